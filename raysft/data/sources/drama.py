"""Acted speech with ratings (Speech-DRAME), and questions on audio (AVQA): JSON lines.

    {"dataset_name": "ROLE", "wav_path": "a.wav", "local_scene": "...", "char_style": "...",
     "char_profile": "...", "annotations": {"pitch_variation": [4, 3, null], ...}}
    {"dataset_name": "Arche", "wav_path": "a.wav", "question": "...",
     "annotations": {"content_pass": [true, true], "audio_quality": [4, 5], ...}}
    {"dataset_name": "AVQA", "audio_path": "a.wav", "question_text": "...",
     "multi_choice": ["rain", "a dog"], "answer": 1}

A rating is learnt as `<answer>4</answer>`, asked for by the audio, a rubric and the scene. In
training one dimension and one rater are drawn at each use (`judged.py`); in evaluation a record is
an example for each dimension that was rated, held against all of its raters. Ratings of null are
none, and so are those of N/A unless `judging.not_applicable` says otherwise; lists of ratings may
stand beside `annotations`' other fields or in the record itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from raysft import paths, stores
from raysft.config.judging import Dataset, Judging
from raysft.config.schema import Source
from raysft.data import rubric
from raysft.data.example import Audio, Example
from raysft.data.judged import Dimension, Judged
from raysft.data.rubric import Named, Rubric
from raysft.data.sources import json_lines
from raysft.data.sources.base import (
    Item,
    Split,
    clip_path,
    default_id,
    id_field,
    kind,
    load_record,
    text_field,
)
from raysft.data.sources.fields import refuse_unread
from raysft.data.sources.layout import LISTED, Layout, fault
from raysft.errors import BadExample, UserError
from raysft.json_types import Json, JsonObject
from raysft.scorers.rated import Rated

TASK, QUESTION_TASK = "rating", "qa"
KINDS = {"Arche": "arche", "AVQA": "avqa"}  # what each dataset_name is; others are roles
NAMES = get_args(Dataset)
CAPTIONS = {
    "RoleCaption": "audio_caption",
    "RoleVariationCaption": "audio_caption",
    "RoleEmotion": "emotion_caption",
}
WORDED = ("RoleVariation", "RoleReasoning", "RoleVariationCaption")
LONGEST = 100  # characters of a rating that is looked at
NOTHING = "N/A"  # what a record says where a field is empty
NOT_APPLICABLE = ("na", "n/a", "n.a.", "not applicable")
SHOWN = ("char_profile", "char_style", "transcript", "local_scene", "question")
READ = frozenset(
    [
        *("id", "dataset_name", "wav_path", "audio_path", "annotations", "audio_info"),
        *("local_scene", "char_age", "char_style", "char_profile", "transcript"),
        *("question", "question_text", "multi_choice", "answer"),
    ]
)


class Drama(Layout):
    """The format `drama`."""

    name = "drama"
    describe = (
        "JSON lines with dataset_name (ROLE, Arche, AVQA, ...), wav_path and annotations, or "
        "question_text and multi_choice"
    )
    noun = "line"
    rank = 0
    options = ("root", "judging")
    by_split = True

    def sniff(self, path: Path) -> bool:
        """Whether one of the first lines is an object with a clip and ratings, or choices."""
        return not stores.is_dir(path) and any(map(_is_drama, json_lines.first_objects(path)))

    def asked(self, given: Source) -> tuple[str, ...]:
        """What its records are made by: `judging`."""
        return ("judging", (given.judging or Judging()).model_dump_json())

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """The files that `judging` names; the package's may be another version's."""
        return None

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """Its lines, as they are trained on."""
        return self.of_split(file, given, "train", keep)

    def of_split(
        self, file: Path, given: Source, split: Split, keep: Path | None = None
    ) -> Iterator[JsonObject]:
        """Its lines; in evaluation one of each dimension of a line that was rated."""
        judging = given.judging or Judging()
        root = None if given.root is None else paths.of_data(given.root)
        files: dict[str, Named] = {}
        for item in json_lines.items(file):
            name, at = default_id(file, item.line), f"{file.name}:{item.line}"
            try:
                if item.raw is None:
                    raise BadExample(item.error or "")
                record = load_record(item.raw)
                name = id_field(record, file, item.line)
                dataset = judging.dataset or _dataset(record)
                sort = KINDS.get(dataset, "role")
                listed: JsonObject = {LISTED: 1, "id": name, "at": at, "root": root}
                listed |= {"dataset": dataset, "record": record}
                if sort != "avqa":
                    if sort not in files:
                        files[sort] = rubric.named(judging.rubrics, f"{sort}.yaml")
                    listed["rubrics"] = [*files[sort]]
                    listed["wordings"] = _wordings(judging, dataset)
                    listed["lowest"] = judging.not_applicable == "lowest"
                    listed["dimensions"] = judging.dimensions
                    rated = [one.rated.dimension for one in _dimensions(listed)]
                    if split == "eval" and "All" not in dataset:
                        for dimension in rated:
                            yield listed | {"dimensions": [dimension], "split": "eval"}
                        continue
                    listed["split"] = split
            except BadExample as error:
                yield fault(name, str(error), at)
                continue
            yield listed

    def line_of(self, item: Item) -> int | None:
        """See `Layout`: in evaluation a line has several records."""
        try:
            return int(str(load_record(item.raw or b"")["at"]).rpartition(":")[2])
        except (BadExample, KeyError, ValueError):
            return None

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of a listed record. Raises BadExample naming what is wrong with it."""
        listed = load_record(raw)
        if "fault" in listed:  # of a line that messages name
            raise BadExample(listed["fault"], "malformed record", listed["id"])
        if "dataset" not in listed:
            return super().parse(raw, file, line, task)
        try:
            if listed["dataset"] == "AVQA":
                return _question(listed, file, task)
            return _rating(listed, file, task)
        except BadExample as error:
            raise BadExample(str(error), error.kind, listed["id"]) from None


