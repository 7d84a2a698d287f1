"""The part of an index that one file makes: measured in chunks, cached until the file changes.

Stands between sources and the index (build.py joins parts; measuring is spread over processes
there). For each item: parse it, probe its clips' headers, ask the encoder how long it will be.
Two things are cached below the index's folder:

    files/<path's hash>.json  what `survey` found, valid while size and times stay as they are
    parts/<key>.npz           lengths and places of a file's examples, and what their clips were
                              like, with the digests of its chunks; the key is made of the file's
                              place, format, task, encoder, limits of length and MEASURED

Of a file that has changed only those chunks are measured that are new (chunks.py). Of the others
those clips are measured again that could not be used, so that a repaired file comes back, and those
that were replaced (clips/states.py). Costs: 0.15 ms an item and core, 0.05 of it the clip's header
on a local disk; 60 bytes an example.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import io
import json
import os
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from raysft import patience
from raysft.data import names, sources
from raysft.data.clips import audio
from raysft.data.clips.states import Piece, States, at_once, changed
from raysft.data.encode.base import Measures
from raysft.data.example import Audio, Example
from raysft.data.sources import ResolvedSource
from raysft.data.sources.base import Chunk, Format, Item, Survey, default_id, origin
from raysft.data.sources.fields import check_duration
from raysft.data.sources.records import OpenFile, Place, fetch
from raysft.errors import BadExample, UserError

VERSION = 1
"""Of an index: raise it when its columns or what they mean change. Runs that go on read the index
they were planned with, and cannot read one of another version."""

MEASURED = 9
"""Of what is cached below an index's folder: raise it when lengths may come out otherwise than
before, or other items count as examples. Everything is then measured anew; where it comes out as
before, a run goes on."""

ROW = np.dtype(
    [
        ("tokens", "<i4"),
        ("seconds", "<f4"),
        ("task", "<i2"),
        ("offset", "<i8"),
        ("size", "<i4"),
        ("line", "<i8"),
        ("crc", "<u4"),
        ("name", "<u8"),
        ("heard", "<f4"),
        ("lang", "<i4"),
    ]
)
"""An example: its positions in the model, its seconds of audio, its task, and where its record
lies (byte offset, bytes, line; crc32 of the bytes, by which a later change is noticed), its id's
hash (`names.hashed`; 0: it has none of its own), the seconds of audio that the model's encoder
computes for it (`Encoder.workload`), and its language."""

_RACY_NS = 2_000_000_000

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Rejected:
    """An item without an example. `audio`: because of a clip, so it is looked at again later.

    id, reason: tell its line. kind: of the reason, see `Quarantined`.
    """

    line: int
    offset: int
    size: int
    id: str
    path: str
    reason: str
    audio: bool
    kind: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Part:
    """What a file's items came to. rows: ROW [examples], by line; `task` counts in `tasks`, `lang`
    in `langs`, which may hold some that no example has.

    clips: what their clips were like, in one or more pieces.
    chunks: of which chunks of the file this is, and the tasks of each; none: of single items.
    """

    rows: np.ndarray
    tasks: list[str]
    rejected: list[Rejected]
    clips: tuple[Piece, ...] = ()
    chunks: tuple[tuple[Chunk, tuple[str, ...]], ...] = ()
    langs: list[str] = field(default_factory=list)

    @classmethod
    def join(cls, parts: Iterable[Part]) -> Part:
        """Of chunks: one part, sorted by line, its tasks and languages by name."""
        parts = list(parts)
        langs = sorted({lang for part in parts for lang in part.langs})
        tasks = sorted({task for part in parts for task in part.tasks})
        blocks = [np.zeros(0, ROW)]
        for part in parts:
            rows = part.rows.copy()
            rows["task"] = renumber(part.tasks, tasks)[rows["task"]]
            rows["lang"] = renumber(part.langs, langs)[rows["lang"]]
            blocks.append(rows)
        rows = np.concatenate(blocks)
        rows = rows[np.argsort(rows["line"], kind="stable")]
        rejected = sorted((r for part in parts for r in part.rejected), key=lambda r: r.line)
        clips = tuple(piece for part in parts for piece in part.clips)
        chunks = sorted((c for part in parts for c in part.chunks), key=lambda c: c[0].first)
        return cls(rows, tasks, rejected, clips, tuple(chunks), langs)

    def without(self, lines: Collection[int]) -> Part:
        """The examples of other lines."""
        if not lines:
            return self
        rows = self.rows[~np.isin(self.rows["line"], list(lines))]
        pieces = (piece.split(lambda line: None if line in lines else 0) for piece in self.clips)
        return replace(self, rows=rows, clips=tuple(one for some in pieces for one in some))

    def items(self, lines: Collection[int]) -> list[Place]:
        """Where the items of these examples lie."""
        rows = self.rows[np.isin(self.rows["line"], list(lines))]
        return [Place(*map(int, row)) for row in rows[["line", "offset", "size"]].tolist()]

    @property
    def refused(self) -> list[Rejected]:
        """The rejected, those once that are several questions about one record."""
        known = {(item.id, item.path, item.reason): item for item in reversed(self.rejected)}
        return [*reversed(known.values())]

    def hash(self) -> str:
        """Of what is planned from it: which lines, how long, of which task."""
        digest = hashlib.sha256(json.dumps(self.tasks).encode())
        for name in ("line", "tokens", "seconds", "task"):
            digest.update(np.ascontiguousarray(self.rows[name]).data)
        return digest.hexdigest()


def renumber(own: list[str], common: list[str]) -> np.ndarray:
    """int32 [own]: where each of `own` stands in `common`; -1 for one that is not there."""
    there = {name: place for place, name in enumerate(common)}
    return np.array([there.get(name, -1) for name in own] or [0], np.int32)


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of a file to be measured: a chunk, or items of a cached part again."""

    source: ResolvedSource
    file: Path
    chunk: Chunk | None
    again: tuple[Place, ...] = ()

    @property
    def bytes(self) -> int:
        """How much there is to do."""
        if self.chunk is None:
            return sum(item.size for item in self.again)
        return self.chunk.stop - self.chunk.start


