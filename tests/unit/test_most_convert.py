"""examples/most/convert.py: ASR items to TTS items."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raysft.data.sources.most_json import FORMAT

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "most" / "convert.py"


def item(name: str, **more: Any) -> dict[str, Any]:
    asr = {"id": name, "instruction": "transcribe", "input": "[Hu1][Hu2]", "output": f"text {name}"}
    return {**asr, **more}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "in"
    source.mkdir()
    a, b = item("a", metadata={"speaker": 7, "task": "asr"}), item("b")
    (source / "list_train.json").write_text(json.dumps([a, b]))
    (source / "data_train.json").write_text(json.dumps({"data": [item("c")]}))
    (source / "one_dev.json").write_text(json.dumps(item("d")))
    (source / "lines_dev.json").write_text("\n".join(map(json.dumps, (item("e"), item("f")))))
    return source


def test_every_shape_comes_out_as_tts_and_is_read_as_such(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run("--input_dir", folder, "--output_dir", out, "--dataset_name", "mine")
    assert first.returncode == 0, first.stderr
    assert "6 converted" in first.stdout
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(found) == {
        f"{n}_tts.json" for n in ("list_train", "data_train", "one_dev", "lines_dev")
    }
    items = json.loads(found["list_train_tts.json"])
    assert items[0] == {
        "id": "tts_a",
        "instruction": "Convert the following text into speech.",
        "input": "text a",
        "output": "[Hu1][Hu2]",
        "metadata": {"speaker": 7, "task": "tts", "original_task": "asr", "dataset": "mine"},
    }
    example = FORMAT.parse(json.dumps(items[1]).encode(), out / "list_train_tts.json", 0)
    assert (example.task, example.text) == ("tts", "text b")
    assert run("--input_dir", folder, "--output_dir", out, "--dataset_name", "mine").returncode == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == found


def test_what_it_wrote_and_what_is_no_asr_is_left_out(folder: Path) -> None:
    (folder / "other.json").write_text(json.dumps([item("t", input="only text")]))
    for _ in range(2):
        done = run("--input_dir", folder, "--output_dir", folder)
        assert done.returncode == 0
    for said in ("4 files left out, written by this", "6 converted", "1 left out, no ASR"):
        assert said in done.stdout
    assert not list(folder.glob("*_tts_tts.json"))


def test_a_batch_config_converts_folders_with_their_names(folder: Path, tmp_path: Path) -> None:
    entries = [
        {"input_dir": str(folder), "output_dir": str(tmp_path / "x"), "file_pattern": "*train*"},
        {"input_dir": str(folder), "output_dir": str(tmp_path / "y"), "dataset_name": "other"},
    ]
    config = tmp_path / "batch.json"
    config.write_text(json.dumps(entries))
    assert run("--config", config).returncode == 0
    assert len(list((tmp_path / "x").iterdir())) == 2
    (said,) = json.loads((tmp_path / "y" / "one_dev_tts.json").read_text())
    assert said["metadata"]["dataset"] == "other"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"data": 7', "bad.json: cannot be read as JSON"),
        ("7", "bad.json: expected a list of items"),
        ('[{"id": "a", "input": "[Hu1]"}]', "bad.json: item 0: output is missing"),
        ('[{"id": "", "input": "[Hu1]", "output": "x"}]', "bad.json: item 0: id is missing"),
        ("[3]", "bad.json: item 0: expected an object, found int"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(
    content: str, said: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "bad.json").write_text(content)
    done = run("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_flags_and_configs_are_named(folder: Path, tmp_path: Path) -> None:
    assert "input_dir is missing" in run().stderr
    assert "is no folder" in run("--input_dir", tmp_path / "no", "--output_dir", "o").stderr
    config = tmp_path / "batch.yaml"
    config.write_text(f"- {{input_dir: {folder}, output_dir: o, pattern: x}}\n")
    assert "entry 0: unknown key 'pattern'" in run("--config", config).stderr
    assert "beside --config" in run("--config", config, "--output_dir", "o").stderr
