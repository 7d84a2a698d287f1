"""Scorers are rows of one table: what a row says is what is counted, shown, drawn and kept as the
best, and one from outside is as good as ours."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from raysft import scorers as table
from raysft.config.schema import Checkpoint, Data, Evaluate, Model, Source
from raysft.data.encode import make_encoder
from raysft.data.example import MicroBatch
from raysft.data.index.build import build_index
from raysft.data.read.reader import Reader, Work
from raysft.errors import UserError
from raysft.evaluate.run import Corpus, evaluate
from raysft.losses import Term
from raysft.losses.term import CROSS_ENTROPY
from raysft.models.base import SpeechModel
from raysft.parallel import World
from raysft.progress import ProgressLine
from raysft.report import draw
from raysft.run.catalogue import Catalogue, Saved
from raysft.run.evaluations import Measure, choose
from raysft.run.evaluations import table as shown_as_table
from raysft.run.folder import reopen, run_folder
from raysft.run.lines import read_lines
from raysft.scorers import Answer, Figure, Loss, Scorer, Sums, added, register, scorers
from raysft.scorers.error_rates import error_rates
from raysft.train.loop import train
from tests.support.models import CAUSAL
from tests.support.worlds import ROOT, start, tiny
from tests.unit.evaluate.test_evaluate import Oracle

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ONE = World(0, 1, torch.device("cpu"))


# -- what somebody has beside raysft -------------------------------------------------------------


def _exact(answers: Sequence[Answer], settings: Evaluate) -> Sums:
    return {"right": sum(a.reference == a.hypothesis for a in answers), "all": len(answers)}


EXACT = Scorer(
    "exact_match",
    (Figure("exact", "percent", better="max"),),
    _exact,
    lambda sums: {"exact": sums["right"] / sums["all"]},
)


def _likely(losses: Sequence[Loss], settings: Evaluate) -> Sums:
    return {"loss": sum(loss.sum for loss in losses), "tokens": sum(loss.tokens for loss in losses)}


LIKELY = Scorer(
    "likelihood",
    (Figure("likely", better="max"),),
    _likely,
    lambda sums: {"likely": math.exp(-sums["loss"] / sums["tokens"])},
    wants="losses",
)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are registered, for one test."""
    monkeypatch.setattr(table, "_ROWS", dict(table._ROWS))
    register(EXACT)
    register(LIKELY)


def run(folder: Path, best: str | None, progress: Callable[..., None] | None = None) -> Path:
    """Train a run that is evaluated, by both; returns its folder."""
    config = tiny(
        folder,
        data__eval=[{"path": str(folder / "units.json"), "name": "dev"}],
        train__max_steps=6,
        evaluate__every=2,
        evaluate__max_new_tokens=2,
        checkpoint__every=2,
        checkpoint__keep=1,
        checkpoint__best=best,
    )
    train(start(config, ONE, progress))
    return run_folder(config)


@pytest.mark.usefixtures("outside")
def test_a_scorer_from_outside_is_logged_shown_and_decides_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations = 0

    def generate(self: SpeechModel, prompts: list[Any], limit: int, synced_gpus: bool) -> list[str]:
        nonlocal evaluations  # of one batch each; every answer is right in the first
        evaluations += 1
        return [f"text {prompt.id[1:]}"[: evaluations > 1 or None] for prompt in prompts]

    monkeypatch.setattr(SpeechModel, "generate", generate)
    out = io.StringIO()
    folder = run(tmp_path, "exact/dev", ProgressLine(out))
    lines = read_lines(folder / "eval.jsonl")
    assert [(line["step"], line["exact/dev"]) for line in lines] == [(2, 1), (4, 0), (6, 0)]
    for line in lines:
        assert line["likely/asr"] == pytest.approx(1 / line["perplexity/asr"])
    assert re.search(
        r"source +wer +cer +exact +examples\n +dev +0\.00% +0\.00% +100\.00% +60\n", out.getvalue()
    )
    assert re.search(
        r"task +loss +perplexity +likely\n +asr +[\d.]+ +[\d.]+ +0\.\d+\n", out.getvalue()
    )
    settings = reopen(folder).checkpoint
    assert settings.best_mode == "max"
    assert choose(folder, settings, "best", Saved.damage)[0].step == 2
    kept = [saved.step for saved in Catalogue.of(settings, folder).committed()]
    assert kept == [2, 6]


