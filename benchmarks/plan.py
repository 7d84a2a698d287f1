"""What does planning cost, for a million examples and for a hundred million?

The columns of an index are made in chunks as memory-mapped files in a temporary folder. Each size
runs in a process of its own; measured are seconds to build the plan (one reading of the columns),
to its first step from the start and from 99% of an epoch, and to plan a whole epoch, and the peak
of the process's own memory (anonymous: what the system cannot drop, unlike the mapped columns).
Full run: about 3 minutes and 0.8 GB of disk.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import results_io
from matplotlib import pyplot

from raysft.config.schema import Data
from raysft.data.plan.plan import Cursor, Plan

SOURCES = 10
REPEATS = 9
_CHUNK = 1 << 22
DATA = Data(lanes=32, tokens_per_batch=60_000)


class PeakMemory(threading.Thread):
    """Samples this process's anonymous memory; `peak_mb` once stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stop_now = threading.Event()
        self.peak_mb = 0.0

    def run(self) -> None:
        while not self._stop_now.wait(0.01):
            status = Path("/proc/self/status").read_text()
            kb = int(status.split("RssAnon:")[1].split()[0])
            self.peak_mb = max(self.peak_mb, kb / 1024)

    def stop(self) -> float:
        self._stop_now.set()
        self.join()
        return self.peak_mb


def make_columns(folder: Path, n: int) -> None:
    """tokens, task and source of n examples: log-normal lengths, ten sources one after another."""
    opened = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (n,))
        for name, dtype in (("tokens", np.int32), ("task", np.int16), ("source", np.int16))
    }
    rng = np.random.default_rng(0)
    for at in range(0, n, _CHUNK):
        stop = min(n, at + _CHUNK)
        draws = rng.lognormal(1.6, 0.7, stop - at)
        opened["tokens"][at:stop] = np.clip(draws, 0.3, 35) * 100
        opened["task"][at:stop] = rng.integers(0, 2, stop - at)
        opened["source"][at:stop] = np.arange(at, stop) * SOURCES // n
    for column in opened.values():
        column.flush()


def measure(folder: Path, n: int) -> dict[str, Any]:
    """All numbers for one size, in a fresh process."""
    memory = PeakMemory()
    memory.start()
    columns = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("tokens", "task", "source")
    }
    began = time.perf_counter()
    plan = Plan(
        columns["tokens"],
        columns["task"],
        ["asr", "tts"],
        columns["source"],
        [1.0] * SOURCES,
        "benchmark",
        DATA,
        0,
    )
    build = time.perf_counter() - began
    # A cursor names a window, so one late in the epoch can be written down without planning to it.
    late = Cursor(plan.hash, 0, 10**6, ((0, int(0.99 * (n / DATA.window - 1)), 0),))
    firsts: dict[str, list[float]] = {"0%": [], "99%": []}
    for _ in range(REPEATS):
        for name, cursor in (("0%", plan.start()), ("99%", late)):
            began = time.perf_counter()
            next(plan.steps(cursor))
            firsts[name].append(time.perf_counter() - began)
    steps_peak = memory.peak_mb
    began = time.perf_counter()
    steps = 0
    for step in plan.steps(plan.start()):
        steps += 1
        if step.after.epoch > 0:
            break
    epoch = time.perf_counter() - began
    from_0, from_99 = (statistics.median(firsts[name]) for name in ("0%", "99%"))
    return {
        "examples": n,
        "build_s": build,
        "first_step_from_0_s": from_0,
        "first_step_from_99_s": from_99,
        "from_99_over_from_0": from_99 / from_0,
        "epoch_s": epoch,
        "epoch_steps": steps,
        "examples_per_s": n / epoch,
        "peak_own_memory_mb": memory.stop(),
        "peak_own_memory_first_step_mb": steps_peak,
    }


def draw(results: list[dict[str, Any]]) -> pyplot.Figure:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    kinds = {
        "build_s": "build",
        "first_step_from_0_s": "first step\nfrom 0%",
        "first_step_from_99_s": "first step\nfrom 99%",
        "epoch_s": "whole epoch",
    }
    for at, result in enumerate(results):
        where = np.arange(len(kinds)) + at * 0.4
        bars = left.bar(
            where, [result[k] for k in kinds], 0.38, label=f"{result['examples']:.0e} examples"
        )
        left.bar_label(bars, [f"{result[k]:.3g}" for k in kinds], fontsize=8)
    left.set(yscale="log", ylabel="seconds", title="time")
    left.set_xticks(np.arange(len(kinds)) + 0.2, list(kinds.values()))
    left.legend()
    bars = right.bar(
        [f"{r['examples']:.0e}" for r in results], [r["peak_own_memory_mb"] for r in results], 0.5
    )
    right.bar_label(bars, fmt="%.0f")
    right.set(ylabel="MB", title="peak of own memory", xlabel="examples")
    return figure


def main() -> None:
    options = results_io.arguments(__doc__.splitlines()[0])
    results = []
    for n in (10_000, 200_000) if options.quick else (10**6, 10**8):
        with tempfile.TemporaryDirectory() as folder:
            make_columns(Path(folder), n)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                result = pool.submit(measure, Path(folder), n).result()
        results.append(result)
        print(
            f"{n:.0e} examples: build {result['build_s']:.2f} s, first step from 0% "
            f"{result['first_step_from_0_s']:.3f} s, from 99% "
            f"{result['first_step_from_99_s']:.3f} s "
            f"({result['from_99_over_from_0']:.2f} x), epoch {result['epoch_s']:.1f} s "
            f"({result['examples_per_s']:,.0f} examples/s), "
            f"{result['peak_own_memory_mb']:.0f} MB"
        )
    payload = {"window": DATA.window, "lanes": DATA.lanes, "results": results}
    print(results_io.write("plan", payload, draw(results), quick=options.quick, out=options.out))


if __name__ == "__main__":
    main()
