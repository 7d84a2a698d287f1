"""What is left of a run that is killed again and again, and how soon does it train again?

An audio LM learns spoken digits (`examples/spoken_digits`, and some clips with NaN samples) on two
workers of a cluster of this machine (`cluster/local.sh`), a checkpoint every 10 steps: once
undisturbed, once under `kill -9`, drawn by a seed, of

    worker   a training worker
    data     a process that is reading micro-batches
    driver   the job's own process; the same command is then run again
    node     whatever runs on one of the two worker nodes, which is added again 2 s later

A kill falls up to half a second after a step is reached, or, one in five, up to 8 s after the kill
before: into its recovery. Compared are both runs' ledgers with their plans (`raysft.audit`), every
step's losses and gradient norm, and the weights in the last checkpoints: all the same to the bit,
or this ends with exit code 1 and leaves everything where it is.

`again_s` is the time from a kill to the next step done, which may be one that is done again;
`new_s` to the first step that no earlier start had reached; `pause_s`, for data tasks do not end
the workers with them, the longest time without a step until the next kill. Recoveries that another
kill interrupts, and data tasks killed while the run recovers, are only counted (overlaps). The
health checks of local.sh notice a lost node after some 10 s; Ray's defaults take 70. Full run: 6
to 12 minutes, by what else the machine does. --quick: two kills, 30 steps, no nodes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import results_io
import soundfile
import yaml
from local_cluster import ROOT, Cluster
from matplotlib import pyplot

from raysft.audit import audit
from raysft.config.checkpoint import Checkpoint
from raysft.data.plan.verify import Report
from raysft.run.catalogue import Catalogue
from raysft.run.lines import read_lines

DIGITS = ROOT / "examples" / "spoken_digits"
POLL_S = 0.03
TOGETHER = 0.2  # of the kills fall into the recovery from the one before
COLOURS = {"worker": "tab:red", "data": "tab:orange", "driver": "tab:purple", "node": "black"}
ENDS_WORKERS = ("worker", "driver", "node")
LONGEST_RUN_S = 1500


@dataclass(frozen=True)
class Size:
    """How much is trained, on how many worker nodes, and killed."""

    steps: int
    examples: int
    damaged: int
    nodes: int
    kills: dict[str, int]
    seed: int = 0


FULL = Size(200, 2400, 12, nodes=2, kills={"worker": 10, "data": 10, "driver": 2, "node": 2})
QUICK = Size(30, 400, 2, nodes=0, kills={"worker": 1, "data": 1})


@dataclass
class Kill:
    """One kill: drawn as `delay_s` after `step` is reached, or (step None) after the one before."""

    kind: str
    step: int | None
    delay_s: float
    at: float | None = None  # time.time(); None: not made
    again_s: float | None = None
    new_s: float | None = None
    pause_s: float | None = None


@dataclass
class Run:
    """What was seen of a run. seen: (time.time(), step, loss) of each line as it appeared."""

    folder: Path
    began: float = 0.0
    ended: float = 0.0
    starts: int = 0
    seen: list[tuple[float, int, float]] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)

    @property
    def continued(self) -> list[dict[str, Any]]:
        """Starts of worker groups after the first."""
        lines = read_lines(self.folder / "events.jsonl")
        return [line for line in lines if line["event"] == "continued"]


def write_corpus(folder: Path, size: Size, rng: np.random.Generator) -> None:
    """train.jsonl: spoken digits, and among them clips whose header is sound and samples NaN."""
    lines = (DIGITS / "train.jsonl").read_text().splitlines()[: size.examples]
    items = [json.loads(line) for line in lines]
    for item in items:
        item["wav_path"] = str(DIGITS / item["wav_path"])
    for number in range(size.damaged):
        path = folder / f"damaged{number}.wav"
        soundfile.write(path, np.full(12_000, np.nan, np.float32), 16_000, subtype="FLOAT")
        item = {"task_type": "asr", "wav_path": str(path), "text": "one", "id": path.stem}
        items.insert(int(rng.integers(len(items))), item)
    (folder / "train.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def write_config(folder: Path, size: Size) -> None:
    """chaos.yaml. The model is small and its steps are many clips: data tasks are always busy."""
    tree = {
        "run": {"storage_path": str(folder / "runs"), "seed": size.seed},
        "data": {
            "train": [str(folder / "train.jsonl")],
            "lanes": 4,
            "tokens_per_batch": 900,
            "window": 512,
            "prompts": {"asr": ""},
            "cpus": 2,
        },
        "model": {
            "tokenizer": str(DIGITS / "tokenizer"),
            "feature_extractor": {"feature_size": 80, "chunk_length": 2},
            "config": {
                "model_type": "qwen2_audio",
                "audio_config": {
                    "model_type": "qwen2_audio_encoder",
                    "num_mel_bins": 80,
                    "max_source_positions": 100,
                    "d_model": 48,
                    "encoder_layers": 1,
                    "encoder_attention_heads": 4,
                    "encoder_ffn_dim": 96,
                    "dropout": 0.1,
                },
                "text_config": {
                    "model_type": "qwen2",
                    "hidden_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 4,
                    "intermediate_size": 96,
                    "attention_dropout": 0.0,
                },
            },
        },
        "parallel": {
            "workers": 2,
            "device": "cpu",
            "threads": 1,
            "cpus_per_worker": 0.5,  # so that all has room while a node is away
            "max_failures": -1,
            "backoff_s": 0.0,
            "timeout_s": 60.0,
        },
        "optim": {"lr": 2e-3, "schedule": "cosine", "warmup": 20},
        "train": {"max_steps": size.steps},
        "checkpoint": {"every": 10},
        "log": {"every": 1, "tensorboard": False},
    }
    (folder / "chaos.yaml").write_text(yaml.safe_dump(tree))


def draw_kills(size: Size, rng: np.random.Generator) -> list[Kill]:
    """In the order in which they are made."""
    kinds = rng.permutation([kind for kind, count in size.kills.items() for _ in range(count)])
    steps = np.sort(rng.integers(2, int(0.9 * size.steps), len(kinds))).tolist()
    kills = []
    for kind, step in zip(kinds.tolist(), steps):
        if kills and rng.random() < TOGETHER:
            kills.append(Kill(kind, None, float(rng.uniform(0, 8))))
        else:
            kills.append(Kill(kind, step, float(rng.uniform(0, 0.5))))
    return kills


def train(
    cluster: Cluster, folder: Path, name: str, kills: list[Kill], rng: np.random.Generator
) -> Run:
    """Run the job to its end, killing meanwhile. Raises RuntimeError where it fails by itself."""
    run = Run(folder / "runs" / name, began=time.time(), starts=1, kills=kills)
    job = cluster.driver(folder, name)
    known: set[bytes] = set()
    reached: dict[int, float] = {}  # step -> when it was first seen
    left = list(kills)
    try:
        while (code := job.poll()) is None:
            now = time.time()
            if now - run.began > LONGEST_RUN_S:
                raise RuntimeError(f"{name}: not done after {LONGEST_RUN_S} s; see {folder}")
            for line in _new_lines(run.folder / "metrics.jsonl", known):
                run.seen.append((now, line["step"], line["loss"]))
                reached.setdefault(line["step"], now)
            if left and (due := _due(left[0], kills, reached)) is not None and now >= due:
                left[0].at = _make(left[0].kind, cluster, job, rng)
                if left[0].at is not None:
                    kill = left.pop(0)
                    print(f"{now - run.began:6.1f} s  step {max(reached)}  killed: {kill.kind}")
                    if kill.kind == "driver":
                        job.wait()
                        job = cluster.driver(folder, name)
                        run.starts += 1
            time.sleep(POLL_S)
    finally:
        job.kill()
        job.wait()
    run.ended = time.time()
    if code:
        last = (folder / f"{name}.log").read_text().splitlines()[-20:]
        raise RuntimeError(f"{name}: the job ended with {code} by itself:\n" + "\n".join(last))
    cluster.added()
    for line in _new_lines(run.folder / "metrics.jsonl", known):
        run.seen.append((run.ended, line["step"], line["loss"]))
    return run


def _new_lines(path: Path, known: set[bytes]) -> list[dict[str, Any]]:
    """Lines that were not there before; what a restart cut off and did again is new."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    new = [line for line in lines if line not in known]
    known.update(new)
    return [json.loads(line) for line in new]


