"""What every model that hears is given of a clip that is varied: features of the clip that it is
planned for, with stripes where they are a spectrogram."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysft.config.schema import Data, Model
from raysft.data.encode import make_encoder
from raysft.data.encode.base import Encoder
from raysft.data.example import Audio, Example, Sequence
from raysft.errors import UserError
from tests.support import audio_zoo, seq2seq, whisper

SAMPLES = ("gemma4_unified", "moonshine")  # what these are given of a clip
STACKED = {"granite_speech": 2, "granite_speech_plus": 2, "fun_asr_nano": 7}
KINDS = (*sorted(audio_zoo.TINY), *sorted(seq2seq.TINY), "whisper")
# A stripe of mels and one of frames.
SPEC = {"p": 1.0, "freq_masks": 1, "freq_width": 8, "time_masks": 1, "time_width": 0.9}
SPEED = {"p": 1.0, "factors": [0.8, 1.25]}
EXAMPLE = Example("e", "asr", (Audio("e.wav"),), ("one",), lang="en", text="one")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """model(kind): the section of a config; its folder is written once."""
    made: dict[str, dict[str, Any]] = {}

    def make(kind: str) -> dict[str, Any]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            if kind in audio_zoo.TINY:
                path = audio_zoo.save(kind, folder / "base")
                made[kind] = {"path": str(path), "family": "audio_lm"}
            elif kind == "whisper":
                made[kind] = whisper.model(folder)
            else:
                made[kind] = seq2seq.model(kind, folder)
        return made[kind]

    return make


def encoder_of(model: dict[str, Any], **augment: Any) -> Encoder:
    return make_encoder(Model(**model), Data(augment=augment or None), Path("none"))


def heard(encoder: Encoder, wave: np.ndarray, step: int) -> Sequence:
    rng = np.random.Generator(np.random.Philox(counter=[0, step, 0, 0], key=[0, 0]))
    return encoder.encode(EXAMPLE, [wave], rng, promised=encoder.measure(EXAMPLE, [len(wave)]))


def lines(features: np.ndarray, stacked: int, mels: int) -> np.ndarray:
    """[frames, stacked, mels], of rows too."""
    if features.ndim == 3:
        features = np.concatenate(features.transpose(0, 2, 1))
    return features.reshape(len(features), stacked, mels)


@pytest.mark.parametrize("kind", KINDS)
def test_stripes_hide_mels_and_frames_of_what_the_model_reads(
    kind: str, model: Callable[[str], dict[str, Any]]
) -> None:
    if kind in SAMPLES:
        with pytest.raises(UserError, match=r"data\.augment\.spec: masks a spectrogram, and this"):
            encoder_of(model(kind), spec=SPEC)
        return
    plain, varied = encoder_of(model(kind)), encoder_of(model(kind), spec=SPEC)
    wave = audio_zoo.clip(15000, 0)
    where = varied.spectrogram
    assert where is not None
    before = plain.encode(EXAMPLE, [wave]).arrays
    shape = before[where.name][0].shape
    mels = shape[1] // where.stacked
    assert where.stacked == STACKED.get(kind, 1)
    own = lines(before[where.name][0], where.stacked, mels)
    count = sum(before["frames"][0]) if "frames" in before else len(own) - where.tail
    count = min(count, 94)  # frames of 10 ms
    seen = np.zeros(len(own), bool)
    for step in range(60):
        found = heard(varied, wave, step)
        assert {name: a[0].shape for name, a in found.arrays.items()} == {
            name: a[0].shape for name, a in before.items()
        }
        hidden = lines(found.arrays[where.name][0], where.stacked, mels) != own
        frames, bands = hidden.all(axis=(1, 2)), hidden.all(axis=(0, 1))
        assert (hidden == (frames[:, None, None] | bands)).mean() > 0.999  # but what was the mean
        seen |= frames
    assert seen[:count].mean() > 0.9 and not seen[count:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_at_another_speed_takes_what_it_was_planned_for(
    kind: str, model: Callable[[str], dict[str, Any]]
) -> None:
    plain, varied = encoder_of(model(kind)), encoder_of(model(kind), speed=SPEED)
    long = varied.of_training()
    for samples in (9000, 15000, 24000, 31000):
        wave = audio_zoo.clip(samples, samples)
        planned = long.measure(EXAMPLE, [samples])
        fast = plain.measure(EXAMPLE, [round(samples / 1.25)])
        assert planned >= plain.measure(EXAMPLE, [samples]) >= fast
        lengths = set()
        for step in range(12):
            rng = np.random.Generator(np.random.Philox(counter=[0, step, 0, 0], key=[0, 0]))
            found = varied.encode(EXAMPLE, [wave], rng, promised=planned)
            lengths.add(len(found.input_ids))
        assert lengths == {planned, fast}  # where there is no room to be slower: as it is
        assert long.workload(EXAMPLE, [samples]) >= plain.workload(EXAMPLE, [samples])
