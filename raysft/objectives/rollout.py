"""Answers to a step's prompts, sampled in the workers: a group of them each.

Prompts are answered in batches of a lane's, sorted by length, as many as fit a budget with the
longest answer there may be. What is random of an answer is drawn by (seed, epoch, step, lane, slot,
number in its group): the same for any number of workers, and after any restart. Under FSDP the
weights travel once, where they fit into every worker as a whole (`Strategy.whole`).

`Answers` is all that learning asks for; who samples elsewhere (a server of vLLM, say) gives that.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np

from raysft.config.objectives import Grpo
from raysft.data.example import MicroBatch, Sequence
from raysft.data.plan import pack
from raysft.errors import UserError
from raysft.evaluate.run import prompts_of
from raysft.models.base import SpeechModel
from raysft.models.draws import Draws, Sampling
from raysft.parallel import Strategy, World


class Answer(NamedTuple):
    """An answer. tokens: up to and with the one that ends it; []: there was no position for any."""

    text: str = ""
    tokens: Seq[int] = ()


@dataclass
class Group:
    """A prompt, and the answers to it. slot: its place among the planned examples."""

    prompt: Sequence
    slot: int
    answers: list[Answer]


class Answers(Protocol):
    """Who samples."""

    def __call__(
        self, batches: list[MicroBatch], seen: Callable[[], None]
    ) -> dict[int, list[Group]]:
        """Groups of each prompt, by lane. A collective. seen: called whenever there is progress."""
        ...


@dataclass
class Sampler:
    """Samples by the model that trains, as it is.

    budget: positions of prompts and longest answers that are sampled together. synced: a forward
    pass of sharded weights is a collective.
    """

    speech_model: SpeechModel
    strategy: Strategy
    world: World
    settings: Grpo
    budget: int
    seed: int
    synced: bool

    def __call__(
        self, batches: list[MicroBatch], seen: Callable[[], None]
    ) -> dict[int, list[Group]]:
        """See `Answers`."""
        found = {batch.lane: self._asked(batch) for batch in batches}
        parts = [(lane, rows) for lane in found for rows in self._parts(found[lane])]
        module, training = self.strategy.module, self.strategy.module.training
        module.eval()
        try:
            with self.strategy.whole() as whole:
                synced = self.synced and whole is not True
                rounds = max(self.world.gather(len(parts))) if synced else len(parts)
                for number in range(rounds):
                    seen()
                    lane, rows = parts[number] if number < len(parts) else (0, [])
                    self._sample(batches, found, lane, rows, synced, seen)
        finally:
            module.train(training)
        return found

    def _asked(self, batch: MicroBatch) -> list[Group]:
        prompts = prompts_of(self.speech_model, batch)
        if empty := [prompt.id for prompt in prompts if not len(prompt.input_ids)]:
            raise UserError(f"{empty[0]}: has no prompt that could be answered; leave it out")
        number = self.settings.group
        return [
            Group(prompt, slot, [Answer()] * number)
            for prompt, slot in zip(prompts, batch.slots, strict=True)
        ]

    def _parts(self, groups: list[Group]) -> list[list[int]]:
        """Answers that are sampled together, each by its number among those of a lane."""
        longest, times = self.settings.max_new_tokens, self.settings.group
        lengths = np.repeat([len(g.prompt.input_ids) + longest for g in groups], times)
        budget = max(self.budget, int(lengths.max(initial=1)))
        return [part.tolist() for part in pack.padded(lengths, budget)]

    def _sample(
        self,
        batches: list[MicroBatch],
        found: dict[int, list[Group]],
        lane: int,
        rows: list[int],
        synced: bool,
        seen: Callable[[], None],
    ) -> None:
        model, size, longest = self.speech_model, self.settings.group, self.settings.max_new_tokens
        places = [(found[lane][row // size], row % size) for row in rows]
        draws = np.zeros((len(rows), longest))
        for row, (group, member) in enumerate(places):
            draws[row] = self._draws(batches[0], lane, group.slot, member)
        temperature, top_p = self.settings.temperature, self.settings.top_p
        sampling = Sampling(temperature, top_p, model.placeholders, seen)
        prompts = [group.prompt for group, _ in places]
        with self.strategy.autocast():
            answers = model.answers(prompts, longest, synced, choose=Draws(sampling, draws))
        for (group, member), answer in zip(places, answers, strict=True):
            group.answers[member] = Answer(answer.text, [*answer.tokens, *answer.end])

    def _draws(self, batch: MicroBatch, lane: int, slot: int, member: int) -> np.ndarray:
        place = [self.seed, batch.epoch, batch.step, lane, slot, member]
        return np.random.default_rng(place).random(self.settings.max_new_tokens)


def digest(groups: list[Group]) -> str:
    """Of the tokens of all answers to a lane's prompts, for the ledger."""
    found = blake2b(digest_size=8)
    for answer in (answer for group in groups for answer in group.answers):
        found.update(np.array([len(answer.tokens), *answer.tokens], "<i8").tobytes())
    return found.hexdigest()
