"""Processes without a name, without a home, or with one they cannot write in."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raysft import remarks
from raysft.environment import settle
from tests.cluster.conftest import ROOT

UNSHARE = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_home_that_works_is_left_alone(temporary: Path) -> None:
    home = temporary / "home"
    home.mkdir()
    environ = {"HOME": str(home), "USER": "ada"}
    assert settle(environ) is None
    assert environ == {"HOME": str(home), "USER": "ada", **remarks.ENVIRONMENT}
    assert list(temporary.iterdir()) == [home]


def test_without_a_writable_home_caches_go_to_a_private_folder_and_settings_stay(
    temporary: Path,
) -> None:
    environ = {"HOME": "/nonexistent", "USER": "ada", "MPLCONFIGDIR": "/mine"}
    remark = settle(environ)
    place = temporary / f"raysft-home-{os.getuid()}"
    assert remark is not None and str(place) in remark and "\n" not in remark
    assert "HOME=/nonexistent" in remark and "HF_HOME" in remark
    assert environ["HOME"] == "/nonexistent" and environ["MPLCONFIGDIR"] == "/mine"
    for key in ("HF_HOME", "HF_MODULES_CACHE", "TRITON_HOME", "TORCH_EXTENSIONS_DIR"):
        assert Path(environ[key]).is_relative_to(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert settle(dict(environ)) == remark, "the next process uses the same one"


def test_models_in_a_home_that_can_only_be_read_are_still_found(temporary: Path) -> None:
    (temporary / "cache" / "huggingface").mkdir(parents=True)
    environ = {"HOME": "/nonexistent", "XDG_CACHE_HOME": str(temporary / "cache")}
    assert settle(environ) is not None
    assert "HF_HOME" not in environ and "HF_MODULES_CACHE" in environ


def test_a_folder_that_others_can_enter_is_not_used(temporary: Path) -> None:
    planted = temporary / f"raysft-home-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    environ = {"HOME": "/nonexistent"}
    settle(environ)
    assert not Path(environ["HF_HOME"]).is_relative_to(planted)


SHOW = """
import raysft
import getpass, os, pathlib
from torch._dynamo import config
import huggingface_hub.constants as hub
place = pathlib.Path(hub.HF_HOME)
place.mkdir(parents=True)
print(getpass.getuser(), os.access(pathlib.Path.home(), os.W_OK), os.access(place, os.W_OK))
"""


@pytest.mark.skipif(
    subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="another user id needs user namespaces",
)
@pytest.mark.parametrize("home", [None, pytest.param("{tmp}", marks=pytest.mark.slow)])
def test_an_unknown_user_id_has_a_name_and_a_home(tmp_path: Path, home: str | None) -> None:
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    if home is not None:
        environ["HOME"] = home.format(tmp=tmp_path)
    done = subprocess.run(
        [*UNSHARE, sys.executable, "-c", SHOW], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["uid54321", "True", "True"]