@pytest.mark.usefixtures("outside")
def test_figures_of_losses_are_by_task_whoever_gives_them(tmp_path: Path) -> None:
    folder = run(tmp_path, "likely/asr")
    settings = reopen(folder).checkpoint
    assert choose(folder, settings, "best", Saved.damage)[0].step == 6, "it rises as losses fall"
    measure = Measure({"dev": {"data": "a", "examples": 1, "of": 1}}, "rules")
    assert measure.of("likely/asr") == measure.of("loss/asr") == (measure.sources,)
    assert measure.of("exact/dev") == measure.of("wer/dev") == (measure.sources["dev"], "rules")
    with pytest.raises(
        UserError,
        match=r"wer/no is not measured; .* wer/dev, cer/dev, exact/dev, "
        "loss/asr, perplexity/asr, likely/asr$",
    ):
        run(tmp_path, "wer/no")


@pytest.mark.usefixtures("outside")
def test_the_mode_is_the_metrics_own_where_none_is_set(tmp_path: Path) -> None:
    assert Checkpoint().best_mode == Checkpoint(best="wer/dev").best_mode == "min"
    assert Checkpoint(best="exact/dev").best_mode == "max"
    assert Checkpoint(best="exact/dev", best_mode="min").best_mode == "min"
    assert Checkpoint(best="known_elsewhere/dev").best_mode == "min"
    folder = run(tmp_path, None)
    assert reopen(folder).checkpoint.best_mode == "min"
    asked = reopen(folder, ["checkpoint.best=exact/dev"]).checkpoint
    assert asked.best_mode == "max", "nobody chose the min that config.yaml has"
    lowest = ["checkpoint.best=exact/dev", "checkpoint.best_mode=min"]
    assert reopen(folder, lowest).checkpoint.best_mode == "min"


def test_a_scorer_that_is_not_registered_here_changes_no_mode_of_a_run(
    tmp_path: Path, outside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path, "exact/dev")
    monkeypatch.setattr(table, "_ROWS", {"losses": table._ROWS["losses"]})
    assert reopen(folder).checkpoint.best_mode == "max"
    shown = shown_as_table(read_lines(folder / "eval.jsonl")[-1])
    assert re.search(r"\n +asr .* -\n +dev .* 60\n +task +loss +perplexity\n", shown)


@pytest.mark.usefixtures("outside")
def test_a_picture_has_shares_together_and_other_figures_beside_them(tmp_path: Path) -> None:
    folder = run(tmp_path, None)
    three = matplotlib.image.imread(draw(folder)).shape
    lines = read_lines(folder / "eval.jsonl")
    for line in lines:
        line["rating_error/dev"] = 0.4
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    four = matplotlib.image.imread(draw(folder)).shape
    assert four[0] == three[0] and three[1] == 14 * 110 and four[1] == 14 * 110 * 4 // 3


@pytest.mark.usefixtures("outside")
def test_a_name_of_a_scorer_or_a_figure_is_given_once() -> None:
    with pytest.raises(UserError, match="there is a scorer exact_match already"):
        register(dataclasses.replace(EXACT))
    register(EXACT)  # what is there already is no other
    with pytest.raises(UserError, match="mine: there is a figure exact already, of exact_match"):
        register(dataclasses.replace(EXACT, name="mine"))
    assert [row.name for row in scorers()][-2:] == ["exact_match", "likelihood"]


# -- sums that add up over workers ---------------------------------------------------------------


WORDS = ("one", "two", "你好", "it's", "...", "", "三 four")


