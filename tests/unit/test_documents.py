"""What the pages show is so: configs are valid, data is read, code runs, and what they name is
there."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.config import load_config
from raysft.config.reference import entries
from raysft.config.schema import Source
from raysft.data import sources
from raysft.plugins import GROUPS
from tests.support import documents
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
    for name in tree.pop("plugins", ()):  # modules of the page itself
        assert f"# {name}.py\n" in text_of(block.page)
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


# -- code ----------------------------------------------------------------------------------------

RUN = """
import json, sys
sys.path.insert(0, "")
for where, text in json.load(sys.stdin):
    exec(compile(text, where, "exec"), {"__name__": "page"})
"""
HERE = ("CONTRIBUTING.md", "docs/extending.md")  # in one process: their names differ
TUTORIAL, LIBRARY = "docs/tutorial.md", "docs/library.md"


def test_modules_and_snippets_run(tmp_path: Path) -> None:
    """Of pages whose code needs no run; a block that begins with `# NAME.py` is that module."""
    rest = []
    for block in (block for page in HERE for block in blocks(page, "python")):
        if name := documents.file_of(block):
            (tmp_path / name).write_text(block.text)
        else:
            rest.append((str(block), block.text))
    command = [sys.executable, "-W", "ignore", "-c", RUN]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=paths, input=json.dumps(rest), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_tutorial_makes_data_that_its_config_reads(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    found = blocks(TUTORIAL)
    before = found[: [block.language for block in found].index("sh")]
    with contextlib.chdir(tmp_path):
        for block in before:
            if block.language == "python":
                exec(compile(block.text, str(block), "exec"), {})
            elif name := documents.file_of(block):
                (tmp_path / name).write_text(block.text)
        config = load_config("mine.yaml")
    counts = []
    for split, given in (("train", config.data.train), ("eval", config.data.eval)):
        (source,) = sources.resolve_all(given, split)
        items = list(sources.scan(source, source.files[0]))
        assert not [item.error for item in items if item.error]
        counts.append(len(items))
    assert counts == [2280, 120]


def test_all_python_is_run_by_a_test() -> None:
    run = {
        *HERE,
        TUTORIAL,
        "README.md",
        "docs/evaluation.md",
        LIBRARY,
        "docs/moe.md",
        "docs/audio.md",
    }  # the last six: test_readme, test_mixture_runs, and test_augment_recordings
    for page in pages():
        assert page in run or not blocks(page, "python"), page


# -- what is named is there ----------------------------------------------------------------------

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
    for name in set(_DOTTED.findall(text)) - GROUPS.keys():
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


def test_messages_that_are_explained_are_those_that_are_said() -> None:
    said = [text for path in sorted((ROOT / "raysft").rglob("*.py")) for text in _texts(path)]
    rows = re.findall(r"^\| (`[^`]+`) \| ", text_of("docs/troubleshooting.md"), re.M)
    assert len(rows) > 20
    lost = []
    for row in rows:
        parts = [re.escape(part) for part in row.strip("`").split("…")]
        wanted = re.compile(".*".join(parts), re.S)
        if not any(wanted.search(text) for text in said):
            lost.append(row)
    assert not lost, ", ".join(lost)


def _texts(path: Path) -> list[str]:
    """The texts of a module, `…` for what is put into them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
            found.append("".join(map(str, parts)))
    return found


# -- what is made --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> Any:
    """docs/tables.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_is_on_a_page_and_every_place_for_one_is_filled(tables: Any) -> None:
    shown = [
        name for page in pages() for name in re.findall(r"^<!-- made: (\w+)", text_of(page), re.M)
    ]
    assert sorted(shown) == sorted(tables.MADE)
    for page in pages():
        made = tables.made(text_of(page))
        assert "<!-- made" not in made
        for line in re.findall(r"^\|.*$", made, re.M):
            assert line.endswith("|"), f"{page}: {line}"


def test_the_reference_has_every_key_with_its_rule(tables: Any) -> None:
    made = tables.keys()
    for entry in entries():
        assert entry.kind is None or made.count(f"| `{entry.key}` |") == 1, entry.key
    assert "| `data.lanes` | int | `8` | virtual data-parallel ranks" in made
    for key, rule in (("data.lanes", "no"), ("data.eval[].path", "yes"), ("data.mix", "with")):
        assert re.search(rf"^\| `{re.escape(key)}` .* \| {rule}[^|]*\|$", made, re.M)


def test_the_matrix_says_what_a_config_is_told(tables: Any) -> None:
    every = tables.features()
    by_name = {feature.value: feature for feature in every if isinstance(feature.given, str)}
    assert tables.pair(by_name["ddp"], by_name["qlora"]) is None
    assert "cannot shard" in tables.pair(by_name["zero3"], by_name["qlora"])
    assert "packed row" in tables.pair(by_name["prefix"], by_name["packed"])
    assert tables.pair(by_name["prefix"], by_name["padded"]) is None
    assert tables.pair(by_name["optimizer"], by_name["adamw8bit"]) == "no strategy takes both"
    for one, other in itertools.combinations(every, 2):
        if one.key != other.key:
            assert tables.pair(one, other) == tables.pair(other, one)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    for page in pages():
        if page.startswith("docs/"):
            assert f"- {page.removeprefix('docs/')}\n" in text, page
