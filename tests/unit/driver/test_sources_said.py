"""How often sources are seen is said before a run; weights that look like sizes are explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.config import Config, load_config
from raysft.driver import preview
from raysft.driver.preflight import prepare
from raysft.errors import UserError
from tests.support.indexes import clip
from tests.support.models import AUDIO, CAUSAL


def config(folder: Path, more: dict[str, Any] | None = None, **sources: dict[str, Any]) -> Config:
    """Of a source of each name, as long as its `count` says."""
    train = []
    for name, settings in sources.items():
        count = settings.pop("count")
        items = [
            {"id": f"{name}{n}", "instruction": "repeat", "input": "a b", "output": "a b"}
            for n in range(count)
        ]
        (folder / f"{name}.json").write_text(json.dumps(items))
        train.append({"path": str(folder / f"{name}.json"), **settings})
    tree = {
        "run": {"name": "run", "storage_path": str(folder / "runs")},
        "data": {"train": train, "lanes": 2, "tokens_per_batch": 300, **(more or {})},
        "model": {**CAUSAL, "tokenizer": "bytes"},
        "train": {"max_steps": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return load_config(folder / "config.yaml")


def said(of: Config) -> list[str]:
    lines = preview.dry_run(of).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("sources"))
    return [line[16:] for line in lines[at : at + 2]]


def test_a_dry_run_says_how_often_sources_are_seen(tmp_path: Path) -> None:
    sources = {"large": {"count": 400}, "small": {"count": 100}}
    plain = config(tmp_path, large={"count": 400}, small={"count": 100, "weight": 2.0})
    assert said(plain) == [
        "large: 400 examples, seen 1 times an epoch, 66.7% of it",
        "small: 100 examples, seen 2 times an epoch, 33.3% of it",
    ]
    # A plain number: 400^(1/2) to 100^(1/2).
    warm = config(tmp_path, {"temperature": 2}, **{k: dict(v) for k, v in sources.items()})
    assert said(warm) == [
        "large: 400 examples, seen 1 times an epoch, 66.7% of it",
        "small: 100 examples, seen 2 times an epoch, 33.3% of it",
    ]
    capped = config(tmp_path, large={"count": 400, "max_examples": 50}, small={"count": 100})
    assert said(capped) == [
        "large: 400 examples, seen 0.125 times an epoch, 33.3% of it",
        "small: 100 examples, seen 1 times an epoch, 66.7% of it",
    ]
    mix = {"mix": {"large": 0.5, "small": 0.5}}
    mixed = config(tmp_path, mix, **{k: dict(v) for k, v in sources.items()})
    assert said(mixed)[1] == (
        "small: 100 examples, seen 1 times a pass of its share of data.mix, 100.0% of it"
    )


def spoken(folder: Path, temperature: dict[str, Any], **data: Any) -> Config:
    """Of clips of 0.2 s in two languages, and in none."""
    clip(folder / "a.wav", 0.2)
    langs = ["de"] * 16 + ["sw"] * 4 + [""]
    rows = [f"a.wav\tab\t{lang}" for lang in langs]
    source = str(folder / "spoken.tsv")
    Path(source).write_text("\n".join(["path\tsentence\tlocale", *rows]))
    tree = {
        "run": {"name": "run", "storage_path": str(folder / "runs")},
        "data": {"train": [source], "lanes": 2, "temperature": temperature, **data},
        "model": AUDIO,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return load_config(folder / "config.yaml")


def test_a_dry_run_says_how_often_languages_are_seen(tmp_path: Path) -> None:
    only = {"mix": {"asr": 1.0}}
    for data, of in (({}, "an epoch"), (only, "a pass of its share of data.mix")):
        given = spoken(tmp_path, {"T": 2, "by": "lang"}, **data)
        lines = preview.dry_run(given).splitlines()
        at = next(n for n, line in enumerate(lines) if line.startswith("languages"))
        assert [line[16:] for line in lines[at : at + 3]] == [
            f"none named: 1 example, seen 4 times {of}, 14.3% of it",
            f"de: 16 examples, seen 1 times {of}, 57.1% of it",
            f"sw: 4 examples, seen 2 times {of}, 28.6% of it",
        ]
        assert lines[at + 3].startswith("steps")
    plain = preview.dry_run(spoken(tmp_path, {"T": 2}))
    assert "languages" not in plain


def test_weights_that_are_the_sizes_are_explained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = config(tmp_path, large={"count": 40, "weight": 4.0}, small={"count": 10, "weight": 1.0})
    for name in ("run", "run2"):
        (tmp_path / name).mkdir()
    prepare(given, tmp_path / "run")
    assert "the weights 4, 1 are as the sources' numbers of examples are" in caplog.text
    assert "sources would be 94%, 6% of what is seen" in caplog.text
    caplog.clear()
    other = config(tmp_path, large={"count": 40, "weight": 1.0}, small={"count": 10, "weight": 4.0})
    prepare(other, tmp_path / "run2")
    assert "weights" not in caplog.text


def test_a_temperature_by_task_beside_a_mix_is_refused(tmp_path: Path) -> None:
    more = {"temperature": {"T": 2.0, "by": "task"}, "mix": {"asr": 1.0}}
    with pytest.raises(UserError, match=r"data.temperature.by: task beside data.mix"):
        config(tmp_path, more, one={"count": 3})
    with pytest.raises(UserError, match=r"data.temperature.T: "):
        config(tmp_path, {"temperature": 0.5}, one={"count": 3})
