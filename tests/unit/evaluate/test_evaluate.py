"""What an evaluation makes of answers: which reference they meet, how long they may be, whose
language they name. A model that gives every right answer is at 0, whatever data and tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from raysft.config.schema import Data, Evaluate, Model, Source
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import MicroBatch, Sequence
from raysft.data.index.build import build_index
from raysft.data.read.reader import Reader, Work
from raysft.data.text import byte_tokenizer
from raysft.evaluate.answers import MOST_NEW_TOKENS, limit_for, transcript
from raysft.evaluate.run import Corpus, answer_lengths, evaluate, last_answer, prompts_of
from raysft.losses import Term
from raysft.models.layout import Document
from raysft.parallel import World
from raysft.run.lines import read_lines
from tests.support.models import AUDIO, CAUSAL


@dataclass
class Oracle:
    """Answers with what it is to learn, as many tokens of it as it may; or with `said`."""

    writes = True
    encoder: Encoder
    said: Callable[[str], str] = lambda text: text
    limits: list[int] = field(default_factory=list)
    writes: bool = True

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoder.template.tokenizer

    def collate(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        self._batch = batch
        return {}

    def documents(self, batch: MicroBatch) -> list[Document]:
        cuts = np.cumsum(batch.lengths)[:-1]
        parts = zip(np.split(batch.input_ids, cuts), np.split(batch.labels, cuts), batch.tasks)
        return [Document(ids, labels, task) for ids, labels, task in parts]

    def generate(self, prompts: list[Sequence], limit: int, synced_gpus: bool = False) -> list[str]:
        self.limits.append(limit)
        tasks = {prompt.task for prompt in prompts}
        documents = [d for d in self.documents(self._batch) if d.task in tasks]
        right = [document.labels[document.labels != -100][:-1] for document in documents]
        answers = [self.tokenizer.decode(ids[:limit].tolist()) for ids in right]
        return [self.said(answer) for answer in answers]


class Evaluated(NamedTuple):
    """What came of it."""

    figures: dict[str, float]
    predictions: list[dict[str, Any]]
    remarks: list[str]


def run(
    path: Path,
    encoder: Encoder,
    said: Callable[[str], str] = lambda text: text,
    meanwhile: Callable[[], Any] = lambda: None,
    **settings: Any,
) -> Evaluated:
    """Evaluate an oracle on the examples in `path`. meanwhile: called once they are indexed."""
    index = build_index([Source(path=str(path), task="asr")], "eval", encoder, path.parent / "i")
    meanwhile()
    reader = Reader(index, encoder, 10**6, None)

    def read(rows: list[np.ndarray]) -> Iterator[MicroBatch]:
        return reader.read(iter([Work(0, i, 0, chosen) for i, chosen in enumerate(rows)]))

    oracle, remarks, file = Oracle(encoder, said), [], path.parent / "said.jsonl"
    file.unlink(missing_ok=True)
    figures = evaluate(
        lambda batch: [Term("none", torch.zeros(()), torch.zeros(()))],  # not about losses
        oracle,
        Corpus(
            index.tokens,
            index.source,
            [source.name for source in index.sources],
            lambda rows: [example.text for example in index.examples(rows)],
        ),
        read,
        Evaluate(**settings),
        World(0, 1, torch.device("cpu")),
        contextlib.nullcontext,
        True,
        file,
        tell=remarks.append,
    )
    return Evaluated(figures, read_lines(file), remarks)


def units(folder: Path, *answers: str, ids: list[str] | None = None) -> Path:
    """A MoST file of `answers`, to units that differ in number."""
    folder.mkdir(exist_ok=True)
    items = [
        {"id": ids[i] if ids else f"u{i}", "input": "[Hu1][Hu2]" * (1 + i % 3), "output": answer}
        for i, answer in enumerate(answers)
    ]
    path = folder / "dev.json"
    path.write_text(json.dumps(items))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """Of units, with the byte tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    return make_encoder(Model(**CAUSAL, speech_units=4), Data(), folder)


# -- references ----------------------------------------------------------------------------------


def test_ids_that_repeat_keep_their_own_references(tmp_path: Path, encoder: Encoder) -> None:
    answers = ["one two three", "four five six", "seven", "eight nine"]
    found = run(units(tmp_path, *answers, ids=["a", "a", "b", "a"]), encoder)
    assert found.figures == {"wer/dev": 0.0, "cer/dev": 0.0}
    assert [line["reference"] for line in found.predictions] == answers
    assert [line["hypothesis"] for line in found.predictions] == answers


