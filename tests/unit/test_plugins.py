"""What somebody has beside raysft is imported before its names are looked up, in every process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml

from raysft import plugins
from raysft.audit import audit
from raysft.config import families, load_config, losses, rewards, strategies
from raysft.config.resume import rule_of
from raysft.config.schema import Source
from raysft.data import sources
from raysft.data.facts import Facts
from raysft.data.index.fan_out import fan_out
from raysft.driver.preflight import check_export
from raysft.driver.session import _brought
from raysft.errors import UserError
from raysft.parallel import World
from raysft.run.folder import read_config, run_folder
from raysft.run.lines import read_lines
from raysft.scorers import scorers
from raysft.train.loop import train
from tests.conftest import tone
from tests.support import known
from tests.support.models import AUDIO, CAUSAL
from tests.support.outside_formats import write_rows
from tests.support.worlds import ROOT, start, tiny

PLUGINS = ROOT / "tests" / "support" / "plugins"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test loads is forgotten after it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setattr(sources, "_registered", {})
    monkeypatch.setattr(families, "_ROWS", dict(families._ROWS))
    monkeypatch.setattr(losses, "_ROWS", dict(losses._ROWS))
    monkeypatch.setattr(rewards, "_ROWS", dict(rewards._ROWS))
    monkeypatch.setattr(strategies, "STRATEGIES", dict(strategies.STRATEGIES))
    yield
    for name in [name for name in sys.modules if name.startswith(("my_", "good"))]:
        del sys.modules[name]


def config_in(folder: Path, **sections: Any) -> Path:
    """A config file that is right, but for what `sections` say."""
    folder.mkdir(exist_ok=True)
    tree = {"data": {"train": ["a.jsonl"]}, "model": CAUSAL, **sections}
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    return folder / "c.yaml"


def refused(path: Path) -> str:
    """What is said of a config file, in a line."""
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"{path}: plugins: ") and "\n" not in str(raised.value)
    return str(raised.value).removeprefix(f"{path}: plugins: ")


def test_modules_where_the_command_runs_add_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PLUGINS)
    path = config_in(
        tmp_path,
        plugins=["my_family", "my_strategy", "my_loss", "my_reward"],
        model={**CAUSAL, "family": "my_family"},
        parallel={"strategy": "my_strategy"},
        train={"losses": {"doubt": 0.5}},
    )
    for _ in "once and again":
        config = load_config(path)
    assert (config.model.family, config.parallel.strategy) == ("my_family", "my_strategy")
    assert rewards.load("brief")("a", Facts("id", "chat", "ab")) == 1.0
    assert plugins.loaded() == ("my_family", "my_strategy", "my_loss", "my_reward")
    places = [PLUGINS / "my_family", PLUGINS / "my_strategy", PLUGINS / "my_loss.py"]
    places.append(PLUGINS / "my_reward.py")
    assert plugins.local() == places
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert [str(place) for place in places] == _brought()[-4:]
    assert load_config(config_in(tmp_path, plugins="my_loss")).plugins == ["my_loss"]
    assert rule_of("plugins").rule == "free"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone", r"there is no module gone; modules are looked for where Python does, .*\(HERE\)"),
        ("good.gone", r"there is no module good\.gone; "),
        ("a/b.py", r"'a/b\.py' is not the name of a module; write it as Python imports it"),
        ("lacks", r"lacks cannot be imported: ModuleNotFoundError: .* \(HERE/lacks\.py, line 2\)"),
        ("fails", r"fails cannot be imported: ZeroDivisionError: .* \(HERE/fails\.py, line 3\)"),
        ("wrong", r"wrong cannot be imported: SyntaxError: .* \(HERE/wrong\.py, line 1\)"),
        ("taken", r"taken: there is a family audio_lm already: give this one another name$"),
        (
            "inner",
            r"there is no module inner; .*, but HERE/sub/inner\.py is there: run it in ",
        ),
    ],
)
def test_what_cannot_be_imported_is_said_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for module, text in {
        "good": "",
        "lacks": "import sys\nimport gone",
        "fails": "def f():\n    pass\n1 / 0",
        "wrong": "x = (",
        "taken": "from raysft.config.families import *\nregister(Family('audio_lm', '', ''))",
        "sub/inner": "",
    }.items():
        (tmp_path / f"{module}.py").write_text(text + "\n")
    path = config_in(tmp_path / "sub", plugins=[name], model={"family": "mine"})
    assert re.match(said.replace("HERE", re.escape(str(tmp_path))), refused(path))


def test_what_is_no_list_of_names_is_said_with_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="plugins: expected a list of texts, found 3"):
        load_config(config_in(tmp_path, plugins=3))


def test_rows_of_parquet_train_an_audio_model_of_somebodys_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PLUGINS)
    clips = []
    for number in range(12):
        soundfile.write(tmp_path / "clip.wav", tone(0.5, 16000, 200 + 10 * number), 16000)
        clips.append((f"r{number}", f"text {number}", (tmp_path / "clip.wav").read_bytes()))
    corpus = write_rows(tmp_path / "rows.parquet", clips)
    path = config_in(
        tmp_path,
        plugins=["my_parquet", "my_audio_model"],
        run={"name": "run", "storage_path": str(tmp_path)},
        data={"train": [str(corpus)], "lanes": 2, "tokens_per_batch": 200},
        model={**AUDIO, "config": {**AUDIO["config"], "model_type": "my_audio"}},
        train={"max_steps": 2},
        log={"every": 1, "tensorboard": False},
    )
    job = start(load_config(path), World(0, 1, torch.device("cpu")))
    train(job)
    assert type(job.stream.speech_model.net).__name__ == "MyAudio"
    assert len(read_lines(job.folder / "metrics.jsonl")) == 2
    assert read_config(job.folder).plugins == ["my_parquet", "my_audio_model"]


def test_processes_that_make_an_index_load_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PLUGINS)
    plugins.load(["my_lines"])
    assert fan_out(known.formats, [1, 2], [1, 1], None, workers=2) == [["my_lines"]] * 2
    path = tmp_path / "a.jsonl"
    path.write_text('{"said": "one", "units": [1]}\n{"said": "two", "units": "none"}\n')
    found = sources.resolve(Source(path=str(path)), "train")
    good, bad = sources.scan(found, path)
    assert good.example is not None and good.example.output == ("one",)
    assert bad.error == "a.jsonl line 2: field 'units' is no list of numbers"


def test_a_run_whose_plugin_is_gone_says_so(tmp_path: Path) -> None:
    config = tiny(tmp_path, train__max_steps=1)
    train(start(config, World(0, 1, torch.device("cpu"))))
    run = run_folder(config)
    written = (run / "config.yaml").read_text()
    assert "plugins: []\n" in written
    (run / "config.yaml").write_text(written.replace("plugins: []", "plugins: [gone]"))
    for asked in (
        lambda: audit(run),
        lambda: read_config(run),
        lambda: check_export(run, tmp_path / "out", "last"),
    ):
        with pytest.raises(UserError, match=r"config\.yaml: plugins: there is no module gone; "):
            asked()


def package(folder: Path, module: str, *points: str) -> None:
    """An installed package, as far as Python sees: my_pack, with these entry points."""
    about = folder / "my_pack-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my_pack\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(points) + "\n")
    (folder / "my_pack.py").write_text(module)


ALONE = """
import sys
sys.path[:0] = sys.argv[1:]
from raysft import plugins
from raysft.config import families, losses, strategies
from raysft.data.sources import formats
from raysft.scorers import scorers
plugins.load()
plugins.load()
rows = [*formats(), *families.choices(), *strategies.choices(), *losses.choices()]
print(*rows, *(row.name for row in scorers()))
"""


def test_entry_points_are_rows(tmp_path: Path) -> None:
    """Whether or not their modules register them too."""
    text = """
