"""How random is the order, what does it cost, and how alike are the lanes of a step?

    variance    of a step's mean of a speaker's property (runs of 64 examples a speaker, as corpora
                are sorted), over that under true permutations with the same step sizes; and the
                correlation of that mean from one step to the next (lag 1)
    speakers    pairs of one speaker (runs of 100 to 300 examples) in a step, over how many a free
                shuffle has
    pairs again how often two examples of one micro-batch meet again in the next epoch, over how
                often by chance, for micro-batches of these sizes
    imbalance   squares of lengths (attention) in a step's dearest lane over the mean lane; and the
                share of the rows that no token fills
    ingest      text records parsed, tokenised and joined to micro-batches a second, over order
                sequential, where records are read one after the other

`version 1` and `version 2` are how runs were planned before, and those that began then still are.
Lengths are
log-normal (median 5 s, clipped to 0.5 to 30 s), 25 positions a second behind a prompt of 20. Above
a million examples the first 300 steps are compared. Full run: about 15 minutes, 3 GB of memory.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import results_io
from matplotlib import pyplot

from raysft.config.schema import Data, Model, Source
from raysft.data.plan.plan import ALGORITHM, Plan, PlannedStep

SPEAKER = 64  # examples
NAMES = {1: "version 1", 2: "version 2", ALGORITHM: "now"}
STEPS = 300  # of an epoch of more than a million
BATCHES = ((16, 8192), (64, 16384))  # lanes, positions of a micro-batch
ROWS = (2000, 4000, 8250, 15_000)  # positions: 80, 160, 330 and 600 s


def lengths(n: int) -> np.ndarray:
    """Positions of n examples, int32."""
    seconds = np.clip(np.random.default_rng(0).lognormal(np.log(5), 0.7, n), 0.5, 30)
    return ((seconds * 25).astype(np.int32) + 20).astype(np.int32)


def make_plan(tokens: np.ndarray, algorithm: int, seed: int = 0, **data: Any) -> Plan:
    zeros = np.zeros(len(tokens), np.int16)
    settings = Data(**data)
    return Plan(tokens, zeros, ["asr"], zeros, [1.0], "benchmark", settings, seed, algorithm)


def epoch(plan: Plan, number: int = 0, most: int | None = None) -> Iterator[PlannedStep]:
    """The steps of an epoch; at most so many."""
    steps = itertools.takewhile(lambda s: s.epoch <= number, plan.steps(plan.start()))
    return itertools.islice((s for s in steps if s.epoch == number), most)


def mixing(n: int, lanes: int, budget: int, algorithm: int, seeds: int) -> dict[str, float]:
    """Variance and lag-1 correlation of step means, medians over seeds."""
    tokens = lengths(n)
    values = np.repeat(np.random.default_rng(5).standard_normal(n // SPEAKER + 1), SPEAKER)[:n]
    factors, lags, sizes = [], [], []
    for seed in range(seeds):
        plan = make_plan(tokens, algorithm, seed, lanes=lanes, tokens_per_batch=budget)
        steps = [
            np.concatenate(step.lanes) for step in epoch(plan, most=STEPS if n > 10**6 else None)
        ]
        steps = steps if n > 10**6 else steps[:-1]  # an epoch's last step is not whole
        means = np.array([values[rows].mean() for rows in steps])
        sizes = [len(rows) for rows in steps]
        # Under a true permutation: without replacement from all n.
        size = statistics.mean(sizes)
        true = values.var() / size * (n - size) / (n - 1)
        factors.append(float(((means - values.mean()) ** 2).mean() / true))
        lags.append(float(np.corrcoef(means[:-1], means[1:])[0, 1]))
    return {
        "variance": statistics.median(factors),
        "lag_1": statistics.median(lags),
        "examples_a_step": statistics.mean(sizes),
    }


def speakers(n: int, lanes: int, budget: int, algorithm: int) -> dict[str, float]:
    """Pairs of one speaker in a step, over how many a free shuffle of all examples has."""
    sizes = np.random.default_rng(6).integers(100, 301, n // 150 + 1)
    ends = np.minimum(np.cumsum(sizes), n)
    counts = np.diff(ends, prepend=0).astype(np.float64)
    chance = float((counts * (counts - 1)).sum()) / (n * (n - 1.0))
    plan = make_plan(lengths(n), algorithm, lanes=lanes, tokens_per_batch=budget)
    met = pairs = 0.0
    for step in epoch(plan, most=STEPS):
        rows = np.concatenate(step.lanes)
        each = np.unique(np.searchsorted(ends, rows, side="right"), return_counts=True)[1]
        met += float((each * (each - 1) / 2).sum())
        pairs += len(rows) * (len(rows) - 1) / 2
    return {"over_free_shuffle": met / (pairs * chance)}


def meeting(n: int, mode: str, algorithm: int, seeds: int) -> dict[str, float]:
    """Pairs of one micro-batch in epoch 0 that are in one again in epoch 1, over chance."""
    tokens, again, met, chance = lengths(n), 0.0, 0.0, 0.0
    for seed in range(seeds):
        plan = make_plan(tokens, algorithm, seed, lanes=8, tokens_per_batch=2000, mode=mode)
        number_of = np.zeros((2, n), np.int64)
        for number in range(2):
            lanes = (lane for step in epoch(plan, number) for lane in step.lanes)
            for count, lane in enumerate(lanes):
                number_of[number, lane] = count
        joint = np.unique(number_of[0] * n + number_of[1], return_counts=True)[1]
        first, second = (np.bincount(numbers) for numbers in number_of)
        pairs = [float((c * (c - 1) / 2).sum()) for c in (first, second, joint)]
        met, again = met + pairs[0], again + pairs[2]
        chance += pairs[0] * pairs[1] / (n * (n - 1) / 2)
    return {"again": again / met, "over_chance": again / chance}


def dealing(n: int, budget: int, algorithm: int) -> dict[str, float]:
    """How alike the lanes of a step are, and how full."""
    tokens = lengths(n)
    plan = make_plan(tokens, algorithm, lanes=8, tokens_per_batch=budget)
    squares, rows, held = [], 0, 0
    for step in epoch(plan):
        cost = np.array([float((tokens[lane].astype(float) ** 2).sum()) for lane in step.lanes])
        rows += int((cost > 0).sum())
        held += sum(int(tokens[lane].sum()) for lane in step.lanes)
        if (cost > 0).all():
            squares.append(float(cost.max() / cost.mean()))
    return {"squares": statistics.mean(squares), "unfilled": 1 - held / (rows * budget)}


def ingest(records: int, rounds: int) -> dict[str, float]:
    """Records a second of processor time, each order in turn; the best of some rounds."""
    from raysft.data.encode import make_encoder
    from raysft.data.index.build import build_index
    from raysft.data.read.reader import Reader, Work

    model = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 512}
    model |= {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 32}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "train.json", "w", encoding="utf-8") as stream:
            for number in range(records):
                units = "".join(f"[Hu{(number * 7 + at) % 100}]" for at in range(50 + number % 50))
                item = {"id": f"x{number}", "input": units, "output": f"the words of {number}"}
                stream.write(json.dumps({"instruction": "Transcribe.", **item}) + "\n")
        source = Source(path=str(folder / "train.json"))
        data = Data(train=[source], lanes=16, tokens_per_batch=8192)
        encoder = make_encoder(
            Model(tokenizer="bytes", config=model, speech_units=100), data, folder
        )
        index = build_index([source], "train", encoder, folder / "index")
        reader = Reader(index, encoder, data.tokens_per_batch, 0)
        ways = {
            "order sequential": (data.model_copy(update={"order": "sequential"}), ALGORITHM),
            **{NAMES[number]: (data, number) for number in NAMES},
        }
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, (settings, algorithm) in ways.items():
                plan = Plan.of(index, settings, 0, algorithm)
                works = [
                    Work(step.epoch, step.step, lane, rows)
                    for step in epoch(plan)
                    for lane, rows in enumerate(step.lanes)
                ]
                began = time.process_time()
                count = sum(len(batch.ids) for batch in reader.read(iter(works)))
                found[way].append(count / (time.process_time() - began))
    speeds = {way: max(each) for way, each in found.items()}
    return {
        "records_per_s": speeds["now"],
        "over_sequential": speeds["now"] / speeds["order sequential"],
        "over_version_1": speeds["now"] / speeds["version 1"],
        "over_version_2": speeds["now"] / speeds["version 2"],
    }


def measure(quick: bool) -> dict[str, Any]:
    sizes = (20_000, 50_000) if quick else (10**6, 10**7, 10**8)
    versions = list(NAMES)
    row: dict[str, Any]
    results: dict[str, Any] = {"mixing": [], "speakers": [], "meeting": [], "dealing": []}
    for n in sizes:
        lanes, budget = BATCHES[-1]
        row = {"examples": n, "lanes": lanes, "tokens_per_batch": budget}
        row |= {NAMES[number]: speakers(n, lanes, budget, number) for number in versions}
        results["speakers"].append(row)
        print(row, flush=True)
    for n, (lanes, budget) in itertools.product(sizes, BATCHES[: 1 if quick else None]):
        row = {"examples": n, "lanes": lanes, "tokens_per_batch": budget}
        for number in versions if n <= 10**6 else versions[-1:]:
            row[NAMES[number]] = mixing(n, lanes, budget, number, 3 if n == 10**6 else 1)
        results["mixing"].append(row)
        print(row, flush=True)
    for n, mode in itertools.product(
        (500, 4096) if quick else (500, 4096, 20_000), ("packed", "padded")
    ):
        row = {"examples": n, "mode": mode}
        seeds = 1 if quick else 20_000 // n
        row |= {NAMES[v]: meeting(n, mode, v, seeds) for v in versions}
        results["meeting"].append(row)
        print(row, flush=True)
    for budget in ROWS[:2] if quick else ROWS:
        row = {"tokens_per_batch": budget, "seconds": budget / 25}
        row |= {NAMES[v]: dealing(5_000 if quick else 40_000, budget, v) for v in versions}
        results["dealing"].append(row)
        print(row, flush=True)
    results["ingest"] = ingest(500 if quick else 8_000, 1 if quick else 7)
    print(results["ingest"], flush=True)
    return results


def draw(results: dict[str, Any]) -> pyplot.Figure:
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.6))
    kinds = (
        ("mixing", "variance", "variance of step means\nover a true permutation"),
        ("speakers", "over_free_shuffle", "pairs of a speaker in a step\nover a free shuffle"),
        ("meeting", "over_chance", "pairs that meet again\nover chance"),
        ("dealing", "squares", "squares of lengths:\ndearest lane over mean"),
    )
    for axis, (kind, key, title) in zip(axes, kinds, strict=True):
        rows = results[kind]
        if kind in ("mixing", "speakers"):
            labels = [f"{r['examples']:.0e}\n{r['lanes']} lanes" for r in rows]
        elif kind == "meeting":
            labels = [f"{r['examples']:,}\n{r['mode']}" for r in rows]
        else:
            labels = [f"{r['seconds']:.0f} s\na row" for r in rows]
        colours = ("lightgrey", "tab:grey", "tab:green")
        for at, (name, colour) in enumerate(zip(NAMES.values(), colours, strict=True)):
            places = [i + 0.27 * at for i, row in enumerate(rows) if name in row]
            heights = [row[name][key] for row in rows if name in row]
            bars = axis.bar(places, heights, 0.26, label=name, color=colour)
            axis.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(np.arange(len(rows)) + 0.27, labels, fontsize=7)
        axis.set(title=title, yscale="linear" if kind == "dealing" else "log")
    axes[0].legend()
    return figure


def main() -> None:
    options = results_io.arguments(__doc__.splitlines()[0])
    results = measure(options.quick)
    payload = {"window": Data().window, "speaker_examples": SPEAKER, "results": results}
    print(results_io.write("shuffle", payload, draw(results), quick=options.quick, out=options.out))


if __name__ == "__main__":
    main()