def survey_file(source: ResolvedSource, file: Path, folder: Path) -> tuple[Survey, list[int]]:
    """Hash and chunks of a file, from the cache if the file has not been touched; and its state.

    Raises UserError naming the source where the file's structure is broken.
    """
    return patience.known(lambda: _survey_file(source, file, folder), file)


def _survey_file(source: ResolvedSource, file: Path, folder: Path) -> tuple[Survey, list[int]]:
    cached = _surveyed(source, file, folder)
    before = _state(file)
    if cached.exists():
        with _stored(cached):
            found = json.loads(cached.read_bytes())
            if found["state"] == before and found["version"] == MEASURED:
                chunks = tuple(Chunk(*chunk) for chunk in found["chunks"])
                return Survey(found["digest"], found["size"], chunks), before
    try:
        survey = sources.get(source.format).survey(file)
    except UserError as error:
        raise UserError(f"{source.key}: {error}") from error
    check_unchanged(source, file, before)
    if survey.size != before[0]:
        raise OSError(errno.EIO, f"{survey.size:,} of {before[0]:,} bytes read", str(file))
    # A file written just now can change once more within the clock's grain: not remembered.
    if time.time_ns() - before[1] > _RACY_NS:
        content = {"version": MEASURED, "file": str(file), "state": before, **asdict(survey)}
        content["chunks"] = [astuple(chunk) for chunk in survey.chunks]
        write_whole(cached, lambda stream: stream.write(json.dumps(content).encode()))
    return survey, before


def _surveyed(source: ResolvedSource, file: Path, folder: Path) -> Path:
    return folder / "files" / f"{digest_of(str(file), source.format)}.json"


def check_unchanged(source: ResolvedSource, file: Path, state: list[int]) -> None:
    """Raises UserError if the file is no longer as it was at `state`."""
    if patience.known(lambda: _state(file), file)[:2] != state[:2]:
        raise UserError(f"{source.key}: {file} changed while it was indexed; start again")


def _state(file: Path) -> list[int]:
    """Bytes, and times of the last change of content and of inode (the latter: this node's)."""
    found = os.stat(file)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def measure(job: Job, encoder: Measures) -> Part:
    """Parse, probe and measure a job's items. Raises UserError where no example of a kind fits."""
    # Garbage is looked for among all objects alive, more of them with every item: a quarter of it.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _measure(job, encoder)
    finally:
        if collects:
            gc.enable()