def test_examples_that_cannot_be_read_shift_no_reference_and_are_told_of(
    tmp_path: Path, make_clips: Callable[..., Path]
) -> None:
    manifest = make_clips(8, seed=3)
    lines = [{**line, "id": "same"} for line in read_lines(manifest)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    encoder = make_encoder(Model(**AUDIO), Data(), tmp_path)

    def spoil() -> None:
        for number in (2, 5):
            (manifest.parent / lines[number]["wav_path"]).write_bytes(b"")

    found = run(manifest, encoder, meanwhile=spoil)
    assert found.figures == {"wer/train": 0.0, "cer/train": 0.0}
    kept = [line["text"] for i, line in enumerate(lines) if i not in (2, 5)]
    assert [line["reference"] for line in found.predictions] == kept
    (remark,) = found.remarks
    assert remark.startswith("2 examples of data.eval cannot be read and are in no figure; ")


def test_references_that_are_empty_end_nothing(tmp_path: Path, encoder: Encoder) -> None:
    silence = units(tmp_path, "...", "♪", "???")
    found = run(silence, encoder)
    assert found.figures == {"wer/dev": 0.0, "cer/dev": 0.0}
    heard = run(silence, encoder, lambda text: "oh no")
    assert heard.figures == {"wer/dev": 2.0, "cer/dev": 5.0}


def test_a_conversation_is_asked_for_its_last_turn_alone(tmp_path: Path) -> None:
    said = [("user", "one?"), ("assistant", "first"), ("user", "two?"), ("assistant", "second one")]
    turns = [{"role": role, "content": text} for role, text in said]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"id": "a", "messages": turns}) + "\n")
    encoder = make_encoder(Model(**CAUSAL), Data(), tmp_path)
    source = Source(path=str(tmp_path / "talk.jsonl"))
    index = build_index([source], "eval", encoder, tmp_path / "i")
    (batch,) = Reader(index, encoder, 10**6, None).read(iter([Work(0, 0, 0, np.arange(1))]))
    (example,) = index.examples(np.arange(1))
    (prompt,) = prompts_of(Oracle(encoder), batch)
    assert prompt.input_ids.tolist() == encoder.prompt(example, []).input_ids.tolist()
    shown = encoder.tokenizer.decode(prompt.input_ids.tolist())
    assert "first" in shown and shown.endswith("two?\n")
    assert answer_lengths(batch) == [len("second one")]  # in bytes


def test_the_last_of_many_answers_is_behind_the_last_break() -> None:
    labels = np.array([-100, 5, 6, -100, -100, 7, -100, 8, 9, 3, -100, -100])
    assert last_answer(labels).tolist() == [8, 9, 3, -100, -100]
    assert last_answer(labels[:6]).tolist() == [7]
    assert last_answer(labels[:3]).tolist() == [5, 6]
    assert last_answer(labels[:1]).tolist() == []


# -- length --------------------------------------------------------------------------------------


def test_the_limit_follows_the_references_of_each_batch(tmp_path: Path, encoder: Encoder) -> None:
    answers = ["word " * 300, "short", "word " * 30]
    found = run(units(tmp_path, *answers), encoder)
    assert found.figures == {"wer/dev": 0.0, "cer/dev": 0.0} and found.remarks == []
    assert limit_for([10, 1500], None) == 1500 + 750 + 16
    assert limit_for([10, 1500], 256) == 256
    assert limit_for([10**6], None) == MOST_NEW_TOKENS
    assert limit_for([], None) == 16


def test_references_longer_than_a_limit_that_is_set_are_counted(
    tmp_path: Path, encoder: Encoder
) -> None:
    exact, longer = "x" * 256, "word " * 51 + "ab"  # bytes are tokens: 256, and 257
    found = run(units(tmp_path, exact, longer, "short", longer), encoder, max_new_tokens=256)
    (remark,) = found.remarks
    assert "evaluate.max_new_tokens: 2 of 4 references of dev are longer than the 256" in remark
    assert "(up to 257) and can never be right" in remark
    assert run(units(tmp_path, exact, "short"), encoder, max_new_tokens=256).remarks == []


# -- language ------------------------------------------------------------------------------------


