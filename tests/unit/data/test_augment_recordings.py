"""Recordings with which clips are varied: listed before a run starts, kept by it, read as they are
needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft.config.schema import Config, Data, Model
from raysft.data.clips import effects
from raysft.driver import pools
from raysft.errors import UserError
from raysft.run.folder import write_config
from tests.conftest import tone
from tests.support.augmented import (
    CLIPS,
    MANY,
    RATE,
    clips_of,
    encoder_of,
    everything,
    reader_of,
    run_with,
    varied,
)
from tests.support.batches import differences
from tests.support.documents import blocks
from tests.support.models import AUDIO


@pytest.fixture(scope="module")
def corpus(make_clips: Callable[..., Path]) -> Path:
    return make_clips(CLIPS)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Noise, longer and shorter than clips, in several containers and at several rates."""
    folder = tmp_path / "noise"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    kinds = (("a.wav", 16000, 5.0), ("deep/b.flac", 44100, 3.0), ("c.ogg", 8000, 0.2))
    for name, rate, seconds in kinds:
        soundfile.write(folder / name, rng.normal(0, 0.1, int(seconds * rate)), rate)
    (folder / "README").write_text("not audio")
    return folder


def test_noise_is_added_from_a_folder_at_the_ratio_asked_for(
    corpus: Path, recordings: Path, tmp_path: Path
) -> None:
    noise = {"p": 1.0, "path": str(recordings), "snr_db": [5, 15]}
    _, found, said = run_with(corpus, tmp_path / "run", noise=noise)
    names = [Path(one.audio.path).name for one in found.recordings["noise"]]
    assert names == ["a.wav", "c.ogg", "b.flac"]  # by their paths
    assert said == ["data.augment.noise: 3 recordings, 0.1 minutes"]
    clip = 0.3 * tone(1.0, RATE, 300)
    ratios, added = [], []
    for step in range(100):
        mixed = varied({"noise": noise}, clip, step, pools=found)
        added.append((mixed - clip).tobytes())
        ratios.append(10 * np.log10(effects.power(clip) / effects.power(mixed - clip)))
    assert len(set(added)) == len(added)
    assert 5 <= min(ratios) + 0.01 < 5.5 and 14.5 < max(ratios) <= 15.01


def test_noise_is_that_of_its_file_from_any_place(tmp_path: Path) -> None:
    """Silence but for its end: most places of it add nothing, some its end."""
    noise = np.zeros(10 * RATE, np.float32)
    noise[-RATE:] = np.random.default_rng(0).normal(0, 0.1, RATE)
    (tmp_path / "noise").mkdir()
    soundfile.write(tmp_path / "noise" / "a.flac", noise, RATE)
    settings = {"p": 1.0, "path": str(tmp_path / "noise")}
    data = Data(augment={"noise": settings})
    config = Config(data=data, model=Model(**AUDIO))
    found = pools.listed(config, tmp_path, lambda text: None)
    clip = 0.3 * tone(1.0, RATE, 300)
    touched = [
        varied({"noise": settings}, clip, step, pools=found) is not clip for step in range(200)
    ]
    assert np.mean(touched) == pytest.approx(1 / 9, abs=0.06)  # of starts from 0 to 9 s


def test_babble_is_made_of_the_training_data(corpus: Path, tmp_path: Path) -> None:
    reader, found, _ = run_with(corpus, tmp_path / "run", babble={"p": 1.0, "snr_db": [10, 10]})
    assert len(found.recordings["babble"]) == CLIPS
    plain = everything(reader_of(corpus, None))
    first = everything(reader)
    assert clips_of(first) != clips_of(plain)
    again, kept, _ = run_with(corpus, tmp_path / "run", babble={"p": 1.0, "snr_db": [10, 10]})
    assert kept == found and differences(everything(again), first) == []


