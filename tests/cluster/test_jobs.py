"""The jobs as a user runs them, on one Ray cluster: train, kill, continue, evaluate, export."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from raysft.audit import audit
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from tests.cluster.conftest import ROOT, without_ray_settings
from tests.properties.test_world_sizes import ledger
from tests.support import jobs
from tests.support.models import AUDIO, CAUSAL

# Every container, rate and channel count that must train, in one manifest.
KINDS = (
    ("wav", 8000, 1),
    ("flac", 22050, 2),
    ("ogg", 44100, 1),
    ("mp3", 44100, 2),
    ("wav", 96000, 2),
    ("flac", 96000, 1),
    ("mp3", 22050, 1),
)
METRICS = {
    "step",
    "epoch",
    "loss",
    "loss/asr",
    "lr",
    "grad_norm",
    "tokens",
    "examples",
    "audio_seconds",
    "tokens_per_s",
    "padding",
    "data_wait",
    "seconds",
    "world_size",
}


pytestmark = pytest.mark.usefixtures("joined")


@pytest.fixture(scope="module")
def corpus(make_clips: Callable[..., Path]) -> Path:
    return make_clips(70, kinds=KINDS, absolute=True)


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds asr.yaml; runs go to its subfolder `runs`."""
    folder = tmp_path_factory.mktemp("jobs")
    tree = {
        "run": {"name": "one", "storage_path": str(folder / "runs")},
        "data": {
            "train": [str(corpus)],
            "eval": [{"path": str(corpus), "name": "dev"}],
            "lanes": 4,
            "tokens_per_batch": 500,
        },
        "model": AUDIO,
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 12},
        "log": {"every": 1},
        "checkpoint": {"every": 4},
        "evaluate": {"max_new_tokens": 4, "max_examples": 8, "every": 6},
    }
    (folder / "asr.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path, joined: None) -> Path:
    """A run of one worker on clips of every kind, trained to its end."""
    done = jobs.call("sft", folder / "asr.yaml")
    assert done.returncode == 0, done.stderr
    assert "step 12/12" in done.stdout and "eta" in done.stdout
    assert re.search(r"source +wer +cer +examples\n +dev +[\d.]+%", done.stdout)
    assert f"run folder: {folder / 'runs' / 'one'}" in done.stdout
    return folder / "runs" / "one"


def test_a_run_leaves_the_files_of_the_contract(finished: Path, corpus: Path) -> None:
    lines = read_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert set(lines[0]) >= METRICS
    evaluations = read_lines(finished / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [6, 12]
    assert {"wer/dev", "cer/dev", "loss/asr", "perplexity/asr"} <= set(evaluations[-1])
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["versions"]["torch"] and config["data"]["lanes"] == 4
    assert config["train"]["precision"] == "fp32"  # of auto, on CPUs
    assert config["parallel"]["threads"] >= 1  # those it began with: they decide its last bits
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == ["step_12", "step_8"]
    assert all((finished / "checkpoints" / name / "COMMITTED").is_file() for name in names)
    assert list((finished / "tensorboard").glob("events*"))
    assert read_lines(finished / "quarantine.jsonl") == []
    seen = [id_ for ids in ledger(finished).values() for id_ in ids]
    first_epoch = set(seen)
    assert len(first_epoch) == 70  # every kind of file was trained on


def test_two_workers_one_killed_train_the_same_batches(finished: Path, folder: Path) -> None:
    job = jobs.start("sft", folder / "asr.yaml", "run.name=two", "parallel.workers=2")
    run = folder / "runs" / "two"
    jobs.wait_for_step(job, run, 6)  # after the checkpoint of step 4
    jobs.processes("RayTrainWorker")[0].send_signal(signal.SIGKILL)
    output, errors = job.communicate(timeout=200)
    assert job.returncode == 0, output + errors
    assert output.count("2 worker(s) started") == 2
    assert ledger(run) == ledger(finished)
    ours = [line["loss"] for line in read_lines(run / "metrics.jsonl")]
    theirs = [line["loss"] for line in read_lines(finished / "metrics.jsonl")]
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_same_command_on_a_finished_run_trains_nothing(finished: Path, folder: Path) -> None:
    before = {name: (finished / name).read_bytes() for name in ("metrics.jsonl", "events.jsonl")}
    done = jobs.call("sft", folder / "asr.yaml")
    assert done.returncode == 0, done.stderr
    assert "is finished: all 12 steps are trained" in done.stdout
    assert "continu" not in done.stdout and "started" not in done.stdout
    assert "evaluation at step 12" in done.stdout and "(step 12)" in done.stdout
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_dry_run_tells_steps_padding_tokens_and_memory(folder: Path) -> None:
    done = jobs.call("sft", folder / "asr.yaml", "run.name=dry", "--dry-run", "--show", "2")
    assert done.returncode == 0, done.stderr
    for word in (
        "examples        70 usable",
        "steps",
        "padding",
        "asr",
        "memory",
        "precision       fp32",
    ):
        assert word in done.stdout
    assert "example 2: " in done.stdout and "example 3: " not in done.stdout
    assert done.stdout.count("\u27e6") == 2, "an answer each is marked"
    assert not (folder / "runs" / "dry").exists()


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a run but those of its evaluations."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if not name.startswith("evaluations/")
    }


def test_evaluate_reproduces_the_run_and_takes_another_source_and_changes_nothing_of_it(
    finished: Path, corpus: Path
) -> None:
    before = content(finished)
    at_end = read_lines(finished / "eval.jsonl")[-1]
    done = jobs.call("evaluate", finished, "--data", corpus, "parallel.workers=2")
    assert done.returncode == 0, done.stderr
    own = finished / "evaluations" / "step_12_train"
    (again,) = read_lines(own / "eval.jsonl")
    assert again["step"] == 12
    assert again["wer/train"] == at_end["wer/dev"]  # the same clips under the file's own name
    assert again["loss/asr"] == pytest.approx(at_end["loss/asr"], rel=1e-5)
    assert len(read_lines(own / "predictions.jsonl")) == 70
    assert yaml.safe_load((own / "config.yaml").read_text())["parallel"]["workers"] == 2
    assert f"evaluating step 12 of {finished}" in done.stdout and str(own) in done.stdout
    assert re.search(r"source +wer +cer +examples\n +train +[\d.]+% +[\d.]+% +70\n", done.stdout)
    assert content(finished) == before
    none = jobs.call("evaluate", finished, "--step", "7")
    assert none.returncode == 1 and "kept are 8, 12" in none.stderr


@pytest.mark.slow
def test_evaluate_beside_a_run_that_trains_changes_nothing_of_it(
    folder: Path, corpus: Path
) -> None:
    endless = ("run.name=beside", "train.max_steps=100000", "evaluate.every=0", "log.every=1")
    job = jobs.start("sft", folder / "asr.yaml", *endless, "checkpoint.keep=99")
    run = folder / "runs" / "beside"
    jobs.wait_for_step(job, run, 60)
    kept = {name: (run / name).read_bytes() for name in ("config.yaml", "plan.json", "owner.json")}
    words = (run, "--data", corpus, "evaluate.max_examples=4", "checkpoint.every=7", "log.every=3")
    done = subprocess.run(  # with a Ray of its own: the run has all of the other one's CPUs
        [sys.executable, ROOT / "jobs" / "evaluate.py", *words],
        env=without_ray_settings(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {name: (run / name).read_bytes() for name in kept} == kept
    jobs.wait_for_step(job, run, len(read_lines(run / "metrics.jsonl")) + 60)
    os.kill(job.pid, signal.SIGINT)
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 130, output + errors
    assert [e["event"] for e in read_lines(run / "events.jsonl") if e["event"] != "saved"] == [
        "started",
        "stopped",
    ]
    assert audit(run).clean


def test_export_is_a_folder_that_transformers_loads(finished: Path, tmp_path: Path) -> None:
    done = jobs.call("export", finished, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "exported step 12" in done.stdout
    asked = "asr examples without an instruction of their own were asked: Transcribe the following"
    assert asked in done.stdout
    assert not done.stderr, "nothing of libraries"
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    net = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert net.config.text_config.hidden_size == 32
    AutoProcessor.from_pretrained(tmp_path / "out")
    words = [sys.executable, "-X", "importtime", jobs.ROOT / "jobs" / "export.py", finished]
    again = subprocess.run([*words, tmp_path / "out"], capture_output=True, text=True)
    assert again.returncode == 1 and "is not empty" in again.stderr
    assert not re.search(r"\| +torch$", again.stderr, re.M), "said before torch is imported"


@pytest.mark.slow
def test_most_json_trains_in_all_three_shapes(tmp_path: Path) -> None:
    def items(prefix: str, count: int) -> list[dict[str, str]]:
        found = []
        for number in range(count):
            units = "".join(f"[Hu{(7 * number + i) % 50}]" for i in range(12))
            text, name = f"WORD {number}", f"{prefix}{number}"
            found.append({"id": name, "instruction": "Transcribe.", "input": units, "output": text})
            found.append(
                {"id": f"tts_{name}", "instruction": "Say.", "input": text, "output": units}
            )
        return found

    listed, wrapped, single = items("l", 10), items("w", 10), items("s", 1)[0]
    shapes = {"list": listed, "wrapped": {"data": wrapped}, "single": single}
    for name, content in shapes.items():
        (tmp_path / f"{name}_train.json").write_text(json.dumps(content))
    tree = {
        "run": {"storage_path": str(tmp_path), "name": "run"},
        "data": {"train": [str(tmp_path)], "lanes": 2, "tokens_per_batch": 256},
        "model": {**CAUSAL, "speech_units": 50},
        "train": {"epochs": 1},
        "log": {"every": 1},
    }
    config = tmp_path / "units.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = jobs.call("sft", config)
    assert done.returncode == 0, done.stderr
    seen = [id_ for ids in ledger(tmp_path / "run").values() for id_ in ids]
    assert sorted(seen) == sorted(item["id"] for item in [*listed, *wrapped, single])
    names = {name for line in read_lines(tmp_path / "run" / "metrics.jsonl") for name in line}
    assert {"loss/asr", "loss/tts"} <= names


@pytest.mark.slow
def test_interrupted_job_stops_cleanly_and_continues(finished: Path, folder: Path) -> None:
    words = (folder / "asr.yaml", "run.name=stopped")
    job = jobs.start("sft", *words)
    run = folder / "runs" / "stopped"
    jobs.wait_for_step(job, run, 5)
    os.kill(job.pid, signal.SIGINT)
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 130 and "the same command continues" in errors
    assert "saved and stopped after step" in output and "Traceback" not in errors
    done = jobs.call("sft", *words)
    assert done.returncode == 0, done.stderr
    (again,) = [e for e in read_lines(run / "events.jsonl") if e["event"] == "continued"]
    assert again["step"] >= 5 and again["steps_again"] == 0
    assert ledger(run) == ledger(finished)
    ours = [line["loss"] for line in read_lines(run / "metrics.jsonl")]
    assert ours == [line["loss"] for line in read_lines(finished / "metrics.jsonl")]


@pytest.fixture(scope="module")
def speech_config(
    make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Ming clips, asr and tts, for a causal LM: audio has to become units."""
    folder = tmp_path_factory.mktemp("speech")
    tree = {
        "run": {"name": "units", "storage_path": str(folder / "runs")},
        "data": {
            "train": [str(make_clips(40, tasks=("asr", "tts")))],
            "lanes": 2,
            "tokens_per_batch": 400,
            "mix": {"asr": 0.5, "tts": 0.5},
        },
        "model": CAUSAL,
        "train": {"max_steps": 3},
        "log": {"every": 1},
    }
    path = folder / "units.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_a_causal_lm_learns_asr_and_tts_through_speech_tokens_with_a_budget_found_by_itself(
    speech_config: Path, tmp_path: Path
) -> None:
    auto = ("data.tokens_per_batch=auto", "parallel.memory_gb=3")
    fit = "data.speech_tokens={clusters: 20, fit_clips: 30}"
    done = jobs.call("sft", speech_config, fit, *auto)
    assert done.returncode == 0, done.stderr
    run = speech_config.parent / "runs" / "units"
    budget = read_config(run).data.tokens_per_batch
    assert isinstance(budget, int) and budget % 64 == 0
    for line in read_lines(run / "metrics.jsonl"):
        assert {"loss/asr", "loss/tts"} <= set(line), "the mix holds in every step"
    exported = jobs.call("export", run, tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<|unit19|>") < net.get_input_embeddings().num_embeddings


def test_a_causal_lm_without_a_speech_tokenizer_says_what_is_missing(speech_config: Path) -> None:
    done = jobs.call("sft", speech_config, "run.name=none")
    assert done.returncode == 1
    assert "data.speech_tokens" in done.stderr and "audio_lm" in done.stderr
