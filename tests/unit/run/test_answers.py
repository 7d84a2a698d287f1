"""The examples that loggers show: the same ones at each evaluation, with clips of all sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft.config import Config
from raysft.run.answers import CLIPS, RATE, Answers, Shown, compared, table
from raysft.run.evaluations import predictions_of
from tests.conftest import tone


def write(run: Path, step: int, answers: list[tuple[str, str, str]], said: str = "one") -> None:
    path = predictions_of(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"id": id_, "source": source, "reference": text, "hypothesis": said}
        for source, id_, text in answers
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def keys(shown: list[Shown]) -> list[tuple[str, str]]:
    return [(one.source, one.id) for one in shown]


def test_they_are_the_same_at_each_evaluation_and_start(tmp_path: Path) -> None:
    whole = [("dev", f"d{n}", "one two") for n in range(20)]
    whole += [("far", f"f{n}", "three") for n in range(2)]
    write(tmp_path, 10, whole[::2])
    first = keys(Answers(Config(), tmp_path).at(10))
    assert first == [*[("dev", f"d{n}") for n in (0, 6, 12, 18)], ("far", "f0")]
    write(tmp_path, 20, whole)  # all examples at the end, not those of evaluate.max_examples
    here = Answers(Config(), tmp_path)
    assert keys(here.at(20)) == first
    assert here.at(30) == []
    write(tmp_path, 40, [("other", "o", "four")])  # data.eval is another
    assert keys(here.at(40)) == [("other", "o")]


def test_of_many_sources_there_are_few_of_each(tmp_path: Path) -> None:
    write(tmp_path, 1, [(f"s{n % 40}", f"e{n}", "x") for n in range(200)])
    shown = Answers(Config(), tmp_path).at(1)
    assert len(shown) == 24 and len({one.source for one in shown}) == 24


def test_what_differs_is_marked_and_nothing_else() -> None:
    one = Shown("a", "dev", "the *big* cat sat", "the cat sat down")
    assert one.errors == compared(one.reference, one.hypothesis)[0] == 2
    assert one.marked() == (r"the **\*big\*** cat sat", "the cat sat **down**")
    assert Shown("a", "dev", "", "so").marked() == ("", "**so**")
    assert Shown("a", "dev", "so", "").marked() == ("**so**", "")
    assert len(Shown("a", "dev", "x" * 5000, "x" * 5000).marked()[0]) < 700
    assert "**" not in table([Shown("a", "dev", "same", "same")])


def test_clips_are_cut_taken_from_all_sources_and_left_out_where_they_are_gone(
    make_clips: Callable[..., Path], tmp_path: Path
) -> None:
    many = make_clips(20)
    lines = [json.loads(line) for line in many.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["id"] = f"m{number}"
    many.write_text("".join(json.dumps(line) + "\n" for line in lines))
    soundfile.write(tmp_path / "long.wav", tone(40.0, 8000, 300, 2), 8000)
    few = [
        {"task_type": "asr", "id": n, "wav_path": f"{n}.wav", "text": n} for n in ("long", "gone")
    ]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in few))
    sources = [{"path": str(many), "name": "many"}]
    sources += [{"path": str(tmp_path / "few.jsonl"), "name": "few"}]
    config = Config.model_validate({"data": {"eval": sources}})
    named = [("many", f"m{n}", "x") for n in range(20)]
    write(tmp_path, 5, [*named, ("few", "long", "y"), ("few", "gone", "z")])
    answers = Answers(config, tmp_path)
    assert len(answers.at(5)) == 6
    clips = answers.clips()
    assert len(clips) == 5 <= CLIPS, "but for the one that is gone"
    assert [clip.id for clip in clips][:2] == ["m0", "long"], "in turns"
    long = clips[1]
    assert long.cut and long.samples.shape == (30 * RATE,) and long.samples.dtype == np.float32
    assert long.said == "long: y (its first 30 s)"
    samples, rate = soundfile.read(many.parent / lines[0]["wav_path"], dtype="float32")
    assert rate == RATE
    np.testing.assert_allclose(clips[0].samples, samples, atol=1e-4)
    assert answers.clips() is clips, "decoded once"


@pytest.mark.parametrize("text", ["a | b", "<b>bold</b>", "`code`", "# head", "[link](x)"])
def test_text_is_nobodys_markup(text: str) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    shown = markdown_to_safe_html(table([Shown("a", "dev", text, text)]))
    cell = shown.split("<td>")[3].split("</td>")[0]
    assert cell.replace("&#124;", "|").replace("&lt;", "<").replace("&gt;", ">") == text