def test_error_rates_of_parts_add_up_to_those_of_all() -> None:
    (row,) = [row for row in scorers() if row.name == "error_rates"]
    draw = random.Random(3)
    for _ in range(200):
        texts = [
            [" ".join(draw.choices(WORDS, k=draw.randint(0, 3))) for _ in "rh"]
            for _ in range(draw.randint(1, 6))
        ]
        answers = [Answer("x", "dev", "asr", None, *pair) for pair in texts]
        cut = draw.randint(0, len(answers))
        parts = [part for part in (answers[:cut], answers[cut:]) if part]
        settings = Evaluate()
        found = row.result(added(row.count(part, settings) for part in parts))
        references, hypotheses = zip(*texts)
        assert found == error_rates(references, hypotheses, settings.normalize)


def test_values_of_any_kind_that_adds_are_added_by_name() -> None:
    parts: list[Sums] = [{"n": 1, "ratings": [3.5]}, {}, {"n": 2, "ratings": [1.0, 2.0]}]
    assert added(parts) == {"n": 3, "ratings": [3.5, 1.0, 2.0]}
    assert parts[0] == {"n": 1, "ratings": [3.5]}


@dataclasses.dataclass(frozen=True)
class Threads(World):
    """Workers that are threads."""

    slots: list[Any]
    there: threading.Barrier

    def gather(self, value: Any) -> list[Any]:
        self.slots[self.rank] = value
        self.there.wait(60)
        found = list(self.slots)
        self.there.wait(60)
        return found

    def barrier(self, waiting: Callable[[], None] = lambda: None) -> None:
        self.there.wait(60)


@pytest.mark.parametrize("workers", [2, 3])
def test_figures_and_predictions_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, workers: int
) -> None:
    items = [
        {"id": f"u{i}", "input": "[Hu1]" * (1 + i % 4), "output": f"number {i}" + " more" * (i % 3)}
        for i in range(11)
    ]
    (tmp_path / "dev.json").write_text(json.dumps(items))
    encoder = make_encoder(Model(**CAUSAL, speech_units=4), Data(), tmp_path)
    source = Source(path=str(tmp_path / "dev.json"), task="asr")
    index = build_index([source], "eval", encoder, tmp_path / "i")
    corpus = Corpus(
        index.tokens,
        index.source,
        [source.name for source in index.sources],
        lambda rows: [example.text for example in index.examples(rows)],
    )

    def evaluated(world: World, file: Path) -> dict[str, float]:
        reader = Reader(index, encoder, 10**6, None)
        oracle = Oracle(encoder, lambda text: text.replace("1", "one two"))

        def read(rows: list[np.ndarray]) -> Iterator[MicroBatch]:
            return reader.read(iter([Work(0, i, 0, chosen) for i, chosen in enumerate(rows)]))

        def module(inputs: dict[str, torch.Tensor]) -> list[Term]:
            ids = oracle._batch.ids
            loss = (torch.tensor(sum(map(len, ids)) / 8), torch.tensor(len(ids)))
            return [
                Term(CROSS_ENTROPY, torch.zeros(()), torch.zeros(()), {"asr": loss} if ids else {})
            ]

        settings, context = Evaluate(tokens_per_batch=80), contextlib.nullcontext
        return evaluate(module, oracle, corpus, read, settings, world, context, True, file)

    alone = evaluated(ONE, tmp_path / "alone.jsonl")
    assert list(alone) == ["loss/asr", "perplexity/asr", "wer/dev", "cer/dev"]
    assert 0 < alone["wer/dev"] < 1
    slots, there = [None] * workers, threading.Barrier(workers)
    found: dict[int, dict[str, float]] = {}

    def work(rank: int) -> None:
        world = Threads(rank, workers, torch.device("cpu"), slots, there)
        found[rank] = evaluated(world, tmp_path / "together.jsonl")

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [alone] * workers
    assert list(found[0]) == list(alone)
    assert (tmp_path / "together.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_the_table_loads_nothing_that_scores() -> None:
    code = """
import sys, raysft.scorers, raysft.config, raysft.cli
assert not {"torch", "transformers", "jiwer", "sacrebleu", "ray"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
