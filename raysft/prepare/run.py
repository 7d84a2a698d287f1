"""Preparation on Ray: an index of data.train, its shards made side by side, data.list at the end.

    <prepare.path>/shards/000000.parquet   000000.ids
                   data.list               a shard's path a line; written once all are there
                   quarantine.jsonl        a line an utterance that could not be used
                   prepare.json            what was asked for, and what came of it
                   state/                  what is needed to go on

Each shard is written whole, under its number, by whoever makes it; a preparation that was killed
goes on with those that are not there. Ray Data runs the makers: actors, as many as there are CPUs,
that hold the models of speech tokens and speakers where there are some.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import ray

from raysft import patience, plugins
from raysft.config.schema import Config
from raysft.data.clips.audio import Limits
from raysft.data.example import Quarantined
from raysft.data.index.build import Index, build_index
from raysft.data.sources.shards import LIST
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.prepare import plan, shard
from raysft.prepare.tools import Tools

Progress = Callable[[JsonObject], None]
NOTE = "prepare.json"


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
    tools = tools.ready(config, index, progress)
    todo = [number for number in range(len(cuts)) if not _path(folder, number).exists()]
    progress({"doing": f"making {len(todo):,} of {len(cuts):,} shards into {folder}"})
    _make(config, folder, index, cuts, todo, tools, progress)
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
        "prepare": config.prepare.model_dump(mode="json", exclude={"path", "workers"}),
        "tools": tools.facts(),
    }
    note = folder / NOTE
    if note.is_file():
        found = json.loads(note.read_bytes())["asked"]
        changed = [name for name in asked if found.get(name) != asked[name]]
        if changed:
            what = "data.train has changed" if "index" in changed else f"{changed[0]} has changed"
            raise UserError(
                f"prepare.path: {folder} holds a preparation of something else ({what}): give "
                "another folder, or remove this one"
            )
        return
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    shard.put(note, json.dumps({"asked": asked}, indent=1).encode())


def _path(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:06d}.parquet"


class Maker:
    """Makes shards; an actor of Ray Data."""

    def __init__(
        self, config: Config, folder: Path, index: Index, cuts: list[tuple[int, int]], tools: Tools
    ) -> None:
        patience.allow(config.patience_s)
        plugins.load(tuple(config.plugins))
        self.config, self.folder, self.index, self.cuts = config, folder, index, cuts
        self.tools = tools
        self.tokenizer = tools.tokenizer()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[object]]:
        """batch: `number` [1] of the shard. Its figures."""
        number = int(batch["number"][0])
        rows = np.arange(*self.cuts[number])
        names = [self.index.source_name(int(row)) for row in rows]
        examples = list(zip(self.index.examples(rows), names, strict=True))
        made = shard.make(
            examples,
            self.config.prepare,
            Limits.of(self.config.data),
            self.tokenizer,
            self.tools.embedded(number),
        )
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in made.rejected)
        shard.put(self.folder / "state" / f"{number:06d}.rejected", lines.encode())
        shard.write(_path(self.folder, number), made.columns)
        seconds = float(sum(made.columns["seconds"]))  # type: ignore[arg-type]
        return {"number": [number], "rows": [len(made.columns["utt"])], "seconds": [seconds]}


def _make(
    config: Config,
    folder: Path,
    index: Index,
    cuts: list[tuple[int, int]],
    todo: list[int],
    tools: Tools,
    progress: Progress,
) -> None:
    if not todo:
        return
    (folder / "state").mkdir(exist_ok=True)
    given = {"config": config, "folder": folder, "index": index, "cuts": cuts, "tools": tools}
    done = rows = 0
    seconds = 0.0
    for row in spread(Maker, given, todo, config.prepare.workers, tools.gpus()):
        done, rows, seconds = done + 1, rows + row["rows"], seconds + row["seconds"]
        progress(
            {
                "doing": f"shards: {done:,} of {len(todo):,}, {rows:,} utterances, "
                f"{seconds / 3600:.2f} h"
            }
        )


def spread(
    maker: type, given: dict[str, object], todo: list[int], workers: int | None, gpus: float
) -> Iterator[JsonObject]:
    """What `maker`s come to with each number of `todo`, as they are done: actors of Ray Data, each
    with a CPU, or `gpus` of a GPU."""
    resources = ray.cluster_resources()
    room = resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 1)
    count = max(1, min(len(todo), workers or int(room)))
    data = ray.data.from_items(
        [{"number": number} for number in todo], override_num_blocks=len(todo)
    )
    made = data.map_batches(
        maker,
        fn_constructor_kwargs=given,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    try:
        yield from made.iter_rows()
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while cause is not None and not isinstance(cause, UserError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise


def _finish(folder: Path, index: Index, shards: int, made: int) -> Prepared:
    """data.list, quarantine.jsonl and the figures."""
    import pyarrow.parquet as pq

    rejected = list(index.rejected)
    rows, seconds, hours = 0, 0.0, {}
    for number in range(shards):
        lines = (folder / "state" / f"{number:06d}.rejected").read_text().splitlines()
        rejected += [Quarantined(**json.loads(line)) for line in lines]
        table = pq.read_table(_path(folder, number), columns=["seconds", "spk"])
        rows += len(table)
        seconds += float(np.sum(table.column("seconds").to_numpy()))
        hours[number] = len(table)
    put = shard.put
    quarantine = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in rejected)
    put(folder / "quarantine.jsonl", quarantine.encode("utf-8", "surrogatepass"))
    asked = json.loads((folder / NOTE).read_bytes())["asked"]
    figures = {"rows": rows, "seconds": seconds, "shards": shards, "rejected": len(rejected)}
    put(folder / NOTE, json.dumps({"asked": asked, "made": figures}, indent=1).encode())
    paths = "".join(f"{_path(folder, number).absolute()}\n" for number in range(shards))
    put(folder / LIST, paths.encode())
    shutil.rmtree(folder / "state" / "parts", ignore_errors=True)
    return Prepared(folder / LIST, rows, seconds, shards, made, len(rejected))
