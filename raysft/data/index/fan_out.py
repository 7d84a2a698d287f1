"""Many small jobs at once: as Ray tasks where Ray runs, else in processes, else here.

Under build.py, which surveys files, looks at clips and measures examples with it. Results come in
the order of the jobs; an error of one ends them all.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from raysft import patience, plugins
from raysft.errors import UserError

Progress = Callable[[int, int], None]
"""Called with (bytes of data files measured, bytes to measure)."""

_PARALLEL_FROM = 4 << 20  # bytes (some 20,000 clips, 3 s) from which starting processes pays
_LOOK_S = 1.0  # between two looks whether the process that builds is there
_Job = TypeVar("_Job")
_Shared = TypeVar("_Shared")
_Result = TypeVar("_Result")


def fan_out(
    function: Callable[[_Job, _Shared], _Result],
    jobs: list[_Job],
    sizes: list[int],
    shared: _Shared,
    workers: int | None,
    progress: Progress | None = None,
    check: Callable[[_Job, _Result], None] | None = None,
) -> list[_Result]:
    """[function(job, shared) for job in jobs]: by Ray where it runs, else in processes or here.

    sizes: of the jobs, in bytes of data files. workers: at once; None: one a CPU, or 1 where there
    is little to do. check: called with each job and its result, in their order; what it raises ends
    the rest.
    """
    total, done = sum(sizes), 0
    if workers is None:
        workers = _cpus() if total >= _PARALLEL_FROM else 1
    if workers == 1 or len(jobs) < 2:
        found: Iterator[_Result] = (function(job, shared) for job in jobs)
    elif _ray_runs():
        found = _by_ray(function, jobs, shared, workers)
    else:
        found = _by_processes(function, jobs, shared, min(workers, len(jobs)))
    results: list[_Result] = []
    for job, size, result in zip(jobs, sizes, found):
        if check is not None:
            check(job, result)
        results.append(result)
        done += size
        if progress is not None:
            progress(done, total)
    return results


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")  # what was never imported cannot be running
    return ray is not None and ray.is_initialized()


def _cpus() -> int:
    if _ray_runs():
        import ray

        return max(1, int(ray.cluster_resources().get("CPU", 1)))
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _by_processes(
    function: Callable[[_Job, _Shared], _Result], jobs: list[_Job], shared: _Shared, workers: int
) -> Iterator[_Result]:
    context = multiprocessing.get_context("spawn")  # threads and fork do not go together
    given = (function, shared, patience.allowed(), plugins.loaded(), os.getpid())
    with ProcessPoolExecutor(workers, context, _begin, given) as pool:
        try:
            yield from pool.map(_one, jobs)
        finally:
            pool.shutdown(cancel_futures=True)


_process: dict[str, Any] = {}


def _begin(
    function: Callable[[_Job, _Shared], object],
    shared: _Shared,
    seconds: float,
    names: tuple[str, ...],
    parent: int,
) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    patience.allow(seconds)
    plugins.load(names)
    _process.update(function=function, shared=shared)


def _end_with(parent: int) -> None:
    """A process whose parent was killed would wait for its jobs for ever."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)


def _one(job: object) -> Any:
    return _process["function"](job, _process["shared"])


def _by_ray(
    function: Callable[[_Job, _Shared], _Result], jobs: list[_Job], shared: _Shared, workers: int
) -> Iterator[_Result]:
    import ray

    seconds, names = patience.allowed(), plugins.loaded()

    def patient(job: _Job, given: _Shared) -> _Result:
        patience.allow(seconds)
        plugins.load(names)
        return function(job, given)

    task = ray.remote(patient).options(num_cpus=1, scheduling_strategy="SPREAD")
    reference = ray.put(shared)
    running: list[ray.ObjectRef] = []
    try:
        for job in jobs:
            # Twice as many as run at once: results are taken in order, and one may be slow.
            if len(running) >= 2 * workers:
                yield ray.get(running.pop(0))
            running.append(task.remote(job, reference))
        while running:
            yield ray.get(running.pop(0))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    finally:
        for left in running:
            ray.cancel(left)
