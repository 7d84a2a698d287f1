"""The last step of the way: a folder that transformers, or peft, loads with `from_pretrained`.

A run with adapters gives its adapter as the checkpoint holds it, or merged weights: the base in
float32, from where `model.path` has it, and the adapter's part added; then, once, rounded to what
`train.precision` computed in. Upon another base than the run's nothing is merged or exported.

Cost: one write of the weights in float32 (merged: in train.precision); of an adapter, of the
adapter. The folder appears whole or not at all: everything is written beside it first and renamed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from raysft import models
from raysft.adapters.attach import FOLDER as ADAPTER
from raysft.adapters.attach import VIRTUAL, merge_adapters
from raysft.config import Config
from raysft.data.encode import make_encoder, model_family, require_template
from raysft.errors import UserError
from raysft.models.base import SpeechModel
from raysft.offered import callable_too
from raysft.parallel.native import HALF
from raysft.paths import check_new_folder
from raysft.run import identity, plans
from raysft.run.catalogue import Saved
from raysft.run.evaluations import choose
from raysft.run.folder import base_in, base_of, read_config
from raysft.train.checkpoint import read_weights

log = logging.getLogger(__name__)
callable_too(__name__)  # `from raysft import export`: the function of the library


def export(
    speech_model: SpeechModel, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None
) -> Path:
    """Write the model (or `state_dict` in its place) to `folder`; returns the folder.

    With it go tokenizer, chat template, generation config and, for audio_lm, the processor (of
    data.features: fbank the feature extractor alone, with a warning: see `AudioLM.save`).
    Raises UserError if `folder` exists and is not an empty folder, or cannot be written.
    """
    return written(Path(folder), lambda partial: speech_model.save(partial, state_dict))


def written(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, new and absolute, whole or not at all, as `fill` writes it into the one that it is
    given. Raises UserError if it is there and not empty, or cannot be written."""
    target = folder.absolute()
    check_new_folder("export", target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        fill(partial)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"export: cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def export_run(run: Path, folder: Path, merge: bool = False, step: str = "last") -> int:
    """Export a checkpoint of the run in `run`; returns its step.

    step: a step, `best` (by checkpoint.best) or `last`, the newest sound one. merge: of a run with
    adapters the whole model, not the adapter. Raises UserError where there is no such checkpoint,
    or it cannot give what is asked for. A newer one that is damaged is named in a warning.
    """
    config = read_config(run)
    found, skipped = choose(run, config.checkpoint, step, Saved.damage)
    for reason in skipped:
        log.warning("skipped: %s", reason)
    require_template(run)
    method = config.peft.method
    if merge and method == "none":
        raise UserError("export --merge: this run trained all weights; there is nothing to merge")
    if merge and method in VIRTUAL:
        raise UserError(
            f"export --merge: peft.method: {method} trains positions, which cannot be merged into "
            "weights; export the adapter, without --merge"
        )
    if method != "none":
        _check_base(config, found, run)
    if method != "none" and not merge:
        _export_adapter(config, found, folder)
        return found.step
    encoder = make_encoder(config.model, config.data, run)
    speech_model = models.build(config.model, config.data, encoder, config.run.seed)
    weights: dict[str, torch.Tensor] | None = read_weights(found)
    if merge:
        settings = json.loads(found.read(f"{ADAPTER}/adapter_config.json"))
        merge_adapters(speech_model, config, settings.get("total_step") or 0, weights or {})
        weights = None
        if config.train.precision in HALF:
            speech_model.net.to(HALF[config.train.precision])
    export(speech_model, folder, weights)
    return found.step


def prompts(run: Path) -> dict[str, str]:
    """What examples without an instruction of their own were asked, by task."""
    config = read_config(run)
    if "data.prompts" in model_family(config.model).refused_keys:
        return {}  # they are asked by other means
    known = config.data.prompts
    return {task: known[task] for task in plans.tasks(run) if task in known}


def _check_base(config: Config, found: Saved, run: Path) -> None:
    """Refuse another base than the one under the checkpoint's adapter. A base that is not on this
    machine is missed only where it is merged: then loading it says so."""
    recorded = base_of(run)
    if "config.yaml" in found.meta()["files"]:
        recorded = base_in(found.read("config.yaml").decode()) or recorded
    remedy = "put that one back; the adapter means nothing upon other weights"
    if recorded is None and config.model.path is not None:
        log.warning(
            "%s has not recorded its base: taken for what model.path %s holds now",
            run,
            config.model.path,
        )
    identity.refuse_other(str(run), config.model, recorded, remedy)


def _export_adapter(config: Config, found: Saved, folder: Path) -> None:
    """The adapter with tokenizer and processor, as they lie in the checkpoint."""
    if config.model.path is None:
        remedy = "export the whole model with --merge"
        if config.peft.method in VIRTUAL:
            remedy = f"train {config.peft.method} on a model that has a model.path"
        raise UserError(
            "export: an adapter is of use beside its base only, and the base of this run is "
            f"nowhere: it was made from model.config; {remedy}"
        )
    names = {name: name.split("/", 1) for name in found.meta()["files"]}
    wanted = {n: rest[-1] for n, rest in names.items() if rest[0] in (ADAPTER, "processor")}

    def fill(partial: Path) -> None:
        for name, place in wanted.items():
            target = partial / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(found.read(name))

    written(folder, fill)
