"""Reading works: budgets are kept, an unusable example costs its own slot only."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft.config.schema import Data, Model, Source
from raysft.config.speech_tokens import SpeechTokens
from raysft.data.clips import speech_tokens
from raysft.data.clips.audio import load
from raysft.data.encode import make_encoder
from raysft.data.example import MicroBatch
from raysft.data.index.build import build_index
from raysft.data.plan.plan import Plan
from raysft.data.read.reader import LOOKED_AT, READS, Reader, Storage, Work, chunks
from tests.conftest import tone
from tests.support.batches import differences
from tests.support.models import AUDIO, CAUSAL

CLIPS = 12


@pytest.fixture
def corpus(make_clips: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of its own for each test, to damage; returns the manifest."""
    shutil.copytree(make_clips(CLIPS).parent, tmp_path / "data")
    return tmp_path / "data" / "train.jsonl"


def make_reader(corpus: Path, seed: int | None = 0, noise: float | None = None) -> Reader:
    """Of raw audio; with `noise`, of speech units of which that share is replaced at random."""
    data, model = Data(), Model(**AUDIO)
    if noise is not None:
        units = SpeechTokens(clusters=8, mels=40, fit_clips=4)
        clips = (load(str(path), 16000) for path in sorted(corpus.parent.glob("*.wav")))
        speech_tokens.fit_or_load(units, corpus.parent, clips, 0)
        data, model = Data(speech_tokens=units, unit_noise=noise), Model(**CAUSAL)
    encoder = make_encoder(model, data, corpus.parent)
    index = build_index([Source(path=str(corpus))], "train", encoder, corpus.parent / "index")
    return Reader(index, encoder, int(index.tokens.sum()), seed)


def everything(reader: Reader, step: int = 1) -> MicroBatch:
    """All examples as one micro-batch."""
    return next(reader.read_chunk([Work(0, step, 0, np.arange(CLIPS))]))


def sequences(batch: MicroBatch) -> dict[str, tuple[bytes, bytes]]:
    """Ids and labels by example."""
    cuts = np.cumsum(batch.lengths)[:-1]
    parts = zip(np.split(batch.input_ids, cuts), np.split(batch.labels, cuts))
    return dict(zip(batch.ids, ((ids.tobytes(), labels.tobytes()) for ids, labels in parts)))


def test_works_come_in_their_order_with_their_examples_in_theirs(corpus: Path) -> None:
    reader = make_reader(corpus)
    order = [np.array([7, 2]), np.array([11]), np.zeros(0, np.int64), np.array([0, 1, 9, 3])]
    works = [Work(0, step, step % 3, rows) for step, rows in enumerate(order)]
    found = list(reader.read(iter(works)))
    assert [(b.epoch, b.step, b.lane) for b in found] == [(0, w.step, w.lane) for w in works]
    assert [b.ids for b in found] == [reader.index.ids(rows) for rows in order]
    assert [b.slots for b in found] == [list(range(len(rows))) for rows in order]


def test_micro_batches_take_what_was_planned_within_the_budget(corpus: Path) -> None:
    reader = make_reader(corpus)
    data = Data(lanes=2, tokens_per_batch=400)
    plan = Plan.of(reader.index, data, 0)
    reader = replace(reader, budget=400)
    steps = [step for step, _ in zip(plan.steps(plan.start()), range(12))]
    works = [Work(s.epoch, s.step, i, rows) for s in steps for i, rows in enumerate(s.lanes)]
    for work, batch in zip(works, reader.read(iter(works)), strict=True):
        assert batch.lengths.tolist() == reader.index.tokens[work.rows].tolist()
        assert batch.lengths.sum() <= 400
        assert batch.quarantined == []


