"""Sampled answers follow their own numbers, whatever is beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysft.data.example import Sequence
from raysft.models.draws import Draws, Sampling, chosen
from tests.support.model_zoo import make, sequences


def test_tokens_are_chosen_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5, 3.0, 2.5]])
    number = 20_000
    draws = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    for temperature in (1.0, 0.5):
        found = chosen(logits.expand(number, -1), draws, temperature)
        shares = torch.bincount(found, minlength=5) / number
        wanted = torch.softmax(logits[0] / temperature, 0)
        assert torch.allclose(shares, wanted, atol=2e-4)


def test_top_p_takes_as_many_of_the_likeliest_as_have_that_share() -> None:
    shares = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    wanted = {0.3: {1}, 0.4: {1}, 0.5: {1, 3}, 0.8: {1, 3, 4}, 0.9: {0, 1, 3, 4}}
    for top_p, tokens in wanted.items():
        found = chosen(shares.log().expand(1000, -1), draws, top_p=top_p)
        assert set(found.tolist()) == tokens, top_p
        share = float(shares[0, 1] / shares[0, sorted(tokens)].sum())
        assert float((found == 1).float().mean()) == pytest.approx(share, abs=2e-3)


def test_no_draw_takes_a_token_without_a_share() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for draw in (0.0, 0.5, float(np.nextafter(1.0, 0.0))):
        assert int(chosen(logits, torch.tensor([draw], dtype=torch.float64))) in (1, 2)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen2_audio"])
def test_an_answer_is_the_same_whatever_is_sampled_beside_it(name: str) -> None:
    model = make(name)
    prompts = [
        Sequence(s.id, s.task, s.input_ids, np.full_like(s.labels, -100), s.arrays)
        for s in sequences(model, [4, 9, 6])
    ]
    draws = np.random.default_rng(0).random((3, 7))
    model.stop_ids[:] = [*range(0, 256, 16)]  # some answers end

    def sample(prompts: list[Sequence], draws: np.ndarray) -> list[list[int]]:
        choose = Draws(Sampling(temperature=2.0, never=[*model.placeholders, 65]), draws)
        found = model.answers(prompts, draws.shape[1], False, choose=choose)
        return [[*answer.tokens, *answer.end] for answer in found]

    together = sample(prompts, draws)
    alone = [sample([prompt], draws[[row]])[0] for row, prompt in enumerate(prompts)]
    assert together == alone
    if name == "qwen2_audio":
        assert model.placeholders == [model.net.config.audio_token_id]
    turned = sample(prompts[::-1], draws[::-1])
    assert turned[::-1] == together
    for answer in together:
        assert 0 < len(answer) <= 7
        assert not set(answer[:-1]) & set(model.stop_ids)
        assert not {*model.placeholders, 65} & set(answer)
    assert sample(prompts, 1 - draws) != together
