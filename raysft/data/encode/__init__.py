"""Encoders: an example and its clips -> a sequence of token ids, labels and features.

Stands between `audio` and the micro-batches; one module a model family (see `Encode`), made by
`make_encoder`. Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from raysft import patience
from raysft.config.objectives import Objective
from raysft.config.schema import Data, Model
from raysft.data.clips.audio import Limits
from raysft.data.clips.augment import Augmentation
from raysft.data.encode.base import Encoder
from raysft.data.encode.families import check_model, model_family, net_class
from raysft.errors import UserError

__all__ = [
    "TEMPLATE",
    "Encode",
    "Encoder",
    "check_model",
    "make_encoder",
    "model_family",
    "net_class",
    "require_template",
]

TEMPLATE = "chat_template.jinja"
"""In a run's folder: the template whose prompts it is trained on."""


class Encode(Protocol):
    """The module of a family that makes its encoders (`Family.encode`).

    It may have a `check_model(model)`, which raises UserError for a section `model` that cannot
    be: what is said before anything is read or trained.
    """

    def make_encoder(self, model: Model, data: Data, run_folder: Path, kept: str | None) -> Encoder:
        """The encoder of `model`. Reads no weights, and imports no torch unless features need it.

        run_folder: of the run, which holds what was fitted for it. kept: the chat template of a
        run that has begun. Raises UserError for what cannot be used.
        """
        ...


def make_encoder(
    model: Model, data: Data, run_folder: str | Path, objective: Objective = "sft"
) -> Encoder:
    """The encoder of the configured model; no weights are read.

    A speech tokenizer must have been fitted before (`speech_tokens.fit_or_load`): it is looked
    for in `run_folder`, or at data.speech_tokens.path. The chat template is that of `run_folder`,
    where the run has one. Clips that stall are remembered there; what varies clips in training is
    looked for there (`data.clips.recordings.FILE`). objective: of the run: sequences
    carry what it asks for. Raises UserError.
    """
    encoder = _encoder(model, data, Path(run_folder))
    limits = Limits.of(data, Path(run_folder))
    encoder.limits = replace(limits, latents=encoder.latents_per_second)
    encoder.augment = Augmentation.of(data, Path(run_folder))
    encoder.facts = objective == "grpo"
    if objective == "dpo":
        encoder.pairs = True
        encoder.fingerprint = f"{encoder.fingerprint}, pairs"
    if encoder.augment is not None:
        _check_heard(encoder, encoder.augment)
    return encoder


def _check_heard(encoder: Encoder, augment: Augmentation) -> None:
    """Whether there is anything of the model's that can be varied."""
    if encoder.sample_rate is None:
        raise UserError(
            f"data.augment: {', '.join(augment.settings.given)}: this model is given no clips to "
            "vary: leave it out, or use a model that hears, or data.speech_tokens"
        )
    if augment.settings.spec is not None and encoder.spectrogram is None:
        raise UserError(
            "data.augment.spec: masks a spectrogram, and this model reads none: leave it out"
        )


def _encoder(model: Model, data: Data, run_folder: Path) -> Encoder:
    family = model_family(model)
    for key, why in family.refused_keys.items():
        if _is_set(key, model, data):
            raise UserError(f"{key}: {why}")
    module: Encode = family.encode_module()
    return module.make_encoder(model, data, run_folder, kept_template(run_folder))


def _is_set(key: str, model: Model, data: Data) -> bool:
    """Whether a key of `model` or `data` has another value than its default."""
    section, name = key.split(".")
    settings = {"model": model, "data": data}[section]
    default = type(settings).model_fields[name].get_default(call_default_factory=True)
    return getattr(settings, name) != default


def kept_template(run_folder: Path) -> str | None:
    """The chat template of the run in `run_folder`; None where none is kept there."""
    path = run_folder / TEMPLATE

    def read() -> str | None:
        return path.read_text(encoding="utf-8") if path.is_file() else None

    try:
        return patience.patiently(read, path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def require_template(folder: Path) -> None:
    """Raises UserError where the run in `folder`, which has been trained, kept no chat template."""
    if kept_template(folder) is None:
        raise UserError(
            f"{folder}: has no {TEMPLATE}: the run was begun by an earlier raysft, which did not "
            "keep its prompts and wrote some of them otherwise than transformers does; go on with "
            "that version, or start anew from its weights, under prompts that can be exported: "
            "checkpoint.resume=weights_only"
        )
