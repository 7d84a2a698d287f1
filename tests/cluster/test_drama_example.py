"""The example that judges speech: through the jobs as a user gives them, and how well it rates
performances whose lines and accents no clip of training has."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from raysft.run.lines import read_lines
from tests.support import jobs

EXAMPLE = jobs.ROOT / "examples" / "drama"
DIMENSIONS = {"pitch_dynamics", "pace", "loudness"}
LEAST = 0.8  # Spearman correlation with the raters' mean, held-out performances
RISE = 0.2  # of the mean reward
SLACK = 0.02  # of a correlation of 480 answers, whose 95% interval is five times as wide

pytestmark = pytest.mark.usefixtures("joined")


def done(job: str, *words: object) -> str:
    found = jobs.call(job, *words)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def summary(run: Path) -> list[dict[str, Any]]:
    """The table of the only evaluation that was asked for."""
    (table,) = run.glob("evaluations/*/judged/test/evaluation_summary.csv")
    with table.open() as stream:
        return list(csv.DictReader(stream))


def test_two_steps_are_rated_and_drawn_by_the_jobs(tmp_path: Path) -> None:
    short = ("only=pitch", "stages.pitch.train.max_steps=2")
    done("sft", EXAMPLE / "sft.yaml", f"run.storage_path={tmp_path}", *short)
    run = tmp_path / "drama" / "pitch"
    (trained,) = read_lines(run / "eval.jsonl")
    assert {"missing_scores/test", "rater_alpha/test", "loss/rating"} <= trained.keys()
    assert read_lines(run / "quarantine.jsonl") == []
    done("evaluate", run)
    rows = summary(run)
    assert {row["dimension"] for row in rows} == {"overall", "pitch_dynamics"}
    assert {row["examples"] for row in rows if row["dimension"] == "overall"} == {"160"}
    (judged,) = run.glob("evaluations/*/judged")
    done("report", judged, "--out", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "correlations.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_held_out_performances_are_rated_as_the_raters_do(tmp_path: Path) -> None:
    done("sft", EXAMPLE / "sft.yaml", f"run.storage_path={tmp_path}")
    run = tmp_path / "drama" / "all"
    last = read_lines(run / "eval.jsonl")[-1]
    assert last["final"] and last["missing_scores/test"] == 0
    done("evaluate", run)
    rows = [row for row in summary(run) if row["score"] == "model_score"]
    found = {row["dimension"]: float(row["spearman"]) for row in rows}
    assert found.keys() == {"overall", *DIMENSIONS}
    assert found["overall"] == pytest.approx(last["spearman/test"], abs=1e-6)
    assert min(found.values()) >= LEAST, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rewards_rise_and_ratings_are_no_worse(tmp_path: Path) -> None:
    done("sft", EXAMPLE / "grpo.yaml", f"run.storage_path={tmp_path}")
    weak, grpo = tmp_path / "drama_grpo" / "weak", tmp_path / "drama_grpo" / "grpo"
    rewards = [line["reward"] for line in read_lines(grpo / "metrics.jsonl") if "reward" in line]
    tenth = max(1, len(rewards) // 10)
    assert sum(rewards[-tenth:]) / tenth - sum(rewards[:tenth]) / tenth >= RISE, rewards
    before, after = (read_lines(run / "eval.jsonl")[-1] for run in (weak, grpo))
    assert after["spearman/test"] >= before["spearman/test"] - SLACK
    assert after["mae/test"] < before["mae/test"]