def test_a_run_keeps_the_recordings_that_it_began_with(
    corpus: Path, recordings: Path, tmp_path: Path
) -> None:
    noise = {"p": 1.0, "path": str(recordings)}
    reader, found, _ = run_with(corpus, tmp_path / "run", noise=noise)
    first = everything(reader)
    soundfile.write(recordings / "0.wav", np.ones(100), RATE)
    again, kept, _ = run_with(corpus, tmp_path / "run", noise=noise)
    assert kept == found and differences(everything(again), first) == []
    (recordings / "c.ogg").unlink()
    with pytest.raises(UserError, match=r"data\.augment\.noise\.path: .*c\.ogg is gone: a run"):
        run_with(corpus, tmp_path / "run", noise=noise)
    other, _, _ = run_with(corpus, tmp_path / "other", noise=noise)
    assert differences(everything(other), first) != []


def test_rooms_are_recordings_too(corpus: Path, tmp_path: Path) -> None:
    """Of several channels the first is taken."""
    (tmp_path / "rooms").mkdir()
    room = np.zeros((1000, 2), np.float32)
    room[40, 0], room[:, 1] = 0.5, 0.1
    soundfile.write(tmp_path / "rooms" / "a.wav", room, RATE, "FLOAT")
    reverb = {"p": 1.0, "path": str(tmp_path / "rooms")}
    _, found, _ = run_with(corpus, tmp_path / "run", reverb=reverb)
    clip = 0.5 * tone(1.0, RATE, 300)
    np.testing.assert_allclose(varied({"reverb": reverb}, clip, pools=found), clip, atol=1e-5)


def test_recordings_may_be_what_data_train_takes(corpus: Path, tmp_path: Path) -> None:
    noise = {"p": 1.0, "path": str(corpus)}
    _, found, _ = run_with(corpus, tmp_path / "run", noise=noise)
    assert len(found.recordings["noise"]) == CLIPS


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda place: None, r"data\.augment\.noise\.path: .* does not exist"),
        (lambda place: place.mkdir(), r"data\.augment\.noise: .*"),
        (
            lambda place: (place.mkdir(), (place / "a.wav").write_bytes(b"RIFF, but no audio")),
            r"data\.augment\.noise\.path: 1 of 1 recordings cannot be used; the first: .*a\.wav",
        ),
    ],
)
def test_recordings_that_cannot_be_read_are_named_before_the_start(
    make: Callable[[Path], object], words: str, corpus: Path, tmp_path: Path
) -> None:
    make(tmp_path / "noise")
    with pytest.raises(UserError, match=words) as caught:
        run_with(corpus, tmp_path / "run", noise={"p": 1.0, "path": str(tmp_path / "noise")})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_recording_that_goes_while_it_trains_ends_the_run_readably(
    damage: str, corpus: Path, recordings: Path, tmp_path: Path
) -> None:
    """It is no example: none is left out for it."""
    reader, _, _ = run_with(corpus, tmp_path / "run", noise={"p": 1.0, "path": str(recordings)})
    for file in [path for path in recordings.rglob("*") if path.is_file()]:
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(b"no audio any more")
    with pytest.raises(UserError, match=r"^data\.augment\.noise\.path: .*noise/") as caught:
        everything(reader)
    assert "\n" not in str(caught.value) and "put an empty file" not in str(caught.value)


def test_a_list_that_is_damaged_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "augment.json").write_text('{"noise": 1}')
    with pytest.raises(UserError, match=r"augment\.json: cannot be read"):
        encoder_of(tmp_path / "train.jsonl", MANY)


def test_what_a_run_does_to_a_clip_can_be_heard(
    recordings: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snippet of the page."""
    noise = {"p": 1.0, "path": str(recordings)}
    data = {"train": [{"path": str(corpus)}], "augment": {"noise": noise}}
    config = Config.model_validate({"data": data, "model": AUDIO})
    run = tmp_path / "runs" / "my_asr"
    run.mkdir(parents=True)
    run_with(corpus, run, noise=noise)
    write_config(config, run, "0" * 32)
    clip = tone(1.0, RATE, 300)
    soundfile.write(tmp_path / "clip.wav", clip, RATE)
    (block,) = blocks("docs/audio.md", "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {})
    found = [soundfile.read(tmp_path / f"heard_{seed}.wav")[0] for seed in range(5)]
    assert len({wave.tobytes() for wave in found}) == 5
    assert all(np.corrcoef(wave, clip)[0, 1] > 0.8 for wave in found)
