"""Checkpoints: sharded state, a cursor, a commit marker that appears last.

    checkpoints/step_N/state/       torch distributed checkpoint: model and optimizer, by name
    checkpoints/step_N/meta.json    step, cursor, running sums of metrics, world size, versions
    checkpoints/step_N/COMMITTED    without it the folder does not exist for any reader

Every worker writes its own shards. The marker is written (flushed, synced, renamed) only when all
have; older checkpoints are pruned only after that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from raysft.errors import UserError
from raysft.parallel import World
from raysft.parallel.strategy import load_state, state_of

MARKER = "COMMITTED"
_NAME = re.compile(r"step_(\d+)")


def committed(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every committed checkpoint of a run, oldest first."""
    found = []
    for path in (folder / "checkpoints").glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / MARKER).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def latest(folder: Path) -> Path | None:
    """The newest committed checkpoint of a run, or None."""
    found = committed(folder)
    return found[-1][1] if found else None


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a checkpoint."""
    return json.loads((checkpoint / "meta.json").read_text())


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, Any],
    keep: int,
    world: World,
) -> Path:
    """Write checkpoint `step` of the run in `folder` and prune to the last `keep`. A collective."""
    target = folder / "checkpoints" / f"step_{step}"
    if world.is_main:
        if target.exists():  # left by an interrupted save, or by a run that is being done again
            (target / MARKER).unlink(missing_ok=True)
            shutil.rmtree(target)
        (target / "state").mkdir(parents=True)
    world.barrier()
    try:
        dcp.save(
            state_of(module, optimizer),
            storage_writer=dcp.FileSystemWriter(str(target / "state")),
            no_dist=not dist.is_initialized(),
        )
    except (OSError, CheckpointException) as error:
        if world.is_main:  # no marker: it does not exist for readers; leave no rubbish either
            shutil.rmtree(target, ignore_errors=True)
        raise UserError(f"{target}: the checkpoint cannot be written: {_cause(error)}") from error
    world.barrier()
    if world.is_main:
        write_durably(target / "meta.json", json.dumps({"step": step, **meta}))
        write_durably(target / MARKER, f"{step}\n")
        for _, old in committed(folder)[:-keep]:
            (old / MARKER).unlink()
            shutil.rmtree(old)
    world.barrier()
    return target


def load(checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load model and optimizer in place (any strategy, any world size); returns meta.json."""
    state = state_of(module, optimizer)
    dcp.load(
        state,
        storage_reader=dcp.FileSystemReader(str(checkpoint / "state")),
        no_dist=not dist.is_initialized(),
    )
    load_state(module, optimizer, state)
    return read_meta(checkpoint)


def load_weights(checkpoint: Path, module: nn.Module) -> None:
    """Load the model's weights alone, in place (evaluation, export). A collective."""
    state = {"model": get_model_state_dict(module)}
    dcp.load(
        state,
        storage_reader=dcp.FileSystemReader(str(checkpoint / "state")),
        no_dist=not dist.is_initialized(),
    )
    set_model_state_dict(module, state["model"])


def _cause(error: BaseException) -> str:
    """The operating system's words, dug out of what torch wraps around them."""
    if isinstance(error, CheckpointException):
        found = [_cause(wrapped[0]) for wrapped in error.failures.values()]
        return found[0] if found else str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if error.__cause__ is not None or error.__context__ is not None:
        return _cause(error.__cause__ or error.__context__ or error)
    return str(error)


def write_durably(path: Path, text: str) -> None:
    """Write a file so that it is whole on disk or not there: write, flush, sync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
