"""Preparation on Ray: an index of data.train, its shards made side by side, data.list at the end.

    <prepare.path>/shards/000000.parquet   000000.ids
                   data.list               a shard's path a line; written once all are there
                   quarantine.jsonl        a line an utterance that could not be used
                   prepare.json            what was asked for, and what came of it
                   prepare.html            the same for people
                   state/                  what is needed to go on

Each shard is written whole, under its number, by whoever makes it; a preparation that was killed
goes on with those that are not there. Ray Data runs the makers: actors, as many as there are CPUs,
that hold the models of speech tokens and speakers where there are some.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import ray

from raysft import patience, plugins
from raysft.config.prepare import Prepare
from raysft.config.schema import Config
from raysft.data.clips.audio import Limits
from raysft.data.example import Example, Quarantined
from raysft.data.index.build import Index, build_index
from raysft.data.sources.shards import LIST
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.prepare import embed, plan, shard, summary
from raysft.prepare.listener import Listener
from raysft.prepare.tools import Tools

Progress = Callable[[JsonObject], None]
NOTE = "prepare.json"
_CHANGED = {
    "index": "data.train has changed",
    "prepare": "prepare has changed",
    "tools": "data.speech_tokens, or the weights of a model, have changed",
}


@dataclass(frozen=True)
class Prepared:
    """What there is at the end. path: of data.list. rows, rejected: utterances. seconds: of audio.
    made: shards that this start made; shards: all."""

    path: Path
    rows: int
    seconds: float
    shards: int
    made: int
    rejected: int


def run(config: Config, progress: Progress) -> Prepared:
    """Make the shards that are not there yet. Ray is connected.

    Raises UserError: nothing to prepare, another preparation's folder, storage that fails.
    """
    settings = config.prepare
    folder = Path(str(settings.path))
    limits = Limits.of(config.data)
    progress({"doing": f"listing and measuring {len(config.data.train)} source(s)"})
    index = _index(config, folder, limits, progress)
    cuts = plan.cuts(index, settings)
    tools = Tools.of(config, folder)
    _claim(config, folder, index, tools)
    gpus = _gpus(settings, tools)
    _fit(config, index, tools, gpus, progress)
    _embed(config, folder, index, cuts, tools, gpus, progress)
    todo = [number for number in range(len(cuts)) if not _path(folder, number).exists()]
    progress({"doing": f"making {len(todo):,} of {len(cuts):,} shards into {folder}"})
    _make(config, folder, index, cuts, todo, tools, gpus, progress)
    return _finish(folder, index, len(cuts), len(todo))


def _index(config: Config, folder: Path, limits: Limits, progress: Progress) -> Index:
    def told(done: int, total: int) -> None:
        progress({"doing": f"measuring: {done / max(total, 1):.0%} of {total / 2**20:,.0f} MiB"})

    cache = Path(config.data.index_path) if config.data.index_path else folder / "state" / "index"
    encoder = plan.Lengths(limits)
    most = config.data.max_quarantined
    return build_index(config.data.train, "train", encoder, cache, progress=told, most=most)


def _claim(config: Config, folder: Path, index: Index, tools: Tools) -> None:
    """Say what the folder is for. Raises UserError where it is for something else."""
    asked = {
        "index": index.hash,
        "prepare": config.prepare.model_dump(mode="json", exclude={"path", "workers", "gpus"}),
        "tools": tools.facts(),
    }
    note = folder / NOTE
    if note.is_file():
        found = json.loads(note.read_bytes())["asked"]
        changed = [name for name in asked if found.get(name) != asked[name]]
        if changed:
            raise UserError(
                f"prepare.path: {folder} holds a preparation of something else "
                f"({_CHANGED[changed[0]]}): give "
                "another folder, or remove this one"
            )
        return
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    shard.put(note, json.dumps({"asked": asked}, indent=1).encode())


def _path(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:06d}.parquet"


@dataclass(frozen=True)
class Work:
    """What actors are given. cuts: see `plan.cuts`."""

    config: Config
    folder: Path
    index: Index
    cuts: list[tuple[int, int]]
    tools: Tools

    def begin(self) -> Limits:
        """In an actor's process."""
        patience.allow(self.config.patience_s)
        plugins.load(tuple(self.config.plugins))
        return Limits.of(self.config.data)

    def examples(self, number: int) -> tuple[list[Example], list[str]]:
        """Of a shard, and the names of their sources."""
        rows = np.arange(*self.cuts[number])
        return self.index.examples(rows), [self.index.source_name(int(row)) for row in rows]


