"""`parallel.threads` of a run: the number it began with, whatever the machine of the day has.

A sum of many numbers is cut into as many parts as there are threads, and each way of cutting it has
other last bits. So the number that the first start found, on CPUs, is written into config.yaml and
used by later starts, while `parallel.workers` is the same. More threads than cores are slower, and
change no bit.
"""

from __future__ import annotations

from raysft.config import Config


def with_threads(config: Config, threads: int) -> Config:
    """`config` with that many threads a worker."""
    parallel = config.parallel.model_copy(update={"threads": threads})
    return config.model_copy(update={"parallel": parallel})


def as_begun(config: Config, before: Config) -> Config:
    """`config` with the threads of its run, where it names none.

    before: what the run was last started with. With another number of workers, whose sums are
    others anyway, they are counted anew.
    """
    ours, theirs = config.parallel, before.parallel
    if ours.threads is not None or theirs.threads is None or ours.workers != theirs.workers:
        return config
    return with_threads(config, theirs.threads)


def difference(config: Config, before: Config) -> str | None:
    """What it means that the user has given another number than the run had; None: it is the same,
    or not known yet."""
    ours, theirs = config.parallel, before.parallel
    if None in (ours.threads, theirs.threads) or ours.workers != theirs.workers:
        return None
    if ours.threads == theirs.threads:
        return None
    return (
        f"parallel.threads: {ours.threads}, and the run has computed with {theirs.threads} so far: "
        "on CPUs, losses from here on have other last bits than those of a run that went on with "
        f"{theirs.threads}"
    )


def tight(threads: int, room: int) -> str | None:
    """What it means that a worker has more threads than cores; None: it has not.

    room: cores of the cluster that a worker may use.
    """
    if threads <= room:
        return None
    return (
        f"parallel.threads: {threads} a worker, as the run began or as given, but there is room "
        f"for {room} now: the same bits, but slower; parallel.threads={room} is faster, and losses "
        "have other last bits from there on"
    )
