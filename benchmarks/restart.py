"""How long does a restart take to forget what was recorded after its checkpoint?

A run's folder with ledgers of several sizes, 8 lanes, 32 ids a line; the last 100 steps lie after
the checkpoint. Timed is what rank 0 does there (`last_recorded`, `cut_back_run`), in a process of
its own, files in the page cache as far as they fit:

    as written     files of 4 MB a lane, as a run of this version leaves them
    one a start    one long file a lane, as versions before left them
    every line     each line parsed and copied, as versions before did it (up to 1 GB)

`memory_mb` is what the process grew by. Full run: about 2 minutes, 22 GB of disk.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import results_io
from matplotlib import pyplot

from raysft.run import ledger, lines
from raysft.run.ledger import FULL
from raysft.train.metrics import cut_back_run, last_recorded

LANES, IDS, AFTER = 8, 32, 100
SIZES = {"full": (0.1, 1.0, 10.0), "quick": (0.01, 0.02)}  # GB
PARSED = 1.0  # GB, up to which every line is parsed too


def line_of(step: int, lane: int) -> bytes:
    ids = [f"corpus/shard-{step % 1000:05d}:{number}" for number in range(IDS)]
    content = {"epoch": 0, "step": step, "lane": lane, "ids": ids, "quarantined": []}
    content |= {"tensors": "0" * 32, "chain": "0" * 32}
    return json.dumps(content).encode() + b"\n"


def write_ledger(folder: Path, gigabytes: float, full: int) -> int:
    """Files of `full` bytes; returns the last step."""
    (folder / "ledger").mkdir(parents=True)
    # Steps of equal width, made once and changed in place: json.dumps would take an hour.
    template = line_of(10_000_000, 0)
    steps = int(gigabytes * 1e9 / LANES / len(template))
    head, tail = template.split(b"10000000", 1)
    for lane in range(LANES):
        rest = tail.replace(b'"lane": 0', b'"lane": %d' % lane, 1)
        first = 1
        while first <= steps:
            last = min(steps, first + max(1, full // len(template)) - 1)
            content = b"".join(b"%b%8d%b" % (head, step, rest) for step in range(first, last + 1))
            path = folder / "ledger" / f"lane_{lane}_from_{1 if full > FULL else first}.jsonl"
            with open(path, "ab") as out:
                out.write(content)
            first = last + 1
    return steps


def timed(folder: str, step: int, every_line: bool, answer: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run, begun = Path(folder), time.monotonic()
    if every_line:
        for own in ledger.files(run).values():
            for _, path in own:
                sum(1 for _ in lines.stream_lines(path))
                lines._replace(path, step, 0)
    else:
        assert last_recorded(run) == step + AFTER
        assert not cut_back_run(run, step)
        assert last_recorded(run) == step
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    answer.put({"seconds": round(time.monotonic() - begun, 3), "memory_mb": round(grown / 1e3, 1)})


def measure(gigabytes: float, full: int, every_line: bool = False) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        steps = write_ledger(Path(folder), gigabytes, full)
        context = get_context("spawn")
        answer = context.Queue()
        worker = context.Process(
            target=timed, args=(folder, steps - AFTER, every_line, answer), daemon=True
        )
        worker.start()
        found = answer.get(timeout=1200)
        worker.join()
    print(f"{gigabytes:g} GB, files of {full / 1e6:.0f} MB, every line {every_line}: {found}")
    return found


def draw(results: dict[str, dict[str, dict[str, float]]]) -> pyplot.Figure:
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for way, by_size in results.items():
        sizes = [float(size) for size in by_size]
        axis.plot(sizes, [found["seconds"] for found in by_size.values()], "o-", label=way)
    axis.set(xscale="log", yscale="log", xlabel="ledger, GB", ylabel="restart, s")
    axis.legend()
    return figure


def main() -> None:
    options = results_io.arguments(__doc__.splitlines()[0])
    results: dict[str, dict[str, dict[str, float]]] = {}
    for size in SIZES["quick" if options.quick else "full"]:
        found = {"as written": measure(size, FULL), "one a start": measure(size, 64 * FULL)}
        if size <= PARSED:
            found["every line"] = measure(size, 64 * FULL, every_line=True)
        for way, numbers in found.items():
            results.setdefault(way, {})[f"{size:g}"] = numbers
    payload = {"lanes": LANES, "results": results}
    results_io.write("restart", payload, draw(results), quick=options.quick, out=options.out)


if __name__ == "__main__":
    main()
