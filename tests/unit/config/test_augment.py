"""data.augment: what makes no sense is refused in a line, before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from raysft.config.augment import Augment
from raysft.config.combinations import contradictions
from raysft.config.load import validate
from raysft.config.resume import rules
from raysft.config.schema import Config
from raysft.errors import UserError
from tests.support.models import CAUSAL

UNITS = {**CAUSAL, "speech_units": 20}


def refused(**augment: Any) -> str:
    tree = {"data": {"train": [{"path": "a.jsonl"}], "augment": augment}, "model": {"path": "a/b"}}
    with pytest.raises(UserError) as caught:
        validate(tree, "run.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        ({"sped": {"p": 0.5}}, "data.augment.sped: unknown key; did you mean data.augment.speed?"),
        ({"speed": {}}, "data.augment.speed.p: missing"),
        ({"speed": 0.5}, "data.augment.speed: expected keys below it, found 0.5; there are p, "),
        (
            {"volume": {"p": 1.5}},
            "data.augment.volume.p: expected a number of at least 0 and at most 1, found 1.5",
        ),
        ({"noise": {"p": 0.5}}, "data.augment.noise.path: missing"),
        (
            {"speed": {"p": 0.5, "factors": []}},
            "data.augment.speed.factors: expected a list of at least 1 numbers",
        ),
        (
            {"speed": {"p": 0.5, "factors": [1.0, 3.0]}},
            "data.augment.speed.factors: expected factors from 0.5 (slow) to 2 (fast), found "
            "[1.0, 3.0]",
        ),
        (
            {"speed": {"p": 0.5, "factors": [0.9, 0.9]}},
            "data.augment.speed.factors: expected factors that differ",
        ),
        (
            {"volume": {"p": 0.5, "db": [6, -6]}},
            "data.augment.volume.db: expected [least, most] with least no larger than most, found "
            "[6",
        ),
        ({"volume": {"p": 0.5, "db": [6]}}, "data.augment.volume.db: expected a list of 2 numbers"),
        (
            {"babble": {"p": 0.5, "speakers": [0, 3]}},
            "data.augment.babble.speakers: expected [least, most] of at least 1 voice",
        ),
        (
            {"reverb": {"p": 0.5, "rt60": [0, 1]}},
            "data.augment.reverb.rt60: expected seconds above 0",
        ),
        (
            {"codec": {"p": 0.5, "kinds": ["mp4"]}},
            "data.augment.codec.kinds.0: expected 'mulaw', 'gsm', 'mp3', 'opus' or 'vorbis', found "
            "'mp4'",
        ),
        (
            {"codec": {"p": 0.5, "kinds": []}},
            "data.augment.codec.kinds: expected a list of at least 1",
        ),
        (
            {"codec": {"p": 0.5, "compression": [0.5, 1.0]}},
            "data.augment.codec.compression: expected numbers from 0 to below 1",
        ),
        (
            {"band": {"p": 0.5, "high_hz": [0, 4000]}},
            "data.augment.band.high_hz: expected frequencies above 0 Hz",
        ),
        (
            {"spec": {"p": 0.5, "time_width": 2}},
            "data.augment.spec.time_width: expected a number of at most 1 and greater than 0, "
            "found 2",
        ),
    ],
)
def test_a_value_that_makes_no_sense_is_said_in_a_line(augment: dict[str, Any], words: str) -> None:
    found = refused(**augment)
    assert words in found and "\n" not in found


def contradicted(model: dict[str, Any], augment: dict[str, Any], **data: Any) -> list[str]:
    tree = {"train": [{"path": "a.jsonl"}], "augment": augment, **data}
    return [
        one.text for one in contradictions(Config.model_validate({"data": tree, "model": model}))
    ]


def test_a_model_of_units_alone_has_no_clips_to_vary() -> None:
    (found,) = contradicted(UNITS, {"volume": {"p": 0.5}, "spec": {"p": 0.5}})
    assert found.startswith("data.augment: volume, spec: causal_lm is given no clips to vary; set ")
    assert contradicted(CAUSAL, {"volume": {"p": 0.5}}, speech_tokens={"clusters": 8}) == []
    assert contradicted(UNITS, {}) == []


def test_units_are_no_spectrogram() -> None:
    given = {"volume": {"p": 0.5}, "spec": {"p": 0.5}}
    (found,) = contradicted(CAUSAL, given, speech_tokens={"clusters": 8})
    assert (
        found == "data.augment.spec: masks a spectrogram, and causal_lm reads units; leave it out"
    )


def test_a_band_lets_something_through() -> None:
    band = {"p": 0.5, "low_hz": [300, 3500]}
    (found,) = contradicted({"path": "a/b"}, {"band": band})
    assert found == (
        "data.augment.band.low_hz: up to 3500 Hz, but high_hz begins at 3400: nothing would pass; "
        "keep them apart"
    )


def test_a_run_keeps_what_its_clips_are_varied_by() -> None:
    keys = [key for key in rules() if key.startswith("data.augment")]
    assert len(keys) > 25 and {rules()[key].rule for key in keys} == {"fixed"}


def test_kinds_are_done_in_the_order_in_which_sound_meets_them() -> None:
    given = {name: {"p": 0.5} for name in ("volume", "spec", "band", "speed", "reverb")}
    found = Augment.model_validate(given).given
    assert found == ["speed", "reverb", "band", "volume", "spec"]