def _due(kill: Kill, kills: list[Kill], reached: dict[int, float]) -> float | None:
    """When it is to be made; None: not known yet."""
    made = max((k.at for k in kills if k.at is not None), default=0.0)
    if kill.step is None:
        return made + kill.delay_s
    times = [at for step, at in reached.items() if step >= kill.step]
    return max(min(times), made) + kill.delay_s if times else None


def _make(
    kind: str, cluster: Cluster, job: subprocess.Popen[bytes], rng: np.random.Generator
) -> float | None:
    """Kill one; returns when. None: there is none of this kind now."""
    if kind == "driver":
        job.kill()
        return time.time()
    if kind == "node":
        return cluster.lose_node(int(rng.integers(1, cluster.nodes + 1)))
    victims = cluster.victims(kind)
    if not victims:
        return None
    with contextlib.suppress(psutil.NoSuchProcess):
        victims[int(rng.integers(len(victims)))].kill()
        return time.time()
    return None


# -- what came of it -----------------------------------------------------------------------------


def recoveries(run: Run) -> None:
    """Fill in how long each kill that was made kept the run."""
    made = [kill for kill in run.kills if kill.at is not None]
    restarts = [line["time"] for line in run.continued]
    for number, kill in enumerate(made):
        at, begun = kill.at, kill.at
        until = made[number + 1].at if number + 1 < len(made) else run.ended
        assert at is not None and until is not None
        if kill.kind == "data" and not _recovered(run, made[:number], at):
            continue
        if kill.kind in ENDS_WORKERS:
            begun = next((when for when in restarts if at < when < until), None)
            if begun is None:
                continue
        assert begun is not None
        highest = max((step for when, step, _ in run.seen if when <= begun), default=0)
        later = [(when, step) for when, step, _ in run.seen if begun < when < until]
        kill.again_s = next((when - at for when, _ in later), None)
        kill.new_s = next((when - at for when, step in later if step > highest), None)
        ends = [at, *(when for when, _ in later)]
        kill.pause_s = float(np.diff(ends).max()) if later else None


