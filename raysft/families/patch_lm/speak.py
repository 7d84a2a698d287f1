"""How a patch_lm speaks: a patch after the other, by the language model and the flow head.

Under `model`. Prompts are answered together, padded on the left; each has noise of its own, so that
it says the same whatever is said beside it. A patch is the last where the stop head says so at its
position, where it was trained to say it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from raysft.config.speaking import Speak
from raysft.families.patch_lm.net import PatchLMForCausalLM
from raysft.losses.stop import STOPS
from raysft.models.flow_parts import T_UNITS
from raysft.models.layout import Batch
from raysft.models.routing import Routing
from raysft.models.sampling import Velocity, guided, solve


class Answer:
    """What is being said after one prompt. rng: gives its noise."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.patches: list[np.ndarray] = []
        self.ended = False


@torch.no_grad()
def speak(
    net: PatchLMForCausalLM,
    inputs: Batch,
    seeds: Seq[int],
    settings: Speak,
    frames_per_second: float,
    routing: Routing | None = None,
) -> list[np.ndarray]:
    """What is said after each prompt: frames [patches * S, latent].

    inputs: rows padded on the left, on the net's device: input_ids, attention_mask [R, L],
    position_ids where the model takes them, patches and patch_at. seeds: of each row's noise.
    routing: of a mixture, whose experts may be for kinds of tokens.
    """
    size, latent = net.config.patch_size, net.config.latent_width
    device = inputs["input_ids"].device
    rate = frames_per_second / size
    most, fewest = max(1, int(settings.max_seconds * rate)), int(settings.min_seconds * rate)
    answers = [Answer(seed) for seed in seeds]
    embeds = net.embedded(inputs["input_ids"], inputs.get("patches"), inputs.get("patch_at"))
    mask, positions = inputs["attention_mask"], inputs.get("position_ids")
    history = torch.zeros(len(answers), size, latent, device=device)
    if "patches" in inputs and "patch_at" in inputs:  # a row that ends in a patch goes on behind it
        ends = inputs["patch_at"] % mask.shape[1] == mask.shape[1] - 1
        rows = inputs["patch_at"][ends] // mask.shape[1]
        history[rows] = inputs["patches"][ends].to(history.dtype)
    cache, ids = None, inputs["input_ids"]
    for number in range(most):
        told: AbstractContextManager[None] = nullcontext()
        if routing is not None:
            told = routing.told(net, ids, mask)
        with told:  # whoever is given embeddings cannot tell
            hidden, cache = _hidden(net, embeds, mask, positions, cache)
        if number >= max(1, fewest):
            stops = net.stop_head(hidden).float().softmax(-1)[:, STOPS] > settings.stop
            for answer, stop in zip(answers, stops.tolist(), strict=True):
                answer.ended = answer.ended or stop
            if all(answer.ended for answer in answers):
                break
        history = _patch(net, hidden, history, answers, settings)
        for answer, patch in zip(answers, history.cpu().numpy(), strict=True):
            if not answer.ended:
                answer.patches.append(patch)
        ids = torch.full((len(answers), 1), net.config.patch_token_id, device=device)
        embeds = net.pooling(history).unsqueeze(1).to(embeds.dtype)
        mask = torch.cat([mask, mask.new_ones(len(answers), 1)], 1)
        positions = None if positions is None else positions[:, -1:] + 1
    return [np.concatenate(answer.patches) for answer in answers]


def _hidden(
    net: PatchLMForCausalLM,
    embeds: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor | None,
    cache: object,
) -> tuple[torch.Tensor, object]:
    """The hidden states of the last position [R, hidden], and the cache that now holds it."""
    told = {} if positions is None else {"position_ids": positions}
    found, hidden = net.with_hidden(
        inputs_embeds=embeds,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **told,
    )
    return hidden[:, -1], found.past_key_values


def _patch(
    net: PatchLMForCausalLM,
    hidden: torch.Tensor,
    history: torch.Tensor,
    answers: list[Answer],
    settings: Speak,
) -> torch.Tensor:
    """The next patch of each answer [R, S, latent]."""

    def normal() -> torch.Tensor:
        drawn = [answer.rng.standard_normal(history.shape[1:], np.float32) for answer in answers]
        return torch.from_numpy(np.stack(drawn)).to(history.device)

    def by(condition: torch.Tensor) -> Velocity:
        def velocity(where: torch.Tensor, t: float) -> torch.Tensor:
            units = torch.full((len(answers),), round(t * T_UNITS), device=where.device)
            return net.flow_head(where, units, condition, history).float()

        return velocity

    velocity = guided(by(hidden), by(torch.zeros_like(hidden)), settings.flow.guidance)
    return solve(velocity, normal(), settings.flow, normal)
