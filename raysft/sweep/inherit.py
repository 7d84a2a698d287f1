"""A trial goes on with another one's weights: its run becomes a copy of that run, with keys of its
own from there on. Jaderberg et al. 2017, population based training: exploit."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from raysft.config import Config
from raysft.errors import UserError
from raysft.run import ownership, place
from raysft.run.catalogue import Catalogue
from raysft.run.folder import read_config, write_config

_NOT = (ownership.POINTER, ownership.FOLDER, "ray_train", "tensorboard", "report.*")
TRIES = 5  # the other one goes on meanwhile, and deletes what it has copied half


def inherit(donor: Path, own: Path, config: Config) -> int:
    """Make the run in `own` a copy of that in `donor`, with the keys of `config`; returns the step
    that it goes on from.

    The donor may be under way. Interrupted anywhere, `own` is what it was, or the copy: see `mend`.
    """
    mend(own)
    new, old = _beside(own)
    for attempt in range(TRIES):
        shutil.rmtree(new, ignore_errors=True)
        try:
            shutil.copytree(donor, new, ignore=shutil.ignore_patterns(*_NOT))
        except (shutil.Error, FileNotFoundError):
            time.sleep(0.2 * 2**attempt)
            continue
        saved, _ = Catalogue.of(read_config(donor).checkpoint, new).newest()
        if saved is not None:
            break
    else:
        raise UserError(f"{donor}: no checkpoint of it could be copied: it deletes them too soon")
    write_config(config, new, place.new_id())
    if own.exists():
        own.rename(old)
    new.rename(own)
    shutil.rmtree(old, ignore_errors=True)
    return saved.step


def mend(own: Path) -> None:
    """Finish, or take back, what was interrupted."""
    new, old = _beside(own)
    if not own.exists() and old.exists() and new.exists():
        new.rename(own)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def _beside(own: Path) -> tuple[Path, Path]:
    return own.with_name(f".{own.name}.new"), own.with_name(f".{own.name}.old")
