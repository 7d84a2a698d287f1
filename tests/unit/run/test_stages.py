"""The folder of several stages: what it remembers, and what is said where something else is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft import audit
from raysft.config import load_config
from raysft.driver import stages as driven
from raysft.errors import UserError
from raysft.page.build import shown_of
from raysft.parallel import World
from raysft.report import draw
from raysft.run.folder import read_config
from raysft.run.stages import Finished, StagesFolder
from raysft.train.loop import train
from raysft.transcribe.model import load
from tests.support import flows, patches, worlds

HOW = Finished("digest", 40, 20, "loss")


@pytest.fixture
def folder(tmp_path: Path) -> StagesFolder:
    found = StagesFolder(tmp_path / "voice")
    found.path.mkdir()
    found.open(["llm", "flow"], "stages: []\n")
    return found


def test_what_is_finished_stays_so_over_starts(folder: StagesFolder) -> None:
    folder.finish("llm", HOW)
    folder.open(["llm", "flow", "joint"], "stages: []\n")
    assert folder.names() == ["llm", "flow", "joint"]
    assert folder.finished("llm") == HOW
    assert folder.finished("flow") is None
    (folder.path / "flow").mkdir()
    (folder.path / "flow" / "config.yaml").write_text("")
    rows = [(row["stage"], row["status"], row["best"], row["begun"]) for row in folder.table()]
    assert rows == [
        ("llm", "finished", 20, False),
        ("flow", "begun", None, True),
        ("joint", "waiting", None, False),
    ]


def test_what_a_killed_export_left_is_cleared_away(folder: StagesFolder) -> None:
    (folder.path / ".llm_best.partial-77").mkdir()
    folder.open(["llm"], "")
    assert not list(folder.path.glob(".*partial*"))


@pytest.mark.parametrize(
    ("file", "what"), [("config.yaml", "a run"), ("sweep.yaml", "a sweep")], ids=str
)
def test_stages_are_not_put_beside_something_else(file: str, what: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("")
    with pytest.raises(UserError, match=f"holds {what}, no stages; choose another run.name"):
        StagesFolder(tmp_path).open(["llm"], "")


def test_a_state_that_cannot_be_read_says_what_to_do(folder: StagesFolder) -> None:
    (folder.path / "stages.json").write_text("{")
    with pytest.raises(UserError, match=r"stages.json: cannot be read .*delete it"):
        folder.names()


WANT_A_RUN: list[Callable[[Path], object]] = [
    read_config,
    draw,
    lambda path: audit.main([str(path)], "audit"),
    lambda path: load(str(path), None),
]


@pytest.mark.parametrize("use", WANT_A_RUN)
def test_whoever_wants_a_run_is_told_which_there_are(
    use: Callable[[Path], object], folder: StagesFolder
) -> None:
    runs = f"{folder.run('llm')}, {folder.run('flow')}"
    with pytest.raises(UserError, match=f"holds stages, each of them a run; name one of {runs}"):
        use(folder.path)


def test_the_page_shows_stages_that_have_not_begun(folder: StagesFolder) -> None:
    shown = shown_of([folder.path])
    assert [row["status"] for row in shown["stages"]] == ["waiting", "waiting"]
    assert shown["runs"] == []


def test_where_nothing_is_evaluated_the_last_is_the_best_and_it_is_made_once(
    folder: StagesFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gone, it is made again; when the run has gone on it stays, and that is said."""
    settings = worlds.tiny(tmp_path, checkpoint__every=2, train__max_steps=4)
    names = {"name": "llm", "storage_path": str(folder.path)}
    settings = settings.model_copy(update={"run": settings.run.model_copy(update=names)})
    train(worlds.start(settings, World.current()))
    said: list[str] = []

    def say(text: str, share: float | None = None) -> None:
        said.append(text)

    best = folder.best("llm") / "model.safetensors"
    assert driven._keep_best(folder, "llm", say) == (4, None)
    assert said == [f"stage llm: exporting step 4 to {folder.best('llm')}"]
    content = best.read_bytes()
    assert driven._keep_best(folder, "llm", say) == (4, None)
    assert len(said) == 1
    shutil.rmtree(folder.best("llm"))
    assert driven._keep_best(folder, "llm", say) == (4, None)
    assert best.read_bytes() == content
    folder.finish("llm", Finished("digest", 4, 4, None))
    longer = settings.train.model_copy(update={"max_steps": 6})
    train(worlds.start(settings.model_copy(update={"train": longer}), World.current()))
    assert driven._keep_best(folder, "llm", say) == (4, None)
    assert best.read_bytes() == content
    assert "its best is step 6 now, and " in caplog.text


def test_a_stage_that_is_not_finished_gives_no_model(folder: StagesFolder) -> None:
    with pytest.raises(UserError, match="begins from llm, which is not finished"):
        driven._require(folder, "llm", lambda text, share=None: None)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            flows.model("one", upsample=3),
            r"stage speaks: model\.config\.upsample: 3 frames for each of 25 tokens",
        ),
        (flows.model("one", widht=3), r"stage speaks: model\.config\.widht: unknown key"),
        (patches.model(mel=None), r"stage speaks: model\.patches\.mel: say which"),
    ],
)
def test_a_model_that_cannot_be_is_said_before_any_stage_is_trained(
    model: dict[str, Any], said: str, tmp_path: Path
) -> None:
    corpus = str(flows.corpus(tmp_path / "corpus", "one"))
    tree = {
        "run": {"name": "voice", "storage_path": str(tmp_path)},
        "data": {"train": [{"path": corpus, "task": "flow"}], "mode": "padded"},
        "stages": [
            {"name": "first", "model": flows.model("one")},
            {"name": "speaks", "model": model},
        ],
    }
    (tmp_path / "voice.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(str(tmp_path / "voice.yaml"))
    with pytest.raises(UserError, match=said):
        driven.check(config)
    assert not (tmp_path / "voice" / "first").exists()