class Actor(ABC):
    """An actor of Ray Data. A UserError is what it comes to, not what it ends with: Ray Data would
    wrap it, and lose it."""

    def __init__(self, work: Work) -> None:
        self.work, self.limits = work, work.begin()

    @abstractmethod
    def make(self, number: int) -> tuple[int, float]:
        """What is to be made of that number; utterances and seconds in it."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[object]]:
        """batch: `number` [1]. Its figures, or why there are none."""
        rows, seconds, refused = 0, 0.0, ""
        try:
            rows, seconds = self.make(int(batch["number"][0]))
        except UserError as error:
            refused = str(error)
        return {"rows": [rows], "seconds": [seconds], "refused": [refused]}


class Fitter(Actor):
    """Fits the method of speech tokens."""

    def make(self, number: int) -> tuple[int, float]:
        """number: 0."""
        self.work.tools.fit(self.work.config, self.work.index)
        return 0, 0.0


class Embedder(Actor):
    """Hears who speaks in the utterances of a shard."""

    @cached_property
    def listener(self) -> Listener:
        """Not made with the actor, whose UserError would be its death."""
        return self.work.tools.speaker()

    def make(self, number: int) -> tuple[int, float]:
        """number: of the shard."""
        examples, _ = self.work.examples(number)
        embed.make(self.work.folder, number, examples, self.limits, self.listener)
        return len(examples), 0.0


class Maker(Actor):
    """Makes shards."""

    @cached_property
    def tokenizer(self) -> shard.Tokenizer | None:
        """Not made with the actor, whose UserError would be its death."""
        return self.work.tools.tokenizer()

    @cached_property
    def speakers(self) -> dict[str, np.ndarray]:
        """Their embeddings."""
        return embed.means(self.work.folder)

    def make(self, number: int) -> tuple[int, float]:
        """number: of the shard."""
        folder, embedded = self.work.folder, None
        if self.work.tools.speakers is not None:
            embedded = embed.of_shard(folder, number, self.speakers)
        examples = list(zip(*self.work.examples(number), strict=True))
        settings = self.work.config.prepare
        made = shard.make(examples, settings, self.limits, self.tokenizer, embedded)
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in made.rejected)
        shard.put(folder / "state" / f"{number:06d}.rejected", lines.encode())
        shard.write(_path(folder, number), made.columns)
        seconds = float(sum(made.columns["seconds"]))  # type: ignore[arg-type]
        return len(made.columns["utt"]), seconds


def _gpus(settings: Prepare, tools: Tools) -> float:
    """Of a GPU, for each actor."""
    by_model = tools.models is not None or tools.speakers is not None
    return settings.gpus if by_model and ray.cluster_resources().get("GPU", 0) else 0.0


def _fit(config: Config, index: Index, tools: Tools, gpus: float, progress: Progress) -> None:
    tools.fit_plain(config, progress)
    if tools.models is not None and tools.unfitted():
        progress({"doing": f"fitting {tools.models.clusters} clusters of speech tokens"})
        work = Work(config, tools.folder, index, [], tools)
        for _ in spread(Fitter, work, [0], 1, gpus):
            pass


def _embed(
    config: Config,
    folder: Path,
    index: Index,
    cuts: list[tuple[int, int]],
    tools: Tools,
    gpus: float,
    progress: Progress,
) -> None:
    if tools.speakers is None:
        return
    todo = [number for number in range(len(cuts)) if not embed.place(folder, number).exists()]
    if todo:
        work = Work(config, folder, index, cuts, tools)
        for done, _ in enumerate(spread(Embedder, work, todo, config.prepare.workers, gpus), 1):
            progress({"doing": f"speakers: {done:,} of {len(todo):,} shards"})
    embed.average(folder, len(cuts))


def _make(
    config: Config,
    folder: Path,
    index: Index,
    cuts: list[tuple[int, int]],
    todo: list[int],
    tools: Tools,
    gpus: float,
    progress: Progress,
) -> None:
    if not todo:
        return
    (folder / "state").mkdir(exist_ok=True)
    work = Work(config, folder, index, cuts, tools)
    done = rows = 0
    seconds = 0.0
    for row in spread(Maker, work, todo, config.prepare.workers, gpus):
        done, rows, seconds = done + 1, rows + row["rows"], seconds + row["seconds"]
        progress(
            {
                "doing": f"shards: {done:,} of {len(todo):,}, {rows:,} utterances, "
                f"{seconds / 3600:.2f} h"
            }
        )


def spread(
    maker: type[Actor], work: Work, todo: list[int], workers: int | None, gpus: float
) -> Iterator[JsonObject]:
    """What `maker`s come to with each number of `todo`, as they are done: actors of Ray Data, each
    with a CPU, and `gpus` of a GPU. Raises the UserError of any."""
    resources = ray.cluster_resources()
    room = resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 1)
    count = max(1, min(len(todo), workers or int(room)))
    data = ray.data.from_items(
        [{"number": number} for number in todo], override_num_blocks=len(todo)
    )
    made = data.map_batches(
        maker,
        fn_constructor_kwargs={"work": work},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    for row in made.iter_rows():
        if row["refused"]:
            raise UserError(row["refused"])
        yield row


def _finish(folder: Path, index: Index, shards: int, made: int) -> Prepared:
    """data.list, quarantine.jsonl, the figures and their page."""
    rejected = list(index.rejected)
    for number in range(shards):
        lines = (folder / "state" / f"{number:06d}.rejected").read_text().splitlines()
        rejected += [Quarantined(**json.loads(line)) for line in lines]
    put = shard.put
    quarantine = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in rejected)
    put(folder / "quarantine.jsonl", quarantine.encode("utf-8", "surrogatepass"))
    paths = [_path(folder, number) for number in range(shards)]
    totals = summary.gather(paths)
    asked = json.loads((folder / NOTE).read_bytes())["asked"]
    rows, seconds = len(totals.seconds), float(totals.seconds.sum())
    figures = {"rows": rows, "seconds": seconds, "shards": shards, "rejected": len(rejected)}
    put(folder / NOTE, json.dumps({"asked": asked, "made": figures}, indent=1).encode())
    put(folder / summary.PAGE, summary.page(folder, asked, totals, shards, len(rejected)))
    put(folder / LIST, "".join(f"{path.absolute()}\n" for path in paths).encode())
    shutil.rmtree(folder / "state" / "parts", ignore_errors=True)
    return Prepared(folder / LIST, rows, seconds, shards, made, len(rejected))
