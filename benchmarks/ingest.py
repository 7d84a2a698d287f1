"""How fast do audio files become batches in a training process? Ours against lhotse + DataLoader.

    ours     index, plan, data tasks of Ray on N CPUs, `Feed` with the model's collate
    reader   N times what our reader does in one process, without Ray or collate: the most there is
    lhotse   CutSet, DynamicBucketingSampler, OnTheFlyFeatures, a torch DataLoader of N workers

N is 3, or on a small machine what is left beside the training process: 1 on 2 cores. Both have the
same N + 1 cores and no others.

The same FLAC clips (2 s, 22.05 kHz) become 80-bin log-mel at 16 kHz in batches of 48, collated and
padded in memory of the training process, which does nothing else. Wants an idle machine. Both run
in turn, several times, each time in a process of its own; medians are compared. `first_s` is the
time from the start of reading to the first batch: `cold` in a process (a Ray) that has just
started, `warm` after that; `clips_per_s` is counted from the first batch to the last. Full run:
about 4 minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import results_io
import soundfile
from matplotlib.figure import Figure

CLIP_S, RATE, TARGET_RATE, MELS = 2.0, 22_050, 16_000, 80
BATCH = 48  # clips
MOST = 3  # processes that read
TEXT = "one two three four five six seven"
CONTENDERS = ("ours", "reader", "lhotse")


def make_corpus(folder: Path, clips: int) -> None:
    """Clips like speech as FLAC, with a manifest: one of 16 voices (harmonics of a gliding pitch
    and noise, falling 6 dB an octave) in syllables of its own, over a floor of white noise."""
    count = int(CLIP_S * RATE)
    at = np.arange(count) / RATE
    slope = 1 / np.maximum(np.fft.rfftfreq(count, 1 / RATE), 100.0)
    voices = []
    for number in range(16):
        rng = np.random.default_rng(number)
        pitch = rng.uniform(90, 220) * (1 + 0.1 * np.sin(2 * np.pi * at))
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        tone = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 13))
        noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(count)) * slope, count)
        voices.append(0.15 * (tone + 0.2 * noise / noise.std()))
    lines = []
    for number in range(clips):
        rng = np.random.default_rng(1000 + number)
        syllables = np.maximum(0.0, np.sin(2 * np.pi * rng.uniform(2, 5) * at))
        wave = syllables * np.roll(voices[number % 16], rng.integers(count))
        wave += 1e-3 * rng.standard_normal(count)
        soundfile.write(folder / f"{number:05d}.flac", wave.astype(np.float32), RATE)
        line = {"task_type": "asr", "wav_path": f"{number:05d}.flac", "text": TEXT}
        lines.append(json.dumps(line))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def measured(start: Callable[[], Iterator[int]]) -> dict[str, float]:
    """Times of one stream of batches; `start()` begins reading and yields each batch's clips."""
    began = time.perf_counter()
    batches = start()
    next(batches)
    first = last = time.perf_counter()
    clips = 0
    for size in batches:
        clips += size
        last = time.perf_counter()
    return {"first_s": first - began, "clips_per_s": clips / (last - first), "clips": clips}


class Prepared(NamedTuple):
    """What reading the corpus takes. model, data: of the config."""

    model: Any
    data: Any
    encoder: Any
    index: Any
    plan: Any


def prepared(corpus: Path) -> Prepared:
    """Index and plan of the corpus."""
    from raysft.config.schema import Data, Model, Source
    from raysft.data.encode import make_encoder
    from raysft.data.index.build import build_index
    from raysft.data.plan.plan import Plan

    model = Model(tokenizer="bytes", config=_model(), feature_extractor={"chunk_length": 2})
    source = Source(path=str(corpus / "train.jsonl"))
    data = Data(train=[source], lanes=1, tokens_per_batch=1, mode="padded")
    encoder = make_encoder(model, data, corpus)
    index = build_index([source], "train", encoder, corpus / "index")
    data = data.model_copy(update={"tokens_per_batch": BATCH * int(index.tokens.max())})
    return Prepared(model, data, encoder, index, Plan.of(index, data, 0))


