"""The learning rate of every step, as a pure function of the config; and what becomes of it where a
run is to have another number of steps than it began with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

from raysft.config.resume import keys_with
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


def asked(config: Config) -> list[int | None]:
    """What a config says of a run's length: kept beside the number of steps it came to."""
    return [attrgetter(key)(config) for key in keys_with("length")]


def another_length(
    config: Config, step: int, before: int | None, now: int, was: Sequence[int | None] | None
) -> str | None:
    """What becomes of a run that has done `step` of `before` steps and is to have `now`, in words.

    was: `asked` when it had `before`; None: not known (a checkpoint of an older raysft). Where it
    is the same now, the number is another because data.extend has taken in other data: the run
    goes on with the rates of `now` steps.

    None where nothing becomes of it: the same number, or not known. Where the config asks for
    another, it goes on by itself if every step so far would have had the same rate; else only
    where optim.reschedule says so, from here on with the rates of `now` steps. Raises UserError.
    """
    if before is None or before == now or step == 0:
        return None
    optim = config.optim
    data = was is not None and list(was) == asked(config)
    what = f"this run has {now:,} steps now, and had {before:,}"
    if data:
        what += ", for data.extend has taken in other data"
    keys = "data.extend" if data else ", ".join(keys_with("length"))
    if was is None and config.data.extend:
        keys += ", data.extend"
    if config.peft.method == "adalora":
        remedy = "Put the data back (data.extend=true stays)" if data else "Set it back"
        raise UserError(
            f"{keys}: {what}; the ranks of peft.method: adalora follow that number. {remedy} to "
            "continue, or export with --merge and train on from there"
        )
    after = min(step + 1, now)
    follows = (
        f"{rate(optim, step, before):.3g} of optim.lr in step {step:,}, "
        f"{rate(optim, after, now):.3g} in step {after:,}"
    )
    done = f"{what}: nothing is left to train, {step:,} steps are done" if now <= step else None
    if all(rate(optim, s, before) == rate(optim, s, now) for s in range(1, min(step, now) + 1)):
        return done or (
            f"{what}: goes on, for its {step:,} steps so far would have had the same rates"
        )
    if not data and not optim.reschedule:
        on = f"go on with the rates of a run of {now:,} steps ({follows})"
        raise UserError(
            f"{keys}: {what}; with optim.schedule: {optim.schedule} and "
            f"optim.warmup: {optim.warmup:g} its {step:,} steps so far would have had other rates. "
            f"Set it back to continue; set optim.reschedule=true to "
            f"{'leave it at the steps that are done' if done else on}; or begin anew with its "
            "weights (checkpoint.resume=weights_only)"
        )
    why = "" if data else "optim.reschedule: "
    return done or f"{what}: {why}{optim.schedule} over {now:,} steps from here on ({follows})"