def _measure(job: Job, encoder: Measures) -> Part:
    form = sources.get(job.source.format)

    def read() -> list[Item]:
        if job.chunk is not None:
            return list(form.items(job.file, job.chunk))
        return list(_read_again(form, job))

    items = patience.known(read, job.file)
    file = origin(job.file)
    kept: list[tuple[Item, Example, list[Audio]]] = []
    rejected: list[Rejected] = []
    for item in items:
        found = sources.read(form, item, job.file, job.source.task)
        if found.example is not None:
            kept.append((item, found.example, found.example.audio()))
        else:
            assert found.error is not None
            rejected.append(_rejected(item, found.id, str(file), found.error, False, found.kind))
    lengths = _probe_all({clip.sound for *_, audio in kept for clip in audio}, encoder)
    tasks = sorted({example.task for _, example, _ in kept})
    langs = sorted({example.counted for _, example, _ in kept})
    number = {lang: place for place, lang in enumerate(langs)}
    rows: list[tuple[int | float, ...]] = []
    states = States()
    for item, example, heard_of in kept:
        clips = [lengths[clip.sound] for clip in heard_of] if lengths else []
        bad = next((clip for clip in clips if clip.reason), None)
        path = heard_of[0].path if clips else str(file)
        unheard = True
        try:
            if bad is not None:
                path = bad.path
                raise BadExample(bad.reason, bad.kind)
            for audio_of, clip in zip(heard_of, clips):
                path = clip.path
                check_duration(audio_of.stated, clip.seconds)
            unheard = False
            samples = [clip.samples for clip in clips]
            tokens, heard = encoder.measure(example, samples), encoder.workload(example, samples)
        except BadExample as error:
            reason = f"{sources.place_of(form, item, file)}: {error}"
            # Of a record whose clip cannot be used, nothing that is asked about it can.
            name = example.rated[0].original if unheard and example.rated else example.id
            rejected.append(_rejected(item, name, path, reason, bool(clips), error.kind))
            continue
        except UserError as error:
            place = sources.place_of(form, item, file)
            raise UserError(f"{job.source.key}: {example.id} ({place}): {error}") from error
        assert item.raw is not None
        seconds = sum(clip.seconds for clip in clips)
        own = names.hashed(example.id) if _names_itself(form, item, example, job) else 0
        place_of = (item.offset, item.size, item.line, zlib.crc32(item.raw), own)
        lang = number[example.counted]
        rows.append((tokens, seconds, tasks.index(example.task), *place_of, heard, lang))
        for audio_of, clip in zip(heard_of, clips):
            if audio_of.stored is not None:  # else the record's checksum tells
                states.add(item.line, audio_of.stored, clip.size, clip.mtime_ns)
    chunks = ((job.chunk, tuple(tasks)),) if job.chunk is not None else ()
    return Part(np.array(rows, ROW), tasks, rejected, Piece.of(states), chunks, langs)


def _names_itself(form: Format, item: Item, example: Example, job: Job) -> bool:
    """Whether an example's id is its record's own, and not one made of its line, which may be
    another's tomorrow."""
    default = default_id(job.file, item.line)
    if example.id != default:
        return True
    assert item.raw is not None
    if b"\\" not in item.raw and default.encode("utf-8", "surrogateescape") not in item.raw:
        return False  # it is not even there: spares nearly all a second look
    return form.parse(item.raw, job.file, item.line + 1, job.source.task).id == default


def replaced(piece: Piece, encoder: Measures) -> list[int]:
    """Lines of a part's examples whose clips are not as they were; piece: one of `Part.clips`."""
    return changed(piece, encoder.limits)


def _rejected(
    item: Item, name: str, path: str, reason: str, audio: bool, kind: str | None
) -> Rejected:
    return Rejected(item.line, item.offset, item.size, name, path, reason, audio, kind)


def _read_again(form: Format, job: Job) -> Iterator[Item]:
    for place, raw in zip(job.again, fetch(form, OpenFile(job.file), job.again), strict=True):
        yield Item(place.offset, place.size, place.line, raw)


@dataclass(frozen=True, slots=True)
class _Clip:
    path: str
    samples: int
    seconds: float
    size: int = 0
    mtime_ns: int = 0
    reason: str = ""
    kind: str | None = None


