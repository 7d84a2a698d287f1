"""GRPO's formulas against references written here, number by number."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch

from raysft.data.example import MicroBatch, Sequence
from raysft.losses import grpo
from raysft.losses.grpo import ADVANTAGE, OLD, REFERENCE, SHARE, WEIGHT, Policy
from raysft.models import SpeechModel
from raysft.models.layout import CONTEXT
from tests.support.model_zoo import gradients, make, worst

REWARDS = [1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, -3.0, 0.25, 7.5, 7.5]
ANSWERS = [3, 5, 1, 4]  # tokens of each
LONGEST = 8


def test_an_advantage_is_a_rewards_distance_from_its_groups_mean_in_deviations() -> None:
    found = grpo.advantages(torch.tensor(REWARDS, dtype=torch.float64), 4).tolist()
    unscaled = grpo.advantages(torch.tensor(REWARDS, dtype=torch.float64), 4, scaled=False)
    wanted, distances = [], []
    for start in range(0, len(REWARDS), 4):
        group = REWARDS[start : start + 4]
        mean, deviation = statistics.fmean(group), statistics.stdev(group)  # of n - 1
        distances += [reward - mean for reward in group]
        wanted += [(reward - mean) / (deviation + 1e-4) for reward in group]
    assert found == pytest.approx(wanted, abs=1e-6)
    assert unscaled.tolist() == pytest.approx(distances, abs=1e-6)
    assert found[4:8] == [0.0] * 4
    assert grpo.equal(torch.tensor(REWARDS), 4).tolist() == [False, True, False]


def test_the_divergence_of_a_token() -> None:
    pairs = [(-1.0, -1.0), (-0.5, -2.0), (-3.0, -0.1), (-10.0, -10.5)]
    logps, reference = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    wanted = [math.exp(ref - lp) - (ref - lp) - 1 for lp, ref in pairs]
    assert grpo.divergence(logps, reference).tolist() == pytest.approx(wanted, abs=1e-6)


def log_probability(logits: np.ndarray, token: int, temperature: float) -> float:
    scores = logits / temperature
    return float(scores[token] - scores.max() - np.log(np.exp(scores - scores.max()).sum()))


def reference(
    logits: list[np.ndarray],
    answers: list[list[int]],
    advantages: list[float],
    old: list[list[float]] | None,
    base: list[list[float]],
    settings: dict[str, Any],
) -> float:
    """The loss of a step as papers write it. logits: of each answer [tokens, V]."""
    beta, low, high = settings["beta"], settings["low"], settings["high"]
    sums = []
    for i, answer in enumerate(answers):
        losses = []
        for t, token in enumerate(answer):
            lp = log_probability(logits[i][t], token, settings["temperature"])
            ratio = math.exp(lp - (lp if old is None else old[i][t]))
            clipped = min(max(ratio, 1 - low), 1 + high)
            kl = math.exp(base[i][t] - lp) - (base[i][t] - lp) - 1
            objective = min(ratio * advantages[i], clipped * advantages[i]) - beta * kl
            losses.append(-objective)
        sums.append(losses)
    if settings["loss"] == "grpo":
        return statistics.fmean(statistics.fmean(losses) for losses in sums)
    total = sum(sum(losses) for losses in sums)
    if settings["loss"] == "dapo":
        return total / sum(map(len, answers))
    return total / (len(answers) * LONGEST)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("again", [False, True])
def test_the_loss_is_that_of_the_formulas(loss: Any, again: bool) -> None:
    rng = np.random.default_rng(0)
    vocabulary = 11
    answers = [rng.integers(vocabulary, size=size).tolist() for size in ANSWERS]
    logits = [rng.standard_normal((size, vocabulary)) for size in ANSWERS]
    own = [
        np.array([log_probability(*pair, 0.8) for pair in zip(rows, answer)])
        for rows, answer in zip(logits, answers, strict=True)
    ]
    base = [(each + 0.5 * rng.standard_normal(len(each))).tolist() for each in own]
    old = [(each + 0.3 * rng.standard_normal(len(each))).tolist() for each in own]
    advantages = [1.2, -0.7, 0.3, -0.8]
    settings = {"loss": loss, "beta": 0.3, "low": 0.2, "high": 0.3, "temperature": 0.8}
    wanted = reference(logits, answers, advantages, old if again else None, base, settings)

    rows = []
    for i, size in enumerate(ANSWERS):
        weight, share = grpo.weights(size, LONGEST, loss)
        for t in range(size):
            row = [0.0] * Policy.columns
            row[ADVANTAGE], row[WEIGHT], row[SHARE] = advantages[i], weight, share
            row[OLD], row[REFERENCE] = old[i][t], base[i][t]
            rows.append(row)
    policy = Policy(**settings, again=again)
    context = torch.tensor(rows, dtype=torch.float64)
    scores = torch.tensor(np.concatenate(logits))
    targets = torch.tensor([token for answer in answers for token in answer])
    losses = policy.of_logits(scores, targets)
    chosen = torch.ones(1, len(rows))
    terms = policy.terms(losses, policy.total(losses, context), context, chosen, ["chat"], True)
    count = sum(ANSWERS) if loss == "dapo" else len(ANSWERS)
    assert terms[0].counted == ("supervised" if loss == "dapo" else "answers")
    assert float(terms[0].count) == pytest.approx(count)
    assert float(terms[0].trained) / count == pytest.approx(wanted, abs=1e-6)
    assert float(terms[0].sum) / count == pytest.approx(wanted, abs=1e-6)
    assert [term.name for term in terms[1:]] == (["clipped", "kl"] if again else ["kl"])
    if again:  # clipped: where the loss has no gradient but the divergence's
        lp = torch.tensor(-losses[0].numpy(), requires_grad=True)
        (gradient,) = torch.autograd.grad(Policy(again=True, high=0.3).each(lp, context).sum(), lp)
        assert float(terms[1].sum) == float((gradient == 0).sum()) > 0


def learnt(model: SpeechModel, rows: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of two answers, `rows` of tokens through the head at a time."""
    rng = np.random.default_rng(1)
    sequences = []
    for number, size in enumerate((4, 9)):
        ids = rng.integers(0, 256, 5 + size).astype(np.int32)
        labels = np.where(np.arange(5 + size) < 5, -100, ids).astype(np.int32)
        context = np.zeros((size, Policy.columns), np.float32)
        context[:, ADVANTAGE], context[:, WEIGHT] = (1.0, -0.5)[number], 1 / size
        context[:, SHARE] = 1 / size
        context[:, OLD] = context[:, REFERENCE] = -5 + rng.standard_normal(size)
        sequences.append(Sequence(f"a{number}", "chat", ids, labels, {CONTEXT: [context]}))
    model.supervised.learns = Policy(beta=0.2, again=True)
    model.supervised.rows = rows
    first, *_ = model.supervised(model.collate(MicroBatch.join(0, 1, 0, sequences)))
    first.trained.backward()
    return float(first.sum), gradients(model)


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_chunks_of_the_head_give_the_loss_and_gradient_of_all_logits(mode: str) -> None:
    whole, wanted = learnt(make("llama", mode), 10**6)
    chunked, found = learnt(make("llama", mode), 3)
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert worst(found, wanted) < 2e-6
