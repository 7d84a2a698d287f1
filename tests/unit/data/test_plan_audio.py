"""Plans with data.audio_per_batch: no micro-batch has more seconds for the encoder."""

from __future__ import annotations

from itertools import takewhile

import numpy as np
import pytest

from raysft.config.schema import Data
from raysft.data.plan.plan import Plan, PlannedStep
from raysft.errors import UserError

TOKENS, CHUNK = 1000, 30.0


def corpus(n: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and seconds: clips of 1 to 30 s, 25 tokens a second, and a third of text alone."""
    draws = np.random.default_rng(0)
    seconds = np.where(draws.random(n) < 1 / 3, 0, draws.uniform(1, 30, n))
    return (25 * seconds + draws.integers(5, 60, n)).astype(np.int32), seconds.astype(np.float32)


def plan(tokens: np.ndarray, heard: np.ndarray | None, **data: object) -> Plan:
    none = np.zeros(len(tokens), np.int16)
    settings = Data(**{"lanes": 4, "tokens_per_batch": TOKENS, "window": 256, **data})
    return Plan(tokens, none, ("asr",), none, (1.0,), "index", settings, 0, heard=heard)


def epoch(of: Plan) -> list[PlannedStep]:
    return list(takewhile(lambda step: step.epoch == 0, of.steps(of.start())))


def lanes(of: Plan) -> list[np.ndarray]:
    return [lane for step in epoch(of) for lane in step.lanes if len(lane)]


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("whole", [False, True], ids=["true lengths", "whole chunks"])
def test_micro_batches_hold_no_more_of_either(mode: str, order: str, whole: bool) -> None:
    tokens, seconds = corpus()
    heard = (np.ceil(seconds / CHUNK) * CHUNK).astype(np.float32) if whole else seconds
    limit = 3 * CHUNK if whole else CHUNK
    found = lanes(plan(tokens, heard, mode=mode, order=order, audio_per_batch=limit))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(tokens)))
    for lane in found:
        size = len(lane) * tokens[lane].max() if mode == "padded" else tokens[lane].sum()
        audio = len(lane) * heard[lane].max() if mode == "padded" else heard[lane].sum()
        assert size <= TOKENS
        assert audio <= limit * (1 + 0.02 * len(lane) / TOKENS)
    free = lanes(plan(tokens, None, mode=mode, order=order))
    assert max(heard[lane].sum() for lane in free) > limit  # else nothing was shown


@pytest.mark.parametrize("fit", [1, 3, 7, 10])
def test_as_many_whole_clips_fit_as_the_seconds_hold(fit: int) -> None:
    tokens = np.full(420, 20, np.int32)
    heard = np.full(420, CHUNK, np.float32)
    found = lanes(plan(tokens, heard, window=420, audio_per_batch=fit * CHUNK))
    assert {len(lane) for lane in found} == {fit}


def test_without_the_key_nothing_is_planned_otherwise() -> None:
    tokens, seconds = corpus()
    told, untold = plan(tokens, seconds), plan(tokens, None)
    assert told.hash == untold.hash
    assert "audio_per_batch" not in told.settings
    assert [lane.tolist() for lane in lanes(told)] == [lane.tolist() for lane in lanes(untold)]


def test_the_hash_tells_of_the_seconds_and_of_their_limit() -> None:
    tokens, seconds = corpus()
    plans = [
        plan(tokens, None),
        plan(tokens, seconds, audio_per_batch=60),
        plan(tokens, seconds, audio_per_batch=61),
        plan(tokens, 2 * seconds, audio_per_batch=60),
    ]
    assert len({one.hash for one in plans}) == len(plans)


def test_padding_and_tokens_are_those_of_the_tokens() -> None:
    tokens, seconds = corpus()
    total = plan(tokens, seconds, mode="padded", audio_per_batch=60).summary()
    assert total.tokens == tokens.sum()
    assert 0 < total.padding < 0.2


def test_an_example_with_too_much_audio_is_never_planned() -> None:
    tokens, seconds = corpus(200)
    of = plan(tokens, seconds, audio_per_batch=20)
    assert of.oversize.tolist() == np.flatnonzero(seconds > 20).tolist()
    with pytest.raises(UserError, match=r"tokens_per_batch=1000 \(or data.audio_per_batch=0.5\)"):
        plan(tokens[seconds > 0], seconds[seconds > 0], audio_per_batch=0.5)
