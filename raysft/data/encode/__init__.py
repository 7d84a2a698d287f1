"""Encoders: an example and its clips -> a sequence of token ids, labels and features.

Stands between `audio` and the micro-batches; one module a model family, made by `make_encoder`.
Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raysft import patience
from raysft.config.schema import Data, Model
from raysft.data import speech_tokens
from raysft.data.audio import Limits
from raysft.data.encode.base import Encoder
from raysft.data.encode.families import Family, family_of
from raysft.errors import UserError

__all__ = ["TEMPLATE", "Encoder", "make_encoder", "model_family", "require_template"]

TEMPLATE = "chat_template.jinja"
"""In a run's folder: the template whose prompts it is trained on."""


def make_encoder(model: Model, data: Data, run_folder: str | Path) -> Encoder:
    """The encoder of the configured model; no weights are read.

    A speech tokenizer must have been fitted before (`speech_tokens.fit_or_load`): it is looked
    for in `run_folder`, or at data.speech_tokens.path. The chat template is that of `run_folder`,
    where the run has one. Clips that stall are remembered there. Raises UserError.
    """
    encoder = _encoder(model, data, Path(run_folder))
    encoder.limits = Limits.of(data, Path(run_folder))
    return encoder


def _encoder(model: Model, data: Data, run_folder: Path) -> Encoder:
    if model_family(model) == "audio_lm":
        from raysft.data.encode.audio_lm import AudioLMEncoder

        if data.speech_tokens is not None:
            raise UserError(
                "data.speech_tokens: audio_lm reads audio as it is: leave data.speech_tokens out, "
                "or set model.family: causal_lm"
            )
        return AudioLMEncoder(model, data, kept_template(run_folder))
    from raysft.data.encode.causal_lm import CausalLMEncoder

    fitted = None
    if data.speech_tokens is not None:
        fitted = speech_tokens.load(data.speech_tokens, run_folder)
    return CausalLMEncoder(model, data, fitted, kept_template(run_folder))


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


def model_family(model: Model) -> Family:
    """model.family, with `auto` resolved by the model's type. Raises UserError for a model that is
    not there, and for types that cannot be trained."""
    settings = _settings(model)
    where = "model.config" if model.path is None else f"model.path: {model.path}"
    return family_of(model.family, settings, where)


def _settings(model: Model) -> dict[str, Any]:
    """What the model's config.json holds."""
    if model.config is not None:
        return dict(model.config)
    if model.path is None:
        raise UserError(
            "model: neither path nor config is given: set model.path to a folder or hub id, "
            "or model.config to a transformers config"
        )
    local = Path(model.path) / "config.json"
    if local.is_file():
        try:
            found = json.loads(local.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"model.path: {local} is no JSON ({error})") from None
        if not isinstance(found, dict):
            raise UserError(f"model.path: {local} is no config of a model (a JSON object)")
        return found
    if local.parent.is_dir():
        adapter = local.with_name("adapter_config.json").is_file()
        raise UserError(
            f"model.path: {local.parent} holds no config.json: "
            + (
                "it is an adapter; give it as peft.path, and its base as model.path"
                if adapter
                else "expected a folder that save_pretrained wrote, or a hub id"
            )
        )
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(model.path, revision=model.revision)[0]
    except OSError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"model.path: no model at {model.path!r}: {reason}") from None
