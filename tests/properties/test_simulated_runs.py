"""A run with kills, resizes and growing data trains on what one undisturbed worker would.

Each example simulates a whole life of a run: starts with any number of workers from the newest
checkpoint (a cursor as JSON), ledgers cut back to it, kills between any two micro-batches. No Ray,
no torch.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysft.config.schema import Data
from raysft.data.plan import pack
from raysft.data.plan.plan import Cursor
from raysft.errors import UserError
from tests.support.simulated import TASKS, Corpus, Ledger, Run, Start

MANY = settings(max_examples=250, deadline=None)
SOME = settings(max_examples=80, deadline=None)


@st.composite
def runs(draw: st.DrawFn, mixed: bool | None = None) -> tuple[Run, list[Start], int]:
    """A run, its starts (all but the last are killed), and its last step."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    budget, n, kinds = draw(st.integers(4, 40)), draw(st.integers(1, 60)), draw(st.integers(1, 3))
    tokens = rng.integers(1, budget + draw(st.integers(1, 4)), n)
    tokens[0] = 1
    task = rng.integers(0, kinds, n)
    mix: dict[str, float] = {}
    if mixed if mixed is not None else draw(st.booleans()):
        tokens, task = np.append(tokens, [1] * kinds), np.append(task, np.arange(kinds))
        mix = {name: draw(st.sampled_from([0.2, 0.5, 1.0])) for name in TASKS[:kinds]}
    sources = draw(st.integers(1, 3))
    corpus = Corpus(
        tokens.astype(np.int32),
        task.astype(np.int16),
        np.sort(rng.integers(0, sources, len(tokens))).astype(np.int16),
        tuple(draw(st.sampled_from([1.0, 1.0, 0.5, 0.3, 2.0, 1.5])) for _ in range(sources)),
        [f"e{i}" for i in range(len(tokens))],
    )
    least = math.ceil(sum(mix.values()) / min(mix.values())) if mix else 1
    data = Data(
        lanes=least + draw(st.integers(0, 4)),
        tokens_per_batch=budget,
        mode=draw(st.sampled_from(["packed", "padded"])),
        order=draw(st.sampled_from(["shuffled", "sequential"])),
        window=draw(st.integers(1, 30)),
        mix=mix,
    )
    last = draw(st.integers(1, 12))
    workers = st.integers(1, data.lanes)
    every = st.integers(1, 6)
    killed = st.integers(0, 6 * data.lanes)
    starts = draw(
        st.lists(st.builds(Start, workers, every, killed, st.booleans()), min_size=1, max_size=4)
    )
    final = Start(draw(workers), draw(every), -1, draw(st.booleans()))
    return Run(data, draw(st.integers(0, 99)), [(0, corpus)]), [*starts, final], last


def live(run: Run, starts: list[Start], last: int) -> None:
    rng = np.random.default_rng(run.seed)
    for number, start in enumerate(starts):
        if start.grows and number:
            run.extend(run.corpora[-1][1].grown(rng, number, run.data.tokens_per_batch))
        run.go(start, last)


def undisturbed(run: Run, last: int) -> Ledger:
    """The ledger of one worker that never stops, given the data as it came."""
    alone = Run(run.data, run.seed, run.corpora)
    alone.go(Start(1, last, -1), last)
    return alone.ledger()


@MANY
@given(runs())
def test_kills_resizes_and_growth_change_nothing_of_what_is_trained(
    life: tuple[Run, list[Start], int],
) -> None:
    run, starts, last = life
    live(run, starts, last)
    assert run.ledger() == undisturbed(run, last)
    report = run.audited()
    assert report.clean, report.findings
    assert report.steps == last
    assert report.examples == sum(len(ids) for _, ids in run.ledger().values())
    done = run.cursor()
    assert done is not None
    trained = Counter(epoch for epoch, _ in run.ledger().values())
    for epoch in range(done.epoch):
        # What total_steps and the learning rate are made of.
        assert run.generations().count_steps(epoch) * run.data.lanes == trained[epoch]


@SOME
@given(runs(), st.integers(0, 3))
def test_an_interrupted_run_audits_clean_at_every_moment(
    life: tuple[Run, list[Start], int], kills: int
) -> None:
    run, starts, last = life
    live(run, starts[: 1 + min(kills, len(starts) - 2)], last)
    report = run.audited()
    assert report.clean, report.findings


