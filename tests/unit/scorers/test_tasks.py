"""What answers are measured by, by task: figures of translations are sacrebleu's, however many
workers count them, and tasks that nothing measures are not answered."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import sacrebleu
import torch

from raysft.config import Config, load_config
from raysft.config.combinations import contradictions
from raysft.config.schema import Checkpoint, Data, Evaluate, Model, Source
from raysft.data.encode import make_encoder
from raysft.data.example import Audio, Example, MicroBatch, Turn, Units
from raysft.data.facts import reference_of
from raysft.data.index.build import build_index
from raysft.data.read.reader import Reader, Work
from raysft.driver import preflight
from raysft.errors import UserError
from raysft.evaluate.run import Corpus, evaluate
from raysft.losses import Term
from raysft.models.base import SpeechModel
from raysft.parallel import World
from raysft.progress import ProgressLine
from raysft.run.catalogue import Saved
from raysft.run.evaluations import Evaluations, Measure, choose, metrics_of
from raysft.run.folder import open_run, reopen, run_folder
from raysft.run.lines import read_lines
from raysft.scorers import Answer, added, figure_of, figures_of, scorers
from raysft.train.loop import train
from tests.support.models import CAUSAL
from tests.support.worlds import start, tiny
from tests.unit.evaluate.test_evaluate import Oracle
from tests.unit.scorers.test_scorers import ONE, Threads

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WORDS = ("the", "cat", "sat on", "mat .", "你好", "don't", "12,000", "Ünal", "“so”", "end.", "( )")
TOKENIZERS = ["13a", "intl", "zh", "char", "none"]


def answers(draw: random.Random, count: int) -> list[Answer]:
    """Texts, half of which are near their references."""
    found = []
    for _ in range(count):
        reference = " ".join(draw.choices(WORDS, k=draw.randint(0, 12)))
        other = " ".join(draw.choices(WORDS, k=draw.randint(0, 12)))
        near = reference[: draw.randint(0, len(reference))] + " "
        found.append(Answer("x", "dev", "st", None, reference, draw.choice([other, near])))
    return found


def measured(name: str, parts: list[list[Answer]], settings: Evaluate) -> dict[str, float]:
    """Figures of a scorer, of parts that each of some workers has counted."""
    (row,) = [row for row in scorers() if row.name == name]
    return row.result(added(row.count(part, settings) for part in parts if part))


@pytest.mark.parametrize("tokenize", TOKENIZERS)
def test_figures_of_parts_are_sacrebleus_of_all(tokenize: str) -> None:
    draw, settings = random.Random(5), Evaluate(bleu_tokenize=tokenize)
    for _ in range(30):
        found = answers(draw, draw.choice([1, 2, 40]))
        cuts = sorted(draw.choices(range(len(found) + 1), k=2))
        parts = [found[: cuts[0]], found[cuts[0] : cuts[1]], found[cuts[1] :]]
        said, right = [one.hypothesis for one in found], [[one.reference for one in found]]
        expected = sacrebleu.corpus_bleu(said, right, tokenize=tokenize).score
        assert measured("bleu", parts, settings) == {"bleu": expected}
        expected = sacrebleu.corpus_chrf(said, right).score
        assert measured("chrf", parts, settings) == {"chrf": expected}


def test_sources_may_have_words_of_their_own() -> None:
    found = [
        Answer("x", name, "st", None, "你好 world end.", "你好 word end.") for name in ("a", "b")
    ]
    settings = Evaluate(bleu_tokenize={"a": "zh"})
    for one, tokenize in zip(found, ("zh", "13a")):
        expected = sacrebleu.corpus_bleu([one.hypothesis], [[one.reference]], tokenize=tokenize)
        assert measured("bleu", [[one]], settings) == {"bleu": expected.score}
    assert measured("bleu", [found[:1]], settings) != measured("bleu", [found[1:]], settings)


def test_an_answer_is_right_as_it_is_or_as_it_is_compared() -> None:
    pairs = [("Paris", " Paris\n"), ("two  words", "two words"), ("Paris", "paris."), ("yes", "no")]
    found = [[Answer("x", "dev", "qa", None, *pair)] for pair in pairs]
    assert measured("exact", found, Evaluate()) == {"exact_match": 2 / 4}
    assert measured("accuracy", found, Evaluate()) == {"accuracy": 3 / 4}
    assert measured("accuracy", found, Evaluate(normalize=[])) == {"accuracy": 1 / 4}
    assert figure_of("accuracy/dev").shown(0.75) == "75.00%"
    assert figure_of("bleu/dev").shown(31.416) == "31.42"
    assert [Checkpoint(best=f"{name}/dev").best_mode for name in ("bleu", "chrf", "accuracy")] == [
        "max"
    ] * 3


def test_a_task_that_is_not_named_has_what_its_rows_say() -> None:
    assert figures_of("asr", {}) == ["wer", "cer"]
    for task in ("translation", "st", "s2tt", "captioning"):
        assert figures_of(task, {}) == ["bleu", "chrf"]
    assert figures_of("qa", {}) == figures_of("question_answering", {}) == ["exact_match"]
    assert figures_of("classification", {}) == ["accuracy"]
    for task in ("chat", "text", "tts", "anything"):
        assert figures_of(task, {}) == []
    assert figures_of("asr", {"asr": ["cer"], "chat": []}) == ["cer"]
    assert figures_of("asr", {"asr": []}) == []


def test_the_reference_is_the_text_or_what_is_to_be_answered() -> None:
    clip = Audio("/a.wav")
    assert reference_of(Example("a", "asr", (clip,), ("one",), text="one")) == "one"
    assert reference_of(Example("a", "qa", (clip,), ("Par", "is"))) == "Paris"
    assert reference_of(Example("a", "tts", ("one",), (clip,), text="one")) is None
    assert reference_of(Example("a", "tts", ("one",), (Units((1,)), "b"))) is None
    turns = (Turn("user", ("who?",)), Turn("assistant", ("me",)))
    assert reference_of(Example("a", "chat", (), (), text="me", turns=turns)) == "me"


# -- an evaluation -------------------------------------------------------------------------------

ITEMS = [  # task, right answer, answer
    ("asr", "one two three", "one two three four"),
    ("asr", "four", "for"),
    ("translation", "the cat is on the mat", "the cat sat on the mat"),
    ("translation", "there is a dog in the garden", "there is a dog in a garden"),
    ("translation", "good morning to all of you", "good morning to all of you"),
    ("qa", "Paris", "Paris"),
    ("qa", "Rome", "rome"),
    ("chat", "who knows", "nobody"),
]


def evaluated(folder: Path, metrics: dict[str, list[str]], workers: int = 1) -> dict[str, Any]:
    """Figures of a model that gives the answers of ITEMS, and "asked": tasks it was asked."""
    items = [
        {"id": f"u{i}", "input": "[Hu1]" * (1 + i % 4), "output": right, "metadata": {"task": task}}
        for i, (task, right, _) in enumerate(ITEMS)
    ]
    (folder / "dev.json").write_text(json.dumps(items))
    prompts = {task: "do it" for task, *_ in ITEMS}
    encoder = make_encoder(Model(**CAUSAL, speech_units=4), Data(prompts=prompts), folder)
    index = build_index([Source(path=str(folder / "dev.json"))], "eval", encoder, folder / "i")
    said = {right: answer for _, right, answer in ITEMS}
    asked: set[str] = set()
    settings = Evaluate(tokens_per_batch=80, metrics=metrics)
    corpus = Corpus(
        index.tokens,
        index.source,
        [source.name for source in index.sources],
        lambda rows: [reference_of(example) for example in index.examples(rows)],
    )

    class Answers(Oracle):
        def generate(self, prompts: list[Any], limit: int, synced_gpus: bool = False) -> list[str]:
            asked.update(prompt.task for prompt in prompts)
            return super().generate(prompts, limit, synced_gpus)

    def work(world: World) -> dict[str, float]:
        reader = Reader(index, encoder, 10**6, None)

        def read(rows: list[np.ndarray]) -> Iterator[MicroBatch]:
            return reader.read(iter([Work(0, i, 0, chosen) for i, chosen in enumerate(rows)]))

        nothing = [Term("none", torch.zeros(()), torch.zeros(()))]
        oracle, context = Answers(encoder, said.__getitem__), contextlib.nullcontext
        file = folder / "said.jsonl"
        return evaluate(
            lambda inputs: nothing, oracle, corpus, read, settings, world, context, True, file
        )

    if workers == 1:
        found = [work(ONE)]
    else:
        slots, there = [None] * workers, threading.Barrier(workers)
        worlds = [Threads(i, workers, torch.device("cpu"), slots, there) for i in range(workers)]
        found = [{}] * workers

        def keep(world: World) -> None:
            found[world.rank] = work(world)

        threads = [threading.Thread(target=keep, args=(world,)) for world in worlds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [found[0]] * workers
    assert sorted(found[0]) == sorted(set(metrics_of(index, settings)) - losses(index.tasks))
    return {**found[0], "asked": asked}


def losses(tasks: list[str]) -> set[str]:
    return {f"{name}/{task}" for name in ("loss", "perplexity") for task in tasks}


def pairs(task: str) -> tuple[list[str], list[str]]:
    """Answers and references."""
    found = [(answer, right) for name, right, answer in ITEMS if name == task]
    return [answer for answer, _ in found], [right for _, right in found]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_tasks_of_a_source_are_each_measured_by_their_own(tmp_path: Path, workers: int) -> None:
    said, right = pairs("translation")
    heard, spoken = pairs("asr")
    assert evaluated(tmp_path, {}, workers) == {
        "exact_match/dev": 1 / 2,
        "bleu/dev": sacrebleu.corpus_bleu(said, [right]).score,
        "chrf/dev": sacrebleu.corpus_chrf(said, [right]).score,
        "wer/dev": jiwer.wer(spoken, heard),
        "cer/dev": jiwer.cer(spoken, heard),
        "asked": {"asr", "translation", "qa"},
    }
    lines = read_lines(tmp_path / "said.jsonl")
    assert [line["reference"] for line in lines] == [text for _, text, _ in ITEMS[:-1]]


def test_a_config_says_what_a_task_is_measured_by(tmp_path: Path) -> None:
    asked = {"asr": ["wer"], "qa": ["cer"], "translation": [], "chat": ["exact_match", "wer"]}
    heard, spoken = (one + two for one, two in zip(pairs("asr"), pairs("chat")))
    said, right = (([text.lower() for text in side]) for side in pairs("qa"))
    assert evaluated(tmp_path, asked) == {
        "exact_match/dev": 0.0,
        "wer/dev": jiwer.wer(spoken, heard),
        "cer/dev": jiwer.cer(right, said),
        "asked": {"asr", "qa", "chat"},
    }


# -- a run ---------------------------------------------------------------------------------------


RIGHT = "this is the text of number {}"


def translating(folder: Path, **more: Any) -> Config:
    """A run whose evaluation data is translated."""
    items = [{"id": f"t{i}", "input": f"[Hu{i}]", "output": RIGHT.format(i)} for i in range(9)]
    (folder / "dev.json").write_text(json.dumps(items))
    return tiny(
        folder,
        data__eval=[{"path": str(folder / "dev.json"), "task": "translation"}],
        data__prompts={"asr": "Write it.", "translation": "Translate it."},
        train__max_steps=6,
        evaluate__every=2,
        checkpoint__every=2,
        checkpoint__keep=1,
        checkpoint__best="bleu/dev",
        **more,
    )


def test_a_run_keeps_the_best_translation_and_says_how_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations = 0

    def generate(self: SpeechModel, prompts: list[Any], limit: int, synced_gpus: bool) -> list[str]:
        nonlocal evaluations  # of one batch each; the second is the best
        evaluations += 1
        said = {1: "text", 2: "there is the text of number {}", 3: "no"}[min(evaluations, 3)]
        return [said.format(prompt.id[1:]) for prompt in prompts]

    monkeypatch.setattr(SpeechModel, "generate", generate)
    out, config = io.StringIO(), translating(tmp_path)
    train(start(config, ONE, ProgressLine(out)))
    folder = run_folder(config)
    lines = read_lines(folder / "eval.jsonl")
    references = [RIGHT.format(i) for i in range(9)]
    said = [text.replace("this", "there") for text in references]
    expected = sacrebleu.corpus_bleu(said, [references]).score
    assert [line["bleu/dev"] for line in lines][1] == expected > lines[0]["bleu/dev"]
    kind = f"version:{sacrebleu.__version__}"
    signature = {
        "bleu/dev": f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|{kind}",
        "chrf/dev": f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|{kind}",
    }
    assert [line["signatures"] for line in lines] == [signature] * 3
    assert choose(folder, reopen(folder).checkpoint, "best", Saved.damage)[0].step == 4
    assert re.search(r"source +bleu +chrf +examples\n +dev +[\d.]+ +[\d.]+ +9\n", out.getvalue())
    known = Evaluations.load(folder)
    (folder / "evaluations.json").unlink()
    assert Evaluations.load(folder).items == known.items, "eval.jsonl says the same"


def test_figures_made_in_other_ways_are_not_compared(tmp_path: Path) -> None:
    config = translating(tmp_path)
    index = preflight.prepare(config, open_run(config)).eval
    assert index is not None

    def taken(**settings: Any) -> Measure:
        return Measure.taken(index, Evaluate(**settings), final=True)

    plain = taken()
    assert plain.of("bleu/dev") != taken(bleu_tokenize="zh").of("bleu/dev")
    assert plain.of("chrf/dev") == taken(bleu_tokenize="zh").of("chrf/dev")
    zh = taken(bleu_tokenize={"dev": "zh", "other": "char"})
    assert zh.of("bleu/dev") == taken(bleu_tokenize="zh").of("bleu/dev")
    assert taken(bleu_tokenize={"other": "char"}) == plain
    asked = taken(metrics={"translation": ["wer"]})
    assert asked.signatures == {} and asked.of("wer/dev") != plain.of("wer/dev")
    # A run of the version before goes on, its figures of WER compared with those of now.
    assert plain.rules == "0c3060ba6da28463"


def test_what_is_not_answered_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    config = translating(tmp_path).model_copy(deep=True)
    config.checkpoint.best = None
    config.evaluate.metrics = {"translation": [], "st": ["bleu"]}
    config.evaluate.bleu_tokenize = {"dev": "zh", "deu": "intl"}
    (tmp_path / "speak.json").write_text(json.dumps([{"input": "one", "output": "[Hu1]"}]))
    config.data.eval.append(Source(path=str(tmp_path / "speak.json")))
    config.data.prompts["tts"] = "Say it."
    with caplog.at_level(logging.WARNING):
        preflight.prepare(config, open_run(config), say=said.append)
    (line,) = [text for text in said if "without a metric" in text]
    assert "9 of translation (evaluate.metrics: {translation: [...]} names one)" in line
    assert "tts" not in line, "speech has no metric that could be named"
    one, other = [text for text in caplog.messages if "evaluate." in text]
    assert one.startswith("evaluate.metrics.st: no example of data.eval is of this task; there")
    assert other.startswith("evaluate.bleu_tokenize.deu: no source of data.eval has this name;")


# -- what is refused -----------------------------------------------------------------------------


def test_names_that_are_none_are_refused_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("{model: {path: a/b}, data: {train: [a.jsonl]}}")
    with pytest.raises(UserError, match=r"evaluate\.metrics\.st\.1: .*\(did you mean bleu\?\)"):
        load_config(file, ["evaluate.metrics={st: [chrf, blue]}"])
    with pytest.raises(UserError, match=r"evaluate\.metrics\.st\.0: expected .*, found 'loss'"):
        load_config(file, ["evaluate.metrics={st: [loss]}"])
    for given in ("flores200", "{dev: flores200}", "[zh]"):
        with pytest.raises(
            UserError, match=r"\.bleu_tokenize: expected '13a', .* or 'none', .* found"
        ):
            load_config(file, [f"evaluate.bleu_tokenize={given}"])


def test_speech_has_no_metric_of_texts(tmp_path: Path) -> None:
    config = tiny(tmp_path, evaluate__metrics={"tts": ["wer"]})
    (mistake,) = contradictions(config)
    assert mistake.text.startswith("evaluate.metrics.tts: answers of tts are speech")
    assert contradictions(tiny(tmp_path, evaluate__metrics={"tts": []})) == []


def test_words_of_a_language_that_cannot_be_found_here_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "MeCab", None)
    config = translating(tmp_path, evaluate__bleu_tokenize="ja-mecab")
    config.model.tokenizer = "bytes"
    with pytest.raises(
        UserError, match=r"bleu_tokenize: ja-mecab is not installed .*sacrebleu\[ja"
    ):
        preflight.check(config)