def _is_drama(record: JsonObject) -> bool:
    if "wav_path" not in record and "audio_path" not in record:
        return False
    rated = isinstance(record.get("annotations"), dict)
    choices = "question_text" in record and "multi_choice" in record
    return rated or choices or record.get("dataset_name") in NAMES


def _dataset(record: JsonObject) -> str:
    given = record.get("dataset_name")
    if given is None:
        if "multi_choice" in record:
            return "AVQA"
        return "Arche" if "question" in record and "char_profile" not in record else "ROLE"
    if given == "Archetype":
        return "Arche"
    if given not in NAMES:
        raise BadExample(
            f"dataset_name is {given!r}; known are {', '.join(sorted(NAMES))}: say what it is "
            "asked as (the entry's judging.dataset)",
            "malformed record",
        )
    return str(given)


def _wordings(judging: Judging, dataset: str) -> list[str] | None:
    if judging.variations is not None:
        return [*rubric.named(judging.variations, "")]
    if dataset in WORDED:
        raise UserError(f"judging.variations: {dataset} is asked in wordings of a file: name it")
    return None


def _clip(listed: JsonObject, file: Path) -> Audio:
    record = listed["record"]
    field = next((name for name in ("wav_path", "audio_path") if record.get(name)), "wav_path")
    given = text_field(record, field)
    refuse_unread(record, READ | set(_fields(listed)), clip=given)
    try:
        return Audio(clip_path(given, file, listed["root"]))
    except BadExample as error:
        raise BadExample(f"field '{field}': {error}", "malformed record") from None


def _fields(listed: JsonObject) -> list[str]:
    if "rubrics" not in listed:
        return []
    return [one.field for one in rubric.rubrics(*listed["rubrics"]).dimensions.values()]


def _question(listed: JsonObject, file: Path, task: str | None) -> Example:
    record = listed["record"]
    asked, choices = text_field(record, "question_text"), record.get("multi_choice")
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise BadExample("field 'multi_choice': expected a list of texts", "malformed record")
    number = record.get("answer")
    if type(number) is not int or not 0 <= number < len(choices):
        raise BadExample(
            f"field 'answer' is {number!r}, expected the number of a choice, 0 to "
            f"{len(choices) - 1}",
            "malformed record",
        )
    asked = asked.replace("video", "audio")
    answer = f"<answer>{choices[number]}</answer>"
    return Example(
        id=listed["id"],
        task=task or QUESTION_TASK,
        input=(_clip(listed, file),),
        output=(answer,),
        instruction=f"{asked} Please choose the answer from the following options: {choices}. "
        "Output the final answer in <answer> </answer>.",
        text=answer,
    )


