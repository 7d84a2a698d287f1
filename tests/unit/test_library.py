"""The library interface is light to import, and the command line names what was typed."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from raysft import command
from raysft.errors import UserError
from tests.support.parts import PARTS, TESTS, part_of
from tests.support.worlds import ROOT

CODE = """
import sys
from raysft import dry_run, evaluate, export, load_config, sweep, train, transcribe
assert not {"torch", "ray", "transformers"} & set(sys.modules)
from raysft import library
import raysft.train.loop, raysft.evaluate.run, raysft.export, raysft.transcribe.run
import raysft.sweep.table, raysft.report
from raysft import evaluate, export, report, sweep, train, transcribe  # modules of ours by now
called = []
for name in ("train", "sweep", "report", "evaluate", "export", "transcribe"):
    setattr(library, name, lambda *words, name=name, **more: called.append((name, words, more)))
train("config"); sweep("config"); report("run"); evaluate("run", step="best"); export("run", "out")
transcribe("run", [])
assert called == [
    ("train", ("config",), {}), ("sweep", ("config",), {}), ("report", ("run",), {}),
    ("evaluate", ("run",), {"step": "best"}), ("export", ("run", "out"), {}),
    ("transcribe", ("run", []), {}),
], called
"""


def test_the_interface_is_light_and_stays_what_it_is() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    import raysft

    with pytest.raises(AttributeError, match="module 'raysft' has no attribute 'trian'"):
        raysft.trian  # noqa: B018


def test_the_console_command_is_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert pkgutil.resolve_name(scripts["raysft"]) is command.run


@pytest.mark.parametrize("name", command.COMMANDS)
def test_a_usage_names_what_was_typed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as left:
            command.main([name, *words])
        assert left.value.code == code
        said = "".join(capsys.readouterr())
        assert f"raysft {name} " in said and "jobs/" not in said and "python" not in said


def test_an_unknown_command_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError, match=r"^exprot: unknown command; did you mean export\? \("):
        command.main(["exprot", "run"])
    with pytest.raises(UserError, match=r"^x: unknown command \(there are sft, sweep, evaluate, "):
        command.main(["x"])
    with pytest.raises(SystemExit) as left:
        command.main([])
    assert left.value.code == 2 and "raysft sft CONFIG" in capsys.readouterr().err


def test_every_part_of_the_tests_has_some() -> None:
    found = {part_of(path) for path in TESTS.rglob("test_*.py")}
    assert found == set(PARTS)
    assert part_of(Path(__file__)) == "rest"
