"""What would 1,000 workers, and a hundred million examples, cost a cluster and a driver?

    coordinator   calls and CPU that a worker's stream costs actors of the whole cluster
    planner       build, first step and memory of a plan
    index         a second start: the index of data that has not changed

`coordinator` counts, in a Ray of this process, the calls of actors in some seconds of a stream: as
a chain of Ray datasets (what raysft had), as one dataset that a long task feeds (the cheapest that
Ray Data offers), and as raysft's own tasks. What a call costs is timed in Ray's own
`_AutoscalingCoordinatorActor`, with as many datasets alive as there are workers and 8 workers a
node. An hour of W workers is then W times a worker's calls, times what each costs beside W others:
counted, not run.

The other sections make columns or files of that many examples in a temporary folder, in a process
of its own. Full run: about 5 minutes, 6 GB of disk, 2 GB of memory.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import plan
import results_io
from matplotlib import pyplot

from raysft.config.schema import Source
from raysft.data.clips.audio import Limits
from raysft.data.index import part as parts
from raysft.data.index import table
from raysft.data.index.build import build_index
from raysft.data.index.known import Known
from raysft.data.plan.plan import Plan
from raysft.data.sources import ResolvedSource, resolve_all
from raysft.data.sources.base import Chunk, Survey

WORKERS = (64, 256, 1024)
WORKERS_A_NODE = 8
SPAN, BATCHES = 8, 8  # chunks a dataset, micro-batches a chunk
SPAN_S = 4.0  # that a dataset of a chain lasts: 8 chunks of 512 examples on 4 CPUs, 2 ms each


def coordinator(quick: bool) -> dict[str, Any]:
    """Calls of cluster-wide actors by a stream, and their CPU for W workers."""
    seconds = 3.0 if quick else 30.0
    workers = WORKERS[:1] if quick else WORKERS
    costs = {count: call_costs(count, 3 if quick else 20) for count in workers}
    calls = counted(seconds)
    hours = {
        way: {
            str(count): 3600 * count * sum(rate * costs[count][name] for name, rate in each.items())
            for count in workers
        }
        for way, each in calls.items()
    }
    for way, each in calls.items():
        busy = ", ".join(f"{n} workers {s / 3600:.2f}" for n, s in hours[way].items())
        told = ", ".join(f"{name} {3600 * rate:,.0f}" for name, rate in each.items()) or "none"
        print(f"{way}: calls a worker and hour: {told}; cores of cluster-wide actors: {busy}")
    return {
        "calls_a_worker_and_second": calls,
        "seconds_a_call": {str(count): each for count, each in costs.items()},
        "actor_cpu_seconds_an_hour": hours,
    }


def call_costs(count: int, repeats: int) -> dict[str, float]:
    """CPU seconds of each call, with the datasets of `count` workers alive."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as ours

    cpus = {"CPU": 96.0, "GPU": 8.0, "memory": 1e12, "object_store_memory": 3e11}
    nodes = [
        {"NodeID": f"{n:056x}", "Alive": True, "Resources": cpus, "Labels": {}}
        for n in range(max(1, count // WORKERS_A_NODE))
    ]
    actor = ours._AutoscalingCoordinatorActor(
        send_resources_request=lambda *_, **__: None, get_cluster_nodes=lambda: nodes
    )
    everything = ["CPU", "GPU", "memory", "object_store_memory"]

    def register(name: str) -> None:
        actor.request_resources(name, [], expire_after_s=1e6, request_remaining=everything)

    requests = actor._ongoing_reqs
    for number in range(count - 1):  # each of them alone costs as many milliseconds
        requests[f"data-{number}"] = ours.OngoingRequest(
            first_request_time=time.time(),
            requested_resources=[],
            requested_label_selectors=[],
            request_remaining=frozenset(everything),
            priority=ours.ResourceRequestPriority.MEDIUM.value,
            expiration_time=time.time() + 1e6,
            reserved_resources={},
            strategy=ours.ResourceRequestStrategy.PACK,
        )

    def timed(call: Callable[[], object]) -> float:
        began = time.process_time()
        call()
        return time.process_time() - began

    found = collections.defaultdict(list)
    for number in range(repeats):
        name = f"new-{number}"
        found["request_resources"].append(timed(lambda name=name: register(name)))
        again = [timed(lambda name=name: register(name)) for _ in range(10)]
        found["request_again"].append(float(np.mean(again)))
        asked = [timed(lambda name=name: actor.get_reserved_resources(name)) for _ in range(10)]
        found["get_reserved_resources"].append(float(np.mean(asked)))
        found["cancel_request"].append(timed(lambda name=name: actor.cancel_request(name)))
    costs = {name: float(np.median(times)) for name, times in found.items()}
    return collections.defaultdict(lambda: CALL_S, {n: s + CALL_S for n, s in costs.items()})


CALL_S = 2e-4
"""CPU of any call of an actor: what Ray itself needs to receive one (5,000 calls/s a core)."""


ONCE = ("register_dataset", "cancel_request")


def counted(seconds: float) -> dict[str, dict[str, float]]:
    """Calls of actors a second, by name, of each way to stream."""
    import ray
    import ray.actor
    import ray.data

    calls: collections.Counter[str] = collections.Counter()
    call = ray.actor.ActorMethod._remote

    asked: dict[str, Any] = {}

    def counting(method: Any, args: Any = None, kwargs: Any = None, **settings: Any) -> Any:
        name, given = method._method_name, kwargs or {}
        if name == "request_resources":
            who, what = given["requester_id"], given["resources"]
            name = "request_again" if asked.get(who) == what else name
            asked[who] = what
        calls[name] += 1
        return call(method, args, kwargs, **settings)

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    ray.actor.ActorMethod._remote = counting
    ways = {"chain of datasets": chain, "one dataset": one, "tasks": tasks}
    found = {}
    try:
        for name, way in ways.items():
            next(way(0.1))  # processes are there
            calls.clear()
            began = time.perf_counter()
            for _ in way(seconds):
                pass
            took = time.perf_counter() - began
            found[name] = {key: count / took for key, count in calls.items()}
            if name == "one dataset":  # it begins once and never ends
                found[name] = {key: rate for key, rate in found[name].items() if key not in ONCE}
                found[name]["request_resources"] -= 1 / took
    finally:
        ray.actor.ActorMethod._remote = call
        ray.shutdown()
    return found


def chain(seconds: float) -> Iterator[object]:
    """Micro-batches of one dataset after another, each of `SPAN_S`."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pause = SPAN_S * 2 / SPAN / BATCHES  # on two CPUs
        yield from _dataset([[pause] * BATCHES for _ in range(SPAN)])


def _dataset(spans: list[list[float]]) -> Iterator[object]:
    import pyarrow
    import ray
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def task(pauses: list[float]) -> Any:
        def blocks() -> Iterator[Any]:
            for pause in pauses:
                time.sleep(pause)
                yield pyarrow.table({"x": [0]})

        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(blocks, metadata)

    class Source(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[Any]:
            return [task(pauses) for pauses in spans]

    read = ray.data.read_datasource(Source(), override_num_blocks=len(spans), concurrency=2)
    return iter(read.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))


def one(seconds: float) -> Iterator[object]:
    """Micro-batches of one dataset: a task that yields chunks, and tasks that read them."""
    import pyarrow
    import ray
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    pause = SPAN_S * 2 / SPAN / BATCHES
    count = max(1, int(seconds * 2 / pause / BATCHES))

    def chunks() -> Iterator[Any]:
        for number in range(count):
            yield pyarrow.table({"chunk": [number]})

    class Source(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[Any]:
            nothing = BlockMetadata(
                num_rows=None, size_bytes=None, input_files=None, exec_stats=None
            )
            return [ReadTask(chunks, nothing)]

    def read(chunk: dict[str, np.ndarray]) -> Iterator[dict[str, list[int]]]:
        for _ in range(BATCHES):
            time.sleep(pause)
            yield {"x": [int(chunk["chunk"][0])]}

    source = ray.data.read_datasource(Source(), override_num_blocks=1, num_cpus=0)
    found = source.map_batches(read, batch_size=None, concurrency=2)
    return iter(found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))


def tasks(seconds: float) -> Iterator[object]:
    """Micro-batches of raysft's stream, whose works take as long."""
    import ray

    from raysft.data.read import stream
    from raysft.data.read.reader import Work

    pause = SPAN_S * 2 / SPAN / BATCHES
    count = max(1, int(seconds * 2 / pause))
    works = [Work(0, n, 0, np.arange(stream.CHUNK // BATCHES)) for n in range(count)]
    spec = stream.ReaderSpec((), ray.put(Sleeper(pause)), 0, None)
    return stream.RayReader(Slow(spec, pause), np.zeros(stream.CHUNK), 2).read(iter(works))


class Sleeper:
    """Reads nothing, slowly."""

    def __init__(self, pause: float) -> None:
        self.pause = pause

    def read_chunk(self, works: list[Any]) -> Iterator[Any]:
        from raysft.data.example import MicroBatch

        for work in works:
            time.sleep(self.pause)
            yield MicroBatch.join(work.epoch, work.step, work.lane, [])


class Slow:
    """As `ReaderSpec`, of a `Sleeper`."""

    def __init__(self, spec: object, pause: float) -> None:
        self.pause = pause

    def reader(self) -> Sleeper:
        return Sleeper(self.pause)


ROWS = 1_000_000  # of a data file
TOKENS = (30, 3500)
_CHUNK = 1 << 22


def planner(quick: bool) -> dict[str, Any]:
    """Building a plan of many examples, its first step, and the memory of that."""
    count = 200_000 if quick else 10**8
    with tempfile.TemporaryDirectory() as folder:
        plan.make_columns(Path(folder), count)
        return apart(plan_of, folder, count)


def plan_of(folder: str, count: int) -> dict[str, Any]:
    """In a process of its own."""
    memory = plan.PeakMemory()
    memory.start()
    columns = [
        np.load(Path(folder) / f"{name}.npy", mmap_mode="r")
        for name in ("tokens", "task", "source")
    ]
    began = time.perf_counter()
    tokens, task, source = columns
    weights = [1.0] * plan.SOURCES
    made = Plan(tokens, task, ["asr", "tts"], source, weights, "benchmark", plan.DATA, 0)
    built = time.perf_counter()
    next(made.steps(made.start()))
    return {
        "examples": count,
        "build_s": built - began,
        "first_step_s": time.perf_counter() - built,
        "peak_own_memory_mb": memory.stop(),
    }


def index(quick: bool) -> dict[str, Any]:
    """A second start: data that has not changed, its parts joined again as before, and as it is."""
    found: dict[str, Any] = {}
    counts = (200_000, 400_000) if quick else (10**7, 10**8)
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            sources = corpus(Path(folder), count)
            ways = ("joined", "kept") if count == counts[0] else ("kept",)
            if ways == ("kept",):  # too large to be joined here: as joining leaves it
                joined(Path(folder), sources, count)
            for way in ways:
                result = apart(start, folder, sources, way == "kept")
                found[f"{count} examples, {way}"] = result
                print(f"{count:,} examples, {way}: {result}", flush=True)
    return found


class Lengths:
    """An encoder of text alone, of which only what it is called is asked."""

    sample_rate = None
    fingerprint = "lengths"
    limits = Limits()


def corpus(folder: Path, count: int) -> list[str]:
    """Data files of `ROWS` examples with the cached parts that measuring them would leave. They are
    as long as such files are, and empty: nothing reads them."""
    rows = np.zeros(min(ROWS, count), parts.ROW)
    rng = np.random.default_rng(0)
    rows["tokens"] = rng.integers(*TOKENS, len(rows))
    rows["line"], rows["size"] = np.arange(1, len(rows) + 1), 200
    rows["offset"] = 200 * np.arange(len(rows))
    old, first, names = time.time() - 100, None, []
    for number in range(-(-count // ROWS)):
        file = folder / f"data_{number:04}.jsonl"
        with open(file, "wb") as stream:
            stream.write(b" " * 65536 + b"\n")
            stream.truncate(200 * len(rows))
        os.utime(file, (old, old))
        names.append(str(file))
        source = sources_of([str(file)])[0]
        chunk = Chunk(0, 200 * len(rows), 1, "chunk")  # the same of each: linked
        survey = Survey(f"digest {number}", 200 * len(rows), (chunk,))
        content = {"version": parts.MEASURED, "state": parts._state(file), **asdict(survey)}
        content["chunks"] = [astuple(chunk)]
        cached = parts._surveyed(source, file, folder / "index")
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(json.dumps(content))
        rows["name"] = rng.integers(1, 2**63, len(rows)) if count == 10**7 else rows["name"]
        place = parts.part_path(source, file, Lengths(), folder / "index")
        if first is None or count <= 10**7:
            parts.save_part(place, parts.Part(rows, ["asr"], [], (), ((chunk, ("asr",)),)))
            first = place
        else:
            os.link(first, place)
    return names


def sources_of(names: list[str]) -> list[ResolvedSource]:
    given = [Source(path=name, format="messages") for name in names]
    return resolve_all(given, "train")


def joined(folder: Path, names: list[str], count: int) -> None:
    """The folder of columns that joining makes, and the record of it."""
    resolved = sources_of(names)
    files = [(source, source.files[0]) for source in resolved]
    target = folder / "index" / ("0" * 32)
    target.mkdir()
    for name, dtype in table._COLUMNS.items():
        column = np.lib.format.open_memmap(target / f"{name}.npy", "w+", dtype, (count,))
        for at in range(0, count if name in ("tokens", "source") else 0, _CHUNK):
            stop = min(count, at + _CHUNK)
            column[at:stop] = np.arange(at, stop) * 7919 % 3000 + 30
            if name == "source":
                column[at:stop] = np.arange(at, stop) // ROWS
        column.flush()
    meta = {
        "version": parts.VERSION,
        "hash": "0" * 64,
        "examples": count,
        "names": 1,
        "heard": 1,
        "tasks": ["asr"],
        "sources": [
            {"name": s.name, "weight": s.weight, "format": s.format, "task": s.task}
            for s in resolved
        ],
        "encoder": "lengths",
        "files": [
            [name, number, f"digest {number}", "", ROWS] for number, name in enumerate(names)
        ],
    }
    (target / "meta.json").write_text(json.dumps(meta))
    (target / "rejected.jsonl").write_text("")
    digests = [f"digest {number}" for number in range(len(names))]
    encoder = Lengths()
    places = [parts.part_path(source, file, encoder, folder / "index") for source, file in files]
    made = Known.of(files, digests, places, encoder, folder / "index")
    made.keep(table.Index.load(target))


def start(folder: str, names: list[str], kept: bool) -> dict[str, Any]:
    """What a start does with data that it knows: index, plan, first step. In its own process."""
    memory = plan.PeakMemory()
    memory.start()
    if not kept:
        for record in (Path(folder) / "index" / "parts").glob("*.json"):
            record.unlink()
    began = time.perf_counter()
    given = [Source(path=name, format="messages") for name in names]
    found = build_index(given, "train", Lengths(), Path(folder) / "index", workers=1)
    indexed = time.perf_counter()
    made = Plan.of(found, plan.DATA, 0)
    next(made.steps(made.start()))
    return {
        "index_s": indexed - began,
        "plan_and_first_step_s": time.perf_counter() - indexed,
        "peak_own_memory_mb": memory.stop(),
    }


def apart(function: Callable[..., dict[str, Any]], *given: object) -> dict[str, Any]:
    """function(*given) in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


SECTIONS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "coordinator": coordinator,
    "planner": planner,
    "index": index,
}


def draw(results: dict[str, Any]) -> pyplot.Figure:
    figure, axis = pyplot.subplots(figsize=(6, 3.4))
    for way, hours in results["coordinator"]["actor_cpu_seconds_an_hour"].items():
        counts = [int(count) for count in hours]
        axis.plot(counts, [max(1e-3, s / 3600) for s in hours.values()], "o-", label=way)
    axis.axhline(1, color="grey", linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel="workers", ylabel="cores of cluster-wide actors")
    axis.legend()
    return figure


def main() -> None:
    options = results_io.arguments(__doc__.splitlines()[0])
    payload = {name: section(options.quick) for name, section in SECTIONS.items()}
    print(results_io.write("scale", payload, draw(payload), quick=options.quick, out=options.out))


if __name__ == "__main__":
    main()
