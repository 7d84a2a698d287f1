"""In a submitted Ray job: nothing is written where it is lost, and large uploads are named."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from raysft.driver import preflight
from raysft.driver.session import check_kept, ray_session
from raysft.errors import UserError
from tests.support.worlds import tiny

ROOT = Path(__file__).parents[3]


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a submitted job, as Ray names it."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0a1b2c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("given", ["runs", "./runs", "a/b", "{cwd}/runs", Path("runs")])
def test_a_place_inside_rays_copy_is_refused(unpacked: Path, given: str | Path) -> None:
    given = str(given).format(cwd=unpacked)
    with pytest.raises(UserError, match=r"run\.storage_path: .*all nodes see") as caught:
        check_kept(run__storage_path=given)
    assert given in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("unpacked")
def test_shared_folders_urls_and_defaults_are_taken() -> None:
    check_kept(run__storage_path="/shared/runs", data__index_path=None)
    check_kept(run__storage_path="~/runs", data__index_path="s3://bucket/run")


def test_elsewhere_relative_places_are_the_users_own() -> None:
    check_kept(run__storage_path="runs", data__index_path="kept")


@pytest.mark.parametrize("key", ["run.storage_path", "data.index_path"])
def test_each_key_that_writes_is_looked_at_before_anything_starts(
    tmp_path: Path, unpacked: Path, key: str
) -> None:
    config = tiny(tmp_path)
    section, name = key.split(".")
    setattr(getattr(config, section), name, str(unpacked / "here"))
    with pytest.raises(UserError, match=key):
        preflight.check(config)
    assert not (tmp_path / "runs").exists()


def test_a_folder_too_large_to_upload_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    for name in ("speech", "raysft"):
        (tmp_path / name / "deep").mkdir(parents=True)
    with open(tmp_path / "speech" / "deep" / "audio.tar", "wb") as file:
        file.truncate(150 << 20)  # without taking the space
    (tmp_path / "raysft" / "deep" / "a.py").write_text("x = 1")

    def said() -> str:
        with pytest.raises(UserError, match="ray job submit") as caught, ray_session():
            pass
        return str(caught.value)

    assert "name speech (150 MiB) in a file .rayignore" in said()
    (tmp_path / ".rayignore").write_text("/speech/\n")
    assert ".rayignore" not in said()


# What a user has beside the source after some runs; nothing of it may travel.
AT_HOME = (
    *("runs/demo/checkpoints/step_5/model.safetensors", "runs/index/abc/tokens.npy"),
    *("elsewhere/demo/checkpoints/step_5/state.json", "elsewhere/demo/ray_train/x/driver.log"),
    "elsewhere/demo/tensorboard/events.out.tfevents.1",
    *(
        "index/part0/tokens.npy",
        "elsewhere/index/abc/index.arrow",
        "elsewhere/demo/ledger/lane_0_from_0.jsonl",
    ),
    *(".git/HEAD", ".venv/bin/python", "raysft/__pycache__/a.pyc", ".mypy_cache/3.11/a.json"),
    *(".hypothesis/a", ".pytest_cache/a", ".ruff_cache/a", "wandb/run-1/files/a", "mlruns/0/a"),
    *("data/a.wav", "models/a/config.json", "exported/a.json", "a.tar", "clips.tar.gz"),
    *(".cache/huggingface/a", "tests/unit/a.py", "benchmarks/a.py"),
)


def test_runs_indexes_and_caches_never_travel_and_all_that_a_job_needs_does(
    tmp_path: Path,
) -> None:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    ignored = get_excludes_from_ignore_files(tmp_path, include_gitignore=True)

    def travels(name: str) -> bool:
        path = tmp_path / name
        over = [path, *path.parents]
        return not any(skip(one) for one in over[: over.index(tmp_path)] for skip in ignored)

    for name in AT_HOME:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [name for name in AT_HOME if travels(name)] == []
    needed = subprocess.check_output(
        ["git", "ls-files", "raysft", "jobs", "examples", "cluster", "pyproject.toml"],
        cwd=ROOT,
        text=True,
    ).split()
    assert len(needed) > 100
    for name in needed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [name for name in needed if not travels(name)] == []