def _probe_all(clips: set[Audio], encoder: Measures) -> dict[Audio, _Clip]:
    """Lengths of clips at the encoder's rate, from their headers; {} where it takes no clips.

    Of files of which parts are clips: each is asked once.
    """
    rate, limits = encoder.sample_rate, encoder.limits
    if rate is None or not clips:
        return {}

    def measured(clip: Audio, found: audio.Probed) -> _Clip:
        length = audio.resampled_length(found.samples, found.rate, rate)
        seconds = found.samples / found.rate
        return _Clip(clip.path, length, seconds, found.size, found.mtime_ns)

    def refused(clip: Audio, error: BadExample) -> _Clip:
        return _Clip(clip.path, 0, 0.0, reason=str(error), kind=error.kind)

    whole = {clip for clip in clips if not clip.part}
    found = _asked(lambda clip: measured(clip, audio.probe(clip, limits)), whole, limits)
    parts = clips - whole
    files = _asked(lambda file: audio.probe(file, audio.ANY), {p.file for p in parts}, limits)
    for clip in parts:
        file = files[clip.file]
        try:
            cut = file if isinstance(file, BadExample) else audio.part_of(clip, file, limits)
        except BadExample as error:
            cut = error
        found[clip] = cut if isinstance(cut, BadExample) else measured(clip, cut)
    return {
        clip: refused(clip, one) if isinstance(one, BadExample) else one
        for clip, one in found.items()
    }


def _asked(
    question: Callable[[Audio], _Answer], clips: set[Audio], limits: audio.Limits
) -> dict[Audio, _Answer | BadExample]:
    return at_once(question, sorted(clips, key=lambda clip: clip.path), limits) if clips else {}


def part_path(source: ResolvedSource, file: Path, encoder: Measures, folder: Path) -> Path:
    """Where the part of a file is cached. The place counts: clips may be relative to it."""
    lengths = (encoder.limits.min_seconds, encoder.limits.max_seconds)
    facts = (str(file), source.format, source.task, encoder.fingerprint, lengths)
    return folder / "parts" / f"{digest_of(MEASURED, encoder.sample_rate, *facts)}.npz"


def of_before(source: ResolvedSource, file: Path, folder: Path) -> bool:
    """Whether an earlier version of raysft has looked at the file, for the index in `folder`."""
    cached = _surveyed(source, file, folder)
    if not patience.known(cached.exists, cached):
        return False
    with _stored(cached):
        content = patience.known(cached.read_bytes, cached)
        return json.loads(content)["version"] != MEASURED


def load_part(path: Path, rows: bool = True) -> Part | None:
    """The cached part, or None. rows: without them it has no examples, and costs next to nothing
    where there are no clips."""
    return patience.known(lambda: _load_part(path, rows), path)


def _load_part(path: Path, rows: bool) -> Part | None:
    try:
        # Whole where it is needed whole: zipfile takes an error of the storage for damage.
        content = io.BytesIO(path.read_bytes()) if rows else path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return None
    with content, _stored(path), np.load(content, allow_pickle=False) as stored:
        meta = json.loads(stored["meta"].tobytes())
        rejected = [Rejected(**item) for item in meta["rejected"]]
        clips = stored["clips"].tobytes()
        ends = accumulate((size for size, *_ in meta["clips"]), initial=0)
        pieces = tuple(
            Piece(clips[start:end], *lines)
            for (start, end), (_, *lines) in zip(pairwise(ends), meta["clips"])
        )
        chunks = tuple((Chunk(*chunk), tuple(tasks)) for chunk, tasks in meta["chunks"])
        own = stored["rows"] if rows else np.zeros(0, ROW)
        return Part(own, meta["tasks"], rejected, pieces, chunks, meta["langs"])


def save_part(path: Path, part: Part) -> None:
    """Cache a part (all of it or nothing)."""
    rejected = [asdict(item) for item in part.rejected]
    meta = {
        "tasks": part.tasks,
        "langs": part.langs,
        "rejected": rejected,
        "clips": [(len(one.data), one.low, one.high, one.shift) for one in part.clips],
        "chunks": [(astuple(chunk), tasks) for chunk, tasks in part.chunks],
    }
    content = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    clips = np.frombuffer(b"".join(piece.data for piece in part.clips), np.uint8)
    write_whole(path, lambda stream: np.savez(stream, rows=part.rows, meta=content, clips=clips))


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that is there whole or not at all, whoever else writes it at the same time.

    Raises UserError where the folder cannot be written or the disk is full.
    """

    def put() -> None:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    with writing(path.parent):
        patience.patiently(put, path)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns the system's refusals to write below `folder` into a UserError naming the key."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.index_path: cannot write the index into {folder}: {error.strerror or error}; "
            "free space there, or set data.index_path to another folder"
        ) from error


@contextlib.contextmanager
def _stored(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"data.index_path: {path} is damaged ({error}); delete it, and it is made again"
        ) from error


def digest_of(*facts: object) -> str:
    """32 hex digits of what json can write."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
