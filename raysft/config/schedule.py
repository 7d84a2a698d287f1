"""The learning rate of every step, as a pure function of the config; and what becomes of it where a
run is to have another number of steps than it began with."""

from __future__ import annotations

import math

from raysft.config.schema import Config, Optim
from raysft.errors import UserError


def steps_of(share: float, total: int) -> int:
    """A number of steps: `share` itself if >= 1, else that share of all steps."""
    return round(share if share >= 1 else share * total)


def rate(optim: Optim, step: int, total: int) -> float:
    """The learning rate of step 1..total as a share of its peak: linear warm-up, then constant,
    linear or cosine decay to zero, or constant with a linear decay at the end (wsd)."""
    warmup = steps_of(optim.warmup, total)
    if step <= warmup:
        return step / warmup
    if optim.schedule == "constant":
        return 1.0
    # The last step still moves: decay reaches zero one step after it.
    if optim.schedule == "wsd":
        decay = min(steps_of(optim.decay, total), total - warmup)
        return min(1.0, (total + 1 - step) / max(1, decay))
    progress = min(1.0, (step - 1 - warmup) / max(1, total - warmup))
    if optim.schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def another_length(config: Config, step: int, before: int | None, now: int) -> str | None:
    """What becomes of a run that has done `step` of `before` steps and is to have `now`, in words.

    None where nothing does: the same number, or not known (a checkpoint of an older raysft). Goes
    on by itself where every step so far would have had the same rate; else only where
    optim.reschedule says so, from here on with the rates of a run of `now` steps. Raises UserError.
    """
    if before is None or before == now or step == 0:
        return None
    optim = config.optim
    what = f"this run has {now:,} steps now, and had {before:,}"
    if config.peft.method == "adalora":
        raise UserError(
            f"train.max_steps, train.epochs: {what}; the ranks of peft.method: adalora follow that "
            "number. Set it back to continue, or export with --merge and train on from there"
        )
    if all(rate(optim, s, before) == rate(optim, s, now) for s in range(1, step + 1)):
        return f"{what}: goes on, for its {step:,} steps so far would have had the same rates"
    after = min(step + 1, now)
    follows = (
        f"{rate(optim, step, before):.3g} of optim.lr in step {step:,}, "
        f"{rate(optim, after, now):.3g} in step {after:,}"
    )
    if not optim.reschedule:
        raise UserError(
            f"train.max_steps, train.epochs: {what}; with optim.schedule: {optim.schedule} and "
            f"optim.warmup: {optim.warmup:g} its {step:,} steps so far would have had other rates. "
            "Set it back to continue; set optim.reschedule=true to go on with the rates of a run "
            f"of {now:,} steps ({follows}); or begin anew with its weights "
            "(checkpoint.resume=weights_only)"
        )
    return f"{what}: optim.reschedule: {optim.schedule} over {now:,} steps from here on ({follows})"
