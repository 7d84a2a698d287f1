"""DPO's formulas against references written here, number by number."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch

from raysft.data.example import MicroBatch, Sequence
from raysft.data.pairs import joined
from raysft.losses.dpo import LENGTH, PAIR, REFERENCE, SIDE, WEIGHT, Preference
from raysft.models import SpeechModel
from raysft.models.layout import CONTEXT
from raysft.models.pairs import both
from tests.support.model_zoo import gradients, make, worst

ANSWERS = [(3, 5), (1, 4), (7, 2)]  # tokens of the chosen and of the rejected one of each pair
SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.7},
    {"smoothing": 0.2, "beta": 0.4},
    {"loss": "ipo", "beta": 0.3},
    {"sft": 0.5},
    {"loss": "ipo", "sft": 2.0},
]


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def reference(
    own: list[list[list[float]]], base: list[list[list[float]]], settings: dict[str, Any]
) -> float:
    """The mean loss of pairs as papers write it. own, base: of each pair and answer the
    log-probabilities of its tokens."""
    beta, smoothing = settings.get("beta", 0.1), settings.get("smoothing", 0.0)
    losses = []
    for ours, theirs in zip(own, base, strict=True):
        total = statistics.fmean if settings.get("loss") == "ipo" else sum
        chosen, rejected = (total(tokens) for tokens in ours)
        ref_chosen, ref_rejected = (total(tokens) for tokens in theirs)
        ahead = (chosen - rejected) - (ref_chosen - ref_rejected)
        if settings.get("loss") == "ipo":
            loss = (ahead - 1 / (2 * beta)) ** 2
        else:
            right, wrong = log_sigmoid(beta * ahead), log_sigmoid(-beta * ahead)
            loss = -(1 - smoothing) * right - smoothing * wrong
        losses.append(loss + settings.get("sft", 0.0) * -statistics.fmean(ours[0]))
    return statistics.fmean(losses)


def numbers(seed: int) -> list[list[list[float]]]:
    rng = np.random.default_rng(seed)
    return [[(-4 * rng.random(size)).tolist() for size in sizes] for sizes in ANSWERS]


def laid_out(
    own: list[list[list[float]]], base: list[list[list[float]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [1, M] and context [M, 5], tokens of pairs mixed up with two rows of fillers."""
    losses, rows = [], []
    for number, (ours, theirs) in enumerate(zip(own, base, strict=True)):
        for side, tokens, refs in zip((1.0, -1.0), ours, theirs, strict=True):
            for logp, ref in zip(tokens, refs, strict=True):
                row = [0.0] * Preference.columns
                row[PAIR], row[SIDE], row[LENGTH] = number, side, len(tokens)
                row[WEIGHT], row[REFERENCE] = 1.0, ref
                rows.append(row)
                losses.append(-logp)
    rows += [[0.0] * Preference.columns] * 2
    losses += [3.0, 4.0]
    order = np.random.default_rng(3).permutation(len(rows))
    context = torch.tensor(rows, dtype=torch.float64)[order]
    return torch.tensor(losses, dtype=torch.float64)[order].unsqueeze(0), context


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_is_that_of_the_formulas(settings: dict[str, Any]) -> None:
    own, base = numbers(0), numbers(1)
    losses, context = laid_out(own, base)
    learns, wanted = Preference(**settings), reference(own, base, settings)
    assert float(learns.total(losses, context)) / 3 == pytest.approx(wanted, abs=1e-6)
    chosen = torch.ones(1, losses.shape[1], dtype=torch.float64)
    first, *_ = learns.terms(losses, losses.sum(), context, chosen, ["chat"], True)
    assert float(first.sum) / float(first.count) == pytest.approx(wanted, abs=1e-6)
    # A pair that weighs twice as much counts as two of it.
    twice = learns.weighted(context, torch.where(context[:, PAIR] == 1, 2.0, 1.0))
    more = reference([*own, own[1]], [*base, base[1]], settings)
    assert float(learns.total(losses, twice)) / 4 == pytest.approx(more, abs=1e-6)


