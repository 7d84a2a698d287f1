"""Stages by one command: each a run, killed anywhere and continued; the best of each for others."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from raysft.audit import audit
from raysft.export import export_run
from raysft.run.folder import base_of, read_config
from raysft.run.identity import of as base
from raysft.run.lines import read_lines
from tests.properties.test_world_sizes import ledger
from tests.support import jobs
from tests.support.models import CAUSAL

pytestmark = [pytest.mark.usefixtures("joined"), pytest.mark.timeout(900)]
STEPS, EVERY = 40, 10


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of a small text model. What the first is evaluated on is unlike what it is trained
    on: the longer it trains, the worse."""
    folder = tmp_path_factory.mktemp("stages")
    for name, answer in (("train", "aaaa"), ("other", "bbbb")):
        lines = [
            {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": a}]}
            for n in range(40)
            for a in [answer]
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tree: dict[str, Any] = {
        "run": {"name": "two", "storage_path": str(folder / "runs")},
        "data": {
            "train": [str(folder / "train.jsonl")],
            "eval": [{"path": str(folder / "train.jsonl"), "name": "dev"}],
            "lanes": 2,
            "tokens_per_batch": 128,
        },
        "model": CAUSAL,
        "parallel": {"backoff_s": 0.0},
        "optim": {"lr": 1e-2},
        "train": {"max_steps": STEPS},
        "evaluate": {"every": EVERY, "generate": False},
        "checkpoint": {"every": 5},
        "log": {"every": 1, "tensorboard": False},
        "stages": [
            {
                "name": "llm",
                "data": {"eval": [{"path": str(folder / "other.jsonl"), "name": "dev"}]},
            },
            {"name": "joint", "model": {"path": "stages.llm"}, "optim": {"lr": 1e-3}},
        ],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path, joined: None) -> Path:
    done = jobs.call("sft", config)
    assert done.returncode == 0, done.stderr
    folder = config.parent / "runs" / "two"
    assert f"stages folder: {folder}" in done.stdout
    return folder


def losses(run: Path) -> list[float]:
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def starts(run: Path) -> int:
    return sum(line["event"] == "started" for line in read_lines(run / "events.jsonl"))


def test_the_best_of_a_stage_is_that_by_validation_loss(undisturbed: Path, tmp_path: Path) -> None:
    """Of the first the first evaluation's, of the second the last's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, expected in (("llm", EVERY), ("joint", STEPS)):
        run, best = undisturbed / name, undisturbed / f"{name}_best"
        assert audit(run).clean
        measured = {line["step"]: line["loss/chat"] for line in read_lines(run / "eval.jsonl")}
        assert list(measured) == list(range(EVERY, STEPS + 1, EVERY))
        step = min(measured, key=lambda at: measured[at])
        assert step == expected
        for at in {step, STEPS}:
            export_run(run, tmp_path / f"{name}{at}", step=str(at))
            assert same(best, tmp_path / f"{name}{at}") == (at == step)
        net = AutoModelForCausalLM.from_pretrained(best)
        loaded = net.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in weights(best).items())
        assert AutoTokenizer.from_pretrained(best).decode([65]) == "A"


def test_a_stage_begins_from_the_best_of_the_one_that_it_names(undisturbed: Path) -> None:
    run = undisturbed / "joint"
    settings = read_config(run).model
    assert settings.path == str(undisturbed / "llm_best")
    assert base_of(run) == base(settings)


def test_what_is_finished_is_not_run_again(undisturbed: Path, config: Path) -> None:
    """Nor looked at: its data may be gone. A change of what it was trained with is refused, by the
    rules of a run, and names the stage."""
    data = config.parent / "train.jsonl"
    moved = data.rename(data.with_suffix(".away"))
    try:
        done = jobs.call("sft", config)
    finally:
        moved.rename(data)
    assert done.returncode == 0, done.stderr
    assert "stage llm is finished" in done.stdout and "stage joint is finished" in done.stdout
    assert [starts(undisturbed / name) for name in ("llm", "joint")] == [1, 1]
    done = jobs.call("sft", config, "stages.joint.optim.lr=2e-2")
    assert done.returncode == 1
    assert "error: stage joint: " in done.stderr
    assert "holds a run of another config: optim.lr (was 0.001, now 0.02)" in done.stderr


def test_a_page_shows_all_stages_and_the_jobs_name_their_folders(
    undisturbed: Path, config: Path, tmp_path: Path
) -> None:
    assert '"stage": "llm", "status": "finished"' in (undisturbed / "report.html").read_text()
    done = jobs.call("report", undisturbed, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    _, _, rest = page.partition('id="facts">')
    shown = json.loads(rest.partition("</script>")[0])
    rows = [(row["stage"], row["step"], row["best"], row["by"]) for row in shown["stages"]]
    assert rows == [("llm", STEPS, EVERY, "loss"), ("joint", STEPS, STEPS, "loss")]
    assert [run["name"] for run in shown["runs"]] == ["llm", "joint"]
    assert shown["runs"][1]["series"]["step"][-1] == STEPS
    for words in (
        ("evaluate", undisturbed),
        ("export", undisturbed, tmp_path / "out"),
        ("transcribe", undisturbed, "clip.wav"),
    ):
        done = jobs.call(*words)
        assert done.returncode == 1
        assert (
            f"{undisturbed}: holds stages, each of them a run; name one of "
            f"{undisturbed / 'llm'}, {undisturbed / 'joint'}"
        ) in done.stderr, words


def test_one_stage_alone_needs_what_it_begins_from(undisturbed: Path, config: Path) -> None:
    done = jobs.call("sft", config, "run.name=alone", "only=joint")
    assert done.returncode == 1
    assert (
        "only: joint begins from llm, which is not trained: add it, only=[llm, joint]"
        in done.stderr
    )
    done = jobs.call("sft", config, "run.name=alone", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "stage llm\n" in done.stdout
    assert "stage joint; here with the model that llm begins with\n" in done.stdout
    assert done.stdout.count("steps           40 in all") == 2
    assert not (undisturbed.parent / "alone").exists()


@pytest.mark.slow
def test_killed_in_each_stage_and_between_them_it_goes_on_as_if_undisturbed(
    undisturbed: Path, config: Path
) -> None:
    folder = undisturbed.with_name("killed")
    runs = {name: folder / name for name in ("llm", "joint")}

    def killed(when: Callable[[], bool]) -> None:
        """Start it, and kill it as soon as that is so."""
        job = jobs.start("sft", config, "run.name=killed")
        end = time.monotonic() + 200
        while not when():
            assert job.poll() is None and time.monotonic() < end, job.communicate()
            time.sleep(0.001)
        job.kill()
        job.wait()

    def at(name: str, step: int) -> bool:
        return len(read_lines(runs[name] / "metrics.jsonl")) >= step

    killed(lambda: at("llm", 12))
    assert not at("llm", STEPS) and not runs["joint"].exists()
    killed(lambda: bool(list(folder.glob(".llm_best.partial-*"))))
    assert not (folder / "llm_best").exists() and not runs["joint"].exists()
    killed(lambda: (folder / "llm_best").exists())
    assert not runs["joint"].exists()
    killed(lambda: at("joint", 12))
    assert not at("joint", STEPS)
    done = jobs.call("sft", config, "run.name=killed")
    assert done.returncode == 0, done.stderr
    assert "stage llm is finished" in done.stdout
    for name, run in runs.items():
        assert audit(run).clean
        assert ledger(run) == ledger(undisturbed / name)
        assert losses(run) == losses(undisturbed / name)
        assert same(folder / f"{name}_best", undisturbed / f"{name}_best")
    assert not list(folder.glob(".*partial*"))


@pytest.mark.slow
def test_interrupted_it_says_in_which_stage_and_what_the_same_command_does(config: Path) -> None:
    run = config.parent / "runs" / "interrupted" / "llm"
    job = jobs.start("sft", config, "run.name=interrupted", "train.max_steps=4000", "only=llm")
    jobs.wait_for_step(job, run, 3)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 130
    assert "stage llm: interrupted; the same command continues from step" in said
    done = jobs.call("sft", config, "run.name=interrupted", "train.max_steps=4000", "only=joint")
    assert done.returncode == 1
    assert "stage joint: begins from llm, which is not finished" in done.stderr
