"""Recordings with which clips are varied: listed before a run starts, kept by it, read as they are
needed."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft.config.schema import Config, Data, Model
from raysft.data.clips import effects
from raysft.data.clips.recordings import FILE, Pools, Recording
from raysft.data.example import Audio, Cell, Within
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
    found = pools.listed(config, tmp_path, tmp_path, lambda text: None)
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


def test_recordings_that_were_moved_are_those_that_a_run_began_with(
    corpus: Path, recordings: Path, tmp_path: Path
) -> None:
    run, place = tmp_path / "run", tmp_path / "moved" / "noise"
    reader, found, _ = run_with(corpus, run, noise={"p": 1.0, "path": str(recordings)})
    first = everything(reader)
    place.parent.mkdir()
    recordings.rename(place)
    soundfile.write(place / "0.wav", np.ones(100), RATE)
    again, moved, _ = run_with(corpus, run, noise={"p": 1.0, "path": str(place)})
    assert [Path(one.audio.path).name for one in moved.recordings["noise"]] == [
        Path(one.audio.path).name for one in found.recordings["noise"]
    ]
    assert differences(everything(again), first) == []


def test_a_list_that_was_lost_is_not_made_anew_for_a_run_that_goes_on(
    corpus: Path, recordings: Path, tmp_path: Path
) -> None:
    noise = {"p": 1.0, "path": str(recordings)}
    reader, _, _ = run_with(corpus, tmp_path / "run", noise=noise)
    data = {"train": [{"path": str(corpus)}], "augment": {"noise": noise, "babble": {"p": 0.5}}}
    config = Config.model_validate({"data": data, "model": AUDIO})
    with pytest.raises(UserError, match=r"augment\.json: does not list the .*babble,"):
        pools.require(config, tmp_path / "run")
    assert reader.encoder.augment is not None
    reader.encoder.augment = reader.encoder.augment.with_pools(Pools())
    with pytest.raises(UserError, match=r"data\.augment\.noise: the run's folder has no augment\."):
        everything(reader)


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


def test_recordings_may_lie_in_an_archive(corpus: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "noise.tar", "w") as archive:
        for number in range(3):
            name = corpus.parent / f"clip{number:04d}.wav"
            archive.add(name, f"{number}.wav")
            (tmp_path / "text").write_text("one")
            archive.add(tmp_path / "text", f"{number}.txt")
    noise = {"p": 1.0, "path": str(tmp_path / "noise.tar"), "snr_db": [3, 3]}
    reader, found, _ = run_with(corpus, tmp_path / "run", noise=noise)
    kept = Pools.load(tmp_path / "run")
    assert kept == found
    assert all(one.audio.held is not None for one in found.recordings["noise"])
    files = {"p": 1.0, "path": str(tmp_path / "files"), "snr_db": [3, 3]}
    (tmp_path / "files").mkdir()
    for number in range(3):
        shutil.copy(corpus.parent / f"clip{number:04d}.wav", tmp_path / "files" / f"{number}.wav")
    other, _, _ = run_with(corpus, tmp_path / "other", noise=files)
    assert differences(everything(reader), everything(other)) == []


def test_what_lies_in_parquet_is_kept_by_its_place(tmp_path: Path) -> None:
    places = (Cell("a.parquet", 1, 2, "audio.bytes"), Within("a.tar", 512, 1000), None)
    clips = [Audio("a.wav", start=0.5, stop=1.5, channel=1, held=held) for held in places]
    recordings = tuple(Recording(clip, 16000, 16000, 9) for clip in clips)
    found = Pools({"noise": recordings, "babble": recordings[:1]}, {"noise": "n", "babble": None})
    (tmp_path / FILE).write_bytes(found.to_bytes())
    assert Pools.load(tmp_path) == found


def test_a_path_that_is_not_there_is_said_before_anything_is_begun(tmp_path: Path) -> None:
    (tmp_path / "noises").mkdir()
    data = Data(augment={"noise": {"p": 0.5, "path": str(tmp_path / "noise")}})
    with pytest.raises(UserError) as caught:
        pools.check(Config(data=data, model=Model(**AUDIO)))
    assert str(caught.value).startswith(
        f"data.augment.noise.path: {tmp_path / 'noise'} does not exist"
    )
    pools.check(Config(data=Data(augment={"babble": {"p": 1}, "reverb": {"p": 1}})))


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