from raysft.config.families import Family
PLAIN = Family("plain", "my_family.encode", "my_family.model")
from my_lines import MyLines
FORMAT = MyLines()
FORMAT.name = "other_lines"
"""
    package(
        tmp_path,
        text,
        *("[raysft.families]", "plain = my_pack:PLAIN", "mine = my_family:ROW"),
        *("[raysft.formats]", "lines = my_pack:FORMAT"),
        *("[raysft.strategies]", "mine = my_strategy:ROW"),
        *("[raysft.losses]", "mine = my_loss:ROW", "[raysft.scorers]", "mine = my_metric:ROW"),
    )
    run = [sys.executable, "-c", ALONE, str(tmp_path), str(PLUGINS)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mine = {"plain", "my_family", "my_lines", "other_lines", "my_strategy", "doubt", "exact_match"}
    assert mine <= set(done.stdout.split())
    assert "exact_match" not in {row.name for row in scorers()}


def test_an_entry_point_that_cannot_be_loaded_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "import gone\n", "[raysft.losses]", "mine = my_pack:ROW")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    plugins._installed_rows.cache_clear()
    said = refused(config_in(tmp_path))
    assert re.match(
        r"entry point mine \(raysft\.losses\) of my_pack cannot be imported: ModuleNotFoundError: "
        r".*'gone' \(.*my_pack\.py, line 1\)$",
        said,
    )