@SOME
@given(runs(), st.data())
def test_the_audit_finds_every_single_fault(
    life: tuple[Run, list[Start], int], data: st.DataObject
) -> None:
    run, _, last = life
    run.go(Start(1, last, -1), last)
    lines = list(run.lines)
    at = data.draw(st.integers(0, len(lines) - 1))
    line, ids = lines[at], lines[at]["ids"]
    faults = ["gone", "twice", "epoch", "foreign"]
    faults += ["short", "repeated"] * bool(ids) + ["turned"] * (ids != ids[::-1])
    fault = data.draw(st.sampled_from(faults))
    if fault == "gone":
        lines.pop(at)
    elif fault == "twice":
        lines.insert(at, line)
    else:
        change = {
            "epoch": {"epoch": line["epoch"] + 1},
            "foreign": {"ids": [*ids, "of_nowhere"]},
            "short": {"ids": ids[1:]},
            "repeated": {"ids": [*ids, *ids[:1]]},
            "turned": {"ids": ids[::-1]},
        }[fault]
        lines[at] = {**line, **change}
    report = run.audited(lines)
    assert not report.clean
    assert f"step {line['step']}, lane {line['lane']}" in report.findings[0]
    assert bool(report.lost) == (fault == "short" or (fault == "gone" and bool(ids)))
    assert bool(report.repeated) == (
        fault in ("foreign", "repeated") or (fault == "twice" and bool(ids))
    )


@SOME
@given(runs(mixed=False))
def test_every_epoch_of_a_growing_run_has_the_examples_of_its_data_each_once(
    life: tuple[Run, list[Start], int],
) -> None:
    run, starts, last = life
    run.corpora = [(0, replace(run.corpora[0][1], weights=(1.0,) * 3))]
    live(run, starts, last)
    ledger = run.ledger()
    done = run.cursor()
    assert done is not None
    for epoch in range(done.epoch):
        corpus = run.corpora[run.generations().number(epoch)][1]
        fits = np.flatnonzero(corpus.tokens <= run.data.tokens_per_batch).tolist()
        trained = Counter(name for e, ids in ledger.values() if e == epoch for name in ids)
        assert trained == Counter(corpus.names[row] for row in fits)


@SOME
@given(runs(mixed=True))
def test_with_a_mix_every_example_is_seen_in_every_epoch_from_its_first_on(
    life: tuple[Run, list[Start], int],
) -> None:
    run, starts, last = life
    run.corpora = [(0, replace(run.corpora[0][1], weights=(1.0,) * 3))]
    live(run, starts, last)
    ledger = run.ledger()
    done = run.cursor()
    assert done is not None
    ended = done.epoch
    for number, (first, corpus) in enumerate(run.corpora):
        until = min([ended, *(epoch for epoch, _ in run.corpora[number + 1 :])])
        seen = Counter(name for e, ids in ledger.values() if first <= e < until for name in ids)
        for row in np.flatnonzero(corpus.tokens <= run.data.tokens_per_batch).tolist():
            assert seen[corpus.names[row]] >= until - first


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_killed_at_every_micro_batch_and_resumed_by_any_number_of_workers(
    mode: str, order: str
) -> None:
    """1,024 runs of 8 steps: every kill point, every two numbers of workers."""
    run = small(n=23, lanes=4, window=9, mode=mode, order=order)
    whole = undisturbed(run, 8)
    for first, killed, then, every in itertools.product(
        range(1, 5), range(32), range(1, 5), (1, 3)
    ):
        run.saved, run.lines = None, []
        run.go(Start(first, every, killed, resumes=True), 8)
        run.go(Start(then, 5 - every, -1, resumes=True), 8)
        assert run.ledger() == whole, (first, killed, then, every)


# What went wrong elsewhere, each on the smallest run that shows it.


def small(n: int = 40, lanes: int = 3, tokens: int = 6, window: int = 16, **data: Any) -> Run:
    """Examples of 3 positions: a run of about n / (2 lanes) steps an epoch."""
    corpus = Corpus(
        np.full(n, 3, np.int32),
        np.zeros(n, np.int16),
        np.zeros(n, np.int16),
        (1.0,),
        [f"e{i}" for i in range(n)],
    )
    settings = Data(lanes=lanes, tokens_per_batch=tokens, window=window, **data)
    return Run(settings, 0, [(0, corpus)])


