"""The tokenizer of a Speech2Text checkpoint, held against what sentencepiece has said.

`tests/support/speech_to_text` has a model of sentencepiece 0.2.3, and its pieces of some texts, as
ids of vocab.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from raysft.config.schema import Data, Model
from raysft.data.encode import make_encoder
from raysft.data.example import Audio, Example
from raysft.errors import UserError
from raysft.export import export
from raysft.families.seq2seq import sentencepiece
from raysft.models import build
from tests.support import seq2seq as zoo
from tests.support.worlds import ROOT

FILES = ROOT / "tests" / "support" / "speech_to_text"
PADDED = Data(mode="padded")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """checkpoint(folder): a Speech2Text as the hub has it, without a tokenizer.json."""
    place = tmp_path_factory.mktemp("base")
    sections = zoo.model("speech_to_text", place)
    made = sentencepiece.made((FILES / sentencepiece.PIECES).read_bytes(), ids())
    made.save_pretrained(sections["tokenizer"])
    model = Model(**sections)
    base = export(build(model, PADDED, make_encoder(model, PADDED, place), 0), place / "exported")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    for name in (sentencepiece.PIECES, sentencepiece.VOCABULARY):
        shutil.copyfile(FILES / name, base / name)
    told = {"tokenizer_class": "Speech2TextTokenizer", "do_upper_case": False}
    (base / "tokenizer_config.json").write_text(json.dumps(told))
    return lambda folder: shutil.copytree(base, folder / "base")


def ids() -> dict[str, int]:
    return json.loads((FILES / sentencepiece.VOCABULARY).read_text(encoding="utf-8"))


def expected() -> list[dict[str, object]]:
    return json.loads((FILES / "expected.json").read_text(encoding="utf-8"))


def test_ids_are_those_of_sentencepiece(checkpoint: Callable[[Path], Path], tmp_path: Path) -> None:
    base = checkpoint(tmp_path)
    encoder = make_encoder(Model(path=str(base)), PADDED, tmp_path)
    assert len(expected()) > 10
    for line in expected():
        text = str(line["text"])
        one = Example("e", "asr", (Audio("/a.wav"),), (text,), text=text)
        answer = encoder.template.render(one).segments[-1]
        assert isinstance(answer, np.ndarray)
        assert answer.tolist() == [*line["ids"], 2], text  # type: ignore[misc]
    said = encoder.tokenizer.decode(expected()[0]["ids"])
    assert said == expected()[0]["text"]


def test_an_export_holds_it_as_a_fast_one(
    checkpoint: Callable[[Path], Path], tmp_path: Path
) -> None:
    base = Model(path=str(checkpoint(tmp_path)))
    encoder = make_encoder(base, PADDED, tmp_path)
    out = export(build(base, PADDED, encoder, 0), tmp_path / "out")
    again = AutoTokenizer.from_pretrained(out)
    assert again.is_fast
    for line in expected():
        assert again(line["text"], add_special_tokens=False).input_ids == line["ids"]
    assert make_encoder(Model(path=str(out)), PADDED, tmp_path).fingerprint == encoder.fingerprint


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda base: (base / sentencepiece.VOCABULARY).unlink(), "no tokenizer could be loaded"),
        (
            lambda base: (base / sentencepiece.PIECES).write_bytes(zoo.pieces(zoo.SCORES, kind=2)),
            "make no tokenizer: it is no unigram model; name one in model.tokenizer",
        ),
        (
            lambda base: (base / sentencepiece.PIECES).write_bytes(b"\x0a\x7fabc"),
            r"make no tokenizer: sentencepiece\.bpe\.model is damaged",
        ),
        (
            lambda base: (base / sentencepiece.PIECES).write_bytes(
                zoo.pieces(zoo.SCORES, prefix=0)
            ),
            "make no tokenizer: it keeps spaces as they are",
        ),
        (
            lambda base: (base / sentencepiece.VOCABULARY).write_text(json.dumps({"<unk>": 0})),
            "make no tokenizer: .* has no id",
        ),
        (
            lambda base: (base / "tokenizer_config.json").write_text('{"do_upper_case": true}'),
            "do_upper_case: a tokenizer that writes capitals alone is not known here",
        ),
    ],
)
def test_files_of_another_kind_are_refused(
    damage: Callable[[Path], None],
    said: str,
    checkpoint: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    base = checkpoint(tmp_path)
    damage(base)
    with pytest.raises(UserError, match=said):
        make_encoder(Model(path=str(base)), PADDED, tmp_path)
