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
of its own. Sections are named on the command line; full run: about 10 minutes, 8 GB of disk.
"""

from __future__ import annotations

import collections
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import results_io
from matplotlib import pyplot

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
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
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


SECTIONS: dict[str, Callable[[bool], dict[str, Any]]] = {"coordinator": coordinator}


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
