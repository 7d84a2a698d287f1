"""Runs of judged speech, in real processes: which dimension, rater and wording is asked about
follows from the place in the run alone, and right tokens are counted over all workers."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from scipy.stats import chisquare
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from raysft.audit import audit
from raysft.export import export_run
from raysft.run.lines import read_lines
from tests.support import asked, worlds
from tests.support.drama import LABELS

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
MODULE = "tests.support.asked"
STEPS, KILLED = 9, 6
RATE = 16000
NAMES = ("token_accuracy", *(f"accuracy_of_{score}" for score in range(6)))


def ledger(run: Path) -> dict[tuple[int, int], tuple[int, list[str], str]]:
    """(step, lane) -> epoch, ids, and the digest of ids, labels and features."""
    found = {}
    for file in sorted((run / "ledger").glob("*.jsonl")):
        for line in read_lines(file):
            key = (line["step"], line["lane"])
            assert key not in found, f"{key} is in the ledger twice"
            found[key] = (line["epoch"], line["ids"], line["tensors"])
    assert len(found) == 3 * STEPS
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one worker, never disturbed; beside it one that was killed in the middle of an
    epoch, two steps after it was saved."""
    folder = tmp_path_factory.mktemp("reference")
    data = {"train": asked.corpus(folder)}
    paths = [asked.write(folder, name, data=data) for name in ("one", "killed", "two")]
    assert worlds.run(1, *paths[:2], kill_at=KILLED, module=MODULE) == -signal.SIGKILL
    return folder / "runs" / "one"


def test_draws_in_a_run_are_uniform_and_new_in_each_epoch(reference: Path) -> None:
    found, epochs = asked.asked(reference), {}
    for place, (epoch, ids, _) in ledger(reference).items():
        assert [id_ for id_, _ in found[place]] == ids
        for id_, text in found[place]:
            assert epochs.setdefault((epoch, id_), text) == text
    one = {place: text for place, text in epochs.items() if not place[1].startswith("all")}
    assert max(epoch for epoch, _ in one) >= 2
    drawn = Counter(map(asked.drawn, one.values()))
    by_label = Counter(label for label, _ in drawn.elements())
    assert set(by_label) == set(LABELS) and chisquare([*by_label.values()]).pvalue > 0.001
    for number, label in enumerate(LABELS):  # each has raters of its own, 2 to 5 of them
        assert {rating for of, rating in drawn if of == label} <= {
            str(rater) for rater in range(1, 3 + number % 4)
        }
    assert len({rating for _, rating in drawn}) == 5
    again = [(text, one.get((1, id_))) for (epoch, id_), text in one.items() if not epoch]
    assert sum(text != other for text, other in again if other) > len(again) / 2
    orders = {text for (_, id_), text in epochs.items() if id_.startswith("all")}
    assert len(orders) > 6  # of as many records: in other orders, by other raters


def test_killed_within_an_epoch_and_gone_on_with_by_three_workers_asks_the_same(
    reference: Path,
) -> None:
    run = reference.with_name("killed")
    assert len(read_lines(run / "metrics.jsonl")) == KILLED
    epochs = {step: epoch for (step, _), (epoch, *_) in ledger(reference).items()}
    assert epochs[KILLED] == epochs[KILLED + 1]  # there it was in the middle of one
    before = asked.asked(run)
    assert worlds.run(3, reference.parents[1] / "killed.yaml", module=MODULE) == 0
    again = {line["step"] for file in run.glob("asked_2.jsonl") for line in read_lines(file)}
    first = min(again)  # after the checkpoint, or at the start where that was not durable yet
    assert again == set(range(first, STEPS + 1)) and first in (1, 5)
    assert before.keys() & {(step, 0) for step in again}
    assert asked.asked(run) == asked.asked(reference)  # also of steps that were taken twice
    assert ledger(run) == ledger(reference) and audit(run).clean


@pytest.mark.slow  # the one before has three of them
def test_two_workers_ask_what_one_asks(reference: Path) -> None:
    assert worlds.run(2, reference.parents[1] / "two.yaml", module=MODULE) == 0
    run = reference.with_name("two")
    assert asked.asked(run) == asked.asked(reference)
    assert ledger(run) == ledger(reference)


# -- right tokens ----------------------------------------------------------------------------------


def counted(records: list[dict[str, Any]], folder: Path, model: Path) -> dict[str, float]:
    """The figures of right tokens, each learnt token looked at by itself: with plain transformers,
    one record and one dimension after the other."""
    net = Qwen2AudioForConditionalGeneration.from_pretrained(model).eval()
    processor = AutoProcessor.from_pretrained(model)
    hits = Counter[str]()
    seen = Counter[str]()
    for record in records:
        wave, rate = soundfile.read(folder / record["wav_path"], dtype="float32")
        assert rate == RATE
        for question, answer in asked.settled(record):
            turn = [{"type": "text", "text": question}, {"type": "audio", "audio": wave}]
            given = processor.apply_chat_template(
                [{"role": "user", "content": turn}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            learnt = processor.tokenizer.encode(answer, add_special_tokens=False)
            learnt.append(processor.tokenizer.eos_token_id)
            prompt = given.pop("input_ids")
            ids = torch.cat([prompt, torch.tensor([learnt])], 1)
            given["attention_mask"] = torch.ones_like(ids)
            with torch.no_grad():
                logits = net(input_ids=ids, **given).logits[0, prompt.shape[1] - 1 : -1]
            for token, best in zip(learnt, logits.argmax(-1).tolist(), strict=True):
                text = processor.tokenizer.decode([token])
                names = ["token_accuracy", *([f"accuracy_of_{text}"] if text.isdigit() else [])]
                seen.update(names)
                hits.update(names if token == best else [])
    return {f"{name}/rating": hits[name] / seen[name] for name in seen}


def test_right_tokens_are_counted_over_all_workers_and_batches(tmp_path: Path) -> None:
    records, (same, spread) = asked.rated(tmp_path)
    data = {"train": [same], "eval": [spread], "tokens_per_batch": 500}
    evaluate = {"tokens_per_batch": 900, "generate": False, "at_end": False}
    optim = {"lr": 1e-2}
    train_for = {"max_steps": 40}
    path = asked.write(tmp_path, "run", data=data, evaluate=evaluate, optim=optim, train=train_for)
    assert worlds.run(1, path, module=MODULE) == 0
    run = tmp_path / "runs" / "run"
    for size in (1, 2, 3):
        assert worlds.run(size, path, kill_at=-1, module=MODULE) == 0
    found = {file.stem: json.loads(file.read_text()) for file in run.glob("[123]_[012].json")}
    assert len(found) == 6
    export_run(run, tmp_path / "out")
    wanted = counted(records, tmp_path, tmp_path / "out")
    assert {f"accuracy_of_{score}/rating" for score in range(1, 6)} < wanted.keys()
    assert 0.2 < wanted["token_accuracy/rating"] < 1
    assert len({*wanted.values()}) > 2  # some digits are right, and others are not
    for figures in found.values():
        own = {name: value for name, value in figures.items() if name.partition("/")[0] in NAMES}
        assert own == wanted
