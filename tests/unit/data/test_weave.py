"""USDM's data: units and text woven as its paper says, and rows of ids."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import truncnorm

from raysft.config.schema import Data, Model, Source
from raysft.data import sources
from raysft.data.encode import make_encoder
from raysft.data.example import Units
from raysft.data.sources import alignments
from raysft.data.weave import CONTINUE, CORRESPOND, Word, on_units, woven
from raysft.errors import BadExample
from tests.support import in_process

TEXTGRID = '''File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 2
        intervals: size = 4
        intervals [1]:
            xmin = 0
            xmax = 0.4
            text = ""
        intervals [2]:
            xmin = 0.4
            xmax = 1.0
            text = "Don't"
        intervals [3]:
            xmin = 1.0
            xmax = 1.2
            text = ""
        intervals [4]:
            xmin = 1.2
            xmax = 2
            text = "say ""no"""
    item [2]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 2
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 2
            text = "x"
'''
SHORT = '''"IntervalTier" "words" 0 2 4
0 0.4 ""
0.4 1.0 "Don't"
1.0 1.2 ""
1.2 2 "say ""no"""
'''
WORDS = [("", 0.0, 0.4), ("Don't", 0.4, 1.0), ("", 1.0, 1.2), ('say "no"', 1.2, 2.0)]


@pytest.mark.parametrize("text", [TEXTGRID, SHORT], ids=["long", "short"])
def test_textgrids_are_read_in_both_forms(text: str) -> None:
    assert alignments.textgrid(text, "x") == WORDS


def test_ctm_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.ctm").write_text("u2 1 0 9 other\nu1 1 0.4 0.6 Don't\nu1 1 1.2 0.8 no\n")
    said = [("", 0.0, 0.4), ("Don't", 0.4, 1.0), ("", 1.0, 1.2), ("no", 1.2, 2.0)]
    assert alignments.read(tmp_path / "a.ctm", "u1") == said
    entries = [[0.4, 1.0, "Don't"], [1.2, 2.0, "no"]]
    for value in (
        {"tiers": {"words": {"type": "interval", "entries": entries}}},
        [{"word": word, "start": a, "end": b} for a, b, word in entries],
        {"words": [[word, a, b] for a, b, word in entries]},
    ):
        (tmp_path / "a.json").write_text(json.dumps(value))
        assert alignments.read(tmp_path / "a.json", "u1") == said


def test_silences_join_their_words_and_words_lie_on_units() -> None:
    # 100 units over 2 s: 50 a second. The pause of 0.2 s is halved at 1.1 s.
    assert on_units(WORDS, 100) == [Word("don't", 0, 55), Word("say no", 55, 100)]
    trailing = [("a", 0.0, 0.5), ("b", 0.5, 1.0), ("", 1.0, 2.0)]
    assert on_units(trailing, 20) == [Word("a", 0, 5), Word("b", 5, 20)]
    tiny = [("a", 0.0, 1.0), ("b", 1.0, 1.001), ("c", 1.001, 2.0)]
    assert on_units(tiny, 20) == [Word("a", 0, 10), Word("b c", 10, 20)]
    with pytest.raises(BadExample, match="2 intervals, expected 3"):
        on_units(WORDS[:2], 10)


def reference(words: list[Word], rng: np.random.Generator) -> list[object]:
    """As the paper and its code say it, with scipy's truncated normal: text pieces and runs of
    units, with markers between."""
    end = words[-1].stop
    segments = end // 500 + 1
    starts = [word.start for word in words]
    cuts = set()
    for k in range(1, segments):
        mean, std = k * end / segments, end / (2 * segments)
        draw = truncnorm.ppf(rng.random(), -2, 2, loc=mean, scale=std)
        cuts.add(min(range(len(words)), key=lambda i: abs(starts[i] - draw)))
    edges = [*sorted(cuts | {0}), len(words)]
    row: list[object] = []
    last = None
    for a, b in pairwise(edges):
        own = words[a:b]
        kinds = ["text" if rng.random() < 0.5 else "units"]
        if rng.random() < 0.5:
            kinds.append("units" if kinds[0] == "text" else "text")
        for number, kind in enumerate(kinds):
            if number:
                row.append(CORRESPOND)
            elif last is not None and last != kind:
                row.append(CONTINUE)
            text = " ".join(word.text for word in own)
            row.append(text if kind == "text" else (own[0].start, own[-1].stop))
            last = kind
    return row


def spoken(units: int, count: int) -> list[Word]:
    edges = np.linspace(0, units, count + 1).astype(int).tolist()
    return [Word(f"w{n}", a, b) for n, (a, b) in enumerate(pairwise(edges))]


@pytest.mark.parametrize("units", [80, 499, 500, 2300])
def test_what_is_woven_is_what_the_paper_says_draw_for_draw(units: int) -> None:
    words = spoken(units, 40)
    shapes = set()
    for seed in range(60):
        ours: list[object] = []
        for piece in woven(words, np.random.default_rng(seed)):
            ours += [piece.marker] if piece.marker else []
            ours.append(piece.text or (piece.start, piece.stop))
        assert ours == reference(words, np.random.default_rng(seed))
        shapes.add(str(ours))
    assert len(shapes) > 3


def encoder(folder: Path, **model: object):  # type: ignore[no-untyped-def]
    config = {"model_type": "llama", "vocab_size": 300}
    given = Model(tokenizer="bytes", config=config, speech_units=50, **model)
    return make_encoder(given, Data(), folder)


EXTRA = {"extra_tokens": [CONTINUE, CORRESPOND]}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / f"{name}_unit.txt").write_text(" ".join(map(str, rng.integers(0, 50, 100))))
        (folder / f"{name}.TextGrid").write_text(TEXTGRID)
    return folder


def test_pairs_of_units_and_alignments_are_learnt_whole_and_drawn_anew(pairs: Path) -> None:
    source = sources.resolve(Source(path=str(pairs)), "train")
    assert source.format == "interleaved"
    found = [item.example for item in sources.scan(source, source.files[0])]
    assert [example.id for example in found if example] == ["a", "b"]
    made = encoder(pairs, **EXTRA)
    names = made.tokenizer.get_vocab()
    assert [names[CONTINUE], names[CORRESPOND]] == sorted([names[CONTINUE], names[CORRESPOND]])
    assert names[CORRESPOND] < names["<|unit0|>"], "markers come before units, as USDM has them"
    example = found[0]
    assert example is not None
    assert example.woven is not None
    planned = made.measure(example, [])
    rows = set()
    for seed in range(40):
        drawn = made.encode(example, [], np.random.default_rng(seed), promised=planned)
        assert np.array_equal(drawn.labels, drawn.input_ids), "all of it is learnt"
        assert drawn.input_ids[-1] == made.tokenizer.eos_token_id
        assert len(drawn.input_ids) <= planned
        rows.add(drawn.input_ids.tobytes())
    assert len(rows) > 3
    again = [made.encode(example, [], np.random.default_rng(5)).input_ids for _ in "ab"]
    assert np.array_equal(*again)
    fixed = [made.encode(example, [], None).input_ids for _ in "ab"]
    assert np.array_equal(*fixed), "evaluation draws the same each time"


def test_units_stand_where_their_words_are(pairs: Path) -> None:
    source = sources.resolve(Source(path=str(pairs)), "train")
    example = next(sources.scan(source, source.files[0])).example
    assert example is not None
    drawn = example.drawn(np.random.default_rng(3))
    whole = [int(n) for n in (pairs / "a_unit.txt").read_text().split()]
    for part in drawn.document:
        if isinstance(part, Units):
            assert "".join(map(chr, part.ids)) in "".join(map(chr, whole))


def test_rows_of_ids_and_labels_are_learnt_as_they_say(tmp_path: Path) -> None:
    file = tmp_path / "sft.txt"
    file.write_text(
        "1 20 21 22 2|-100 -100 21 22 -100\n1 2 3|1 2\n1 20 21|-100 20 99\n1 20|-100 -100\n7 5000\n"
    )
    source = sources.resolve(Source(path=str(file)), "train")
    assert source.format == "token_ids"
    first, *bad, beyond = sources.scan(source, file)
    assert first.example is not None
    made = encoder(tmp_path)
    row = made.encode(first.example, [])
    assert row.input_ids.tolist() == [1, 20, 21, 22, 2]
    assert row.labels.tolist() == [-100, -100, 21, 22, -100]
    says = ("3 ids and 2 labels", "label 99 stands at id 21", "none of its ids is learnt")
    for item, text in zip(bad, says, strict=True):
        assert text in str(item.error)
    assert beyond.example is not None
    with pytest.raises(BadExample, match="has the id 5000, and the tokenizer has"):
        made.measure(beyond.example, [])


def test_packed_rows_are_cut_where_documents_begin(tmp_path: Path) -> None:
    file = tmp_path / "part1.txt"
    file.write_text("1 5 6 2 1 7 2\n1 8 9 2\n")
    source = sources.resolve(Source(path=str(file), document_start=1), "train")
    found = [item.example for item in sources.scan(source, file)]
    assert [example.tokens.ids for example in found if example and example.tokens] == [
        (1, 5, 6, 2),
        (1, 7, 2),
        (1, 8, 9, 2),
    ]
    assert [example.id for example in found if example] == ["part1:1.1", "part1:1.2", "part1:2.1"]
    whole = sources.resolve(Source(path=str(file)), "train")
    assert len(list(sources.scan(whole, file))) == 2


LLAMA = {
    "config": {
        **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    },
    "tokenizer": "bytes",
    "speech_units": 50,
}


def test_pre_training_and_rows_of_labels_are_learnt(pairs: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        asked = rng.integers(3, 30, 10)
        ids = [1, *asked, *(asked + 100), 2]
        labels = [-100] * 11 + [*(asked + 100), -100]
        rows.append(f"{' '.join(map(str, ids))}|{' '.join(map(str, labels))}\n")
    file = tmp_path / "sft.txt"
    file.write_text("".join(rows))
    for path, extra in ((pairs, EXTRA), (file, {})):
        run = in_process.run(
            tmp_path / f"of {path.name}",
            data={"train": [{"path": str(path)}], "tokens_per_batch": 1024},
            model={**LLAMA, **extra},
            optim={"lr": 3e-3, "schedule": "constant"},
            train={"max_steps": 25},
        )
        found = in_process.losses(run)
        assert found[-1] < 0.75 * found[0], path