def _recovered(run: Run, before: list[Kill], at: float) -> bool:
    """Whether there was a new step between the last kill that ended the workers and `at`."""
    last = max((k.at for k in before if k.kind in ENDS_WORKERS and k.at is not None), default=0.0)
    first, then = (max((n for w, n, _ in run.seen if w <= end), default=0) for end in (last, at))
    return then > first + 1  # one may have been on its way when the kill came


def loss_difference(one: Path, other: Path, steps: int) -> float:
    """Largest difference of a loss or gradient norm of a step. Raises RuntimeError where one of the
    runs has not recorded each step once."""
    lines = [read_lines(run / "metrics.jsonl") for run in (one, other)]
    for run, found in zip((one, other), lines):
        if [line["step"] for line in found] != list(range(1, steps + 1)):
            raise RuntimeError(f"{run}: metrics.jsonl has not each step once")
    keys = [key for key in lines[0][0] if key.startswith(("loss", "grad_norm"))]
    return max(abs(a[key] - b[key]) for a, b in zip(*lines) for key in keys)


def weights_equal(one: Path, other: Path) -> bool:
    """Whether model and optimizer of the last checkpoints are the same, byte for byte."""
    found = []
    for run in (one, other):
        saved = Catalogue.of(Checkpoint(), run).committed()[-1]
        files = saved.meta()["files"]
        shards = {name: files[name] for name in files if name.endswith(".distcp")}
        found.append((saved.step, shards))
    return found[0] == found[1]


def summarize(
    calm: Run, wild: Run, reports: dict[str, Report], size: Size, same_weights: bool
) -> dict[str, Any]:
    """All numbers; `clean` says whether nothing differs."""
    recoveries(wild)
    difference = loss_difference(calm.folder, wild.folder, size.steps)
    audits = {
        name: {
            **{key: getattr(report, key) for key in ("clean", "lost", "repeated", "findings")},
            "quarantined": len(report.quarantined),
            "summary": report.summary(),
        }
        for name, report in reports.items()
    }
    refused = [
        [(line["id"], line["reason"]) for line in read_lines(run.folder / "quarantine.jsonl")]
        for run in (calm, wild)
    ]
    clean = all(report.clean for report in reports.values()) and difference == 0
    return {
        "clean": clean and same_weights and sorted(refused[0]) == sorted(refused[1]),
        "audit": audits,
        "loss_difference": difference,
        "same_weights": same_weights,
        "same_quarantine": sorted(refused[0]) == sorted(refused[1]),
        "kills_made": sum(kill.at is not None for kill in wild.kills),
        "worker_groups": len(wild.continued) + 1,
        "drivers": wild.starts,
        "steps_again": sum(line["steps_again"] for line in wild.continued),
        "seconds": {"undisturbed": calm.ended - calm.began, "chaos": wild.ended - wild.began},
        "longest_pause_undisturbed_s": float(np.diff([when for when, _, _ in calm.seen]).max()),
        "by_kind": {kind: _figures(kind, wild.kills) for kind in size.kills},
    }


