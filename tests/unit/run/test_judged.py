"""Result files of judging: what is written, and what is read of ours and of the original's."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from raysft import library
from raysft.errors import UserError
from raysft.page import judged as pictures
from raysft.run import judged
from raysft.scorers import agreement

FIELDS = [
    *("id", "original_id", "char_profile", "char_style", "transcript", "local_scene"),
    *("evaluation_type", "specific_dimension", "raw_model_output", "model_score"),
    *("probability_score", "evaluation_text", "ground_truth_ratings"),
]


def predictions(folder: Path, count: int = 12) -> Path:
    """Answers to two dimensions of so many recordings; every fourth has no score."""
    lines = []
    rng = np.random.default_rng(0)
    for number in range(count):
        for dimension, field in (("pitch_dynamics", "pitch_variation"), ("warmth", "warm")):
            ratings = rng.integers(1, 6, 3).tolist()
            said = None if number % 4 == 3 else int(np.clip(np.mean(ratings) + rng.normal(), 1, 5))
            rated = {"original": f"r{number}", "kind": "role", "dimension": dimension}
            rated |= {"annotated": field, "ratings": ratings, "lowest": 1, "highest": 5}
            rated |= {"label": "", "context": {"char_profile": "A baker.", "transcript": "Hi."}}
            found = {"rated": rated, "model": said}
            found["probability"] = None if said is None else said + 0.25
            name = f"r{number}:{dimension}"
            text = "none" if said is None else f"<answer>{said}</answer>"
            line = {"id": name, "source": "dev", "reference": "", "hypothesis": text}
            lines.append(line | {"ratings": [found]})
    lines.append({"id": "x", "source": "asr", "reference": "a", "hypothesis": "a"})
    path = folder / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is written of them."""
    folder = tmp_path_factory.mktemp("ours")
    (found,) = judged.write(predictions(folder), folder / "judged")
    assert found == folder / "judged" / "dev"
    return found


def test_each_dimension_has_a_file_as_the_original_writes_it(place: Path) -> None:
    names = {path.name for path in place.iterdir()}
    assert names == {
        "role_eval_pitch_dynamics_exact.json",
        "role_eval_warmth_exact.json",
        "detailed_results.csv",
        "evaluation_summary.csv",
    }
    results = json.loads((place / "role_eval_pitch_dynamics_exact.json").read_text())
    assert len(results) == 12 and list(results[0]) == FIELDS
    assert results[0]["original_id"] == "r0" and results[0]["char_profile"] == "A baker."
    assert results[0]["char_style"] == "" and results[3]["model_score"] is None
    assert list(results[0]["ground_truth_ratings"]) == ["pitch_variation"]


def test_each_source_has_a_folder_of_its_own(tmp_path: Path) -> None:
    given = predictions(tmp_path).read_text()
    lines = []
    for number, name in enumerate(("a/b", "a_b", "a_b_2", "a/b/c")):
        own = given.replace('"source": "dev"', f'"source": "{name}"')
        lines.append(own.replace('"original": "r', f'"original": "{number}r'))
    several = tmp_path / "several.jsonl"
    several.write_text("".join(lines))
    places = judged.write(several, tmp_path / "judged")
    assert [place.name for place in places] == ["a_b_3", "a_b", "a_b_2", "a_b_c"]
    for number, place in enumerate(places):
        assert {row.original[:2] for row in judged.read(place)} == {f"{number}r"}


def test_tables_are_scipys_figures_and_count_what_is_missing(place: Path) -> None:
    rows = judged.read(place)
    summed = {(row["dimension"], row["score"]): row for row in table(place / judged.SUMMARY)}
    assert {name for name, _ in summed} == {"overall", "pitch_dynamics", "warmth"}
    for (dimension, kind), found in summed.items():
        own = [row for row in rows if dimension in ("overall", row.dimension)]
        there = [(row.truth, row.score(kind)) for row in own if row.score(kind) is not None]
        truth, score = np.array(there, float).T
        assert int(found["examples"]) == len(own) and len(own) in (12, 24)
        assert int(found["missing"]) == len(own) // 4 == len(own) - len(there)
        assert float(found["mae"]) == pytest.approx(np.abs(truth - score).mean())
        for name, of in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            value, p = of(truth, score)
            assert float(found[name]) == pytest.approx(value)
            assert float(found[f"{name}_p"]) == pytest.approx(p)
            assert float(found[f"{name}_low"]) < value < float(found[f"{name}_high"])
    details = table(place / judged.DETAILED)
    assert len(details) == 24 and details[3]["model_score"] == ""  # of r3
    assert float(details[0]["gt_average"]) == pytest.approx(rows[0].truth)


