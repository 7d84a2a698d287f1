"""Overrides: what was typed is what is used, or it is refused in one line."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest
import yaml

from raysft.config import load_config, to_yaml
from raysft.config.load import all_keys
from raysft.config.overrides import Loader, read_value
from raysft.errors import UserError

TYPED = (
    "my run #1",
    "#1",
    "a: b",
    "{x}",
    "[x]",
    "it's",
    '"quoted" twice"',
    "- x",
    "*star",
    "&and",
    "!bang",
    "%x",
    "@x",
    "`x`",
    "| x",
    "> x",
    "? x",
    "a, b",
    "2024",
    "1e-4",
    "2024-01-01",
    "12:30",
    "0x10",
    "yes",
    "no",
    "true",
    "null and void",
    "~x",
    "größe 你好 🎧",
    "back\\slash",
    "a=b",
    "--dash",
    " leading",
    "trailing ",
    "$",
    "100%",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "a.yaml"
    file.write_text("data: {train: [t.jsonl]}\nmodel: {path: base}\n")
    return file


@pytest.mark.parametrize("typed", TYPED)
def test_a_text_is_used_as_it_was_typed(path: Path, tmp_path: Path, typed: str) -> None:
    config = load_config(
        path,
        [
            f"run.name={typed}",
            f"run.storage_path={tmp_path}/{typed}",
            f"data.prompts.asr={typed}",
            f"data.train.0={tmp_path}/{typed}",
        ],
    )
    assert config.run.name == typed
    assert config.run.storage_path == f"{tmp_path}/{typed}"
    assert config.data.prompts["asr"] == typed
    assert config.data.train[0].path == f"{tmp_path}/{typed}"
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.name='a #1'", "a #1"),
        ('run.name="a\\tb: c"', "a\tb: c"),
        ("run.name='it''s'", "it's"),
        ("data.index_path=null", None),
        ("data.index_path=", None),
        ("data.train.0.task=~", None),
        ("data.silence_db=null", None),
        ("run.seed=010", 10),
        ("run.seed=0x10", 16),
        ("run.seed=1_000", 1000),
        ("optim.lr=1e-4", 1e-4),
        ("optim.lr=2", 2),
        ("train.compile=true", True),
        ("data.tokens_per_batch=auto", "auto"),
        ("data.tokens_per_batch=90", 90),
        ("parallel.workers=[1, 2]", [1, 2]),
        ("data.mix={asr: 0.5, tts: 0.5}", {"asr": 0.5, "tts": 0.5}),
        ("optim.betas=[0.9, 0.98]", [0.9, 0.98]),
        ("peft.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("peft.target_modules=['a #1', \"b: c\"]", ["a #1", "b: c"]),
        ("peft.target_modules=.*(q|v)_proj # all", ".*(q|v)_proj # all"),
        ("peft.target_modules=*proj", "*proj"),
        ("model.config.rope_theta=1e6", 1e6),
        ("model.config.name=a #1", "a #1"),
        ("model.config.name=12:30", "12:30"),
        ("model.config.name=2024-01-01", "2024-01-01"),
        ("model.config.layers=[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_values_of_other_kinds_are_yaml(override: str, value: object) -> None:
    key, _, typed = override.partition("=")
    found = read_value(typed, key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lr=1e-4 #1", "optim.lr: expected a number greater than 0, found '1e-4 #1'"),
        ("parallel.workers=[1, 2] # two", "parallel.workers: YAML would drop '# two'; put texts"),
        ("data.train=[a #1.jsonl]", "data.train: not valid YAML"),
        ("data.train=[a,\nb #1\n]", "data.train: YAML would drop a comment"),
        ("data.train=[a] b", "data.train: "),
        ("data.mix={asr: 1} {tts: 1}", "data.mix: "),
        ("optim.betas=[0.9, 0.9", "optim.betas: not valid YAML"),
        ("data.mix={asr: 1, asr: 2}", "'asr' is given twice"),
        ("data.mix={[1]: 2}", "data.mix: "),
        ("model.config.x=!!python/object:os.system {}", "model.config.x: "),
        ("run.name=\udcff", "not valid UTF-8"),
        ("data.train.²=x", "'²' is none of its positions 0..0"),
        ("data.eval.0=x", "'0' is none of its positions (it is empty)"),
        ("run.name=a\nb", "is not a plain folder name"),
        ("run.name=", "run.name: '' is not a plain folder name"),
    ],
)
def test_what_would_be_cut_or_cannot_be_read_is_refused(
    path: Path, override: str, says: str
) -> None:
    path.write_text("data: {train: [t.jsonl], eval: []}\nmodel: {path: base}\n")
    with pytest.raises(UserError) as caught:
        load_config(path, [override])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ('data.train=["\\ud83d"]', "data.train.0"),
        ('data.train="\\ud83d"', "data.train"),
        ('data.train={path: "\\udc00"}', "data.train.path"),
        ('data.prompts={asr: "\\ud83d"}', "data.prompts.asr"),
        ('data.mix={"\\ud83d": "\\ud83d"}', "data.mix"),
        ('model.config={a: [b, {c: "x\\ud83d"}]}', "model.config.a.1.c"),
        ('run.name="\\ud83d"', "run.name"),
    ],
)
def test_half_a_character_is_refused_by_key_wherever_it_stands(
    path: Path, override: str, place: str
) -> None:
    path.write_text("data: {train: [t.jsonl]}\nmodel: {path: base}\n")
    says = "holds half a surrogate pair, not text"
    with pytest.raises(UserError, match=says) as caught:
        load_config(path, [override])
    assert str(caught.value).startswith(f"{place}: ")
    str(caught.value).encode()
    key, _, typed = override.partition("=")
    keys = key.split(".")
    text = f"{keys[0]}: {{{keys[1]}: {typed}}}\n"  # the same in a file
    path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {place}: ")


def test_texts_that_lead_back_into_themselves_are_looked_through_once() -> None:
    (found,) = read_value("[&a [*a, b]]", "model.config.x")
    assert found[0] is found


def test_an_override_reaches_into_a_single_source(path: Path) -> None:
    path.write_text("data: {train: t.jsonl}\nmodel: {path: base}\n")
    (source,) = load_config(path, ["data.train.0.task=tts"]).data.train
    assert (Path(source.path).name, source.task) == ("t.jsonl", "tts")


@pytest.mark.parametrize("count", [300, pytest.param(5_000, marks=pytest.mark.slow)])
def test_random_overrides_are_values_or_one_line_each(path: Path, count: int) -> None:
    """Never another exception, and what is accepted as a text is what was typed."""
    rng = random.Random(count)
    keys = [key.replace("[]", ".0") for key in all_keys()] + ["data.train", "a", "run", "model.x"]
    pieces = [*TYPED, *string.punctuation, "\n", "\t", "\0", " #", ": ", "[", "{", "[[" * 300]
    pieces += ["1", "9" * 500, "-", "null", ".inf", ".nan", "\x1b", "\ud800", "\u2028", "\ufeff"]
    lines = accepted = 0
    for _ in range(count):
        typed = "".join(rng.choice(pieces) for _ in range(rng.randrange(4)))
        key = rng.choice(keys) if rng.random() < 0.9 else "".join(rng.sample(pieces, 2))
        try:
            config = load_config(path, [f"{key}={typed}"])
        except UserError as error:
            lines += 1
            said = str(error)
            if ": 2 mistakes\n" not in said and ": 3 mistakes\n" not in said:
                assert "\n" not in said.strip(), said
            assert len(said) < 3000, said
        else:
            accepted += 1
            if key == "run.name":
                assert config.run.name == typed or typed[0] in "'\""
                path.with_name("again.yaml").write_text(to_yaml(config))
                assert load_config(path.with_name("again.yaml")) == config
    assert lines > count // 5
    assert accepted > count // 20


def test_the_yaml_of_a_file_has_no_numbers_of_another_base_and_no_dates() -> None:
    text = "[010, 1:30, 2024-01-01, 0o10, 1e3, .5, 1_000, yes, ~, -1.5E-3]"
    found = yaml.load(text, Loader=Loader)
    assert found == [10, "1:30", "2024-01-01", 8, 1000.0, 0.5, 1000, True, None, -0.0015]
