"""How much of what a model computes is padding? Ours against the usual ways to batch speech.

    static          batches of 32 in random order
    sort 1000       buffers of 1,000, sorted, filled while n x longest <= budget
    lhotse          DynamicBucketingSampler, 30 buckets, a buffer of 10,000
    ours, padded    the plan in mode padded, for several data.window
    ours, packed    the plan in mode packed, at the default data.window

Budget 600 s. `padding` is the share of computed positions that is padding. Packed rows have none;
for them, and for all, `unfilled` is the share of the budget of all batches that no token uses
(padding included), which is what unequal lanes would wait for. `waste` is padding, and for packed
rows unfilled: the stricter measure. Full run: about 10 s.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import results_io
from matplotlib import pyplot

from raysft.config.schema import Data
from raysft.data.plan.plan import Plan

BUDGET = 600  # seconds
RATE = 100  # positions a second
WINDOWS = (Data().window, 4096, 10_240)


def log_normal(n: int, rng: np.random.Generator) -> np.ndarray:
    """Seconds, as in conversational and web speech."""
    return np.clip(rng.lognormal(1.6, 0.7, n), 0.3, 35)


def librispeech_like(n: int, rng: np.random.Generator) -> np.ndarray:
    """Seconds between 1 and 17, most of them 12 to 16, as in LibriSpeech's training sets."""
    return 17 - np.clip(rng.gamma(2, 1.6, n), 0.5, 16)


def measure(batches: Iterable[np.ndarray]) -> dict[str, float]:
    """Shares for batches given as arrays of seconds, each padded to its longest."""
    count, real, computed = 0, 0.0, 0.0
    for batch in batches:
        count += 1
        real += float(batch.sum())
        computed += float(len(batch) * batch.max())
    padding, unfilled = 1 - real / computed, 1 - real / (count * BUDGET)
    return {"waste": padding, "padding": padding, "unfilled": unfilled, "batches": count}


def static(seconds: np.ndarray, size: int = 32) -> Iterable[np.ndarray]:
    return (seconds[at : at + size] for at in range(0, len(seconds), size))


def sort_then_fill(seconds: np.ndarray, buffer: int = 1000) -> Iterable[np.ndarray]:
    for at in range(0, len(seconds), buffer):
        batch: list[float] = []
        for value in np.sort(seconds[at : at + buffer]).tolist():
            if (len(batch) + 1) * value > BUDGET:
                yield np.array(batch)
                batch = []
            batch.append(value)
        yield np.array(batch)


def lhotse(seconds: np.ndarray) -> Iterable[np.ndarray]:
    from lhotse import CutSet, MonoCut
    from lhotse.dataset import DynamicBucketingSampler

    cuts = [
        MonoCut(id=str(i), start=0.0, duration=value, channel=0)
        for i, value in enumerate(seconds.tolist())
    ]
    with warnings.catch_warnings():
        # It recommends lazy manifests, for speed: not measured here.
        warnings.simplefilter("ignore", UserWarning)
        sampler = DynamicBucketingSampler(
            CutSet.from_cuts(cuts),
            max_duration=BUDGET,
            num_buckets=30,
            buffer_size=10_000,
            shuffle=True,
            world_size=1,
            rank=0,
            seed=0,
        )
    for batch in sampler:
        yield np.array([cut.duration for cut in batch])


def ours(seconds: np.ndarray, mode: str, window: int) -> dict[str, float]:
    tokens, zeros = np.round(seconds * RATE).astype(np.int32), np.zeros(len(seconds), np.int16)
    data = Data(tokens_per_batch=BUDGET * RATE, mode=mode, window=window)
    summary = Plan(tokens, zeros, ["asr"], zeros, [1.0], "benchmark", data, 0).summary()
    return {
        "waste": summary.unfilled if mode == "packed" else summary.padding,
        "padding": summary.padding,
        "unfilled": summary.unfilled,
        "batches": summary.micro_batches,
    }


def compare(seconds: np.ndarray) -> dict[str, dict[str, float]]:
    return {
        "static, 32": measure(static(seconds)),
        "sort 1000, dynamic": measure(sort_then_fill(seconds)),
        "lhotse DynamicBucketing": measure(lhotse(seconds)),
        **{f"ours, padded, window {w:,}": ours(seconds, "padded", w) for w in WINDOWS},
        f"ours, packed, window {WINDOWS[0]:,}": ours(seconds, "packed", WINDOWS[0]),
    }


def draw(results: dict[str, Any]) -> pyplot.Figure:
    figure, axes = pyplot.subplots(1, len(results), figsize=(11, 3.6), sharey=True)
    for axis, (corpus, ways) in zip(axes, results.items(), strict=True):
        shares = [100 * way["waste"] for way in ways.values()]
        colours = ["tab:green" if name.startswith("ours") else "tab:grey" for name in ways]
        bars = axis.barh(list(ways), shares, color=colours)
        axis.bar_label(bars, [f"{share:.2f}%" for share in shares], padding=3)
        axis.set(title=corpus, xlabel="wasted positions, %", xlim=(0, 1.25 * max(shares)))
    axes[0].invert_yaxis()
    return figure


def main() -> None:
    options = results_io.arguments(__doc__.splitlines()[0])
    n = 10_000 if options.quick else 100_000
    corpora = {"log-normal": log_normal, "LibriSpeech-like": librispeech_like}
    results = {name: compare(make(n, np.random.default_rng(0))) for name, make in corpora.items()}
    for corpus, ways in results.items():
        for name, way in ways.items():
            print(
                f"{corpus:18} {name:30} waste {way['waste']:7.2%}  unfilled {way['unfilled']:.2%}"
            )
    payload = {"examples": n, "budget_seconds": BUDGET, "results": results}
    print(results_io.write("padding", payload, draw(results), quick=options.quick, out=options.out))


if __name__ == "__main__":
    main()