def _figures(kind: str, kills: list[Kill]) -> dict[str, Any]:
    made = [kill for kill in kills if kill.kind == kind and kill.at is not None]
    found: dict[str, Any] = {
        "made": len(made),
        "overlaps": sum(kill.new_s is None for kill in made),
    }
    for name in ("again_s", "new_s", "pause_s"):
        values = [getattr(kill, name) for kill in made if kill.new_s is not None]
        if values:
            middle = statistics.median(values)
            found[name] = {"median": middle, "least": min(values), "most": max(values)}
    return found


def table(summary: dict[str, Any]) -> str:
    """For the terminal: seconds as median (least to most)."""
    heads = {"again_s": "training again", "new_s": "new step", "pause_s": "longest pause"}
    rows = [["killed", "times", "overlaps", *heads.values()]]
    for kind, found in summary["by_kind"].items():
        cells = [
            "{median:.1f} ({least:.1f} to {most:.1f})".format(**found[key]) if key in found else "-"
            for key in heads
        ]
        rows.append([kind, str(found["made"]), str(found["overlaps"]), *cells])
    widths = [10, 7, 13, 22, 22, 22]
    lines = ["".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) for row in rows]
    took = summary["seconds"]
    return "\n".join(
        [
            *lines,
            *(f"{name:<12} {found['summary']}" for name, found in summary["audit"].items()),
            f"largest difference of a loss or gradient norm: {summary['loss_difference']:g}; "
            f"weights {'the same' if summary['same_weights'] else 'DIFFER'}; "
            f"quarantine {'the same' if summary['same_quarantine'] else 'DIFFERS'}",
            f"{summary['kills_made']} kills, {summary['steps_again']} steps done again, "
            f"{took['chaos']:.0f} s; undisturbed {took['undisturbed']:.0f} s",
        ]
    )


def draw(calm: Run, wild: Run) -> pyplot.Figure:
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 3.8), gridspec_kw={"width_ratios": [3, 1]}
    )
    for run, name, colour in ((wild, "under kill -9", "tab:blue"), (calm, "undisturbed", "grey")):
        times = [when - run.began for when, _, _ in run.seen]
        left.plot(times, [loss for _, _, loss in run.seen], ".", ms=3, color=colour, label=name)
    made = [kill for kill in wild.kills if kill.at is not None]
    for kill in made:
        left.axvline(kill.at - wild.began, color=COLOURS[kill.kind], lw=0.8, alpha=0.7)
    kinds = list(dict.fromkeys(kill.kind for kill in made))
    for kind in kinds:
        left.plot([], [], color=COLOURS[kind], lw=0.8, label=f"kill: {kind}")
        values = [kill.new_s for kill in made if kill.kind == kind and kill.new_s is not None]
        right.plot([kind] * len(values), values, "o", color=COLOURS[kind], alpha=0.6)
    left.set(xlabel="seconds since the start", ylabel="loss", title="both runs, step by step")
    left.legend(fontsize=8)
    right.set(ylabel="seconds", title="from a kill to a new step", ylim=(0, None))
    right.margins(x=0.2)
    figure.tight_layout()
    return figure


def main() -> None:
    options = results_io.arguments(__doc__.splitlines()[0])
    size = QUICK if options.quick else FULL
    # Short: Ray puts sockets below it.
    folder = Path(tempfile.mkdtemp(prefix="chaos", dir="/tmp"))
    rng = np.random.default_rng(size.seed)
    write_corpus(folder, size, rng)
    write_config(folder, size)
    cluster, load = Cluster(folder, size.nodes), os.getloadavg()[0]
    try:
        cluster.do("start")
        calm = train(cluster, folder, "undisturbed", [], rng)
        wild = train(cluster, folder, "chaos", draw_kills(size, rng), rng)
    finally:
        cluster.do("stop")
    reports = {run.folder.name: audit(run.folder) for run in (calm, wild)}
    same = weights_equal(calm.folder, wild.folder)
    summary = summarize(calm, wild, reports, size, same)
    print(table(summary))
    kills = [vars(kill) | {"at": kill.at and kill.at - wild.began} for kill in wild.kills]
    payload = {"size": vars(size), "load_before": load, "summary": summary, "kills": kills}
    figure = draw(calm, wild)
    print(results_io.write("chaos", payload, figure, quick=options.quick, out=options.out))
    if not summary["clean"]:
        raise SystemExit(f"NOT CLEAN: both runs are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
