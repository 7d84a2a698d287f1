"""What does a checkpoint cost, and is going on from 99% of an epoch as quick as from 1%?

Checkpoints: a Qwen3 with random weights in fp32, AdamW, one process on 3 torch threads, no Ray.
Rounds of three times ten steps: with no save; after a save begun as the loop does (`Saver.start`);
after one that training waits for (`Saver.start`, `Saver.wait`). `stall_s` is what training waits,
`slower_s` what the ten steps after it take longer than ten without a save. The medians count.

Resuming: an index of 1e7 examples, its columns made up, in the page cache. Timed is all that the
data side does from a cursor at 1% and at 99% of an epoch until the first ten steps are planned:
opening the index, holding it against plan.json and making the plan, the first step, nine more.
`windows` are those filled with micro-batches meanwhile. Full run: about 3 minutes, 2.5 GB of disk.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import results_io
from matplotlib import pyplot
from plan import DATA, SOURCES, make_columns

LAP = 10  # steps
SHARES = (0.01, 0.99)  # of an epoch


@dataclass(frozen=True)
class Shape:
    """A model, the tokens of its steps, and how often it is measured."""

    hidden: int
    layers: int
    tokens: int
    rounds: int
    threads: int = 3


FULL = (Shape(256, 5, 512, rounds=5), Shape(640, 9, 128, rounds=3))
QUICK = (Shape(64, 2, 64, rounds=2, threads=1),)


# -- what a checkpoint costs ---------------------------------------------------------------------


def save_costs(folder: Path, shape: Shape) -> dict[str, Any]:
    """All numbers for one model, in a fresh process."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, Qwen3Config

    from raysft.config.checkpoint import Checkpoint
    from raysft.config.schema import Config
    from raysft.parallel import World
    from raysft.parallel.ddp import Ddp
    from raysft.run.catalogue import Catalogue
    from raysft.train.checkpoint import Saver

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process
    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=512,
            hidden_size=shape.hidden,
            intermediate_size=4 * shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.hidden // 64,
            num_key_value_heads=shape.hidden // 64,
            head_dim=64,
            tie_word_embeddings=False,
        )
    )
    strategy = Ddp(Config(), model, World.current())
    ids = torch.randint(0, 512, (1, shape.tokens))
    saver = Saver(Catalogue.of(Checkpoint(), folder), World.current(), keep=1)

    def lap() -> float:
        """Seconds of ten steps."""
        began = time.perf_counter()
        for _ in range(LAP):
            logits = model(input_ids=ids, use_cache=False).logits
            F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
            strategy.step(1.0)
        return time.perf_counter() - began

    def save(number: int, wait: bool) -> float:
        """Seconds that training waits."""
        began = time.perf_counter()
        saver.start(number, strategy, {"cursor": None})
        if wait:
            saver.wait()
        return time.perf_counter() - began

    lap()
    first_stall = save(1, wait=True)  # of a process: imports, and the optimizer's names
    saver.finished()
    rounds = []
    for number in range(shape.rounds):
        plain = lap()
        stall = save(2 * number + 2, wait=False)
        after = lap()
        saver.wait()
        (written,) = saver.finished()
        waited = save(2 * number + 3, wait=True)
        after_waiting = lap()
        saver.finished()
        rounds.append(
            {
                "plain_s": plain,
                "async": {"stall_s": stall, "slower_s": after - plain},
                "sync": {"stall_s": waited, "slower_s": after_waiting - plain},
                "published_after_s": written.seconds,
                "bytes": written.bytes,
            }
        )

    def median(way: str, key: str) -> float:
        return statistics.median(found[way][key] for found in rounds)

    plain = statistics.median(found["plain_s"] for found in rounds)
    costs: dict[str, dict[str, float]] = {}
    for way in ("async", "sync"):
        stall, slower = median(way, "stall_s"), median(way, "slower_s")
        costs[way] = {
            "stall_s": stall,
            "slower_s": slower,
            "slower_share": slower / plain,
            "cost_s": stall + slower,
        }
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": rounds[0]["bytes"],
        "step_s": plain / LAP,
        "first_stall_s": first_stall,
        "published_after_s": statistics.median(found["published_after_s"] for found in rounds),
        **costs,
        "rounds": rounds,
    }


# -- what going on costs -------------------------------------------------------------------------


def make_index(folder: Path, n: int) -> None:
    """The folder of an index of n examples in one file, which is not there: none is read."""
    from raysft.data.index import part

    folder.mkdir()
    make_columns(folder, n)
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    seconds = np.lib.format.open_memmap(folder / "seconds.npy", "w+", np.float32, (n,))
    seconds[:] = tokens / np.float32(100)
    for name, dtype in (("file", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("line", "<i8")):
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (n,))
    np.lib.format.open_memmap(folder / "crc.npy", "w+", "<u4", (n,))
    np.lib.format.open_memmap(folder / "again.npy", "w+", "|u1", (n,))
    source = {"weight": 1.0, "format": "ming_jsonl", "task": None}
    meta = {
        "version": part.VERSION,
        "hash": "0" * 64,
        "examples": n,
        "names": 1,
        "tasks": ["asr", "tts"],
        "sources": [{"name": f"source{number}", **source} for number in range(SOURCES)],
        "encoder": "none",
        "files": [["none.jsonl", 0, "0" * 64, "0" * 64, n]],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "rejected.jsonl").touch()


