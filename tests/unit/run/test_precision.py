"""A run computes in the precision it began with, where a start names none."""

from __future__ import annotations

from pathlib import Path

from raysft.config import Config
from raysft.config.precision import with_precision
from raysft.config.resume import rule_of
from raysft.run.folder import open_run, read_config, reopen, write_config
from tests.support.worlds import resolved, tiny


def begun(tmp_path: Path, precision: str) -> Path:
    """A run that began in it, as `launch` leaves it."""
    tmp_path.mkdir(exist_ok=True)
    config = tiny(tmp_path)
    folder = open_run(config)
    write_config(with_precision(config, precision), folder)  # type: ignore[arg-type]
    return folder


def test_a_start_that_names_none_goes_on_in_that_of_the_first(tmp_path: Path) -> None:
    assert Config().train.precision == "auto" and rule_of("train.precision").rule == "fixed"
    for precision in ("bf16", "fp32"):
        folder = begun(tmp_path / precision, precision)
        for _ in range(2):
            config = resolved(tiny(tmp_path / precision))
            assert config.train.precision == precision
            assert open_run(config) == folder  # whatever ends this start here
            assert read_config(folder).train.precision == precision
        assert reopen(folder).train.precision == precision
        other = tiny(tmp_path / precision, run__name="other")
        assert resolved(other).train.precision == "auto"
        anew = tiny(tmp_path / precision, checkpoint__resume="weights_only")
        assert resolved(anew).train.precision == "auto"


def test_one_that_is_named_is_held_against_the_run_as_ever(tmp_path: Path) -> None:
    begun(tmp_path, "fp32")
    assert resolved(tiny(tmp_path, train__precision="bf16")).train.precision == "bf16"


def test_a_run_that_ended_before_it_was_known_asks_again(tmp_path: Path) -> None:
    begun(tmp_path, "auto")
    assert resolved(tiny(tmp_path)).train.precision == "auto"
