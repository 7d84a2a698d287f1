"""GRPO: a step's prompts are answered, answers earn rewards, and those that earn more are learnt.

Stands between feed and step: `prepared` makes of a batch of prompts one of answers, with what each
token is to be learnt by (`losses.grpo`). A lane's answers make as many turns as it takes to hold
them in data.tokens_per_batch each. All of a step's sampling is done, and forgotten, within it: a
checkpoint holds nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from raysft.config import rewards
from raysft.config.objectives import Grpo
from raysft.data.example import MicroBatch, Sequence
from raysft.data.facts import FACTS, Facts
from raysft.data.plan import pack
from raysft.errors import UserError
from raysft.losses import grpo as losses
from raysft.models.base import SpeechModel
from raysft.models.layout import CONTEXT
from raysft.models.supervised import Supervised
from raysft.objectives.asking import tell, with_context
from raysft.objectives.frozen import Frozen
from raysft.objectives.rollout import Answer, Answers, Group, digest
from raysft.parallel import Strategy, World
from raysft.train.feed import LayOut
from raysft.train.step import StepBatch, Turn

TOTAL = ""  # the name of no reward: their sum, each times its weight


def policy_of(settings: Grpo) -> losses.Policy:
    """What sampled tokens teach."""
    return losses.Policy(
        settings.loss,
        settings.temperature,
        settings.beta,
        settings.clip,
        settings.high,
        again=settings.updates > 1,
    )


def prompts(batch: MicroBatch) -> Turn:
    """What the feed lays out: nothing yet. Counts are those of answers."""
    return Turn(batch.lane, {}, {"quarantined": float(len(batch.quarantined))})


@dataclass
class GrpoObjective:
    """See `job.Objective`.

    answers: who samples. reference: None where beta is 0. lay_out: of micro-batches. budget:
    positions of a turn; padded: each row counts as the longest.
    """

    settings: Grpo
    speech_model: SpeechModel
    strategy: Strategy
    world: World
    answers: Answers
    reference: Frozen | None
    lay_out: LayOut
    budget: int
    padded: bool

    def __post_init__(self) -> None:
        self.updates = self.settings.updates
        self._rewards = {name: rewards.load(name) for name in self.settings.rewards}

    def prepared(self, batch: StepBatch, beat: Callable[[str], None]) -> StepBatch:
        """See `job.Objective`."""
        told = f"in step {batch.step}, "
        found = self.answers(batch.micro_batches, partial(beat, f"{told}sampling answers"))
        turns = []
        for micro_batch in batch.micro_batches:
            turns += self._turns(micro_batch, found[micro_batch.lane])
        most = max(self.world.gather(len(turns)))
        while len(turns) < most:  # of weight zero
            empty = MicroBatch.join(batch.epoch, batch.step, len(turns), [])
            turns.append(self._turn(empty, len(turns), self._counts([], [])))
        supervised = self.speech_model.supervised
        assert isinstance(supervised, Supervised)  # its family has this objective
        ask = partial(tell, turns, strategy=self.strategy, supervised=supervised, world=self.world)

        def asked(whose: str) -> Callable[[int], None]:
            return lambda number: beat(f"{told}asking the {whose}, turn {number + 1} of {most}")

        if self.settings.updates > 1:
            ask(column=losses.OLD, reference=None, begins=asked("model"))
        if self.reference is not None:
            ask(column=losses.REFERENCE, reference=self.reference, begins=asked("reference"))
        ledger = {lane: {"rollouts": digest(groups)} for lane, groups in found.items()}
        return StepBatch(batch.epoch, batch.step, batch.after, turns, batch.micro_batches, ledger)

    def _turns(self, prompts: MicroBatch, groups: list[Group]) -> list[Turn]:
        """The answers to a lane's prompts as turns; at least one."""
        earned = [self._earned(group) for group in groups]
        size, settings = self.settings.group, self.settings
        total = torch.tensor([[one[TOTAL] for one in each] for each in earned]).view(-1).double()
        advantages = losses.advantages(total, size, settings.scale)
        advantages = advantages.view(len(groups), size)
        equal = losses.equal(total, size).tolist()
        learnt: list[Sequence] = []
        for group, same, each in zip(groups, equal, advantages.tolist(), strict=True):
            if not (same and settings.drop_equal):
                pairs = zip(group.answers, each, strict=True)
                learnt += [self._learnt(group, answer, a) for answer, a in pairs if answer.tokens]
        counts = self._counts(groups, earned)
        counts |= {"equal": float(sum(equal)), "quarantined": float(len(prompts.quarantined))}
        counts["audio_seconds"] = prompts.seconds
        lengths = np.array([len(sequence.input_ids) for sequence in learnt], np.int64)
        budget = max(self.budget, int(lengths.max(initial=1)))
        cut = pack.padded if self.padded else pack.packed
        turns = []
        for part, rows in enumerate(cut(lengths, budget) or [np.zeros(0, np.int64)]):
            chosen = [learnt[row] for row in sorted(rows.tolist())]
            batch = MicroBatch.join(prompts.epoch, prompts.step, prompts.lane, chosen)
            turns.append(self._turn(batch, part, counts if not part else self._counts([], [])))
        return turns

    def _turn(self, batch: MicroBatch, part: int, counts: Mapping[str, float]) -> Turn:
        """counts: of its lane, where it is the first of it."""
        turn = with_context(self.lay_out(batch), losses.Policy.columns)
        turn.counts |= {"answers": float(len(batch.ids)), **counts}
        turn.part = part
        return turn

    def _learnt(self, group: Group, answer: Answer, advantage: float) -> Sequence:
        prompt, size = group.prompt, len(answer.tokens)
        weight, share = losses.weights(size, self.settings.max_new_tokens, self.settings.loss)
        context = np.zeros((size, losses.Policy.columns), np.float32)
        context[:, losses.ADVANTAGE] = advantage
        context[:, losses.WEIGHT], context[:, losses.SHARE] = weight, share
        tokens = np.array(answer.tokens, np.int32)
        return Sequence(
            prompt.id,
            prompt.task,
            np.concatenate([prompt.input_ids, tokens]),
            np.concatenate([prompt.labels, tokens]),
            {**_without_facts(prompt), CONTEXT: [context]},
        )

    def _earned(self, group: Group) -> list[dict[str, float]]:
        """Of each answer its rewards, by name, and their sum."""
        facts = Facts.unpacked(group.prompt.arrays[FACTS][0])
        found = []
        for answer in group.answers:
            own = {name: self._reward(name, answer.text, facts) for name in self._rewards}
            weights = self.settings.rewards
            own[TOTAL] = sum(weights[name] * value for name, value in own.items())
            found.append(own)
        return found

    def _reward(self, name: str, text: str, facts: Facts) -> float:
        value = float(self._rewards[name](text, facts))
        if not math.isfinite(value):
            raise UserError(
                f"train.grpo.rewards.{name}: gave {value} for an answer to {facts.id}; a reward is "
                "a finite number"
            )
        return value

    def _counts(
        self, groups: Seq[Group], earned: Seq[Seq[Mapping[str, float]]]
    ) -> dict[str, float]:
        """What metrics are made of; the same names whatever there is."""
        stops = self.speech_model.stop_ids
        answers = [answer.tokens for group in groups for answer in group.answers]
        found = {
            "examples": float(len(groups)),
            "audio_seconds": 0.0,
            "quarantined": 0.0,
            "sampled": float(len(answers)),
            "sampled_tokens": float(sum(map(len, answers))),
            "cut": float(sum(not answer or answer[-1] not in stops for answer in answers)),
            "equal": 0.0,
        }
        each = [one for group in earned for one in group]
        for name in (TOTAL, *self._rewards):
            values = [one[name] for one in each]
            found |= {f"{name}:sum": sum(values), f"{name}:squares": sum(v * v for v in values)}
        return {name: float(value) for name, value in found.items()}

    def figures(self, counts: Mapping[str, float]) -> dict[str, float]:
        """reward, reward/NAME, reward_std, reward_std/NAME: over answers; of answers: their mean
        length, and the share that ends at train.grpo.max_new_tokens; share of equal groups."""
        sampled = max(1.0, counts["sampled"])
        found = {}
        for name in (TOTAL, *self._rewards):
            mean, squares = counts[f"{name}:sum"] / sampled, counts[f"{name}:squares"] / sampled
            tail = "" if name == TOTAL else f"/{name}"
            found[f"reward{tail}"] = mean
            found[f"reward_std{tail}"] = math.sqrt(max(0.0, squares - mean * mean))
        found["completion_tokens"] = counts["sampled_tokens"] / sampled
        found["cut_answers"] = counts["cut"] / sampled
        found["equal_groups"] = counts["equal"] / max(1.0, counts["examples"])
        return {name: float(f"{value:.6g}") for name, value in found.items()}


def _without_facts(prompt: Sequence) -> dict[str, list[np.ndarray]]:
    return {name: arrays for name, arrays in prompt.arrays.items() if name != FACTS}
