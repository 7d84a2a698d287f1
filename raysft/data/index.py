"""Building the index: the table of all examples with their lengths, all that planning reads.

sources -> index (here) -> plan -> stream -> step -> checkpoint -> evaluate -> export.
Every file is surveyed, what is new is measured in parallel (part.py; Ray tasks where Ray runs,
else processes), and the parts are joined into a folder that every node reads (table.py).

Costs: about 0.2 ms an example and core the first time, without tokenising (0.12 of it the clip's
header, on a local disk); then a read of the cached parts. The driver holds about 80 bytes an
example while it joins.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from raysft.config.schema import Source
from raysft.data import part as parts
from raysft.data import sources as formats
from raysft.data.encode import Encoder
from raysft.data.part import Job, Part
from raysft.data.sources import ResolvedSource
from raysft.data.sources.base import Split, Survey
from raysft.data.table import Index, IndexedSource, join
from raysft.errors import UserError

__all__ = ["Index", "IndexedSource", "build_index"]

Progress = Callable[[int, int], None]
"""Called with (bytes of data files measured, bytes to measure)."""

_PARALLEL_FROM = 4 << 20  # bytes (some 20,000 clips, 3 s) from which starting processes pays
_Result = TypeVar("_Result")


def build_index(
    sources: list[Source],
    split: Split,
    encoder: Encoder,
    folder: Path,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Index:
    """Index `sources`, re-using below `folder` whatever has not changed.

    workers: processes or Ray tasks at once; None: one a CPU, or 1 where there is little to do.
    Raises UserError: sources.resolve's, a file whose structure is broken or that changes
    meanwhile, a source without one usable example, an encoder that takes none of a kind, a folder
    that cannot be written.
    """
    if not sources:
        raise UserError(f"data.{split} is empty; give it at least one source")
    folder = Path(folder).absolute()
    resolved = formats.resolve_all(sources, split)
    files = [(source, file) for source in resolved for file in source.files]
    sizes = [file.stat().st_size for _, file in files]
    surveyed = _fan_out(_survey, [(*entry, folder) for entry in files], sizes, None, workers)
    surveys = [survey for survey, _ in surveyed]
    found: list[Part | None] = []
    jobs: list[tuple[int, Job]] = []
    for number, ((source, file), survey) in enumerate(zip(files, surveys)):
        cached = parts.load_part(parts.part_path(source, file, survey, encoder, folder))
        found.append(cached)
        if cached is None:
            jobs += [(number, Job(source, file, chunk)) for chunk in survey.chunks]
        elif again := tuple(item for item in cached.rejected if item.audio):
            jobs.append((number, Job(source, file, None, again)))
    sizes = [job.bytes for _, job in jobs]
    measured = _fan_out(parts.measure, [job for _, job in jobs], sizes, encoder, workers, progress)
    chunks: dict[int, list[Part]] = {}
    for (number, _), result in zip(jobs, measured):
        chunks.setdefault(number, []).append(result)
    for number, ((source, file), survey) in enumerate(zip(files, surveys)):
        parts.check_unchanged(source, file, surveyed[number][1])
        found[number] = _renewed(
            found[number],
            chunks.get(number, []),
            parts.part_path(source, file, survey, encoder, folder),
        )
    whole = [part for part in found if part is not None]
    _check_usable(resolved, files, whole)
    return join(resolved, files, [survey.digest for survey in surveys], whole, encoder, folder)


def _renewed(cached: Part | None, results: list[Part], path: Path) -> Part:
    """The part of a file: as cached, with what was measured now in its place."""
    if cached is not None and not results:
        return cached
    if cached is None:
        renewed = Part.join(results)
    else:
        steady = [item for item in cached.rejected if not item.audio]
        renewed = Part.join([Part(cached.rows, cached.tasks, steady), *results])
        if renewed.rejected == cached.rejected:
            return cached
    parts.save_part(path, renewed)
    return renewed


def _check_usable(
    resolved: list[ResolvedSource], files: list[tuple[ResolvedSource, Path]], found: list[Part]
) -> None:
    for source in resolved:
        own = [part for (of, _), part in zip(files, found) if of is source]
        rejected = [item for part in own for item in part.rejected]
        if any(len(part.rows) for part in own):
            continue
        if not rejected:
            raise UserError(f"{source.key}: {source.path} holds no example")
        raise UserError(
            f"{source.key}: none of the {len(rejected)} examples in {source.path} can be used; "
            f"the first: {rejected[0].reason}"
        )


def _survey(job: tuple[ResolvedSource, Path, Path], _: None) -> tuple[Survey, list[int]]:
    return parts.survey_file(*job)


def _fan_out(
    function: Callable[[Any, Any], _Result],
    jobs: list[Any],
    sizes: list[int],
    shared: Any,
    workers: int | None,
    progress: Progress | None = None,
) -> list[_Result]:
    """[function(job, shared) for job in jobs]: by Ray where it runs, else in processes or here."""
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
    for size, result in zip(sizes, found):
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
    return len(os.sched_getaffinity(0))


def _by_processes(
    function: Callable[[Any, Any], _Result], jobs: list[Any], shared: Any, workers: int
) -> Iterator[_Result]:
    context = multiprocessing.get_context("spawn")  # threads and fork do not go together
    with ProcessPoolExecutor(workers, context, _begin, (function, shared)) as pool:
        try:
            yield from pool.map(_one, jobs)
        finally:
            pool.shutdown(cancel_futures=True)


_process: dict[str, Any] = {}


def _begin(function: Callable[[Any, Any], Any], shared: Any) -> None:
    _process.update(function=function, shared=shared)


def _one(job: Any) -> Any:
    return _process["function"](job, _process["shared"])


def _by_ray(
    function: Callable[[Any, Any], _Result], jobs: list[Any], shared: Any, workers: int
) -> Iterator[_Result]:
    import ray

    task = ray.remote(function).options(num_cpus=1, scheduling_strategy="SPREAD")
    reference = ray.put(shared)
    running: list[Any] = []
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
