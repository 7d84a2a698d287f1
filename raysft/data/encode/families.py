"""Which family trains a model, by its type; a type that none can train is refused by name.

The type is looked at before anything else of a model: what reads or speaks audio in a way that is
not known here is not sent to a family that cannot take it.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal

from raysft.errors import UserError

Family = Literal["causal_lm", "audio_lm"]

AUDIO_LM = ("qwen2_audio",)
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


def family_of(given: str, settings: dict[str, Any], where: str) -> Family:
    """The family of a model whose config holds `settings`, given as model.family.

    where: the key that names the model, and its value, for the message. Raises UserError for a
    type that the family, or every family, cannot train.
    """
    kind = settings.get("model_type")
    if kind in AUDIO_LM:  # as causal_lm: the loader says that it has no such class
        return "causal_lm" if given == "causal_lm" else "audio_lm"
    if "auto_map" in settings or kind is None:  # code of its own: transformers says what it is
        return "audio_lm" if given == "audio_lm" else "causal_lm"
    hears, causal = _known(kind, settings)
    takes = (
        f"audio_lm knows {', '.join(AUDIO_LM)}; causal_lm the text models of "
        "AutoModelForCausalLM, with audio as units (data.speech_tokens)"
    )
    near = [] if kind in causal else get_close_matches(kind, [*AUDIO_LM, *causal], 3, TYPO)
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    if given == "audio_lm" or (hears and kind not in causal):
        if kind in causal:
            meant = " (set model.family=causal_lm)"
        raise UserError(
            f"{where}: models of type {kind!r} cannot be trained on audio{meant}: {takes}"
        )
    if kind not in causal:
        raise UserError(f"{where}: models of type {kind!r} cannot be trained{meant}: {takes}")
    return "causal_lm"


def _known(kind: str, settings: dict[str, Any]) -> tuple[bool, set[str]]:
    """Whether a type hears or speaks, and the types that are language models of text."""
    from transformers.models.auto import modeling_auto

    listed = {name for mapping in _HEARING for name in getattr(modeling_auto, mapping, ())}
    hears = kind in listed or any(part in settings for part in _AUDIO_PARTS)
    return hears, set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - listed
