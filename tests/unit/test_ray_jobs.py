"""In a submitted Ray job: nothing is written where it is lost, and large uploads are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysft import prepare
from raysft.errors import UserError
from raysft.session import check_kept, ray_session
from tests.worlds import tiny

PACKAGE = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0a1b2c"


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {}}')


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("given", ["runs", "./runs", "a/b", f"{PACKAGE}/runs", Path("runs")])
def test_a_place_inside_rays_copy_is_refused_in_a_job(given: str | Path) -> None:
    with pytest.raises(UserError, match=r"run\.storage_path: .*all nodes see") as caught:
        check_kept(run__storage_path=given)
    assert str(given) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("job")
def test_shared_folders_urls_and_defaults_are_taken_in_a_job() -> None:
    check_kept(run__storage_path="/shared/runs", checkpoint__path=None)
    check_kept(run__storage_path="~/runs", checkpoint__path="s3://bucket/run")


def test_outside_a_job_relative_places_are_the_users_own() -> None:
    check_kept(run__storage_path="runs", checkpoint__path="kept")


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("key", ["run.storage_path", "checkpoint.path", "data.index_path"])
def test_each_key_that_writes_is_looked_at_before_anything_starts(tmp_path: Path, key: str) -> None:
    config = tiny(tmp_path)
    section, name = key.split(".")
    setattr(getattr(config, section), name, "relative")
    with pytest.raises(UserError, match=key):
        prepare.check(config)
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
