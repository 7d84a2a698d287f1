"""What the pages show is so: configs are valid, data is read, code runs, and what they name is
there."""

from __future__ import annotations

import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.config import load_config
from raysft.config.schema import Source
from raysft.data import sources
from tests.support.documents import ROOT, Block, blocks, pages, text_of
from tests.unit.test_house import DATA, ROOMS

SHOWN = ("sh", "python", "yaml", "json", "console", "text")
BASE: dict[str, Any] = {"data": {"train": ["train.jsonl"]}, "model": {"path": "owner/model"}}


def of(language: str) -> list[Any]:
    """Every block of all pages in that language, as parameters."""
    found = [block for page in pages() for block in blocks(page, language)]
    assert found
    return [pytest.param(block, id=str(block)) for block in found]


def test_every_block_says_what_it_is() -> None:
    unknown = [b for page in pages() for b in blocks(page) if b.language not in SHOWN]
    assert not unknown, ", ".join(f"{block} ({block.language!r})" for block in unknown)


@pytest.mark.parametrize("block", of("yaml"))
def test_configs_are_valid_with_a_source_and_a_model(block: Block, tmp_path: Path) -> None:
    tree = yaml.safe_load(block.text)
    for section, keys in BASE.items():
        if section != "model" or not {"path", "config"} & set(tree.get("model", {})):
            tree[section] = {**keys, **tree.get(section, {})}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    found = load_config(path).model
    assert (found.path or found.config) == (tree["model"].get("path") or tree["model"]["config"])


@pytest.mark.parametrize("block", of("json"))
def test_records_are_read(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(json.loads(x)) + "\n" for x in block.text.splitlines()))
    source = sources.resolve(Source(path=str(path)), "train")
    found = list(sources.scan(source, path))
    assert len(found) == len(block.text.splitlines())
    assert not [item.error for item in found if item.error]


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(page)):
        there = target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists()
        assert there, f"{page}: {target}"


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 150


# A path of the repository, alone or in a command; `a/{b,c}.py` and `NAME` are no paths.
_PATH = re.compile(
    r"(?<![\w/.:-])((?:raysft|tests|jobs|benchmarks|cluster|docs)/[\w./-]*[\w/]|examples/\w[\w./-]*)"
)
_DOTTED = re.compile(r"(?<![\w./-])raysft(?:\.\w+)+")


@pytest.mark.parametrize("page", pages())
def test_paths_and_modules_that_are_named_are_there(page: str) -> None:
    text = text_of(page)
    if page == "docs/models.md":  # written by a test of its own
        text = text[: text.index("| model type")]
    lost = [path for path in _PATH.findall(text) if not _there(path)]
    for name in _DOTTED.findall(text):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            lost.append(name)
    assert not lost, f"{page}: {', '.join(lost)}"


def _there(path: str) -> bool:
    return any((ROOT / each).exists() for each in (path, f"{path}.py"))


def test_architecture_is_short_and_names_every_room() -> None:
    text = text_of("ARCHITECTURE.md")
    assert len(text.splitlines()) <= 150
    for name in ROOMS:
        assert not name or f"`{name}`" in text or f"`{name}/`" in text, name
    for name in DATA:
        assert f"`data/{name}/`" in text
