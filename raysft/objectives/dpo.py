"""DPO: of each pair of answers the chosen one is to become likelier than by the reference.

Stands between feed and step: batches come laid out with both answers of each pair
(`models.pairs`), and `prepared` asks the reference for their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from raysft.config.objectives import Dpo
from raysft.data.example import MicroBatch
from raysft.losses import dpo as losses
from raysft.models.pairs import both
from raysft.models.supervised import Supervised
from raysft.objectives.asking import tell, with_context
from raysft.objectives.frozen import Frozen
from raysft.parallel import Strategy, World
from raysft.train.feed import LayOut
from raysft.train.step import StepBatch, Turn


def preference_of(settings: Dpo) -> losses.Preference:
    """What pairs teach."""
    return losses.Preference(
        settings.beta, settings.loss, settings.label_smoothing, settings.sft_weight
    )


def paired(batch: MicroBatch, lay_out: LayOut) -> Turn:
    """A micro-batch laid out with both answers of each pair, which count as one example."""
    turn = with_context(lay_out(both(batch)), losses.Preference.columns)
    turn.counts |= {losses.PAIRS: float(len(batch.ids)), "examples": float(len(batch.ids))}
    return turn


@dataclass
class DpoObjective:
    """See `job.Objective`."""

    supervised: Supervised
    strategy: Strategy
    world: World
    reference: Frozen
    updates: int = 1

    def prepared(self, batch: StepBatch, beat: Callable[[str], None]) -> StepBatch:
        """See `job.Objective`."""

        def begins(number: int) -> None:
            beat(f"in step {batch.step}, asking the reference, turn {number + 1}")

        tell(
            batch.turns,
            losses.REFERENCE,
            self.strategy,
            self.supervised,
            self.world,
            self.reference,
            begins,
        )
        return batch

    def figures(self, counts: Mapping[str, float]) -> dict[str, float]:
        """See `job.Objective`: all of them are terms."""
        return {}
