"""Building the index: the table of all examples with their lengths, all that planning reads.

sources -> index (here) -> plan -> stream -> step -> checkpoint -> evaluate -> export.
Every file is surveyed, what is new is measured in parallel (part.py; Ray tasks where Ray runs,
else processes), and the parts are joined into a folder that every node reads (table.py).

Costs: about 0.15 ms an example and core the first time (0.05 of it the clip's header, on a local
disk; as much tokenising), of which a build that is killed loses seconds (unfinished.py); then,
where something has changed, a read of the cached parts. The driver holds about 90 bytes an example
while it joins. Where nothing has, a look at each file and at each clip that is a file (known.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from raysft import patience
from raysft.config.schema import Source
from raysft.data import sources as formats
from raysft.data.encode.base import Measures
from raysft.data.index import part as parts
from raysft.data.index.chunks import fit
from raysft.data.index.fan_out import Progress, fan_out
from raysft.data.index.hope import Hope
from raysft.data.index.known import Known
from raysft.data.index.listing import listed
from raysft.data.index.part import Job, Part
from raysft.data.index.table import Index, IndexedSource, join
from raysft.data.index.unfinished import Unfinished
from raysft.data.sources import ResolvedSource
from raysft.data.sources.base import Chunk, Split, Survey
from raysft.data.sources.records import Place
from raysft.errors import UserError

__all__ = ["Index", "IndexedSource", "build_index"]

log = logging.getLogger(__name__)

READING, LOOKING, MEASURING = "reading files", "looking at known clips", "measuring"
Stages = Callable[[str, int, int], None]
"""Called with what is being done, and `Progress` of it."""

_AGAIN = 4096  # items of a cached part that are measured again in one job


def build_index(
    sources: list[Source],
    split: Split,
    encoder: Measures,
    folder: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    most: float = 1.0,
    stages: Stages | None = None,
    languages: bool = False,
) -> Index:
    """Index `sources`, re-using below `folder` whatever has not changed.

    workers: processes or Ray tasks at once; None: one a CPU, or 1 where there is little to do.
    stages: told how far each stage is.
    most: share of unusable examples (data.max_quarantined) with which the caller can do; below 1,
    indexing stops as soon as there is no hope: a source none of whose first few thousand clips is
    there, or very many unusable examples.
    languages: whether examples are to be counted by the languages they name.
    Raises UserError: sources.resolve's, a file whose structure is broken or that changes
    meanwhile, a source without one usable example, an encoder that takes none of a kind, a folder
    that cannot be written.
    """
    if not sources:
        raise UserError(f"data.{split} is empty; give it at least one source")
    folder = Path(folder).absolute()
    resolved = listed(formats.resolve_all(sources, split), folder, workers, languages)
    files = [(source, file) for source in resolved for file in source.files]
    sizes = [patience.known(file.stat, file).st_size for _, file in files]
    if old := [file for source, file in files if parts.of_before(source, file, folder)]:
        log.warning(
            "data.%s: %s was measured by an earlier version of raysft%s: measured again, once",
            split,
            old[0],
            f" (and {len(old) - 1:,} more files)" if len(old) > 1 else "",
        )

    def of(stage: str) -> Progress | None:
        return partial(stages, stage) if stages is not None else None

    todo_files = [(*entry, folder) for entry in files]
    surveyed = fan_out(_survey, todo_files, sizes, None, workers, of(READING))
    surveys = [survey for survey, _ in surveyed]
    digests = [survey.digest for survey in surveys]
    if split == "train":
        encoder = encoder.of_training()
    places = [parts.part_path(source, file, encoder, folder) for source, file in files]
    known = Known.of(files, digests, places, encoder, folder)
    before = known.index()
    unfinished = Unfinished(folder)
    stored, cached, fresh = _parts(places, surveys, unfinished, rows=before is None)
    replaced = _replaced(cached, encoder, workers, of(LOOKING))
    if before is not None and (any(replaced) or any(fresh)):
        before = None
        stored, cached, fresh = _parts(places, surveys, unfinished)
    jobs: list[tuple[int, Job]] = []
    for number, (source, file) in enumerate(files):
        jobs += [(number, Job(source, file, chunk)) for chunk in fresh[number]]
        part = cached[number]
        if part is None:
            continue
        again = [Place(item.line, item.offset, item.size) for item in part.rejected if item.audio]
        again = sorted([*again, *part.items(replaced[number])], key=lambda place: place.line)
        for at in range(0, len(again), _AGAIN):
            jobs.append((number, Job(source, file, None, tuple(again[at : at + _AGAIN]))))
    if count := sum(map(len, replaced)):
        log.warning(
            "data.%s: clips of %s examples were replaced: measuring them again", split, f"{count:,}"
        )
    sizes = [job.bytes for _, job in jobs]
    todo = [job for _, job in jobs]
    hope = Hope(split, most)
    measured: dict[int, list[Part]] = {}
    whole: dict[int, Part] = {}
    numbers = (number for number, _ in jobs)

    def finish(number: int) -> None:
        """All of a file is measured."""
        source, file = files[number]
        parts.check_unchanged(source, file, surveyed[number][1])
        made = measured.get(number, [])
        whole[number] = _renewed(stored[number], cached[number], replaced[number], made)
        if whole[number] is not stored[number]:
            parts.save_part(places[number], whole[number])
        unfinished.clear(places[number])

    def take(job: Job, part: Part) -> None:
        """What was measured, in the order of the jobs: kept as it comes."""
        hope.check(job, part)
        number = next(numbers)
        if before is None and number not in measured and measured:
            finish(next(reversed(measured)))
        measured.setdefault(number, []).append(part)
        unfinished.add(places[number], part)

    progress = progress or of(MEASURING)
    fan_out(parts.measure, todo, sizes, encoder, workers, progress, take)
    if before is not None:
        if all(_as_it_was(part, measured.get(number, [])) for number, part in enumerate(cached)):
            for (source, file), (_, state) in zip(files, surveyed):
                parts.check_unchanged(source, file, state)
            _say_repeated(before, split)
            return before
        stored, cached, _ = _parts(places, surveys, unfinished)
    for number in range(len(files)):
        if number not in whole:
            finish(number)
    found = [whole[number] for number in range(len(files))]
    _check_usable(resolved, files, found)
    index = join(resolved, files, digests, found, encoder, folder)
    known.keep(index)
    _say_repeated(index, split)
    return index


def _parts(
    places: list[Path], surveys: list[Survey], unfinished: Unfinished, rows: bool = True
) -> tuple[list[Part | None], list[Part | None], list[Sequence[Chunk]]]:
    """The stored parts; what of each holds for its file as it is; the chunks that are new."""
    stored = [parts.load_part(path, rows) for path in places]
    cached: list[Part | None] = []
    fresh: list[Sequence[Chunk]] = []
    for place, part, survey in zip(places, stored, surveys):
        kept, new = (None, survey.chunks) if part is None else fit(part, survey.chunks)
        if not new:
            unfinished.clear(place)  # of a build that was killed beside the one that made it
        for some in unfinished.of(place):
            more, new = fit(some, new)
            kept = more if kept is None else Part.join([kept, more])
        cached.append(kept)
        fresh.append(new)
    return stored, cached, fresh


def _as_it_was(part: Part | None, made: list[Part]) -> bool:
    """Whether what could not be used of a part, measured again, still cannot be."""
    before = [item for item in part.rejected if item.audio] if part is not None else []
    return before == [item for new in made for item in new.rejected] and not any(
        len(new.rows) for new in made
    )


def _say_repeated(index: Index, split: Split) -> None:
    """Name an id that records share: people mean ids to be unique."""
    if index.repeats is None:
        return
    rows = np.array(index.repeats.rows)
    ids = [example.id for example in index.examples(rows, named=False)]
    if ids[0] != ids[1]:  # their hashes alone are the same, by chance
        return
    places = [index.where(row) for row in index.repeats.rows]
    names = [example.id for example in index.examples(rows)]
    log.warning(
        "data.%s: %s examples have an id that others have too: %r is that of %s and of %s. They "
        "are told apart by their place: these two are %s and %s",
        split,
        f"{index.repeats.count:,}",
        ids[0],
        *places,
        *names,
    )


def _replaced(
    cached: list[Part | None], encoder: Measures, workers: int | None, progress: Progress | None
) -> list[frozenset[int]]:
    """Of each cached part the lines whose clips are not as they were when they were measured."""
    if encoder.sample_rate is None:
        return [frozenset()] * len(cached)
    owners = [(number, piece) for number, part in enumerate(cached) if part for piece in part.clips]
    pieces = [piece for _, piece in owners]
    # A piece is that of a chunk of a data file, about ten times its size.
    sizes = [10 * len(piece.data) for piece in pieces]
    lines = fan_out(parts.replaced, pieces, sizes, encoder, workers, progress)
    found: list[set[int]] = [set() for _ in cached]
    for (number, _), some in zip(owners, lines):
        found[number].update(some)
    return list(map(frozenset, found))


def _renewed(
    stored: Part | None, cached: Part | None, replaced: frozenset[int], new: list[Part]
) -> Part:
    """The part of a file: what is cached, with what was measured now in its place; `stored` itself
    where that is the same."""
    if cached is None:
        return Part.join(new)
    if cached is stored and not new and not replaced:
        return cached
    steady = [item for item in cached.rejected if not item.audio]
    renewed = Part.join([replace(cached.without(replaced), rejected=steady), *new])
    same = cached is stored and renewed.rejected == cached.rejected and not replaced
    return cached if same else renewed


def _check_usable(
    resolved: list[ResolvedSource], files: list[tuple[ResolvedSource, Path]], found: list[Part]
) -> None:
    for source in resolved:
        own = [part for (of, _), part in zip(files, found) if of is source]
        rejected = [item for part in own for item in part.refused]
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
