"""What a logger lacks is said before anything is started; secrets are the environment's alone."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from raysft.config import load_config, to_yaml
from raysft.config.logs import Log
from raysft.errors import UserError
from raysft.loggers.check import check, credentials, take


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without names and keys."""
    for key in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def log(**sections: object) -> Log:
    return Log.model_validate(sections)


def test_wandb_needs_a_key_unless_it_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(log(wandb={"mode": "offline"}))
    with pytest.raises(UserError, match=r"log\.wandb: no key.*WANDB_API_KEY.*mode=offline"):
        check(log(wandb={}))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "k" * 40 + "\n")
    (tmp_path / ".netrc").chmod(0o600)
    check(log(wandb={}))
    assert credentials(log(wandb={})) == {"WANDB_API_KEY": "k" * 40}, "for a worker elsewhere"
    monkeypatch.setenv("WANDB_API_KEY", "e" * 40)
    assert credentials(log(wandb={})) == {"WANDB_API_KEY": "e" * 40}
    assert credentials(log(wandb={"mode": "offline"})) == credentials(log()) == {}


def test_mlflow_needs_a_place_that_takes_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"log\.mlflow\.tracking_uri: says nothing"):
        check(log(mlflow={}))
    for uri in ("sqlite:////proc/nowhere/mlflow.db", f"file://{tmp_path}/mlruns"):
        with pytest.raises(UserError, match=r"tracking_uri: .* cannot be used: ") as caught:
            check(log(mlflow={"tracking_uri": uri}))
        assert "\n" not in str(caught.value)
    check(log(mlflow={"tracking_uri": "http://127.0.0.1:9"}))  # a network is nobody's mistake
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    check(log(mlflow={"tracking_uri": uri}), writes=False)
    assert not (tmp_path / "new").exists()
    check(log(mlflow={"tracking_uri": uri}))
    assert (tmp_path / "new" / "mlflow.db").is_file()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    check(log(mlflow={}))


@pytest.mark.parametrize(
    ("section", "settings"), [("wandb", {"mode": "offline"}), ("mlflow", {"tracking_uri": "a://b"})]
)
def test_a_package_that_is_not_there_is_named(
    section: str, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("raysft.loggers.check.version", none)
    with pytest.raises(UserError, match=rf"log\.{section}: .*pip install 'raysft\[{section}\]'"):
        check(log(**{section: settings}))
    check(log())


def test_a_key_that_is_none_and_a_password_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: {train: [a.jsonl]}\nmodel: {path: /a}\n")
    with pytest.raises(UserError, match=r"log\.wandb\.projct.*project"):
        load_config(path, ["log.wandb={projct: mine}"])
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_PASSWORD"):
        load_config(path, ["log.mlflow={tracking_uri: 'https://me:secret@host'}"])
    found = load_config(path, ["log.mlflow={tracking_uri: 'sqlite:///mlflow.db'}"])
    assert found.log.mlflow is not None
    assert found.log.mlflow.tracking_uri == f"sqlite:///{Path.cwd()}/mlflow.db"
    assert f"sqlite:///{Path.cwd()}/mlflow.db" in to_yaml(found)


def test_what_a_process_knows_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "own")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    given = credentials(log(mlflow={}))
    assert given["MLFLOW_TRACKING_TOKEN"] == "own"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "of this machine")
    take({**given, "MLFLOW_TRACKING_USERNAME": "me"})
    assert credentials(log(mlflow={})) == {
        **given,
        "MLFLOW_TRACKING_TOKEN": "of this machine",
        "MLFLOW_TRACKING_USERNAME": "me",
    }