def test_a_clip_that_grew_is_quarantined_where_the_budget_has_no_room_for_it(corpus: Path) -> None:
    reader = make_reader(corpus)
    before = everything(reader)
    path = corpus.parent / "clip0003.wav"
    wave = soundfile.read(path, dtype="float32")[0]
    audio_tokens = len(wave) / 640
    grown = 0.8 / audio_tokens  # hardly one more audio token: within the 2% that are tolerated
    soundfile.write(path, np.pad(wave, (0, int(len(wave) * 2 * grown))), 16000)
    roomy = everything(replace(reader, budget=reader.budget + 10))
    assert roomy.quarantined == []
    assert int(roomy.lengths.sum()) > reader.budget
    full = everything(reader)
    assert [q.id for q in full.quarantined] == [before.ids[3]]
    assert "no longer fits its micro-batch" in full.quarantined[0].reason
    assert full.lengths.sum() <= reader.budget


def test_a_clip_that_became_much_longer_is_not_even_decoded(corpus: Path) -> None:
    reader = make_reader(corpus)
    path = corpus.parent / "clip0003.wav"
    soundfile.write(path, tone(60.0, 16000, 300), 16000)
    batch = everything(reader)
    assert [q.path for q in batch.quarantined] == [str(path)]
    assert "longer than indexed: 60.00 s, expected at most" in batch.quarantined[0].reason


@pytest.mark.parametrize("noise", [None, 0.5])
def test_a_quarantined_example_leaves_its_slot_empty_and_changes_nothing_else(
    corpus: Path, noise: float | None
) -> None:
    reader = make_reader(corpus, noise=noise)
    whole = everything(reader)
    clip = corpus.parent / "clip0004.wav"
    clip.write_bytes(b"RIFF, but not audio any more")
    (corpus.parent / "clip0007.wav").write_bytes(b"")
    damaged = everything(reader)
    assert damaged.slots == [slot for slot in range(CLIPS) if slot not in (4, 7)]
    assert [q.id for q in damaged.quarantined] == [whole.ids[4], whole.ids[7]]
    assert [q.source for q in damaged.quarantined] == ["train", "train"]
    assert damaged.quarantined[0].path == str(clip)
    assert "empty file" in damaged.quarantined[1].reason
    left = sequences(whole)
    del left[whole.ids[4]], left[whole.ids[7]]
    assert sequences(damaged) == left


def test_all_examples_quarantined_give_an_empty_micro_batch(corpus: Path) -> None:
    reader = make_reader(corpus)
    for path in corpus.parent.glob("*.wav"):
        path.write_bytes(b"")
    batch = everything(reader)
    assert len(batch.quarantined) == CLIPS
    assert (batch.ids, batch.slots, len(batch.lengths), batch.arrays) == ([], [], 0, {})


@pytest.mark.parametrize("noise", [None, 0.5])
def test_the_same_work_gives_the_same_bits_in_whatever_company_it_is_read(
    corpus: Path, noise: float | None
) -> None:
    reader = make_reader(corpus, noise=noise)
    works = [Work(0, step, 1, np.arange(step, step + 4)) for step in range(8)]
    alone = [batch for work in works for batch in reader.read_chunk([work])]
    together = list(reader.read_chunk(works))
    backwards = list(reader.read_chunk(works[::-1]))[::-1]
    assert not any(map(differences, alone, together))
    assert not any(map(differences, alone, backwards))


def test_augmentation_depends_on_seed_and_step_and_is_off_in_evaluation(corpus: Path) -> None:
    reader = make_reader(corpus, noise=0.5)
    drawn = everything(reader, step=1)
    assert differences(drawn, replace(everything(reader, step=2), step=1))
    assert differences(drawn, everything(replace(reader, seed=1)))
    evaluated = replace(reader, seed=None)
    assert (
        differences(everything(evaluated, step=1), replace(everything(evaluated, step=2), step=1))
        == []
    )


