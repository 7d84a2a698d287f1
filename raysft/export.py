"""The last step of the way: a folder that plain transformers loads with `from_pretrained`.

Cost: one write of the weights in float32. The folder appears whole or not at all: everything is
written beside it first and renamed.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch

from raysft import models
from raysft.data.encode import make_encoder
from raysft.errors import UserError
from raysft.models.base import Adapter
from raysft.rundir import read_config
from raysft.train.catalogue import Catalogue, Saved
from raysft.train.checkpoint import read_weights

log = logging.getLogger(__name__)


def export(
    adapter: Adapter, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None
) -> Path:
    """Write the adapter's model (or `state_dict` in its place) to `folder`; returns the folder.

    With it go tokenizer, chat template, generation config and, for audio_lm, the processor (of
    data.features: fbank the feature extractor alone, with a warning: see `AudioLM.save`).
    Raises UserError if `folder` exists and is not an empty folder, or cannot be written.
    """
    target = Path(folder).absolute()
    if target.is_dir():
        if any(target.iterdir()):
            raise UserError(f"export: {target} is not empty; give a new folder")
    elif target.exists():
        raise UserError(f"export: {target} is a file; give a new folder")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        adapter.save(partial, state_dict)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"export: cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def export_run(run: Path, folder: Path) -> int:
    """Export the newest sound checkpoint of the run in `run`; returns its step.

    Raises UserError where there is none. A newer one that is damaged is named in a warning.
    """
    config = read_config(run)
    found, skipped = Catalogue.of(config.checkpoint, run).newest(Saved.damage)
    for reason in skipped:
        log.warning("skipped: %s", reason)
    if found is None:
        raise UserError(f"{run}: no committed checkpoint to export; train first")
    encoder = make_encoder(config.model, config.data, run)
    adapter = models.build(config.model, config.data, encoder, config.run.seed)
    export(adapter, folder, read_weights(found))
    return found.step
