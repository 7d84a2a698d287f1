"""Result files of judging: for each dimension what was answered, as Speech-DRAME writes it, and
tables of how that agrees with the raters.

    judged/SOURCE/role_eval_DIMENSION_exact.json    a list of answers
                 /detailed_results.csv              a row an answer
                 /evaluation_summary.csv            a row a dimension and kind of score; `overall`

Folders of the original's own files are read as well. Needs no torch.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raysft.errors import UserError
from raysft.json_types import Json, JsonObject
from raysft.run.lines import read_lines
from raysft.run.storage import write_whole
from raysft.scorers import agreement

FOLDER = "judged"
PATTERN = "*_eval_*.json"
OVERALL = "overall"
KINDS = ("model_score", "probability_score")
DETAILED, SUMMARY = "detailed_results.csv", "evaluation_summary.csv"
# What the original calls the fields of dimensions whose names differ.
FIELDS = {
    "pitch_dynamics": "pitch_variation",
    "emotional_dynamic_range": "dynamic_range",
    "emotion_intensity": "emotion_intensity_control",
    "global_story_fit": "global_story_coherence",
    "local_scene_fit": "local_story_fit",
    "stress_emphasis": "stress_and_emphasis",
}
_SHOWN = ("char_profile", "char_style", "transcript", "local_scene")
_FIGURES = (
    *("mae", "mse", "rmse", "r2", "pearson", "pearson_p", "spearman", "spearman_p"),
    *(f"{name}_{edge}" for name in agreement.INTERVALS for edge in ("low", "high")),
)


@dataclass(frozen=True)
class Row:
    """An answer to one dimension of a recording. model, probability: None where it is missing."""

    id: str
    original: str
    dimension: str
    ratings: tuple[float, ...]
    model: float | None
    probability: float | None

    @property
    def truth(self) -> float:
        """The mean of its raters."""
        return sum(self.ratings) / len(self.ratings)

    def score(self, kind: str) -> float | None:
        """One of KINDS."""
        return self.model if kind == "model_score" else self.probability


def write(predictions: Path, folder: Path) -> list[Path]:
    """Write the files of what an evaluation rated, a folder below `folder` for each source; returns
    these. predictions: its answers; nothing is written where none of them is rated."""
    files: dict[str, dict[str, list[JsonObject]]] = {}
    for line in read_lines(predictions, {"id": str, "hypothesis": str}):
        for found in line.get("ratings", ()):
            rated = found["rated"]
            name = f"{rated['kind']}_eval_{rated['dimension']}_exact.json"
            files.setdefault(line["source"], {}).setdefault(name, []).append(_result(line, found))
    places, names = [], _folders(list(files))
    for source, by_name in files.items():
        place = folder / names[source]
        place.mkdir(parents=True, exist_ok=True)
        for name, results in by_name.items():
            content = json.dumps(results, ensure_ascii=False, indent=2)
            write_whole(place / name, content.encode())
        rows = read(place)
        write_whole(place / DETAILED, _table(map(_detail, rows)))
        write_whole(place / SUMMARY, _table(summary(rows)))
        places.append(place)
    return places


def _folders(sources: Sequence[str]) -> dict[str, str]:
    """The folder of each source: its name, with _ for /, and a number where another has that."""
    found = {source: source for source in sources if "/" not in source}
    for source in sources:
        base, number = source.replace("/", "_"), 2
        name = base
        while source not in found and name in found.values():
            name, number = f"{base}_{number}", number + 1
        found.setdefault(source, name)
    return found


def _result(line: JsonObject, found: JsonObject) -> JsonObject:
    rated, said = found["rated"], line["hypothesis"]
    context = rated["context"]
    return {
        "id": line["id"],
        "original_id": rated["original"],
        **{name: context.get(name, "") for name in _SHOWN},
        **({"question": context["question"]} if "question" in context else {}),
        "evaluation_type": "specific_dimension",
        "specific_dimension": rated["dimension"],
        "raw_model_output": said,
        "model_score": found["model"],
        "probability_score": found["probability"],
        "evaluation_text": said,
        "ground_truth_ratings": {rated["annotated"]: rated["ratings"]},
    }


def has_results(folder: Path) -> bool:
    """Whether there are result files in a folder, or below it."""
    return folder.is_dir() and next(folder.rglob(PATTERN), None) is not None


def read(folder: Path) -> list[Row]:
    """The answers in all result files in or below a folder, ours or Speech-DRAME's, but for those
    that nobody rated. Ratings of null are none; N/A is 1, as the original has it (ours hold none).

    Raises UserError for a file that holds something else.
    """
    rows = []
    for file in sorted(folder.rglob(PATTERN)):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: no JSON: {error}") from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
        if not isinstance(found, list):
            raise UserError(f"{file}: expected a list of results")
        for number, result in enumerate(found):
            try:
                row = _row(result)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{file}: [{number}] is no result ({error!r})") from None
            rows += [row] if row is not None else []
    if not rows:
        raise UserError(f"{folder}: no results of judging ({PATTERN}) in it or below it")
    return rows


def _row(result: JsonObject) -> Row | None:
    dimension = result["specific_dimension"]
    by_field = result["ground_truth_ratings"]
    if not isinstance(dimension, str):
        raise ValueError(f"specific_dimension is {dimension!r}")
    given = by_field.get(FIELDS.get(dimension, dimension))
    if given is None and len(by_field) == 1:  # a rubric of one's own
        (given,) = by_field.values()
    if not isinstance(given, list | None):
        raise ValueError(f"ratings are {given!r}, expected a list")
    ratings = tuple(1.0 if one == "N/A" else float(one) for one in given or () if one is not None)
    if not all(map(math.isfinite, ratings)):
        raise ValueError(f"ratings are {given!r}")
    if not ratings:
        return None
    name = str(result["id"])
    original = str(result.get("original_id") or name)
    scores = (_number(result.get(kind)) for kind in KINDS)
    return Row(name, original, dimension, ratings, *scores)


def _number(value: Json) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no score")
    return float(value)


def summary(rows: Sequence[Row]) -> list[JsonObject]:
    """For each dimension, and all of them pooled, a row for each kind of score: how many examples
    and how many of them without a score, `agreement.figures`, their intervals, the raters' alpha.
    What is not defined is None."""
    found = []
    for dimension in (OVERALL, *dict.fromkeys(row.dimension for row in rows)):
        own = [row for row in rows if dimension in (OVERALL, row.dimension)]
        for kind in KINDS:
            found.append(_summed(dimension, kind, own))
    return found


def _summed(dimension: str, kind: str, rows: Sequence[Row]) -> JsonObject:
    scored = [(row, score) for row in rows if (score := row.score(kind)) is not None]
    truth, scores = [row.truth for row, _ in scored], [score for _, score in scored]
    figures: dict[str, float] = agreement.figures(truth, scores)
    between = agreement.intervals(truth, scores, [row.original for row, _ in scored])
    for name, (low, high) in between.items():
        figures |= {f"{name}_low": low, f"{name}_high": high}
    return {
        "dimension": dimension,
        "score": kind,
        "examples": len(rows),
        "missing": len(rows) - len(scored),
        **{name: figures.get(name) for name in _FIGURES},
        "rater_alpha": agreement.alpha([row.ratings for row in rows]),
    }


def _detail(row: Row) -> JsonObject:
    return {
        "id": row.id,
        "original_id": row.original,
        "eval_dimension": row.dimension,
        "model_score": row.model,
        "probability_score": row.probability,
        "gt_average": row.truth,
        "gt_count": len(row.ratings),
    }


def _table(rows: Iterable[Mapping[str, Json]]) -> bytes:
    """Rows as CSV; None is an empty cell."""
    out, given = io.StringIO(), list(rows)
    writer = csv.DictWriter(out, list(given[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(given)
    return out.getvalue().encode()