def resume_costs(folder: Path, n: int, repeats: int) -> dict[str, Any]:
    """All numbers of going on from 1% and from 99%, in turn, in a fresh process."""
    from raysft.data.index.build import Index
    from raysft.data.plan import pack
    from raysft.data.plan.plan import Cursor, Plan
    from raysft.run import plans

    index = Index.load(folder / "index")
    plan_hash = Plan.of(index, DATA, 0).hash
    plans.follow(folder, index, DATA, 0, None)
    windows = n / DATA.window - 1
    # A cursor names a window, so one late in the epoch can be written down without planning to it.
    cursors = {
        share: Cursor(plan_hash, 0, int(share * 1e5), ((0, int(share * windows), 0),)).to_json()
        for share in SHARES
    }
    found: dict[float, list[dict[str, float]]] = {share: [] for share in SHARES}
    for number in range(2 * repeats):
        share = SHARES[number % 2]
        with mock.patch.object(pack, "packed", wraps=pack.packed) as fill:
            times = [time.perf_counter()]
            cursor = Cursor.from_json(cursors[share])
            index = Index.load(folder / "index")
            times.append(time.perf_counter())
            plan = plans.follow(folder, index, DATA, 0, cursor)
            times.append(time.perf_counter())
            steps = plan.steps(cursor)
            next(steps)
            times.append(time.perf_counter())
            assert len(list(islice(steps, LAP - 1))) == LAP - 1
            times.append(time.perf_counter())
            opening, planning, first, rest = np.diff(times).tolist()
            found[share].append(
                {
                    "open_index_s": opening,
                    "make_plan_s": planning,
                    "first_step_s": first,
                    "nine_more_steps_s": rest,
                    "total_s": times[-1] - times[0],
                    "windows": fill.call_count,
                }
            )
    medians = {
        f"{share:.0%}": {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        for share, runs in found.items()
    }
    ratio = medians["99%"]["total_s"] / medians["1%"]["total_s"]
    return {"examples": n, "repeats": repeats, **medians, "from_99_over_from_1": ratio}


# -- all -----------------------------------------------------------------------------------------


def draw(saves: list[dict[str, Any]], resumed: dict[str, Any]) -> pyplot.Figure:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    names, bottoms = [], []
    for result in saves:
        for way in ("async", "sync"):
            names.append(f"{way}\n{result['parameters'] / 1e6:.1f} M")
            bottoms.append((result[way]["stall_s"], max(0.0, result[way]["slower_s"])))
    stalls, slower = (np.array(values) for values in zip(*bottoms))
    left.bar(names, stalls, color="tab:red", label="training waits")
    bars = left.bar(names, slower, bottom=stalls, color="tab:orange", label="next ten steps slower")
    left.bar_label(bars, [f"{total:.2f}" for total in stalls + slower], fontsize=8)
    left.set(ylabel="seconds", title="a checkpoint costs the training")
    left.legend()
    bottom = np.zeros(len(SHARES))
    places = [f"{share:.0%}" for share in SHARES]
    for key in ("open_index_s", "make_plan_s", "first_step_s", "nine_more_steps_s"):
        values = np.array([resumed[place][key] for place in places])
        label = key.removesuffix("_s").replace("_", " ")
        bars = right.bar(places, values, 0.5, bottom=bottom, label=label)
        bottom += values
    right.bar_label(bars, [f"{total:.2f}" for total in bottom], fontsize=8)
    right.set(
        ylabel="seconds",
        xlabel=f"of an epoch of {resumed['examples']:.0e} examples",
        title="going on from",
    )
    right.legend(loc="lower center")
    figure.tight_layout()
    return figure


def main() -> None:
    options = results_io.arguments(__doc__.splitlines()[0])
    load = os.getloadavg()[0]
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `launch` sets it for workers
    saves = []
    for shape in QUICK if options.quick else FULL:
        with (
            tempfile.TemporaryDirectory() as scratch,
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        ):
            result = pool.submit(save_costs, Path(scratch), shape).result()
        saves.append({"shape": vars(shape), **result})
        for way in ("async", "sync"):
            cost = result[way]
            print(
                f"{result['parameters'] / 1e6:5.1f} M parameters, {way:5}: training waits "
                f"{cost['stall_s']:.3f} s, the next ten steps take {cost['slower_s']:+.3f} s "
                f"({cost['slower_share']:+.1%}); {result['bytes'] / 1e6:,.0f} MB"
            )
    n, repeats = (200_000, 2) if options.quick else (10**7, 5)
    with tempfile.TemporaryDirectory() as scratch:
        make_index(Path(scratch) / "index", n)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            resumed = pool.submit(resume_costs, Path(scratch), n, repeats).result()
    for place in ("1%", "99%"):
        cost = resumed[place]
        print(
            f"from {place:>3} of {n:.0e} examples: {cost['total_s']:.3f} s to ten planned steps, "
            f"{cost['windows']:g} windows filled"
        )
    print(f"99% / 1%: {resumed['from_99_over_from_1']:.2f}")
    payload = {"load_before": load, "saves": saves, "resume": resumed}
    figure = draw(saves, resumed)
    print(results_io.write("resume", payload, figure, quick=options.quick, out=options.out))


if __name__ == "__main__":
    main()
