"""A run computes with the number of threads it began with, and says what another one means."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from raysft.config import Config
from raysft.run.folder import open_run, read_config, reopen, run_folder, write_config
from raysft.run.threads import tight, with_threads
from tests.support.worlds import resolved, tiny


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that began on 3 threads, as `launch` leaves it."""
    config = tiny(tmp_path)
    folder = open_run(config)
    write_config(with_threads(config, 3), folder)
    return folder


def again(begun: Path, **changes: Any) -> Config:
    return tiny(begun.parents[1], **changes)


def test_a_start_that_names_no_threads_has_those_of_the_first(begun: Path) -> None:
    for _ in range(2):
        config = resolved(again(begun))
        assert config.parallel.threads == 3
        assert open_run(config) == begun  # whatever ends this start here
        assert read_config(begun).parallel.threads == 3
    assert reopen(begun).parallel.threads == 3
    assert resolved(again(begun, run__name="other")).parallel.threads is None


def test_with_another_number_of_workers_threads_are_counted_anew(begun: Path) -> None:
    assert resolved(again(begun, parallel__workers=2)).parallel.threads is None
    assert resolved(again(begun, parallel__workers=[1, 2])).parallel.threads is None
    assert resolved(again(begun, parallel__workers=1)).parallel.threads == 3


def test_another_number_that_is_given_is_used_and_said(
    begun: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        open_run(again(begun, parallel__threads=3))
        open_run(again(begun, parallel__threads=8, parallel__workers=2))
        assert not caplog.messages
        write_config(with_threads(again(begun), 3), begun)
        open_run(again(begun, parallel__threads=2))
    (said,) = caplog.messages
    assert said.startswith("parallel.threads: 2, and the run has computed with 3 so far: on CPUs")
    assert read_config(run_folder(again(begun))).parallel.threads == 2


def test_a_run_that_begins_anew_counts_its_threads_anew(begun: Path) -> None:
    assert resolved(again(begun, checkpoint__resume="weights_only")).parallel.threads is None


def test_more_threads_than_cores_are_said_to_be_slower_and_the_same() -> None:
    assert tight(2, 2) is None and tight(1, 4) is None
    said = tight(4, 1)
    assert said is not None and "there is room for 1 now: the same bits, but slower" in said
