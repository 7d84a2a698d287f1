"""A run's folder: what it is created with, and whether a config may continue it.

config.yaml  the config as resolved, and the versions of the packages it ran with
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from raysft.config import Config, changed_keys, to_yaml
from raysft.config.load import apply_override, read_tree, validate
from raysft.errors import UserError
from raysft.train.checkpoint import committed, write_durably

PACKAGES = ("raysft", "torch", "transformers", "ray", "numpy", "soundfile", "soxr")

# What may differ when a run is continued: none of it changes what a step computes.
FREE = (
    "parallel.*",
    "log.*",
    "checkpoint.*",
    "evaluate.*",
    "data.eval",
    "data.cpus",
    "data.prefetch",
    "data.index_path",
    "data.max_quarantined",
    "run.storage_path",
)


def run_folder(config: Config) -> Path:
    """`run.storage_path/run.name`, absolute: workers may have another working directory."""
    return Path(config.run.storage_path).expanduser().absolute() / config.run.name


def open_run(config: Config) -> Path:
    """Create the run's folder, or check that the one there is of this config. Returns it.

    Raises UserError where the folder holds another run, is not a run's, or cannot be written.
    """
    check_run(config)
    folder = run_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.storage_path: {folder} cannot be made: {error.strerror or error}"
        ) from None
    written = folder / "config.yaml"
    versions = yaml.safe_dump({"versions": _versions()}, sort_keys=False)
    write_durably(written, to_yaml(config) + versions)
    return folder


def check_run(config: Config) -> None:
    """Raises UserError if the run's folder is there and this config may not continue it."""
    folder = run_folder(config)
    if (folder / "config.yaml").is_file():
        _check_same(config, folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{folder}: is there and holds no config.yaml, so it is not the folder of a run; "
            "choose another run.name or run.storage_path"
        )


def reopen(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of the run in `folder` with overrides, wherever the folder has moved to."""
    read_config(folder)
    tree = _read_tree(folder / "config.yaml")
    here = folder.absolute()
    tree["run"] = {**tree["run"], "storage_path": str(here.parent), "name": here.name}
    for override in overrides:
        apply_override(tree, override)
    return validate(tree, str(folder / "config.yaml"))


def read_config(folder: Path) -> Config:
    """The config a run was last started with. Raises UserError where `folder` is not a run's."""
    written = folder / "config.yaml"
    if not written.is_file():
        raise UserError(f"{folder}: no run is here (no config.yaml); name a run's folder")
    return validate(_read_tree(written), str(written))


def _read_tree(written: Path) -> dict[str, Any]:
    tree = read_tree(written.read_text(encoding="utf-8"), str(written))
    tree.pop("versions", None)
    return tree


def _check_same(config: Config, folder: Path) -> None:
    if config.checkpoint.resume == "never":
        raise UserError(
            f"{folder}: a run is there and checkpoint.resume is never; choose another run.name, "
            "delete the folder, or set checkpoint.resume=auto to continue it"
        )
    old = _read_tree(folder / "config.yaml")
    new = config.model_dump(mode="json")
    new["run"]["name"] = old["run"]["name"]  # a folder that was moved is still the same run
    free = FREE
    if config.optim.schedule == "constant" and (
        config.optim.warmup >= 1 or not config.optim.warmup
    ):
        free = (*FREE, "train.max_steps", "train.epochs")  # longer, at the same rates
    changed = [
        change
        for change in changed_keys(old, new)
        if not any(fnmatch(change.split(" ")[0], pattern) for pattern in free)
    ]
    if changed and committed(folder):
        raise UserError(
            f"{folder}: holds a run of another config: {'; '.join(changed)}. Set these back to "
            "continue it, choose another run.name to train anew, or delete the folder"
        )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
