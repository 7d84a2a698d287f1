"""Every key says what a run that goes on may do with it."""

from __future__ import annotations

import pytest

from raysft.config.marks import Fixed, Free, Resume
from raysft.config.overrides import is_section, section_of
from raysft.config.resume import keys_with, rule_of, rules
from raysft.config.schema import Config
from raysft.config.section import Section


def without_one_rule(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Keys that have no rule, or more than one. A section that is always there needs none."""
    found = []
    for name, field in section.model_fields.items():
        marks = [item for item in field.metadata if isinstance(item, Resume)]
        if len(marks) != (0 if is_section(field.annotation) else 1):
            found.append(prefix + name)
        inner = section_of(field.annotation)
        if inner is not None and not str(field.annotation).startswith("list"):
            found += without_one_rule(inner, f"{prefix}{name}.")
    return found


def test_every_key_has_one_rule() -> None:
    assert without_one_rule() == [], "say with Free, Fixed, ... of marks.py what a run may change"


def test_a_key_without_a_rule_or_with_two_is_named() -> None:
    class Inner(Section):
        new: int = 0
        both: Free[Fixed[int]] = 0

    class Outer(Section):
        inner: Inner = Inner()
        known: Free[int] = 0

    assert without_one_rule(Outer) == ["inner.new", "inner.both"]


def test_what_lies_below_a_key_follows_its_rule() -> None:
    assert rule_of("data.mix.asr") == rule_of("data.mix") == Resume("data")
    assert rule_of("model.config.hidden_size") == Resume("fixed", weights=True)
    assert rule_of("data.speech_tokens").rule == rule_of("data.speech_tokens.stack").rule == "fixed"
    with pytest.raises(KeyError, match=r"data\.none"):
        rule_of("data.none")


def test_rules_that_are_not_free_or_fixed_have_few_keys() -> None:
    temperature = ["data.temperature", "data.temperature.T", "data.temperature.by"]
    assert keys_with("data") == ["data.train", "data.mix", *temperature]
    assert keys_with("length") == ["train.max_steps", "train.epochs"]
    assert keys_with("base") == ["model.path"]
    assert {key.partition(".")[0] for key, mark in rules().items() if mark.weights} == {
        "model",
        "peft",
    }