def reader(corpus: Path, reads: int, processes: int) -> dict[str, Any]:
    """Our reader alone, in this process; as fast in each of `processes`."""
    import torch

    from raysft.data.read.reader import Reader, Work

    torch.set_num_threads(1)
    made = prepared(corpus)
    own = Reader(made.index, made.encoder, made.data.tokens_per_batch, 0)

    def start(steps: int) -> Iterator[int]:
        planned = itertools.islice(made.plan.steps(made.plan.start()), steps)
        works = (Work(step.epoch, step.step, 0, step.lanes[0]) for step in planned)
        for batch in own.read(works):
            yield len(batch.ids)

    cold = measured(lambda: start(2))
    found = measured(lambda: start(reads // processes // BATCH))
    found["clips_per_s"] *= processes
    return {"cold_first_s": cold["first_s"], **found}


def ours(corpus: Path, reads: int, processes: int) -> dict[str, Any]:
    """Index, plan, RayReader, Feed; in a Ray of this process."""
    import ray
    import torch

    from raysft import models
    from raysft.data.read.stream import RayReader, ReaderSpec
    from raysft.driver.session import ray_session
    from raysft.parallel import World
    from raysft.train.feed import Feed

    torch.set_num_threads(1)
    model, data, encoder, index, plan = prepared(corpus)
    adapter = models.build(model, data, encoder, 0)

    def start(steps: int) -> Iterator[int]:
        stream = RayReader(spec, index.seconds, processes)
        assert (stream.tasks, stream.cpus_per_task) == (processes, 1.0)
        feed = Feed(plan, 1, adapter, stream.read, World.current(), steps, data.prefetch)
        for batch in feed.open(None):
            features = batch.turns[0].batch["input_features"]
            assert features.shape[1:] == (MELS, CLIP_S * 100)
            yield len(features)
        feed.close()

    with ray_session() as session:
        # As a training worker would have them: data tasks get `processes` CPUs, never more or less.
        taken = session.cluster_cpus() - processes
        if taken > 0:
            ray.get(ray.util.placement_group([{"CPU": taken}]).ready(), timeout=60)
        left = ray.available_resources().get("CPU", 0)
        assert left == processes, f"{left:g} CPUs for data tasks instead of {processes}"
        spec = ReaderSpec((index.place,), ray.put(encoder), data.tokens_per_batch, 0)
        cold = measured(lambda: start(2))
        return {"cold_first_s": cold["first_s"], **measured(lambda: start(reads // BATCH))}


def _model() -> dict[str, Any]:
    """The smallest model that reads these clips: it only collates."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 1}
    return {
        "model_type": "qwen2_audio",
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": MELS,
            "max_source_positions": int(CLIP_S * 50),
            "encoder_ffn_dim": 32,
            **audio,
        },
        "text_config": {
            "model_type": "qwen2",
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            **small,
        },
    }


def lhotse(corpus: Path, reads: int, processes: int) -> dict[str, Any]:
    """The usual lhotse pipeline, with its own resampler and its own filter bank."""
    import torch
    from lhotse import CutSet, Fbank, FbankConfig, Recording, SupervisionSegment
    from lhotse.audio.backend import set_current_audio_backend
    from lhotse.dataset import DynamicBucketingSampler, K2SpeechRecognitionDataset
    from lhotse.dataset.input_strategies import OnTheFlyFeatures

    torch.set_num_threads(1)
    set_current_audio_backend("LibsndfileBackend")  # straight to soundfile, as ours reads
    cuts = []
    for path in sorted(corpus.glob("*.flac")):
        cut = Recording.from_file(path).to_cut().resample(TARGET_RATE)
        cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, 0.0, CLIP_S, text=TEXT)]
        cuts.append(cut)
    manifest = CutSet.from_cuts(cuts)
    extractor = Fbank(FbankConfig(sampling_rate=TARGET_RATE, num_filters=MELS))
    dataset = K2SpeechRecognitionDataset(input_strategy=OnTheFlyFeatures(extractor))

    def start(clips: int) -> Iterator[int]:
        sampler = DynamicBucketingSampler(
            manifest.repeat(times=-(-clips // len(manifest))),
            max_duration=BATCH * (CLIP_S + 0.01),
            num_buckets=2,
            shuffle=True,
            seed=0,
        )
        loader = torch.utils.data.DataLoader(
            dataset, sampler=sampler, batch_size=None, num_workers=processes
        )
        for batch in loader:
            assert batch["inputs"].shape[1:] == (CLIP_S * 100, MELS)
            yield len(batch["inputs"])

    cold = measured(lambda: start(2 * BATCH))
    return {"cold_first_s": cold["first_s"], **measured(lambda: start(reads))}


def compare(corpus: Path, reads: int, rounds: int, processes: int) -> dict[str, Any]:
    """Rounds of each in turn; medians, and their ratio."""
    cores = sorted(os.sched_getaffinity(0))[: processes + 1]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--run", name, str(corpus), str(reads)]
            command += [str(processes)]
            # Ray's processes give way to others (nice 15). On a machine that is not quite idle that
            # would compare priorities: here both have the same.
            environ = {**os.environ, "RAY_worker_niceness": "0"}
            output = subprocess.run(
                command,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=environ,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            ).stdout
            result = json.loads(output.splitlines()[-1])
            found[name].append(result)
            print(
                f"round {number + 1}  {name:7} {result['clips_per_s']:7.0f} clips/s  first batch "
                f"{result['cold_first_s']:.2f} s cold, {result['first_s']:.2f} s warm",
                flush=True,
            )
    results: dict[str, Any] = {}
    for name, each in found.items():
        medians = {key: statistics.median(result[key] for result in each) for key in each[0]}
        medians["audio_hours_per_hour"] = medians["clips_per_s"] * CLIP_S
        results[name] = {"median": medians, "rounds": each}
    return results


def draw(results: dict[str, Any], processes: int) -> Figure:
    from matplotlib import pyplot  # not in the processes that others start from here

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 2.6))
    speed = [results[name]["median"]["clips_per_s"] for name in CONTENDERS]
    colours = ["tab:green", "tab:olive", "tab:grey"]
    axes[0].bar_label(axes[0].barh(CONTENDERS, speed, color=colours), fmt="%.0f", padding=3)
    each = "1 process each" if processes == 1 else f"{processes} processes each"
    axes[0].set(title=each, xlabel="clips of 2 s a second")
    for shift, key in ((-0.2, "cold_first_s"), (0.2, "first_s")):
        values = [results[name]["median"][key] for name in CONTENDERS]
        places = np.arange(len(CONTENDERS)) + shift
        bars = axes[1].barh(places, values, 0.38, color=colours, alpha=0.6 if shift < 0 else 1)
        kind = "cold" if shift < 0 else "warm"
        axes[1].bar_label(bars, [f"{value:.2f} {kind}" for value in values], padding=3)
    axes[1].set_yticks(range(len(CONTENDERS)), CONTENDERS)
    axes[1].set(title="to the first batch", xlabel="seconds")
    for axis in axes:
        axis.invert_yaxis()
        axis.margins(x=0.25)
    return figure


def main() -> None:
    if sys.argv[1:2] == ["--run"]:  # one round, in a process of its own
        parser = argparse.ArgumentParser()
        parser.add_argument("--run", choices=CONTENDERS)
        parser.add_argument("corpus", type=Path)
        parser.add_argument("reads", type=int)
        parser.add_argument("processes", type=int)
        options = parser.parse_args()
        contender = {"ours": ours, "reader": reader, "lhotse": lhotse}[options.run]
        print(json.dumps(contender(options.corpus, options.reads, options.processes)))
        return
    options = results_io.arguments(__doc__.splitlines()[0])
    cores = len(os.sched_getaffinity(0))
    processes = max(1, min(MOST, cores - 1))
    clips, reads, rounds = (96, 480, 1) if options.quick else (2_400, 12_000, 3)
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        make_corpus(Path(folder), clips)
        if load > 0.5:
            print(f"other work runs on this machine (load {load:.1f}): no figures to be quoted")
        results = compare(Path(folder), reads, rounds, processes)
    ratio = results["ours"]["median"]["clips_per_s"] / results["lhotse"]["median"]["clips_per_s"]
    share = results["ours"]["median"]["clips_per_s"] / results["reader"]["median"]["clips_per_s"]
    print(f"ours / lhotse: {ratio:.2f}, with {processes} of {cores} cores to read each")
    print(f"ours / our reader in process: {share:.2f}")
    payload = {
        "clips": clips,
        "reads": reads,
        "clip_seconds": CLIP_S,
        "batch": BATCH,
        "processes": processes,
        "cores_each": min(cores, processes + 1),
        "load_before": load,  # of other work on the machine
        "ratio": ratio,
        "of_reader": share,
        "results": results,
    }
    print(
        results_io.write(
            "ingest", payload, draw(results, processes), quick=options.quick, out=options.out
        )
    )


if __name__ == "__main__":
    main()
