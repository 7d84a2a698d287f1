"""What an answer earns, and what rewards are told."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from raysft.data.example import Example
from raysft.data.facts import Facts, Part, facts_of
from raysft.data.judged import Dimension, Judged
from raysft.objectives.rewards import accuracy, form, rating
from raysft.scorers.rated import Rated


@pytest.mark.parametrize(
    ("answer", "right", "earned"),
    [
        ("<answer>4</answer>", "<answer>4</answer>", 1.0),
        ("it is\n<answer> 4.0\n</answer>, surely", "<answer>4</answer>", 1.0),
        ("<answer>5</answer>", "<answer>4</answer>", 0.0),
        ("4", "<answer>4</answer>", 0.0),
        ("<answer>4", "<answer>4</answer>", 0.0),
        ("<answer>the dog</answer>", "<answer>the dog</answer>", 1.0),
        ("Paris ", "Paris", 1.0),
        ("paris", "Paris", 0.0),
        ("anything", None, 0.0),
    ],
)
def test_accuracy(answer: str, right: str | None, earned: float) -> None:
    assert accuracy(answer, Facts("a", "chat", right)) == earned


@pytest.mark.parametrize(
    ("answer", "earned"),
    [
        ("<answer>4</answer>", 1.0),
        ("<answer>\nseveral\nlines</answer>\n", 1.0),
        ("so: <answer>4</answer>", 0.0),
        ("<answer>4", 0.0),
        ("", 0.0),
    ],
)
def test_format(answer: str, earned: float) -> None:
    assert form(answer, Facts("a", "chat")) == earned


@pytest.mark.parametrize(
    ("answer", "ratings", "right", "earned"),
    [
        ("<answer>4</answer>", (4.0, 5.0), None, -0.5),
        ("<answer>about 2, or 3</answer>", (4.0, 5.0), None, -2.5),
        ("<answer>900</answer>", (4.0, 5.0), None, -4.0),
        ("4", (4.0, 5.0), None, -4.0),
        ("<answer>good</answer>", (4.0, 5.0), None, -4.0),
        ("<answer>3</answer>", (), "<think>loud</think><answer>4</answer>", -1.0),
        ("<answer>3</answer>", (), "loud", 0.0),
    ],
)
def test_a_rating_earns_minus_its_distance_from_the_raters_mean(
    answer: str, ratings: tuple[float, ...], right: str | None, earned: float
) -> None:
    assert rating(answer, Facts("a", "chat", right, ratings)) == earned


def test_facts_travel_as_bytes() -> None:
    facts = Facts("ein Fall", "chat", "Größe „4“", (3.0, 4.5), 0, 10)
    assert Facts.unpacked(facts.packed()) == facts
    example = Example("e", "chat", ("how loud?",), ("<answer>", "4</answer>"))
    assert facts_of(example, example) == Facts("e", "chat", "<answer>4</answer>")


def test_a_drawn_dimension_is_held_against_its_own_raters() -> None:
    given = {"pitch": (2, 5), "rhythm": (1, 1, 3)}
    dimensions = tuple(
        Dimension(Rated("o", "role", name, name, ratings), name, (f"how is {name}?",), "", ratings)
        for name, ratings in given.items()
    )
    judged = Judged(dimensions, before="Listen. ", after=" Answer.")
    example = Example("e", "chat", (), ("<answer>4</answer>",), "how is pitch?", judged=judged)
    asked = set()
    for seed in range(20):
        form = example.drawn(np.random.default_rng(seed))
        (name,) = (name for name in given if name in (form.instruction or ""))
        facts = facts_of(example, form)
        assert facts.ratings == given[name] and facts.rated == statistics.fmean(given[name])
        asked.add(name)
    assert asked == given.keys()


@pytest.mark.parametrize(
    ("answer", "earned"),
    [
        ("<answer>[Pitch]4[Rhythm]1</answer>", (-0.5, 0.0)),
        ("<answer>[Rhythm]0[Pitch] is 4</answer>", (-0.5, -1.0)),  # in any order
        ("<answer>[Pitch]5[Other]1</answer>", (-0.5, -1.0)),  # one is missing: its whole scale
        ("<answer>[Pitch][Rhythm]1</answer>", (-4.0, 0.0)),
        ("<answer>[Pitch]" + 5000 * "9" + "[Rhythm]1</answer>", (-4.0, 0.0)),
        ("<answer>4 and 1</answer>", (-4.0, -1.0)),
        ("[Pitch]4[Rhythm]1", (-4.0, -1.0)),
        ("", (-4.0, -1.0)),
    ],
)
def test_an_answer_of_several_dimensions_earns_the_mean(
    answer: str, earned: tuple[float, float]
) -> None:
    parts = (Part("Pitch", (4.0, 5.0)), Part("Rhythm", (1.0,), 0, 1))
    facts = Facts("a", "rating", parts=parts)
    assert rating(answer, facts) == pytest.approx(sum(earned) / 2)
    assert Facts.unpacked(facts.packed()) == facts


@pytest.mark.parametrize("together", [True, False])
def test_all_dimensions_that_are_asked_about_are_held_against_their_raters(together: bool) -> None:
    given = {"A": (1, 2, None), "B": (3, None, None), "C": (5, 4, None)}
    dimensions = tuple(
        Dimension(
            Rated("o", "role", name, name, tuple(r for r in ratings if r is not None), label=name),
            name,
            ("unread",),
            f"how is {name}?",
            ratings,
        )
        for name, ratings in given.items()
    )
    judged = Judged(dimensions, "", "", header="Rate each.", free=True, together=together)
    example = Example("e", "rating", (), ("",), "Rate each.", judged=judged)
    for seed in range(20):
        form = example.drawn(np.random.default_rng(seed))
        facts = facts_of(example, form)
        assert [(part.label, part.ratings) for part in facts.parts] == [
            (name, tuple(float(r) for r in given[name] if r is not None)) for name in "ABC"
        ]
        worst = [max(mean - 1, 5 - mean) for mean in (1.5, 3.0, 4.5)]
        assert -sum(worst) / 3 <= rating(form.text or "", facts) <= 0
    assert facts.ratings == ()


def test_a_dimension_that_the_drawn_rater_left_out_is_not_missing() -> None:
    ratings = {"A": (1, 2, 3), "B": (None, 3, 4), "C": (5, None, None)}
    dimensions = tuple(
        Dimension(
            Rated("o", "role", name, name, tuple(r for r in own if r is not None), label=name),
            name,
            ("unread",),
            f"how is {name}?",
            own,
        )
        for name, own in ratings.items()
    )
    judged = Judged(dimensions, "", "", header="Rate each.", together=True)
    example = Example("e", "rating", (), ("",), "Rate each.", judged=judged)
    found = set()
    for seed in range(20):
        form = example.drawn(np.random.default_rng(seed))
        facts = facts_of(example, form)
        labels = "".join(part.label for part in facts.parts)
        assert all((f"[{name}]" in (form.text or "")) == (name in labels) for name in ratings)
        found.add(labels)
    assert found == {"AB", "AC"}
