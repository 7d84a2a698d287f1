"""How fast are clips read in each shape a corpus can have? Ours beside lhotse Shar and WebDataset.

    files, tar, parquet, shards    ours: records by their places, in an order drawn at random
    lhotse shar, webdataset        theirs, from archive to archive in order, as they are made for

The same FLAC clips (2 s, 22.05 kHz) become mono samples at 16 kHz in one process with one thread:
what containers cost, for all decode with libFLAC; lhotse resamples as it does, WebDataset's bytes
go through soundfile and soxr, as ours do. All run in turn, several rounds, each in a process of its
own; medians are compared. `first_s`: from the start of reading to the first clip, the index being
there. Wants an idle machine; about 3 minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import results_io
from ingest import TARGET_RATE, make_corpus
from matplotlib import pyplot
from matplotlib.figure import Figure

OURS = ("files", "tar", "parquet", "shards")
THEIRS = ("lhotse shar", "webdataset")
SHARD = 500  # clips of an archive, or a shard


def write(folder: Path, clips: int) -> None:
    """The corpus in every shape."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

    from raysft.config.prepare import Prepare
    from raysft.config.schema import Source
    from raysft.data.clips.audio import Limits
    from raysft.data.index.build import build_index
    from raysft.prepare import plan, shard

    make_corpus(folder, clips)
    files = sorted(folder.glob("*.flac"))
    for name in ("tar", "parquet", "shards", "lhotse shar"):
        (folder / name).mkdir()
    for number, start in enumerate(range(0, clips, SHARD)):
        some = files[start : start + SHARD]
        with tarfile.open(folder / "tar" / f"{number:06d}.tar", "w") as archive:
            for file in some:
                archive.add(file, file.name)
                info = tarfile.TarInfo(f"{file.stem}.txt")
                info.size = 5
                archive.addfile(info, io.BytesIO(b"hello"))
        audio = [{"bytes": file.read_bytes(), "path": file.name} for file in some]
        table = pa.table({"audio": audio, "text": ["hello"] * len(some)})
        pq.write_table(table, folder / "parquet" / f"{number:06d}.parquet", row_group_size=100)
    source, limits = Source(path=str(folder / "train.jsonl")), Limits()
    index = build_index([source], "train", plan.Lengths(limits), folder / "lengths", workers=1)
    settings = Prepare(path="x", rows=SHARD)
    paths = []
    for number, (start, stop) in enumerate(plan.cuts(index, settings)):
        examples = [(one, "x") for one in index.examples(np.arange(start, stop))]
        paths.append(folder / "shards" / f"{number:06d}.parquet")
        shard.write(paths[-1], shard.make(examples, settings, limits).columns)
    (folder / "shards" / "data.list").write_text("".join(f"{path}\n" for path in paths))
    cuts = []
    for file in files:
        recording = Recording.from_file(file)
        spoken = SupervisionSegment(file.stem, recording.id, 0.0, recording.duration, text="hello")
        cuts.append(MonoCut(file.stem, 0.0, recording.duration, 0, [spoken], recording=recording))
    shar = CutSet.from_cuts(cuts)
    shar.to_shar(folder / "lhotse shar", fields={"recording": "flac"}, shard_size=SHARD)


def ours(folder: Path, shape: str) -> Iterator[np.ndarray]:
    """By an index, in random order."""
    from raysft.config.schema import Source
    from raysft.data.clips import audio
    from raysft.data.clips.audio import Limits
    from raysft.data.index.build import build_index
    from raysft.prepare import plan

    path = folder / "train.jsonl" if shape == "files" else folder / shape
    encoder = plan.Lengths(Limits())
    index = build_index([Source(path=str(path))], "train", encoder, folder / "index", workers=1)
    yield np.zeros(0, np.float32)  # what is before reading
    # A window of what the plan shuffles; neighbours of a corpus are read near each other in time.
    rows = np.random.default_rng(0).permutation(len(index))
    for start in range(0, len(rows), 128):
        for example in index.examples(rows[start : start + 128]):
            (clip,) = example.audio()
            yield audio.load(clip, TARGET_RATE)


def lhotse_shar(folder: Path) -> Iterator[np.ndarray]:
    """From shard to shard."""
    from lhotse import CutSet

    yield np.zeros(0, np.float32)
    for cut in CutSet.from_shar(in_dir=folder / "lhotse shar"):
        yield cut.resample(TARGET_RATE).load_audio()[0]


def webdataset(folder: Path) -> Iterator[np.ndarray]:
    """From archive to archive."""
    import soundfile
    import soxr
    import webdataset as wds

    paths = [str(path) for path in sorted((folder / "tar").glob("*.tar"))]
    yield np.zeros(0, np.float32)
    for sample in wds.WebDataset(paths, shardshuffle=False):
        wave, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        yield soxr.resample(wave, rate, TARGET_RATE)


def once(folder: Path, shape: str) -> dict[str, float]:
    """One pass over the corpus."""
    import torch

    torch.set_num_threads(1)
    reads = {"lhotse shar": lhotse_shar, "webdataset": webdataset}
    clips = reads[shape](folder) if shape in reads else ours(folder, shape)
    next(clips)
    began = time.perf_counter()
    total = len(next(clips))
    first = time.perf_counter()
    count = 0
    for clip in clips:
        total += len(clip)
        count += 1
    done = time.perf_counter()
    return {"first_s": first - began, "clips_per_s": count / (done - first), "samples": total}


def draw(medians: dict[str, dict[str, float]]) -> Figure:
    figure, axis = pyplot.subplots(figsize=(7, 3))
    names = list(medians)
    colours = ["tab:blue" if name in OURS else "tab:gray" for name in names]
    axis.barh(names, [medians[name]["clips_per_s"] for name in names], color=colours)
    axis.invert_yaxis()
    axis.set_xlabel("clips of 2 s a second, one thread")
    axis.grid(axis="x", alpha=0.3)
    return figure


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--run", choices=(*OURS, *THEIRS))
        parser.add_argument("folder", type=Path)
        given = parser.parse_args()
        print(json.dumps(once(given.folder, given.run)))
        return
    options = results_io.arguments(__doc__.splitlines()[0])
    clips, rounds = (64, 1) if options.quick else (3_000, 3)
    load = os.getloadavg()[0]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*OURS, *THEIRS)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder, clips)
        for number in range(rounds + 1):  # the first makes the indexes
            for name in found:
                command = [sys.executable, __file__, "--run", name, scratch]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                if number:
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    assert len({figures["samples"] for figures in medians.values()}) == 1, "others read other clips"
    best = max(medians[name]["clips_per_s"] for name in THEIRS)
    for name, figures in medians.items():
        rate = figures["clips_per_s"]
        print(f"{name:12} {rate:8.0f} clips/s  {rate / best:5.2f} of their best")
    payload = {"clips": clips, "rounds": rounds, "load_before": load, "medians": medians}
    payload |= {"shards_of_their_best": medians["shards"]["clips_per_s"] / best, "runs": found}
    print(results_io.write("shapes", payload, draw(medians), quick=options.quick, out=options.out))


if __name__ == "__main__":
    main()
