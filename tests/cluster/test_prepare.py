"""jobs/prepare.py as a user runs it: Step's whole preparation by one command, killed and gone on
with; shards that pyarrow alone reads."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from raysft.config.speech_tokens import SpeechTokens
from tests.support import jobs, layouts, listeners

pytestmark = pytest.mark.usefixtures("joined")

COUNT, ROWS = 27, 3


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of Step's preparation of a Kaldi folder, without prepare.path."""
    folder = tmp_path_factory.mktemp("step")
    kaldi = layouts.LAYOUTS["kaldi"].write(folder / "kaldi", layouts.corpus(COUNT))
    streams = [
        {
            "path": str(listeners.onnx_model(folder / "vq02.onnx", "fbank", codes=16, step=6)),
            **{"features": "fbank80", "codes": 16, "rate": 16.67},
        },
        {
            "path": str(listeners.onnx_model(folder / "vq06.onnx", "mel", codes=32, step=4)),
            **{"features": "whisper_mel128", "codes": 32, "rate": 25, "chunk_s": 30},
        },
    ]
    tree = {
        "data": {"train": [str(kaldi)]},
        "prepare": {
            **{"rows": ROWS, "workers": 1},
            "speech_tokens": {
                **{"method": "onnx", "streams": streams, "pattern": [2, 3]},
                **{"peak": 0.999, "trim_db": 20},
            },
            "speakers": {
                "method": "onnx",
                "path": str(listeners.onnx_model(folder / "campplus.onnx", "fbank")),
            },
        },
    }
    (folder / "step.yaml").write_text(yaml.safe_dump(tree))
    return folder / "step.yaml"


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def killed_once(there: Callable[[], bool], *words: object) -> None:
    """Start the preparation, and kill it as soon as something is there."""
    job = jobs.start("prepare", *words)
    end = time.monotonic() + 200
    while not there():
        if job.poll() is not None or time.monotonic() > end:
            job.kill()
            pytest.fail(f"the job ended early: {job.communicate()}")
        time.sleep(0.005)
    job.kill()
    assert job.wait() == -9


@pytest.mark.slow
def test_step_s_preparation_killed_twice_makes_the_same_shards(step: Path, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    done = jobs.call("prepare", step, f"prepare.path={whole}")
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} utterances" in done.stdout
    shards = -(-COUNT // ROWS)

    path = f"prepare.path={folder}"
    heard, made = folder / "state" / "embeddings", folder / "shards"
    killed_once(lambda: len(list(heard.glob("0*.npz"))) >= 2, step, path)
    assert not list(made.glob("*.parquet"))
    killed_once(lambda: len(list(made.glob("*.parquet"))) >= 2, step, path)
    assert not (folder / "data.list").exists()
    before = files(made, "*.parquet")
    assert 2 <= len(before) < shards
    done = jobs.call("prepare", step, path)
    assert done.returncode == 0, done.stderr
    assert f"{shards} shards" in done.stdout
    now = int(done.stdout.split(" shards, ")[1].split(" of them")[0])
    assert 0 < now <= shards - len(before)

    for pattern in ("*.parquet", "*.ids"):
        assert files(made, pattern) == files(whole / "shards", pattern)
    for name, content in before.items():
        assert (made / name).read_bytes() == content
    lists = [(one / "data.list").read_text().split() for one in (whole, folder)]
    assert [Path(path).name for path in lists[0]] == [Path(path).name for path in lists[1]]
    assert f'"utterances": {COUNT}' in (folder / "prepare.html").read_text()
    assert not list(folder.rglob(".*"))  # nothing half written is left

    told = {one.id: one for one in layouts.corpus(COUNT)}
    rows = [row for path in lists[1] for row in pq.read_table(path).to_pylist()]
    assert [row["utt"] for row in rows] == list(told)
    for speaker in ("s0", "s1"):
        own = [row for row in rows if row["spk"] == speaker]
        mean = np.mean([row["utt_embedding"] for row in own], axis=0)
        for row in own:
            np.testing.assert_allclose(row["spk_embedding"], mean, rtol=1e-5)
    for row in rows:
        assert row["text"] == told[row["utt"]].text
        assert len(row["utt_embedding"]) == 12
        assert row["tokens"] == len(row["speech_token"]) > 0
        turns = np.array(row["speech_token"]).reshape(-1, 5)
        assert turns[:, :2].max() < 16 <= turns[:, 2:].min()
        assert turns[:, 2:].max() < 48


@pytest.mark.slow
def test_hidden_units_are_fitted_once_and_held(tmp_path: Path) -> None:
    """Fitted by a worker before the shards; another layer in the same folder is refused."""
    kaldi = layouts.LAYOUTS["kaldi"].write(tmp_path / "kaldi", layouts.corpus(6))
    model = listeners.saved("hubert", tmp_path / "hubert")
    section = f"{{model: {model}, layer: 2, clusters: 5, dedup: true}}"
    config = tmp_path / "ssl.yaml"
    config.write_text(
        f"data: {{train: [{kaldi}]}}\nprepare: {{rows: 4, speech_tokens: {section}}}\n"
    )
    folder = tmp_path / "out"
    done = jobs.call("prepare", config, f"prepare.path={folder}")
    assert done.returncode == 0, done.stderr
    assert (folder / "units.safetensors").is_file()
    tokens = pq.read_table(folder / "shards" / "000000.parquet")["speech_token"]
    for one in tokens.to_pylist():
        assert all(a != b for a, b in itertools.pairwise(one))

    changed = "prepare.speech_tokens.layer=1"
    done = jobs.call("prepare", config, f"prepare.path={folder}", changed)
    assert done.returncode != 0
    assert "holds a preparation of something else (prepare has changed)" in done.stderr


def test_what_is_wrong_with_a_model_is_one_line(step: Path, tmp_path: Path) -> None:
    """What is only known where it is loaded, too."""
    tree = yaml.safe_load(step.read_text())
    broken = tmp_path / "broken.onnx"
    broken.write_text("none")
    tree["prepare"]["speakers"]["path"] = str(broken)
    config = tmp_path / "broken.yaml"
    config.write_text(json.dumps(tree))
    done = jobs.call("prepare", config, f"prepare.path={tmp_path / 'out'}")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines[-1].startswith(
        f"error: prepare.speakers.path: {broken}: no model that onnxruntime"
    )


def test_tokens_that_a_run_makes_itself_are_in_shards_too(tmp_path: Path) -> None:
    """data.speech_tokens: those of its centroids, which are fitted once, into the folder."""
    from raysft.data.clips.audio import load
    from raysft.data.clips.speech_tokens import load as fitted

    told = layouts.corpus(5)
    kaldi = layouts.LAYOUTS["kaldi"].write(tmp_path / "kaldi", told)
    config = tmp_path / "own.yaml"
    own = "speech_tokens: {clusters: 4, stack: 2}"
    config.write_text(f"data: {{train: [{kaldi}], {own}}}\nprepare: {{rows: 3}}\n")
    folder = tmp_path / "out"
    done = jobs.call("prepare", config, f"prepare.path={folder}")
    assert done.returncode == 0, done.stderr
    tokenizer = fitted(SpeechTokens(clusters=4, stack=2), folder)
    paths = (folder / "data.list").read_text().split()
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    assert [row["utt"] for row in rows] == [one.id for one in told]
    for row in rows:
        expected = tokenizer.encode(load(row["wav"], 16000))
        assert row["speech_token"] == expected.tolist()
        assert row["tokens"] == len(expected) == -(-row["samples"] // 160) // 2
        assert row["utt_embedding"] is None
