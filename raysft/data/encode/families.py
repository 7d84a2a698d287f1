"""Which family trains a model, by its type; a type that none can train is refused by name.

The type is looked at before anything else of a model: what reads or speaks audio in a way that is
not known here is not sent to a family that cannot take it.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from raysft.config.families import AUTO, Family, any_text, families, named, owner
from raysft.config.schema import Model
from raysft.errors import UserError, first_line
from raysft.json_types import JsonObject

TYPO = 0.85  # likeness from which a name is offered: another model of its kin is no typing error

# Lists of transformers (model type -> class) whose models hear or speak.
_HEARING = (
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES",
)
# Parts of a model's config that only one with an audio side has.
_AUDIO_PARTS = ("audio_config", "speech_config", "thinker_config", "num_mel_bins")


def model_family(model: Model) -> Family:
    """The row of model.family, with `auto` resolved by the model's type. Raises UserError for a
    model that is not there, and for types that cannot be trained."""
    return _family_and_type(model)[0]


def check_model(model: Model) -> None:
    """Look for mistakes in the section `model` that its family can tell without data. Raises
    UserError as `model_family` does, and naming the key."""
    found = getattr(model_family(model).encode_module(), "check_model", None)
    if found is not None:
        found(model)


def net_class(model: Model) -> Any:
    """The class of transformers that builds the model: its own, or an auto class. Imports torch.

    Raises UserError as `model_family` does, and for a type that its family does not know.
    """
    family, kind = _family_and_type(model)
    return family.net_class(kind)


def model_type(model: Model) -> str | None:
    """The type of the model, by its config. Raises UserError as `model_family` does."""
    return _family_and_type(model)[1]


def _family_and_type(model: Model) -> tuple[Family, str | None]:
    settings = _settings(model)
    where = "model.config" if model.path is None else f"model.path: {model.path}"
    return _family_of(model.family, settings, where), settings.get("model_type")


def _family_of(given: str, settings: JsonObject, where: str) -> Family:
    """The family of a model whose config holds `settings`, given as model.family.

    where: the key that names the model, and its value, for the message. Raises UserError for a
    type that the family, or every family, cannot train.
    """
    kind = settings.get("model_type")
    chosen = None if given == AUTO else named(given)
    if chosen is not None and kind in chosen.types:
        return chosen
    own = owner(kind)
    if own is not None and chosen is None:
        return own
    if own is not None and not own.alone and chosen is not None and chosen.every_causal_lm:
        return chosen  # the loader says that it has no such class
    if own is None and ("auto_map" in settings or kind is None):
        return chosen or any_text()  # code of its own: transformers says what it is
    assert kind is not None  # none of a row, nor without a row
    hears, causal = _known(kind, settings)
    if kind in causal and (chosen is None or chosen.every_causal_lm):
        return chosen or any_text()
    right = any_text() if own is None and kind in causal else own
    types = [name for row in families() for name in row.types]
    near = [] if right else get_close_matches(kind, [*types, *causal], 3, TYPO)
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    how = " on audio" if hears or (chosen is not None and chosen.hears) else ""
    if chosen is not None and right is not None:  # another family would take it
        meant = f" (set model.family={right.name})"
        how = " on audio" if chosen.hears else f" as {chosen.name}"
    reasons = [row.refused_types[kind] for row in families() if kind in row.refused_types]
    meant += f" ({reasons[0]})" if reasons else ""
    known = [f"{row.name} knows {', '.join(row.types)}; " for row in families() if row.types]
    raise UserError(
        f"{where}: models of type {kind!r} cannot be trained{how}{meant}: {''.join(known)}"
        f"{any_text().name} the text models of AutoModelForCausalLM, with audio as units "
        "(data.speech_tokens)"
    )


def _known(kind: str, settings: JsonObject) -> tuple[bool, set[str]]:
    """Whether a type hears or speaks, and the types that are language models of text."""
    from transformers.models.auto import modeling_auto

    listed = {name for mapping in _HEARING for name in getattr(modeling_auto, mapping, ())}
    hears = kind in listed or any(part in settings for part in _AUDIO_PARTS)
    return hears, set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - listed


def _settings(model: Model) -> JsonObject:
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
        raise UserError(f"model.path: no model at {model.path!r}: {first_line(error)}") from None
