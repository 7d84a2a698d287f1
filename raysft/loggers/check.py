"""What loggers need, looked for before anything is started: packages, and who the user is there."""

from __future__ import annotations

import netrc
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from raysft.config.logs import SQLITE, Log, Mlflow, Wandb
from raysft.errors import UserError

_WANDB = "https://api.wandb.ai"


def check(log: Log, writes: bool = True) -> None:
    """Raises UserError where a package is missing, or what a mode needs. Asks no server.

    writes: make the database of a `sqlite:` tracking_uri, before several trials do so at once.
    """
    if log.wandb is not None:
        _require("log.wandb", "wandb", "wandb")
        _check_key(log.wandb)
    if log.mlflow is not None:
        _require("log.mlflow", "mlflow", "mlflow-skinny", "mlflow")
        _check_uri(log.mlflow, writes)


def credentials(log: Log) -> dict[str, str]:
    """What this process's environment says to loggers, for one that may have another: secrets."""
    found: dict[str, str] = {}
    if log.wandb is not None and log.wandb.mode == "online":
        if (key := _key()) is not None:
            found["WANDB_API_KEY"] = key
        if (url := os.environ.get("WANDB_BASE_URL")) is not None:
            found["WANDB_BASE_URL"] = url
    if log.mlflow is not None:
        found |= {key: text for key, text in os.environ.items() if key.startswith("MLFLOW_")}
    return found


def take(given: dict[str, str]) -> None:
    """Have in this process what `credentials` gave, but for what its environment says itself."""
    for key, text in given.items():
        os.environ.setdefault(key, text)


def _require(key: str, extra: str, *packages: str) -> None:
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            continue
        return
    raise UserError(
        f"{key}: {packages[0]} is not installed: pip install 'raysft[{extra}]', or set {key}=null"
    )


def _check_key(settings: Wandb) -> None:
    if settings.mode == "offline" or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    if _key() is None:
        raise UserError(
            "log.wandb: no key of Weights & Biases is here: set WANDB_API_KEY, or "
            "log.wandb.mode=offline, which sends nothing"
        )


def _key() -> str | None:
    """The environment's, or that of `wandb login`."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _WANDB).hostname or ""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(path).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found is not None else None


def _check_uri(settings: Mlflow, writes: bool) -> None:
    uri = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "log.mlflow.tracking_uri: says nothing, nor does MLFLOW_TRACKING_URI: set one, e.g. to "
            "http://HOST:5000, or sqlite:///FOLDER/mlflow.db for a file"
        )
    if uri.startswith(SQLITE):
        _require("log.mlflow", "mlflow", "sqlalchemy")
        _require("log.mlflow", "mlflow", "alembic")
    if not writes or urlsplit(uri).scheme in ("http", "https", "databricks"):
        return
    from raysft.loggers.to_mlflow import client_of, experiment_id

    try:
        if uri.startswith(SQLITE):
            Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
        experiment_id(client_of(settings), settings.experiment, uri)
    except Exception as error:  # whatever it is: this place takes no runs
        why = " ".join(str(error).split())[:300]
        raise UserError(f"log.mlflow.tracking_uri: {uri} cannot be used: {why}") from error