def test_chunks_keep_the_order_and_weigh_examples_and_long_audio() -> None:
    seconds = np.array([1.0] * 10 + [30.0] * 10)
    works = [Work(0, i, 0, np.array([i])) for i in range(20)]
    found = list(chunks(iter(works), seconds, size_of(4, 30)))
    assert [w.step for chunk in found for w in chunk] == list(range(20))
    # 4 short clips; then 6 short ones weigh 6, and 2 of 30 s weigh 15 each.
    assert [len(chunk) for chunk in found] == [4, 8, 2, 2, 2, 2]


def size_of(first: int, later: int):
    yield first
    while True:
        yield later


def test_storage_that_lets_one_wait_is_asked_for_several_clips_at_once(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [Work(0, step, 0, np.arange(CLIPS)) for step in range(8)]
    reader, other = make_reader(corpus), make_reader(corpus)
    soundfile.write(corpus.parent / "clip0005.wav", tone(60.0, 16000, 300), 16000)
    expected = list(other.read_chunk(works))
    assert all(batch.quarantined for batch in expected)
    pause, at_once, most = 0.05, 0, 0
    lock, real = threading.Lock(), os.open

    def late(path: str, *args: int) -> int:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(pause)
        with lock:
            at_once -= 1
        return real(path, *args)

    monkeypatch.setattr("raysft.data.clips.file.os.open", late)
    assert_same(list(reader.read_chunk(works[:4])), expected[:4])
    assert most == 1
    assert_same(list(reader.read_chunk(works[4:])), expected[4:])
    assert 8 <= most <= READS
    # What is left of a chunk that nobody wants any more is not read.
    chunk = reader.read_chunk(works)
    assert differences(next(chunk), expected[0]) == []
    chunk.close()
    time.sleep(3 * pause)
    most = 0
    time.sleep(3 * pause)
    assert most == 0


@pytest.mark.parametrize(
    ("seconds", "cpu", "slow"),
    [(0.002, 0.002, False), (0.004, 0.001, False), (0.03, 0.028, False), (0.02, 0.002, True)],
)
def test_storage_is_slow_where_most_of_a_long_read_is_waiting(
    seconds: float, cpu: float, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = {"perf_counter": 0.0, "process_time": 0.0}
    for name in clocks:
        monkeypatch.setattr(f"raysft.data.read.reader.time.{name}", lambda name=name: clocks[name])

    def read() -> list[np.ndarray]:
        clocks["perf_counter"] += seconds
        clocks["process_time"] += cpu
        return []

    storage = Storage()
    for _ in range(LOOKED_AT - 1):
        storage.timed(read)
    assert not storage.slow  # a few clips tell nothing
    storage.timed(read)
    assert storage.slow is slow


def assert_same(found: list[MicroBatch], expected: list[MicroBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert differences(one, other) == []


def test_a_stereo_clip_at_another_rate_is_read_as_it_was_planned(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", tone(0.7, 22050, 300, channels=2), 22050)
    manifest = tmp_path / "train.jsonl"
    manifest.write_text('{"task_type": "asr", "wav_path": "a.flac", "text": "one"}\n')
    reader = make_reader(manifest)
    batch = next(reader.read_chunk([Work(0, 1, 0, np.array([0]))]))
    assert batch.lengths.tolist() == reader.index.tokens.tolist()
    assert batch.seconds == pytest.approx(0.7, abs=1e-3)


def test_a_clip_that_became_shorter_is_named_and_not_trained_on_with_its_whole_text(
    corpus: Path,
) -> None:
    reader = make_reader(corpus)
    path = corpus.parent / "clip0003.wav"
    wave = soundfile.read(path, dtype="float32")[0]
    soundfile.write(path, wave[: len(wave) // 2], 16000)
    batch = everything(reader)
    assert [q.path for q in batch.quarantined] == [str(path)]
    assert "shorter than indexed" in batch.quarantined[0].reason
    soundfile.write(path, wave[: int(len(wave) * 0.96)], 16000)
    assert everything(reader).quarantined == []
