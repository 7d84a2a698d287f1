"""The house rules, read from the imports: who may import whom, and where Ray and torch may be.

Rooms are in order: a module imports from its own room and from those before it, in functions and
for types too. ARCHITECTURE.md says what is in which.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "raysft"

# From the bottom up. A folder, or a module beside them; "" is the package itself.
ROOMS = (
    *("json_types", "errors", "remarks", "environment", "", "offered"),
    *("paths", "stores", "patience", "failures", "hub", "plugins", "preload", "preloaded"),
    *("scorers", "config", "data", "losses", "parallel", "models", "adapters", "families"),
    *(
        "run",
        "loggers",
        "train",
        "evaluate",
        "objectives",
        "worker",
        "export",
        "transcribe",
        "synthesis",
        "hearing",
        "reread",
        "cli",
        "progress",
        "audit",
        "report",
        "page",
        "sweep",
    ),
    *("driver", "prepare", "library", "command"),
)
OFFERED = ("raysft", "raysft.library")  # for type checkers alone: what it gives is loaded by name
DATA = ("clips", "sources", "encode", "index", "plan", "read")  # in data/, after its own modules
RAY = (
    "raysft.driver.",
    "raysft.data.read.stream",
    "raysft.data.index.fan_out",
    "raysft.prepare.run",
)
WITHOUT_TORCH = ("raysft.config", "raysft.scorers", "raysft.run", "raysft.families")
LINES = 500
ANY = 100

Import = tuple[str, str]  # importing module, imported module


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name of what is imported, whether when the module itself is), ours and others'."""

    def walk(node: ast.AST, now: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}: a relative import"
                for alias in child.names:
                    yield f"{child.module}.{alias.name}", now
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, now
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, now and not later and not types)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def module_of(name: str) -> str:
    """The module of ours that a dotted name is, or is in."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def edges(only_now: bool = False) -> list[Import]:
    return sorted(
        {
            (module, module_of(name))
            for module, path in MODULES.items()
            for name, now in imports_of(path)
            if name.split(".")[0] == "raysft" and (now or not only_now)
        }
    )


def room(module: str) -> str:
    return module.removeprefix("raysft").lstrip(".").split(".")[0]


def test_every_module_is_in_a_room() -> None:
    assert {room(module) for module in MODULES} == set(ROOMS)


def test_nothing_imports_upward() -> None:
    up = [
        f"{one} imports {other}"
        for one, other in edges()
        if ROOMS.index(room(one)) < ROOMS.index(room(other)) and (one, other) != OFFERED
    ]
    assert up == []


def test_nor_does_anything_in_data() -> None:
    def floor(module: str) -> int:
        name = module.split(".")[2] if module.count(".") > 1 else ""
        return DATA.index(name) + 1 if name in DATA else 0

    inside = [edge for edge in edges() if all(room(module) == "data" for module in edge)]
    assert [edge for edge in inside if floor(edge[0]) < floor(edge[1])] == []


def test_there_is_no_circle() -> None:
    """None that an import could meet: of what modules import when they are imported."""
    after: dict[str, set[str]] = {module: set() for module in MODULES}
    for one, other in edges(only_now=True):
        if one != other:
            after[one].add(other)
    while after:
        free = [module for module, needs in after.items() if not needs & after.keys()]
        assert free, f"a circle among {sorted(after)}"
        for module in free:
            del after[module]


def library(name: str) -> str:
    return name.split(".")[0]


def test_ray_is_where_it_is_named() -> None:
    found = {m for m, p in MODULES.items() for name, _ in imports_of(p) if library(name) == "ray"}
    assert [module for module in sorted(found) if not module.startswith(RAY)] == []


def test_what_a_start_reads_first_takes_no_torch() -> None:
    """A config and the tables are read by a driver that may have no time, or no torch, to load."""
    rows = [m for m in MODULES if m.startswith(WITHOUT_TORCH) and m.count(".") < 3]
    heavy = {"torch", "transformers", "peft", "deepspeed", "torchaudio"}
    wrong = [
        (module, name)
        for module in rows
        for name, now in imports_of(MODULES[module])
        if library(name) in heavy and (now or module.startswith("raysft.config"))
        if not module.endswith(".model")
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", ["raysft", "jobs", "tests", "benchmarks", "examples"])
def test_files_are_short_and_named_for_what_they_do(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py") if "runs" not in path.parts]
    most = 80 if folder == "jobs" else LINES
    long = [str(p) for p in files if len(p.read_text(encoding="utf-8").splitlines()) > most]
    assert long == []
    assert [str(path) for path in files if path.stem in ("utils", "util", "helpers", "misc")] == []


def test_types_are_said() -> None:
    """`make lint` checks types; of what is Any it checks nothing."""
    texts = [path.read_text(encoding="utf-8") for path in MODULES.values()]
    assert sum(len(re.findall(r"\bAny\b", text)) for text in texts) < ANY
    assert (PACKAGE / "py.typed").is_file()
