"""Judged speech: what of a record is asked and answered, how it is drawn, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from scipy.stats import chisquare

from raysft.config.judging import Judging
from raysft.config.schema import Data, Model, Source
from raysft.data import rubric, sources
from raysft.data.encode import make_encoder
from raysft.data.example import Example, MicroBatch
from raysft.data.index.build import Index, build_index
from raysft.data.read.reader import Reader, Work
from raysft.errors import UserError
from tests.support.drama import FIELDS, LABELS, TOLD, arche, avqa, prompts, role, written
from tests.support.models import AUDIO, CAUSAL

OUTER = "Please evaluate the audio based on the following criteria:"
TAGS = "Output the answer in <answer> </answer>."


def located(path: Path, split: str = "train", **judging: Any) -> list[sources.base.Located]:
    given = Source(path=str(path), judging=Judging(**judging) if judging else None)
    source = sources.resolve(given, split)
    assert source.format == "drama"
    return list(sources.scan(source, path))


def examples(path: Path, split: str = "train", **judging: Any) -> list[Example]:
    found = located(path, split, **judging)
    assert [one.error for one in found] == [None] * len(found)
    return [one.example for one in found if one.example is not None]


def error(folder: Path, record: dict[str, Any], **judging: Any) -> str:
    (one,) = located(written(folder, record), **judging)
    assert one.example is None and one.kind == "malformed record"
    return str(one.error)


def answers(example: Example, count: int = 200) -> Counter[tuple[str, str]]:
    """(label asked about, answer), as drawn by so many generators."""
    found: Counter[tuple[str, str]] = Counter()
    for seed in range(count):
        form = example.drawn(np.random.default_rng(seed))
        assert form.instruction is not None
        label = form.instruction.partition("Dimension: ")[2].partition(" - ")[0]
        found[label, str(form.output[0])] += 1
    return found


# -- messages --------------------------------------------------------------------------------------


def test_a_dimension_of_a_role_is_asked_about_with_scene_and_profile(tmp_path: Path) -> None:
    (example,) = examples(written(tmp_path, role()))
    assert example.id == "r0" and example.task == "rating" and example.lang is None
    (clip,) = example.input
    assert clip.path == str(tmp_path / "wav" / "0.wav")
    form = example.drawn(np.random.default_rng(0))
    outer, header, rest = form.instruction.split("\n\n", 2)
    assert outer == OUTER and "1-5 scale" in header
    assert rest.startswith("Dimension: ") and rest.endswith(f"\n\n{TOLD}\n\n{TAGS}")
    told = rest.partition("\n\n")[0].split("\n")
    assert [line[:2] for line in told[1:6]] == ["5:", "4:", "3:", "2:", "1:"]
    assert told[6] == "Example output: 4" and "Adult" not in rest and "kettle" not in rest
    assert form.input == example.input and form.text == form.output[0]
    asked = answers(example)
    assert {label for label, _ in asked} == set(LABELS)
    assert {answer for _, answer in asked} == {"<answer>4</answer>", "<answer>2</answer>"}


def test_each_dimension_answers_by_its_own_field(tmp_path: Path) -> None:
    for field, label in zip(FIELDS, LABELS, strict=True):
        (example,) = examples(written(tmp_path, role(**{field: [5, 5, 5]})))
        asked = answers(example, 150)
        assert {a for name, a in asked if name == label} == {"<answer>5</answer>"}
        assert {a for name, a in asked if name != label} == {
            "<answer>4</answer>",
            "<answer>2</answer>",
        }


def test_archetypes_have_yes_or_no_and_ratings(tmp_path: Path) -> None:
    (example,) = examples(written(tmp_path, arche()))
    asked = answers(example)
    assert "Question: You are a nurse. You say:" in example.instruction
    by_label = {label: {a for name, a in asked if name == label} for label, _ in asked}
    assert by_label == {
        "ContentPass": {"<answer>1</answer>", "<answer>0</answer>"},
        "AudioQuality": {"<answer>4</answer>", "<answer>5</answer>"},  # null is no rating
        "HumanLikeness": {"<answer>3</answer>"},
        "Appropriateness": {f"<answer>{n}</answer>" for n in (1, 2, 3)},
    }


def test_what_failed_is_asked_about_alone(tmp_path: Path) -> None:
    nothing = {name: [None] * 3 for name in ("audio_quality", "human_likeness", "appropriateness")}
    (example,) = examples(written(tmp_path, arche(content_pass=[False] * 3, **nothing)))
    assert set(answers(example)) == {("ContentPass", "<answer>0</answer>")}


@pytest.mark.parametrize(
    ("given", "settings", "expected"),
    [
        ([None, 3, None], {}, {"3"}),
        (["N/A", 3, "n/a"], {}, {"3"}),
        (["N/A", 3, "n/a"], {"not_applicable": "lowest"}, {"1", "3"}),
        ([4.0, "5", ""], {}, {"4", "5"}),
        (2, {}, {"2"}),
        ([None, None, None], {}, set()),
        (["N/A", "N/A", None], {}, set()),
        (None, {}, set()),
    ],
)
def test_odd_ratings_are_what_they_mean_and_never_1_by_accident(
    tmp_path: Path, given: Any, settings: dict[str, Any], expected: set[str]
) -> None:
    (example,) = examples(written(tmp_path, role(emotion_accuracy=given)), **settings)
    found = {answer[8:-9] for name, answer in answers(example) if name == "EmotionAccuracy"}
    assert found == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([float("nan"), 3], "annotations.emotion_accuracy holds nan, outside of the scale"),
        ([float("inf"), 3], "annotations.emotion_accuracy holds inf, outside of the scale"),
        (["4" * 5000], "annotations.emotion_accuracy holds a text, outside of the scale"),
        ([6, 3, 3], "annotations.emotion_accuracy holds 6, outside of the scale of whole numbers"),
        ([0, 3, 3], "holds 0, outside"),
        ([3.5, 3, 3], "holds 3.5, outside"),
        ([True, 3, 3], "holds True, outside"),
        (["good", 3, 3], "holds 'good', outside"),
        ([[3], 3, 3], "holds a list, outside"),
    ],
)
def test_a_rating_outside_the_scale_is_no_rating(tmp_path: Path, given: Any, named: str) -> None:
    assert named in error(tmp_path, role(emotion_accuracy=given))


def test_records_that_cannot_be_asked_about_are_named(tmp_path: Path) -> None:
    record = role()
    record["annotations"] = {field: [None, None] for field in FIELDS}
    assert "nobody rated any of pitch_variation" in error(tmp_path, record)
    assert "dataset_name is 'Role2'; known are AVQA, Arche" in error(
        tmp_path, role() | {"dataset_name": "Role2"}
    )
    record = role()
    del record["char_profile"]
    assert "field 'char_profile' is missing" in error(tmp_path, record)
    assert "expected the number of a choice, 0 to 1" in error(tmp_path, avqa(answer=2))
    assert "expected the number of a choice" in error(tmp_path, avqa(answer=True))
    assert "says which part of a clip is meant" in error(tmp_path, role() | {"offset": 1.5})


def test_ratings_may_stand_beside_the_record_and_names_may_be_left_out(tmp_path: Path) -> None:
    beside = role()
    beside |= beside.pop("annotations")
    del beside["dataset_name"]
    beside["annotations"] = {}
    unnamed = {k: v for k, v in arche().items() if k != "dataset_name"}
    first, second = examples(written(tmp_path, beside, unnamed))
    assert {label for label, _ in answers(first)} == set(LABELS)
    assert "ContentPass" in {label for label, _ in answers(second)}


def test_questions_on_audio_have_their_choices(tmp_path: Path) -> None:
    (example,) = examples(written(tmp_path, avqa()))
    assert example.task == "qa" and example.id == "drama:1" and not example.rated
    assert example.instruction == (
        "What is heard in the audio? Please choose the answer from the following options: "
        "['rain', 'a voice']. Output the final answer in <answer> </answer>."
    )
    assert example.output == ("<answer>a voice</answer>",) and example.text == example.output[0]
    assert example.input[0].path.endswith("wav/0.wav")


def all_of(example: Example, seed: int) -> tuple[list[str], list[int], str]:
    form = example.drawn(np.random.default_rng(seed))
    parts = str(form.output[0]).removeprefix("<answer>").removesuffix("</answer>").split("[")[1:]
    labels = [part.partition("]")[0] for part in parts]
    return labels, [int(part.partition("]")[2]) for part in parts], str(form.instruction)


def test_all_dimensions_in_the_fixed_order_or_any(tmp_path: Path) -> None:
    path = written(tmp_path, role(pitch_variation=[5, 5, 5], dynamic_range=[None] * 3))
    rated = [label for label in LABELS if label != "EmotionalDynamicRange"]
    (fixed,) = examples(path, dataset="RoleAllFixOrder")
    (free,) = examples(path, dataset="RoleAllFlexOrder")
    orders = set()
    for seed in range(30):
        labels, ratings, asked = all_of(fixed, seed)
        assert labels == rated and ratings[0] == 5 and asked.startswith(f"{TOLD}\n\n")
        assert "5: every movement" in asked
        labels, ratings, asked = all_of(free, seed)
        assert sorted(labels) == sorted(rated) and ratings[labels.index("PitchDynamics")] == 5
        lines = [line.partition(":")[0] for line in asked.partition("\n\n")[2].split("\n")[1:]]
        assert lines == labels and "5: every movement" not in asked  # asked as they are answered
        orders.add(tuple(labels))
    assert len(orders) > 25


def test_one_rater_gives_all_ratings_where_they_are_to_be_consistent(tmp_path: Path) -> None:
    ratings = {field: [1, 2, 3, 4] for field in FIELDS} | {FIELDS[3]: [1, None, 3, 4]}
    path = written(tmp_path, role(**ratings))
    for name in ("RoleAllFixOrderConsistent", "RoleAllFlexOrderConsistent"):
        (example,) = examples(path, dataset=name)
        found = Counter(tuple(sorted({*all_of(example, seed)[1]})) for seed in range(200))
        assert set(found) == {(1,), (3,), (4,)}  # the second did not rate all
        assert min(found.values()) > 40
    (mixed,) = examples(path, dataset="RoleAllFixOrder")
    assert max(len({*all_of(mixed, seed)[1]}) for seed in range(20)) > 2


def test_captions_are_thought_before_the_answer(tmp_path: Path) -> None:
    told = {"audio_info": {"audio_caption": "A calm voice.", "emotion_caption": "Bored."}}
    expected = {"RoleCaption": "A calm voice.", "RoleEmotion": "Bored."}
    for name, caption in expected.items():
        (example,) = examples(written(tmp_path, role() | told), dataset=name)
        assert (
            example.drawn(np.random.default_rng(0))
            .output[0]
            .startswith(f"<think>{caption}</think><answer>")
        )
        (example,) = examples(written(tmp_path, role()), dataset=name)
        assert str(example.output[0]).startswith("<think>N/A</think><answer>")


def test_wordings_of_a_file_are_the_same_in_training_and_evaluation(tmp_path: Path) -> None:
    path, file = written(tmp_path, role()), prompts(tmp_path)
    (example,) = examples(path, variations=str(file))
    drawn = Counter(example.drawn(np.random.default_rng(n)).instruction for n in range(600))
    expected = {f"Wording {n}: rate {name}.\n\n{TOLD}" for n in range(3) for name in LABELS}
    assert set(drawn) == expected and chisquare([*drawn.values()]).pvalue > 0.001
    evaluated = examples(path, "eval", variations=str(file))
    assert {one.instruction for one in evaluated} < expected
    assert [one.instruction for one in evaluated] == [
        one.instruction for one in examples(path, "eval", variations=str(file))
    ]
    assert len({one.instruction.partition(":")[0] for one in evaluated}) > 1


# -- evaluation ------------------------------------------------------------------------------------


def test_in_evaluation_each_rated_dimension_is_an_example(tmp_path: Path) -> None:
    path = written(tmp_path, role(pitch_variation=[5, 4, None], dynamic_range=[None] * 3), arche(1))
    found = examples(path, "eval")
    assert len(found) == 9 + 4
    first = found[0]
    assert first.id == "r0:pitch_dynamics" and "Dimension: PitchDynamics" in first.instruction
    (rated,) = first.rated
    assert (rated.original, rated.kind, rated.dimension) == ("r0", "role", "pitch_dynamics")
    assert rated.ratings == (5, 4) and rated.truth == 4.5 and rated.settled == 5
    assert first.text == "<answer>5</answer>" and first.judged is None
    assert rated.context["char_profile"] == "A baker of a small town."
    assert "r0:emotional_dynamic_range" not in {one.id for one in found}
    passed = found[9]
    assert passed.id == "a1:content_pass" and passed.rated[0].highest == 1
    assert passed.output == ("<answer>1</answer>",)
    (every,) = examples(written(tmp_path, role()), "eval", dataset="RoleAllFixOrder")
    assert [one.label for one in every.rated] == list(LABELS)


# -- draws -----------------------------------------------------------------------------------------


def indexed(path: Path, folder: Path, split: str = "train", **judging: Any) -> Reader:
    encoder = make_encoder(Model(**AUDIO), Data(), folder)
    given = Source(path=str(path), judging=Judging(**judging) if judging else None)
    index: Index = build_index([given], split, encoder, folder / "index")
    return Reader(index, encoder, int(index.tokens.sum()), 0 if split == "train" else None)


def read(reader: Reader, epoch: int, step: int, lane: int, rows: Sequence[int]) -> MicroBatch:
    (batch,) = reader.read_chunk([Work(epoch, step, lane, np.array(rows))])
    assert batch.quarantined == []
    return batch


def texts(reader: Reader, batch: MicroBatch) -> list[str]:
    cuts = np.cumsum(batch.lengths)[:-1]
    ids = [row[row >= 0] for row in np.split(batch.input_ids, cuts)]
    return [reader.encoder.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def test_draws_are_uniform_over_dimensions_and_raters_and_depend_on_the_place_alone(
    tmp_path: Path,
) -> None:
    # Raters differ in number, and their ratings say who they are.
    ratings = {field: [1, 2, 3, 4, 5][: 2 + n % 4] for n, field in enumerate(FIELDS)}
    path = written(tmp_path, *(role(n, **ratings) for n in range(4)))
    short = {"variations": str(prompts(tmp_path, 1))}
    reader = indexed(path, tmp_path, **short)
    places = [(epoch, step, lane) for epoch in range(2) for step in range(8) for lane in (0, 1)]
    drawn = {place: texts(reader, read(reader, *place, range(4))) for place in places}

    def asked(text: str) -> tuple[str, int]:
        label = text.partition("rate ")[2].partition(".")[0]
        return label, int(text.rpartition("<answer>")[2][0])

    counts = Counter(asked(text) for found in drawn.values() for text in found)
    (example,) = reader.index.examples([0])
    forms = [example.drawn(np.random.default_rng([1, n])) for n in range(2000)]
    counts.update(asked(f"{form.instruction}{form.output[0]}") for form in forms)
    by_dimension = Counter[str]()
    for (label, _), count in counts.items():
        by_dimension[label] += count
    assert set(by_dimension) == set(LABELS)
    assert chisquare([*by_dimension.values()]).pvalue > 0.001
    for number, label in enumerate(LABELS):
        own = [counts[label, rating] for rating in range(1, 3 + number % 4)]
        assert min(own) > 0 and chisquare(own).pvalue > 0.001
        assert sum(own) == by_dimension[label]

    # A start that goes on at a step, and workers that take other lanes, read what was read.
    later = indexed(path, tmp_path / "again", **short)
    for place in places[::-9]:
        assert texts(later, read(later, *place, range(4))) == drawn[place]
    assert len({tuple(found) for found in drawn.values()}) == len(places)
    (one, two) = later.read_chunk([Work(1, 5, lane, np.arange(4)) for lane in (1, 0)])
    assert [texts(later, batch) for batch in (one, two)] == [drawn[1, 5, 1], drawn[1, 5, 0]]


def test_an_example_is_measured_at_its_longest(tmp_path: Path) -> None:
    reader = indexed(written(tmp_path, role()), tmp_path, variations=str(prompts(tmp_path, 2)))
    longest = max(len(read(reader, 0, step, 0, [0]).input_ids) for step in range(120))
    assert reader.index.tokens.tolist() == [longest]


def test_a_missing_clip_is_quarantined_and_never_silence(tmp_path: Path) -> None:
    path = written(tmp_path, role(0), role(1))
    (tmp_path / "wav" / "1.wav").unlink()
    reader = indexed(path, tmp_path)
    assert len(reader.index) == 1
    (lost,) = reader.index.rejected
    assert lost.id == "r1" and "1.wav" in lost.reason


@pytest.mark.parametrize("split", ["train", "eval"])
def test_what_cannot_be_used_is_named_once_by_the_line_of_its_file(
    tmp_path: Path, split: str
) -> None:
    lost, unheard, unrated = role(2), {**role(3), "wav_path": "wav/none.wav"}, role(4)
    del lost["wav_path"]
    unrated["annotations"] = {}
    path = written(tmp_path, role(0), role(1), lost, unheard, unrated, arche(5, audio_quality=[9]))
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # a line that is empty
    encoder = make_encoder(Model(**AUDIO), Data(), tmp_path)
    index = build_index([Source(path=str(path))], split, encoder, tmp_path / "index")
    assert len(index) == (2 if split == "train" else 2 * len(FIELDS))
    found = {one.id: one.reason.partition(": ") for one in index.rejected}
    assert len(index.rejected) == len(found)
    places = {id_: place for id_, (place, _, _) in found.items()}
    assert places == {
        id_: f"drama.jsonl line {line}"
        for id_, line in (("r2", 4), ("r3", 5), ("r4", 6), ("a5", 7))
    }
    assert all("drama.jsonl" not in reason for _, _, reason in found.values())
    assert index.where(0) == f"{path}:1" and index.where(len(index) - 1) == f"{path}:3"


def test_an_empty_field_is_told_as_such(tmp_path: Path) -> None:
    (example,) = examples(written(tmp_path, role() | {"char_profile": " ", "local_scene": ""}))
    told = "Global Profile: N/A, Local Scene: N/A, Available Traits: Calm, Dry\n\n"
    assert example.instruction is not None and told in example.instruction


# -- files that say how ----------------------------------------------------------------------------


def test_rubrics_can_be_replaced(tmp_path: Path) -> None:
    own = Path(rubric.__file__).parent / "rubrics" / "role.yaml"
    content = yaml.safe_load(own.read_text(encoding="utf-8"))
    content["dimensions"] = {
        "warmth": {
            "field": "warm",
            "means": "how warm it sounds",
            "anchors": {n: f"warm {n}" for n in range(1, 8)},
            "scale": [1, 7],
        }
    }
    content["context"] = "Age: {char_age}"
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    (example,) = examples(written(tmp_path, role(warm=[7, 6, None])), rubrics=str(file))
    assert "Dimension: warmth - how warm it sounds\n7: warm 7" in example.instruction
    assert "Age: Adult" in example.instruction
    assert {answer for _, answer in answers(example)} == {f"<answer>{n}</answer>" for n in (6, 7)}


def warm(**more: Any) -> dict[str, Any]:
    """A dimension of two ratings."""
    return {"means": "warm", "scale": [1, 2], "anchors": {1: "no", 2: "yes"}, **more}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"one": "{context}"}, "one has no {rubric}"),
        ({"header": ""}, "no rubrics, for it has no header"),
        ({"scale": [1, 10]}, "scale is [1, 10], expected two digits"),
        ({"dimensions": {"warmth": {"field": "warm"}}}, "dimensions.warmth: has no rubric"),
        (
            {"dimensions": {"warmth": {"means": "warm", "anchors": {1: "cold"}}}},
            "dimensions.warmth: anchors of 1 to 5 are needed, found 1",
        ),
        ({"one": 5}, "one is 5, expected a text"),
        ({"header_long": "x"}, "header_long: nothing reads this"),
        ({"dimensions": {"warm": warm(anchors={1: "no", 2: None})}}, "anchors.2 says nothing"),
        ({"dimensions": {"warm": warm(lable="Warm")}}, "dimensions.warm: lable: expected field,"),
        ({"dimensions": {"a/b": warm()}}, "dimensions.a/b: name it in letters"),
        ({"dimensions": {1: warm()}}, "dimensions.1: name it in letters"),
        ({"dimensions": {"overall": warm()}}, "dimensions.overall: name it in letters"),
        ({"dimensions": {"a": warm(label="X"), "b": warm(label="X")}}, "have the label X"),
        ({"dimensions": {"a": warm(field="f"), "b": warm(field="f")}}, "have the field f"),
    ],
)
def test_rubrics_that_are_none_are_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    own = Path(rubric.__file__).parent / "rubrics" / "role.yaml"
    content = yaml.safe_load(own.read_text(encoding="utf-8")) | change
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as found:
        located(written(tmp_path, role()), rubrics=str(file))
    assert named in str(found.value) and "\n" not in str(found.value)


def test_a_dimension_without_a_rubric_or_a_wording_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, role())
    with pytest.raises(UserError, match=r"'pitch_dynamic' has no rubric .did you mean pitch_dyn"):
        located(path, dimensions=["pitch_dynamic"])
    file = prompts(tmp_path, fields=LABELS[1:])
    with pytest.raises(UserError, match=r"prompts.json: has no prompt for pitch_dynamics"):
        located(path, variations=str(file))
    (example,) = examples(path, variations=str(file), dimensions=["trait_embodiment"])
    assert "rate TraitEmbodiment" in example.instruction
    with pytest.raises(UserError, match=r"judging.variations: RoleVariation is asked in wordings"):
        located(path, dataset="RoleVariation")
    file.write_text('{"variations": {}}')
    with pytest.raises(UserError, match=r"no variations: expected variations.dimension_prompts"):
        located(path, variations=str(file))


def test_rubrics_that_change_under_a_run_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    shutil.copy(Path(rubric.__file__).parent / "rubrics" / "role.yaml", file)
    reader = indexed(written(tmp_path, role()), tmp_path, rubrics=str(file))
    first = reader.index.hash
    read(reader, 0, 1, 0, [0])
    file.write_text(file.read_text().replace("You judge acted speech.", "You listen."))
    rubric.rubrics.cache_clear()  # as in a process that starts
    with pytest.raises(UserError, match=r"mine.yaml has changed since the data"):
        read(reader, 0, 1, 0, [0])
    changed = indexed(tmp_path / "drama.jsonl", tmp_path, rubrics=str(file))
    assert changed.index.hash != first


@pytest.mark.parametrize(
    "given",
    [
        {"dimensions": []},
        {"dataset": "AVQA", "dimensions": ["pitch_dynamics"]},
        {"dataset": "AVQA", "rubrics": "mine.yaml"},
        {"dataset": "RoleAllFixOrder", "variations": "prompts.json"},
    ],
)
def test_keys_that_nothing_would_read_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=[*given][-1]):
        Judging.model_validate(given)


def test_judging_is_read_by_its_format_alone(tmp_path: Path) -> None:
    path = tmp_path / "asr.jsonl"
    path.write_text(json.dumps({"task_type": "asr", "wav_path": "a.wav", "text": "hello"}) + "\n")
    with pytest.raises(UserError, match=r"judging: format ming_jsonl does not read it; drama do"):
        sources.resolve(Source(path=str(path), judging=Judging()), "train")


def test_a_text_model_has_to_have_units(tmp_path: Path) -> None:
    encoder = make_encoder(Model(**CAUSAL), Data(), tmp_path)
    with pytest.raises(UserError):
        build_index([Source(path=str(written(tmp_path, role())))], "train", encoder, tmp_path / "i")
