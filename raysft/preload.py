"""What a process of an embedded Ray imports while it starts, by what it is started for: see
`driver.warm`. `preloaded` does it. Imports nothing else: every process of Ray's pays for it."""

from __future__ import annotations

import os
from pathlib import Path

MODULES = "RAYSFT_PRELOAD"  # environment: comma-separated; "": none
MARK = "RAYSFT_CONTROLLER_BEGAN"  # environment: a file that is there once a controller began
# Set by Ray Train for its controller, whose environment is not ours to choose, and so for actors
# that the controller starts: the first such process is the controller.
CONTROLLER_HAS = "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"
CONTROLLER = ("raysft.driver.launch",)
HELPERS = ("ray.train",)
# Environment of a worker, and of a task that reads for one, which else would have the worker's.
WORKER = {MODULES: "ray.train.torch,raysft.driver.entry,raysft.worker"}
READER = {MODULES: "raysft.data.read.stream,raysft.data.encode"}


def modules() -> tuple[str, ...]:
    """What this process is to import."""
    named = os.environ.get(MODULES)
    if named is not None:
        return tuple(filter(None, named.split(",")))
    if CONTROLLER_HAS not in os.environ:
        return ()
    try:
        Path(os.environ[MARK]).touch(exist_ok=False)
    except OSError:
        return HELPERS
    return CONTROLLER