def spaced_tokenizer(folder: Path) -> str:
    """Bytes, behind a normaliser that makes a tab a space, as SentencePiece's nmt_nfkc does."""
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\t", " ")]
    )
    tokenizer.save_pretrained(folder / "spaced")
    return str(folder / "spaced")


TEXTS = (
    ("one two three", "EN"),
    ("un\tdeux trois", "fr"),
    ("tab\tin it", None),
    ("DE is how this begins", None),
    ("你好世界", "zh-CN"),
)


@pytest.mark.parametrize("kind", ["bytes", "spaced"])
def test_the_language_before_an_answer_is_no_word_and_a_tab_in_a_text_no_language(
    tmp_path: Path, make_clips: Callable[..., Path], kind: str
) -> None:
    manifest = make_clips(len(TEXTS), seed=4)
    lines = [
        {**line, "text": text} | ({"lang": lang} if lang else {})
        for line, (text, lang) in zip(read_lines(manifest), TEXTS)
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = "bytes" if kind == "bytes" else spaced_tokenizer(tmp_path)
    encoder = make_encoder(Model(**{**AUDIO, "tokenizer": tokenizer}), Data(), tmp_path)
    found = run(manifest, encoder)
    assert found.figures == {"wer/train": 0.0, "cer/train": 0.0}
    kept = "\t" if kind == "bytes" else " "
    said = [text.replace("\t", kept) for text, _ in TEXTS]
    assert [line["hypothesis"] for line in found.predictions] == said


@pytest.mark.parametrize(
    ("answer", "lang", "expected"),
    [
        ("EN\tone", "EN", "one"),
        ("EN one", "EN", "one"),
        ("en one", "EN", "one"),
        (" EN\tone\ttwo", "EN", "one\ttwo"),
        ("DE\teins", "EN", "eins"),  # the wrong language: its words count, its name does not
        ("DE eins", "EN", "eins"),
        ("English (US)\thello", "English (US)", "hello"),
        ("English (US) hello", "English (US)", "hello"),
        ("one two", "EN", "one two"),  # left out by the model
        ("EN", "EN", ""),
        ("", "EN", ""),
        ("EN\tone", None, "EN\tone"),
        ("EN one", None, "EN one"),
    ],
)
def test_a_transcript_is_what_follows_the_language(
    answer: str, lang: str | None, expected: str
) -> None:
    assert transcript(answer, lang, {"DE", "EN"}, spaced=True) == expected
    if answer != "DE eins":  # where tabs are kept, a word
        assert transcript(answer, lang, {"DE", "EN"}) == expected


CODES = {"no", "it", "is", "so", "my", "de", "en", "en US"}


@pytest.mark.parametrize(
    ("answer", "lang", "expected"),
    [
        ("No way", "Norwegian", "No way"),
        ("it is so", "en", "it is so"),
        ("My dear", "en", "My dear"),
        ("de la mer", "fr", "de la mer"),
        ("so it is", "de", "so it is"),
        ("no\tway", "en", "way"),
        ("en US\thello", "de", "hello"),
        ("EN it is", "en", "it is"),
        ("en\tno way", "en", "no way"),
    ],
)
def test_a_first_word_that_is_a_code_of_another_language_is_a_word(
    answer: str, lang: str, expected: str
) -> None:
    assert transcript(answer, lang, CODES | {"Norwegian", "fr"}) == expected


@pytest.mark.parametrize("kind", ["bytes", "spaced"])
def test_a_name_before_a_space_is_one_only_where_tabs_become_spaces(
    tmp_path: Path, make_clips: Callable[..., Path], kind: str
) -> None:
    manifest = make_clips(2, seed=4)
    texts = [("it is late", "en"), ("ja", "it")]
    lines = [
        {**line, "text": text, "lang": lang}
        for line, (text, lang) in zip(read_lines(manifest), texts)
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = "bytes" if kind == "bytes" else spaced_tokenizer(tmp_path)
    encoder = make_encoder(Model(**{**AUDIO, "tokenizer": tokenizer}), Data(), tmp_path)
    # The name is left out by the model: nothing but a tokenizer without tabs makes a word one.
    found = run(manifest, encoder, said=lambda text: text.replace("\t", " ").removeprefix("en "))
    said = {line["reference"]: line["hypothesis"] for line in found.predictions}
    assert said == {"it is late": "it is late" if kind == "bytes" else "is late", "ja": "ja"}