def epochs_of(run: Run) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for (_, _), (epoch, ids) in sorted(run.ledger().items()):
        found.setdefault(epoch, []).extend(ids)
    return found


def test_a_resumed_run_skips_no_epoch() -> None:
    # Elsewhere a run resumed at the end of an epoch counted it twice, and ended with code 0.
    run = small()
    per_epoch = run.generations().count_steps(0)
    for epoch in range(3):
        run.go(Start(2, 1, -1), per_epoch * (epoch + 1))
    names = sorted(run.corpora[0][1].names)
    assert {epoch: sorted(ids) for epoch, ids in epochs_of(run).items()} == {
        0: names,
        1: names,
        2: names,
    }


def test_iterating_before_the_state_is_loaded_does_not_restart_the_data() -> None:
    # Elsewhere an iterator made early kept its place at the start, whatever was loaded later.
    run = small()
    run.go(Start(1, 1, -1), 4)
    cursor = run.cursor()
    assert cursor is not None
    generations = run.generations()
    early = generations.steps(generations.start())
    next(early)
    assert next(generations.steps(cursor)).step == 5
    assert next(early).step == 2


def test_a_cursor_holds_the_place_within_a_packed_window() -> None:
    # Elsewhere the packing ratio was no part of the cursor: what was packed was counted in
    # examples, and a resumed run began at another one.
    run = small(mode="packed")
    run.go(Start(1, 1, -1), 2)
    cursor = run.cursor()
    assert cursor is not None
    assert cursor.streams[0][2] > 0  # in the middle of a window
    run.go(Start(3, 1, -1), 7)
    assert sorted(epochs_of(run)[0]) == sorted(run.corpora[0][1].names)
    # and with another ratio it belongs to another plan
    other = small(mode="packed", tokens=9)
    with pytest.raises(UserError, match="tokens_per_batch"):
        other.generations().steps(cursor)


def test_the_second_and_third_resume_go_on_as_the_first() -> None:
    # Elsewhere the state was right once: resuming a resumed stream began it anew.
    run = small()
    for last in (3, 4, 5, 9, 16):
        run.go(Start(1, 1, -1), last)
    assert run.ledger() == undisturbed(run, 16)


def test_going_on_from_99_percent_of_an_epoch_plans_as_many_windows_as_from_1_percent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = small(n=20_000, lanes=4, tokens=30, window=256)
    generations = run.generations()
    steps = generations.count_steps(0)
    planned: list[int] = []
    fill = pack.packed
    monkeypatch.setattr(pack, "packed", lambda *window: planned.append(1) or fill(*window))
    counts = []
    cursors = [
        step.after for step in itertools.islice(generations.steps(generations.start()), steps)
    ]
    for share in (0.01, 0.99):
        cursor = Cursor.from_json(json.loads(json.dumps(cursors[int(share * steps)].to_json())))
        planned.clear()
        next(run.generations().steps(cursor))
        counts.append(len(planned))
    assert max(counts) - min(counts) <= 2  # a step that crosses into the next window plans it too
    assert 0 < min(counts) <= max(counts) <= 4


def test_a_generation_that_never_began_can_be_replaced_or_dropped_between_two_epochs() -> None:
    run = small()
    first = run.corpora[0][1]
    run.go(Start(1, 1, -1), run.generations().count_steps(0))  # an epoch to its end
    rng = np.random.default_rng(0)
    run.extend(first.grown(rng, 1, 6))
    assert [epoch for epoch, _ in run.corpora] == [0, 1]
    run.extend(first.grown(rng, 2, 6))
    assert [epoch for epoch, _ in run.corpora] == [0, 1]
    newest = run.corpora[1][1]
    total = sum(run.generations().count_steps(epoch) for epoch in range(2))
    run.go(Start(2, 1, -1), total)
    assert sorted(epochs_of(run)[1]) == sorted(
        newest.names[row] for row in np.flatnonzero(newest.tokens <= 6)
    )
    run.extend(first.grown(rng, 3, 6))
    assert [epoch for epoch, _ in run.corpora] == [0, 1, 2]


def test_new_data_waits_for_the_end_of_the_epoch_under_way() -> None:
    run = small()
    first = run.corpora[0][1]
    run.go(Start(1, 1, -1), 2)
    run.extend(first.grown(np.random.default_rng(0), 1, 6))
    run.go(Start(1, 1, -1), run.generations().count_steps(0))
    assert sorted(epochs_of(run)[0]) == sorted(first.names)