def _rating(listed: JsonObject, file: Path, task: str | None) -> Example:
    record, dataset = listed["record"], listed["dataset"]
    texts = rubric.rubrics(*listed["rubrics"]).texts
    every = "All" in dataset
    frame = texts["all" if every else "varied" if listed["wordings"] else "one"]
    before, _, after = frame.partition("{rubric}")
    context = _told(texts["context"], record)
    header = texts["all_long" if "Fix" in dataset else "all_short"] if every else None
    judged = Judged(
        dimensions=tuple(_dimensions(listed)),
        before=before.replace("{context}", context),
        after=after.replace("{context}", context),
        thought=_thought(record, dataset),
        header=header,
        free="Flex" in dataset,
        together=dataset.endswith("Consistent"),
    )
    clip, evaluated = _clip(listed, file), listed["split"] == "eval"
    own = str(listed["id"])
    name = f"{own}:{judged.dimensions[0].rated.dimension}" if evaluated and not every else own
    asked, answer = judged.settled()
    if evaluated and listed["wordings"] and not every:  # the same one at every evaluation
        asked, answer = judged.worded(name)
    return Example(
        id=name,
        task=task or TASK,
        input=(clip,),
        output=(answer,),
        instruction=asked,
        text=answer,
        judged=None if evaluated else judged,
        rated=tuple(one.rated for one in judged.dimensions) if evaluated else (),
    )


def _told(context: str, record: JsonObject) -> str:
    """The context with the record's fields in their places; N/A where one is empty."""
    found = context
    for name in dict.fromkeys(_places(context)):
        value = text_field(record, name)
        found = found.replace(f"{{{name}}}", value if value.strip() else NOTHING)
    return found


def _places(text: str) -> Iterator[str]:
    for piece in text.split("{")[1:]:
        yield piece.partition("}")[0]


def _thought(record: JsonObject, dataset: str) -> str:
    if dataset not in CAPTIONS:
        return ""
    info = record.get("audio_info")
    said = info.get(CAPTIONS[dataset]) if isinstance(info, dict) else None
    return f"<think>{said if isinstance(said, str) and said.strip() else NOTHING}</think>"


def _dimensions(listed: JsonObject) -> list[Dimension]:
    """Those that were rated, in the fixed order. Raises BadExample where there is none, and
    UserError for a dimension without a rubric or a wording."""
    record, dataset = listed["record"], listed["dataset"]
    chosen = rubric.rubrics(*listed["rubrics"]).chosen(listed["dimensions"])
    prompts = rubric.variations(*listed["wordings"]) if listed["wordings"] else None
    inside = record.get("annotations")
    annotations = inside if isinstance(inside, dict) else {}
    context = {name: str(record[name]) for name in SHOWN if isinstance(record.get(name), str)}
    found = []
    for one in chosen:
        texts: tuple[str, ...] = (one.text,)
        if prompts is not None:
            texts = rubric.wordings(one, prompts, listed["wordings"][0])
        given = annotations.get(one.field, record.get(one.field))
        by_rater = _ratings(given, one, listed["lowest"])
        ratings = tuple(rating for rating in by_rater if rating is not None)
        if not ratings:
            continue
        rated = Rated(
            str(listed["id"]),
            KINDS.get(dataset, "role"),
            one.name,
            one.field,
            ratings,
            one.lowest,
            one.highest,
            one.label if "All" in dataset else "",
            context,
        )
        line = one.long if "Fix" in dataset else one.line
        found.append(Dimension(rated, one.label, texts, line, by_rater))
    if not found:
        raise BadExample(
            f"nobody rated any of {', '.join(one.field for one in chosen)}", "malformed record"
        )
    return found


def _ratings(given: Json, one: Rubric, lowest: bool) -> tuple[int | None, ...]:
    """A rating of each rater; None: there is none."""
    values = given if isinstance(given, list) else [given]
    return tuple(_one_rating(value, one, lowest) for value in values)


def _one_rating(value: Json, one: Rubric, lowest: bool) -> int | None:
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in NOT_APPLICABLE:
            return one.lowest if lowest else None
        if not text:
            return None
        value = int(text) if text.isdecimal() and len(text) < LONGEST else text
    if value is None:
        return None
    yes_no = (one.lowest, one.highest) == (0, 1)
    if isinstance(value, bool) and yes_no:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not one.lowest <= value <= one.highest:
        plain = isinstance(value, int | float | str) and len(str(value)) < LONGEST
        found = repr(value) if plain else kind(value)
        raise BadExample(
            f"annotations.{one.field} holds {found}, outside of the scale of whole numbers from "
            f"{one.lowest} to {one.highest}",
            "malformed record",
        )
    return value


FORMAT = Drama()