def test_nothing_is_written_where_nothing_is_rated(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "x", "source": "asr", "reference": "a", "hypothesis": "a"}\n')
    assert judged.write(path, tmp_path / "judged") == []
    assert not (tmp_path / "judged").exists()


def theirs(folder: Path, *results: dict[str, Any], dimension: str = "emotion_intensity") -> Path:
    """A file as Speech-DRAME writes it: all ratings of a recording, whatever is asked about."""
    folder.mkdir(exist_ok=True)
    full = [
        dict.fromkeys(FIELDS, "")
        | {"id": f"role-{n}", "specific_dimension": dimension, "probability_score": None}
        | one
        for n, one in enumerate(results)
    ]
    path = folder / f"role_eval_{dimension}_exact.json"
    path.write_text(json.dumps(full))
    return path


def result(given: list[Any], model: float | None, **more: Any) -> dict[str, Any]:
    ratings = {"emotion_intensity_control": given, "pitch_variation": [5, 5]}
    ratings["annotator_confidence_rating"] = [1, 1]
    return {"ground_truth_ratings": ratings, "model_score": model, **more}


def test_the_originals_files_give_the_originals_figures(tmp_path: Path) -> None:
    theirs(
        tmp_path,
        result([4, None, 5], 4),
        result(["N/A", 3], 1, probability_score=1.5),
        result([1, 1], 2),
        result([None, None], 3),  # nobody rated it
        result([2, 2], None),  # here the original has 0 for all figures
    )
    rows = judged.read(tmp_path)
    assert [row.truth for row in rows] == [4.5, 2, 1, 2]
    whole = {(s["dimension"], s["score"]): s for s in judged.summary(rows)}
    found = whole["emotion_intensity", "model_score"]
    assert (found["examples"], found["missing"]) == (4, 1)
    assert found["mae"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert found["mse"] == pytest.approx((0.25 + 1 + 1) / 3)
    pearson = stats.pearsonr([4.5, 2, 1], [4, 1, 2])
    assert (found["pearson"], found["pearson_p"]) == pytest.approx(tuple(pearson))
    assert found["spearman"] == pytest.approx(0.5)
    few = whole["emotion_intensity", "probability_score"]
    assert few["missing"] == 3 and few["pearson"] is None and few["mae"] == 0.5


def one(ratings: str, score: str) -> str:
    """The file of one result."""
    told = f'"specific_dimension": "x", "ground_truth_ratings": {ratings}, "model_score": {score}'
    return f'[{{"id": "a", {told}}}]'


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "no JSON"),
        ("{}", "expected a list of results"),
        ('[{"id": "a"}]', r"\[0\] is no result .*specific_dimension"),
        ("[1]", r"\[0\] is no result"),
        (
            '[{"id": "a", "specific_dimension": null, "ground_truth_ratings": {}}]',
            r"\[0\] is no result .*is None",
        ),
        (one('{"x": "45"}', "4"), r"\[0\] is no result .*expected a list"),
        (one('{"x": [NaN, 4]}', "4"), r"\[0\] is no result .*ratings are .nan, 4"),
        (one('{"x": [4]}', "NaN"), r"\[0\] is no result .*nan is no score"),
        ("[]", "no results of judging"),
    ],
)
def test_files_that_are_no_results_are_named(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "role_eval_x_exact.json").write_text(content)
    with pytest.raises(UserError, match=named):
        judged.read(tmp_path)


def test_a_score_that_is_a_text_is_no_score(tmp_path: Path) -> None:
    theirs(tmp_path, result([4], "4"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\[0\] is no result .*'4' is no score"):
        judged.read(tmp_path)


def test_models_are_drawn_beside_each_other(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "DRAWS", 20)
    ours = tmp_path / "dev"
    shutil.copytree(place, ours)
    theirs(tmp_path / "theirs", result([4, 5], 4), result([1, 2], 2), result([3, 3], 3))
    columns, names, values = pictures.table(pictures.named([ours, tmp_path / "theirs"]))
    assert columns == ["dev\nmodel", "dev\nprobability", "theirs\nmodel", "theirs\nprobability"]
    assert names == ["overall", "pitch_dynamics", "warmth", "emotion_intensity"]
    assert values[3, 2] == pytest.approx(1) and np.isnan(values[3, [0, 1, 3]]).all()
    picture = library.report([ours, tmp_path / "theirs"], tmp_path / "pictures")
    assert picture == tmp_path / "pictures" / "correlations.png"
    for name in pictures.PICTURES:
        assert (tmp_path / "pictures" / name).read_bytes()[:4] == b"\x89PNG"
    assert library.report([ours]) == ours / "correlations.png"
    with pytest.raises(UserError, match=r"nothing: no results of judging are here"):
        library.report([ours, tmp_path / "nothing"])
    assert list(pictures.named([ours, place]))[1].endswith("judged/dev")  # a name of its own
