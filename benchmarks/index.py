"""How long does an index of 200,000 clips take: the first time, and where little has changed?

    first      nothing is known: every line is parsed, every clip's header read, every example
               measured
    unchanged  a second start: files and clips are looked at, nothing is measured
    changed    1% of the manifest's lines are others
    replaced   1% of the clips were replaced in place
    killed     a build that was killed half way, started again

Half of the clips are WAV, half FLAC, of 0.2 to 0.8 s at 16 kHz, a file each, in the page cache;
the encoder is that of Qwen2-Audio with a tokenizer of bytes, texts of 4 to 19 words. Each start
builds in processes of its own, as many as there are cores. `cpu_s` counts their CPU time: where
other work runs beside it, `wall_s` is that of a slower machine. Full run: about 2 minutes, 3 GB of
disk.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ingest
import numpy as np
import results_io
import soundfile
from matplotlib.figure import Figure

from raysft.config.schema import Data, Model, Source
from raysft.data.encode import make_encoder
from raysft.data.index import fan_out, unfinished
from raysft.data.index.build import build_index

RATE = 16_000
SHAPES = 64  # clips that differ; of each many copies
TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him"
)
CHANGED = 0.01


def make_corpus(folder: Path, count: int) -> None:
    """Clips, a thousand a folder, and their manifest; none of them written just now."""
    rng, words = np.random.default_rng(0), TEXT.split()
    shapes = []
    for _ in range(SHAPES):
        at = np.arange(int(RATE * rng.uniform(0.2, 0.8))) / RATE
        wave = 0.2 * np.sin(2 * np.pi * rng.uniform(100, 400) * at)
        wave += 0.003 * rng.standard_normal(len(at))
        for kind in ("wav", "flac"):
            out = io.BytesIO()
            soundfile.write(out, wave, RATE, format=kind.upper())
            shapes.append((kind, out.getvalue()))
    lines = []
    for number in range(count):
        kind, content = shapes[number % len(shapes)]
        name = f"clips/{number // 1000:03}/utt_{number:06}.{kind}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        text = " ".join(rng.choice(words, rng.integers(4, 20)))
        record = {"task_type": "asr", "wav_path": name, "text": text, "lang": "en"}
        lines.append(json.dumps({**record, "id": f"utt_{number:06}", "duration": 0.8}))
        aged(path)
    write(folder, lines)


def warm(folder: Path) -> None:
    """What was written is on disk, and in memory too."""
    os.sync()
    for path in (folder / "clips").rglob("*.*"):
        path.read_bytes()


def aged(path: Path) -> None:
    then = time.time() - 1000
    os.utime(path, (then, then))


def write(folder: Path, lines: list[str]) -> None:
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    aged(folder / "train.jsonl")


def start(corpus: str, index: str, most: float, out: Any) -> None:
    """One build, as a job makes it. most: share at which it ends itself, with its processes."""
    unfinished.EVERY_S = 1.0 if most < 1 else unfinished.EVERY_S
    folder = Path(corpus)
    source = Source(path=str(folder / "train.jsonl"))
    data = Data(train=[source], tokens_per_batch=1000)
    model = Model(tokenizer="bytes", config=ingest._model(), feature_extractor={"chunk_length": 2})
    encoder = make_encoder(model, data, folder)

    def stages(stage: str, done: int, total: int) -> None:
        if stage == "measuring" and most < 1 and done >= most * total:
            os.kill(os.getpid(), signal.SIGKILL)

    began, before = time.perf_counter(), spent()
    made = build_index([source], "train", encoder, Path(index), stages=stages)
    wall = time.perf_counter() - began
    cpu = spent() - before
    out.put({"wall_s": wall, "cpu_s": cpu, "examples": len(made), "hash": made.hash})


def spent() -> float:
    """Seconds of CPU of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def built(corpus: Path, index: Path, most: float = 1.0) -> dict[str, Any]:
    context = get_context("spawn")
    out = context.SimpleQueue()
    process = context.Process(target=start, args=(str(corpus), str(index), most, out))
    process.start()
    found: dict[str, Any] = {}
    if most == 1:
        found = out.get()
    process.join()
    return found


def measure(quick: bool) -> dict[str, Any]:
    count = 2_000 if quick else 200_000
    with tempfile.TemporaryDirectory() as name:
        corpus, index = Path(name), Path(name) / "index"
        make_corpus(corpus, count)
        warm(corpus)
        results = {"first": built(corpus, index)}
        results["unchanged"] = built(corpus, index)
        lines = (corpus / "train.jsonl").read_text().splitlines()
        few = int(CHANGED * count)
        for number in range(few):  # in one place, as edits are
            lines[number] = lines[number].replace('"text": "', '"text": "well ')
        write(corpus, lines)
        results["changed"] = built(corpus, index)
        for number in range(0, count, int(1 / CHANGED)):
            kind = "wav" if number % 2 == 0 else "flac"
            path = corpus / f"clips/{number // 1000:03}/utt_{number:06}.{kind}"
            soundfile.write(path, np.full(RATE // 2, 0.1), RATE)
            aged(path)
        results["replaced"] = built(corpus, index)
        built(corpus, corpus / "again", most=0.5)
        results["killed"] = built(corpus, corpus / "again")
        if results["killed"]["hash"] != results["replaced"]["hash"]:
            raise RuntimeError("a build that was killed came to another index")
    for name, result in results.items():
        print(f"{name}: {result['wall_s']:.1f} s, {result['cpu_s']:.1f} s of CPU", flush=True)
    return results


def draw(results: dict[str, Any]) -> Figure:
    from matplotlib import pyplot  # not in the processes that build

    figure, axis = pyplot.subplots(figsize=(7, 3.6))
    for at, (key, label) in enumerate((("wall_s", "elapsed"), ("cpu_s", "CPU, all processes"))):
        places = np.arange(len(results)) + 0.4 * at
        bars = axis.bar(places, [result[key] for result in results.values()], 0.38, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xticks(np.arange(len(results)) + 0.2, list(results))
    axis.set(ylabel="seconds", title=f"index of {results['first']['examples']:,} clips")
    axis.legend()
    return figure


def main() -> None:
    options = results_io.arguments(__doc__.splitlines()[0])
    results = measure(options.quick)
    payload = {"clips": results["first"]["examples"], "processes": fan_out._cpus()}
    payload["results"] = results
    print(results_io.write("index", payload, draw(results), quick=options.quick, out=options.out))


if __name__ == "__main__":
    main()