def test_what_is_watched_of_pairs_in_training_and_in_evaluation() -> None:
    own, base = numbers(0), numbers(1)
    losses, context = laid_out(own, base)
    learns = Preference(beta=0.5)
    tasks = torch.stack([context[:, PAIR] == 1, context[:, PAIR] != 1]).double()
    tasks *= context[:, SIDE].abs()
    terms = learns.terms(losses, learns.total(losses, context), context, tasks, ["a", "b"], True)
    first, *others = terms
    assert first.trained is not None and (first.counted, float(first.count)) == ("pairs", 3)
    assert float(first.sum) / 3 == pytest.approx(reference(own, base, {"beta": 0.5}), abs=1e-6)
    alone = reference(own[1:2], base[1:2], {"beta": 0.5})
    assert [float(value) for value in first.by_task["a"]] == pytest.approx([alone, 1], abs=1e-6)
    sums = [[sum(tokens) for tokens in pair] for pair in own]
    refs = [[sum(tokens) for tokens in pair] for pair in base]
    rewards = [
        [0.5 * (x - y) for x, y in zip(pair, ref, strict=True)]
        for pair, ref in zip(sums, refs, strict=True)
    ]
    assert {term.name: float(term.sum) / float(term.count) for term in others} == pytest.approx(
        {
            "reward_accuracy": statistics.fmean(chosen > other for chosen, other in rewards),
            "reward_margin": statistics.fmean(chosen - other for chosen, other in rewards),
            "reward_chosen": statistics.fmean(chosen for chosen, _ in rewards),
            "reward_rejected": statistics.fmean(other for _, other in rewards),
            "logp_chosen": statistics.fmean(chosen for chosen, _ in sums),
            "logp_rejected": statistics.fmean(other for _, other in sums),
        },
        abs=1e-6,
    )
    assert all(term.aside for term in others)

    # In evaluation one pair lacks its rejected answer: it counts in the cross-entropy alone.
    kept = ~((context[:, PAIR] == 2) & (context[:, SIDE] == -1))
    losses, context, tasks = losses[:, kept], context[kept], tasks[:, kept]
    said, *asked = learns.terms(losses, losses.sum(), context, tasks, ["a", "b"], False)
    chosen = [-logp for pair in own for logp in pair[0]]
    assert said.name == "cross_entropy"
    assert float(said.sum) / float(said.count) == pytest.approx(statistics.fmean(chosen))
    assert {term.name: float(term.sum) / float(term.count) for term in asked} == pytest.approx(
        {
            "preferred": statistics.fmean(chosen > other for chosen, other in sums[:2]),
            "preferred_margin": statistics.fmean(chosen - other for chosen, other in sums[:2]),
        }
    )


def batch(seed: int = 1) -> MicroBatch:
    """Pairs of random tokens."""
    rng = np.random.default_rng(seed)

    def answer(number: int, prompt: np.ndarray, size: int) -> Sequence:
        ids = np.concatenate([prompt, rng.integers(0, 256, size)]).astype(np.int32)
        labels = np.where(np.arange(len(ids)) < len(prompt), -100, ids).astype(np.int32)
        return Sequence(f"p{number}", "chat", ids, labels)

    found = []
    for number, sizes in enumerate(ANSWERS):
        prompt = rng.integers(0, 256, 3 + number)
        found.append(joined(*(answer(number, prompt, size) for size in sizes)))
    return MicroBatch.join(0, 1, 0, found)


def learnt(model: SpeechModel, rows: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of pairs, `rows` of tokens through the head at a time."""
    pairs = both(batch())
    assert [len(ids) for ids in np.split(pairs.input_ids, np.cumsum(pairs.lengths)[:-1])] == [
        3 + number + size for number, sizes in enumerate(ANSWERS) for size in sizes
    ]
    model.supervised.learns = Preference(beta=0.3, sft=0.5)
    model.supervised.rows = rows
    laid = model.collate(pairs)
    laid[CONTEXT].view(torch.float32)[:, REFERENCE] = -5.0
    first, *_ = model.supervised(laid)
    first.trained.backward()
    return float(first.sum), gradients(model)


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_chunks_of_the_head_give_the_loss_and_gradient_of_all_logits(mode: str) -> None:
    whole, wanted = learnt(make("llama", mode), 10**6)
    chunked, found = learnt(make("llama", mode), 3)
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert worst(found, wanted) < 2e-6


def test_what_has_no_pair_is_laid_out_as_it_is() -> None:
    plain = MicroBatch.join(0, 1, 0, [Sequence("a", "chat", *np.ones((2, 4), np.int32))])
    assert both(plain) is plain
