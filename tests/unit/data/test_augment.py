"""Augmentation in what is read: drawn by (seed, epoch, step, lane, slot), in training alone, within
what was planned; nothing by default."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft.config.schema import Data, Model, Source
from raysft.config.speech_tokens import SpeechTokens
from raysft.data.clips import effects, speech_tokens
from raysft.data.clips.audio import load
from raysft.data.clips.augment import STREAMS, Augmentation
from raysft.data.encode import make_encoder
from raysft.data.example import Audio, Example
from raysft.data.index.build import build_index
from raysft.data.read.reader import Reader, Work
from raysft.errors import UserError
from tests.conftest import tone
from tests.support.augmented import (
    CLIPS,
    MANY,
    RATE,
    clips_of,
    drawn,
    encoder_of,
    everything,
    reader_of,
    varied,
)
from tests.support.batches import differences
from tests.support.models import CAUSAL


@pytest.fixture(scope="module")
def corpus(make_clips: Callable[..., Path]) -> Path:
    return make_clips(CLIPS)


# -- what is drawn -------------------------------------------------------------------------------


def test_nothing_is_varied_by_default_nor_where_there_is_no_chance(corpus: Path) -> None:
    assert Data().augment is None
    plain = everything(reader_of(corpus, None))
    for none in ({}, {kind: {**about, "p": 0.0} for kind, about in MANY.items()}):
        assert differences(everything(reader_of(corpus, none)), plain) == []
    seen = [everything(reader_of(corpus, None), step) for step in (1, 2)]
    assert clips_of(seen[0]) == clips_of(seen[1])


def test_evaluation_is_never_varied(corpus: Path) -> None:
    encoder = encoder_of(corpus, {kind: {**about, "p": 1.0} for kind, about in MANY.items()})
    sources = [Source(path=str(corpus))]
    index = build_index(sources, "eval", encoder, corpus.parent / "index")
    plain = build_index(sources, "eval", encoder_of(corpus, None), corpus.parent / "index")
    assert index.folder == plain.folder  # planned as they are
    found = everything(Reader(index, encoder, 10**6, None))
    assert differences(found, everything(reader_of(corpus, None, seed=None))) == []
    assert clips_of(everything(Reader(index, encoder, 10**6, 0))) != clips_of(found)


def test_the_same_work_gives_the_same_bits_wherever_it_is_read(corpus: Path) -> None:
    reader = reader_of(corpus, MANY)
    other = pickle.loads(pickle.dumps(reader.encoder))  # in another process
    works = [Work(0, step, 1, np.arange(step, step + 4)) for step in range(8)]
    elsewhere = Reader(reader.index, other, reader.budget, 0)
    alone = [batch for work in works for batch in elsewhere.read_chunk([work])]
    backwards = list(reader.read_chunk(works[::-1]))[::-1]
    for one, two in zip(alone, backwards, strict=True):
        assert differences(one, two) == [] and one.tensors == two.tensors


def test_every_step_lane_slot_epoch_and_seed_draws_anew(corpus: Path) -> None:
    augment = {"volume": {"p": 1.0}}
    reader = reader_of(corpus, augment)
    row = np.array([3])
    works = [Work(0, 1, 0, row), Work(0, 2, 0, row), Work(0, 1, 1, row), Work(1, 1, 0, row)]
    found = [clips_of(batch)[0] for batch in reader.read_chunk(works)]
    found += clips_of(next(reader.read_chunk([Work(0, 1, 0, np.array([3, 3]))])))[1:]
    found += clips_of(next(replace(reader, seed=1).read_chunk(works[:1])))
    assert len(set(found)) == len(found) == 6


def test_an_example_that_is_left_out_changes_no_other(corpus: Path) -> None:
    reader = reader_of(corpus, MANY)
    whole, without = everything(reader), everything(reader, skip=frozenset({2, 5}))
    left = [clip for slot, clip in enumerate(clips_of(whole)) if slot not in (2, 5)]
    assert clips_of(without) == left


def test_a_kind_draws_the_same_whatever_others_are_on() -> None:
    every = Augmentation(Data(augment=MANY).augment)
    for kind, settings in MANY.items():
        alone = Augmentation(Data(augment={kind: settings}).augment)
        for step in range(20):
            one, two = (a.draws(kind, drawn(step), 0) for a in (alone, every))
            assert (one is None) == (two is None)
            if one is not None and two is not None:
                assert one.random(4).tolist() == two.random(4).tolist()


def test_kinds_clips_and_the_example_itself_share_no_random_numbers() -> None:
    settings = {kind: {"p": 1.0} for kind in STREAMS if kind not in ("noise", "babble")}
    augment = Augmentation(Data(augment=settings).augment)
    rng = drawn()
    before = rng.bit_generator.state["state"]["counter"].tolist()
    found = [rng.random(8).tolist()]
    for number in range(3):
        for kind in settings:
            draws = augment.draws(kind, rng, number)
            assert draws is not None
            found.append(draws.random(8).tolist())
    numbers = [number for numbers in found for number in numbers]
    assert len(set(numbers)) == len(numbers)
    assert before == drawn().bit_generator.state["state"]["counter"].tolist()
    assert found[0] == drawn().random(8).tolist()  # nothing was taken from it


def test_the_share_of_clips_is_the_chance() -> None:
    augment = Augmentation(Data(augment={"volume": {"p": 0.3}}).augment)
    seen = [augment.draws("volume", drawn(step), 0) is not None for step in range(2000)]
    assert np.mean(seen) == pytest.approx(0.3, abs=0.04)


def test_variants_are_drawn_as_without(corpus: Path) -> None:
    clip = Audio(str(corpus.parent / "clip0001.wav"))
    forms = [Example("a", "asr", (clip,), (text,), text=text) for text in ("one", "two", "three")]
    example = replace(forms[0], variants=tuple(forms[1:]))
    plain, varied = encoder_of(corpus, None), encoder_of(corpus, MANY)
    wave = load(clip, RATE)
    for step in range(20):
        one, two = (encoder.encode(example, [wave], drawn(step)) for encoder in (plain, varied))
        assert [i for i in one.labels if i >= 0] == [i for i in two.labels if i >= 0]


def test_several_clips_of_an_example_draw_for_themselves(corpus: Path) -> None:
    clip = Audio(str(corpus.parent / "clip0001.wav"))
    example = Example("a", "asr", (clip, "and", clip), ("one",), text="one")
    encoder = encoder_of(corpus, {"volume": {"p": 1.0}})
    wave = load(clip, RATE)
    one, two = encoder.encode(example, [wave, wave], drawn()).arrays["features"]
    assert not np.array_equal(one, two)


# -- what is heard -------------------------------------------------------------------------------


def test_a_clip_that_nothing_is_done_to_is_not_touched() -> None:
    loud = 2 * tone(1.0, RATE, 300) / 0.4
    assert varied({"volume": {"p": 0.0}}, loud) is loud
    assert varied({"spec": {"p": 1.0}}, loud) is loud  # of its features


def test_a_clip_that_would_be_too_loud_is_made_quieter() -> None:
    clip = tone(1.0, RATE, 300) / 0.5
    found = varied({"volume": {"p": 1.0, "db": [20, 20]}}, clip)
    assert np.abs(found).max() == pytest.approx(1)
    quiet = varied({"volume": {"p": 1.0, "db": [-20, -20]}}, clip)
    np.testing.assert_allclose(quiet, clip / 10, rtol=1e-5)


def test_ranges_are_kept_to() -> None:
    clip = 0.1 * tone(0.5, RATE, 300)
    found = [
        20 * np.log10(varied({"volume": {"p": 1.0, "db": [-4, 2]}}, clip, step)[10] / clip[10])
        for step in range(200)
    ]
    assert -4 <= min(found) < -3.7 and 1.7 < max(found) <= 2.001


def test_a_part_of_a_file_is_cut_and_then_varied(tmp_path: Path) -> None:
    wave = tone(3.0, RATE, 300)
    soundfile.write(tmp_path / "long.wav", wave, RATE, "FLOAT")
    soundfile.write(tmp_path / "part.wav", wave[8000:24000], RATE, "FLOAT")
    long = Audio(str(tmp_path / "long.wav"), start=0.5, stop=1.5)
    encoder = encoder_of(tmp_path / "train.jsonl", MANY)
    found = []
    for clip in (long, Audio(str(tmp_path / "part.wav"))):
        example = Example("a", "asr", (clip,), ("one",), text="one")
        found.append(encoder.encode(example, [load(clip, RATE)], drawn(5)))
    assert found[0].input_ids.tolist() == found[1].input_ids.tolist()
    assert np.array_equal(found[0].arrays["features"][0], found[1].arrays["features"][0])


def test_spec_masks_what_the_front_end_made(corpus: Path) -> None:
    plain = everything(reader_of(corpus, None))
    masked = everything(reader_of(corpus, {"spec": {"p": 1.0}}))
    assert masked.input_ids.tolist() == plain.input_ids.tolist()
    both = (batch.arrays["features"].of_sequences(CLIPS) for batch in (plain, masked))
    for (before,), (after,) in zip(*both, strict=True):
        hidden = before != after
        frames, mels = hidden.all(axis=1), hidden.all(axis=0)
        assert np.array_equal(hidden, frames[:, None] | mels[None, :])
        assert not frames[-2:].any()  # the tail


def test_answers_stay_clean(tmp_path: Path, make_clips: Callable[..., Path]) -> None:
    """Units to be learnt are those of the clip as it is; those that are read are not."""
    corpus = make_clips(8, tasks=("asr", "tts"))
    units = SpeechTokens(clusters=8, mels=40, fit_clips=4)
    clips = (load(str(path), 16000) for path in sorted(corpus.parent.glob("*.wav")))
    speech_tokens.fit_or_load(units, tmp_path, clips, 0)
    batches = []
    for augment in (None, {"speed": {"p": 1.0, "factors": [0.8]}, "volume": {"p": 1.0}}):
        data = Data(speech_tokens=units, augment=augment)
        encoder = make_encoder(Model(**CAUSAL), data, tmp_path)
        index = build_index([Source(path=str(corpus))], "train", encoder, tmp_path / "index")
        batches.append(everything(Reader(index, encoder, 10**6, 0)))
        lengths, tokens = batches[-1].lengths.tolist(), index.tokens.tolist()
        assert lengths == tokens  # answers are not planned any longer than they are
    plain, varied = (np.split(b.input_ids, np.cumsum(b.lengths)[:-1]) for b in batches)
    for task, one, two in zip(batches[0].tasks, plain, varied, strict=True):
        assert (one.tolist() == two.tolist()) == (task == "tts")


# -- lengths -------------------------------------------------------------------------------------


@pytest.fixture
def long_clips(tmp_path: Path) -> Path:
    """Up to the longest that the model reads (3 s), and down to the shortest."""
    lines = []
    seconds = [3.0, 2.99, 2.8, 2.7, 2.5, 2.41, 2.4, 2.0, 1.0, 0.5, 0.1, 0.08]
    for number, length in enumerate(seconds):
        soundfile.write(tmp_path / f"{number}.wav", tone(length, RATE, 300 + number), RATE)
        lines.append({"task_type": "asr", "wav_path": f"{number}.wav", "text": "word"})
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


SPEED = {"speed": {"p": 1.0, "factors": [0.5, 0.8, 0.9, 1.1, 2.0]}}


def test_no_speed_costs_an_example(long_clips: Path) -> None:
    plain, reader = reader_of(long_clips, None), reader_of(long_clips, SPEED)
    assert plain.index.rejected == reader.index.rejected == []
    slower = reader.index.tokens > plain.index.tokens
    assert slower.tolist() == [False, False, False, *[True] * 9]  # 0.9 of 2.7 s is 3 s
    assert reader.index.seconds.tolist() == plain.index.seconds.tolist()
    seen = []
    for step in range(60):
        batch = everything(reader, step)
        assert batch.quarantined == []
        assert (batch.lengths <= reader.index.tokens).all()
        seen.append(batch.lengths)
    longest = np.max(seen, axis=0)
    assert longest[3:].tolist() == reader.index.tokens[3:].tolist()  # as long as planned, sometimes
    assert (longest[:3] == plain.index.tokens[:3]).all()  # as it is, where there is no room
    assert (np.min(seen, axis=0)[:10] < plain.index.tokens[:10]).all()


def test_no_speed_makes_an_example_too_large_for_a_micro_batch(long_clips: Path) -> None:
    plain = reader_of(long_clips, None)
    budget = int(plain.index.tokens[4])  # longer ones are too large as they are
    reader = reader_of(long_clips, SPEED, tokens_per_batch=budget)
    assert reader.index.tokens[:5].tolist() == plain.index.tokens[:5].tolist()
    assert reader.index.tokens[4:].max() == budget
    free = reader_of(long_clips, SPEED, tokens_per_batch=10 * budget)
    assert free.index.tokens[4:].max() > budget
    assert reader.index.folder != free.index.folder
    rows = [np.array([row]) for row in range(4, len(plain.index))]
    full = replace(reader, budget=budget)
    for step in range(30):
        works = [Work(0, step, lane, row) for lane, row in enumerate(rows)]
        for work, batch in zip(works, full.read_chunk(works), strict=True):
            assert batch.quarantined == []
            assert batch.lengths.sum() <= reader.index.tokens[work.rows].sum()


def test_no_speed_gives_the_encoder_more_than_a_micro_batch_may_have(long_clips: Path) -> None:
    plain = reader_of(long_clips, None)
    reader = reader_of(long_clips, SPEED, audio_per_batch=2.6)
    assert plain.index.heard.tolist()[:3] == reader.index.heard.tolist()[:3]  # too much as they are
    planned = [2.5, 2.41, 2.4, 2.0 / 0.8, 1.0 / 0.5, 0.5 / 0.5, 0.1 / 0.5, 0.08 / 0.5]
    assert reader.index.heard[4:].tolist() == pytest.approx(planned, rel=1e-4)
    for step in range(30):
        batch = everything(reader, step)
        seconds = [len(f[0]) / 100 for f in batch.arrays["features"].of_sequences(len(batch.ids))]
        assert max(seconds[4:]) <= 2.6 + 0.03


def test_with_a_last_position_no_speed_goes_beyond_it(long_clips: Path) -> None:
    encoder = encoder_of(long_clips, SPEED)
    plain = reader_of(long_clips, None)
    most = int(plain.index.tokens.max())
    encoder.limit(most)
    sources = [Source(path=str(long_clips))]
    index = build_index(sources, "train", encoder, long_clips.parent / "index")
    assert len(index) == len(plain.index) and index.tokens.max() <= most
    # Whoever reads it again knows the plan, not the model's last position.
    for again in (encoder, encoder_of(long_clips, SPEED)):
        batches = [everything(Reader(index, again, 10**6, 0), step) for step in range(10)]
        assert all((batch.lengths <= index.tokens).all() for batch in batches)
        told = [batch.tensors for batch in batches]
        assert told == [everything(Reader(index, encoder, 10**6, 0), s).tensors for s in range(10)]


def test_faster_alone_is_planned_as_it_is(corpus: Path) -> None:
    fast = reader_of(corpus, {"speed": {"p": 1.0, "factors": [1.1, 1.2]}})
    assert fast.index.folder == reader_of(corpus, None).index.folder
    assert (everything(fast).lengths < fast.index.tokens).all()
    assert {effects.length_at(16000, factor) for factor in (1.1, 1.2)} == {14545, 13333}


# -- what makes no sense -------------------------------------------------------------------------


def test_a_model_that_is_given_no_clips_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    model = Model(**CAUSAL, speech_units=20)
    with pytest.raises(UserError, match=r"data\.augment: volume: this model is given no clips"):
        make_encoder(model, Data(augment={"volume": {"p": 0.5}}), tmp_path)
