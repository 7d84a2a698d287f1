"""Every model type that the family audio_lm knows, as a tiny checkpoint that is made here.

`save(kind, folder)` writes config, random weights and processor as transformers' own
`save_pretrained` does, so that what is tested loads them as it loads a real checkpoint.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
)
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

from raysft.data.tokenizer import byte_tokenizer
from tests.support import audio_voxtral
from tests.support.audio_tiny import MODES, OMNI, TINY, TURNS
from tests.support.audio_whole import WHOLE

__all__ = ["MODES", "OMNI", "TINY", "WHOLE"]


def spoken_of(kind: str) -> PreTrainedTokenizerFast:
    """Its tokenizer."""
    if kind != "voxtral":
        return tokenizer(TINY[kind].tokens)
    with tempfile.TemporaryDirectory() as scratch:
        audio_voxtral.write_tekken(Path(scratch))
        return convert_tekken_tokenizer(f"{scratch}/tekken.json", chat_template="")


def tokenizer(tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """Bytes, the markers of turns, and `tokens` as attributes of the tokenizer."""
    plain = byte_tokenizer()
    extra = {**tokens, "turn": "<|im_start|>", "end": "<|im_end|>"}
    extra |= {"boa": "<|begin_of_audio|>", "eoa": "<|end_of_audio|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens={f"{k}_token" if "_" not in k else k: v for k, v in extra.items()},
    )


def template(kind: str) -> str:
    """Its chat template: ChatML, a clip written as its kind has it."""
    tiny = TINY[kind]
    return TURNS.replace("AUDIO", tiny.shown.format(tiny.tokens[tiny.audio_key]))


def config_of(kind: str, spoken: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The settings of its config, ids of tokens included."""
    settings = copy.deepcopy(TINY[kind].config)
    for key, name in TINY[kind].ids.items():
        *parts, key = key.split(".")
        part = settings[parts[0]] if parts else settings
        part[key] = spoken.convert_tokens_to_ids(TINY[kind].tokens[name])
    text = settings.get("text_config", settings)
    text |= {
        "vocab_size": len(spoken),
        "eos_token_id": spoken.eos_token_id,
    }
    return settings


def processor_of(kind: str, spoken: PreTrainedTokenizerFast) -> Any:
    """Its processor. That of a model that sees too has no part for images."""
    import transformers

    tiny = TINY[kind]
    name, settings = tiny.extractor
    extractor = getattr(transformers, name)(**settings)
    plain = getattr(transformers, tiny.processor)

    class Hearing(plain):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, name: str, given: Any) -> Any:
            return None if given is None else super().check_argument_for_proper_class(name, given)

    parts = plain.get_attributes()
    given = dict.fromkeys(parts)
    for name in parts:
        if "tokenizer" in name:
            given[name] = spoken
        elif name in ("feature_extractor", "audio_processor"):
            given[name] = extractor
    own = plain if all(part is not None for part in given.values()) else Hearing
    return own(**given, chat_template=template(kind), **tiny.settings)


def net_of(kind: str, settings: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """The model of `settings` with random weights."""
    from raysft.config.families import named

    rest = {key: value for key, value in settings.items() if key != "model_type"}
    config = AutoConfig.for_model(settings["model_type"], **rest)
    torch.manual_seed(seed)
    net = named("audio_lm").net_class(kind)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return net.eval()


def save(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of `kind` to `folder`, as one from the hub looks."""
    spoken = spoken_of(kind)
    net_of(kind, config_of(kind, spoken), seed).save_pretrained(folder)
    if kind == "voxtral":  # which has no file of a tokenizer of transformers
        audio_voxtral.write_tekken(folder)
        WhisperFeatureExtractor(**TINY[kind].extractor[1]).save_pretrained(folder)
        return folder
    processor = processor_of(kind, spoken)
    spoken.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template(kind))
    held = getattr(processor, "feature_extractor", None) or processor.audio_processor
    held.save_pretrained(folder)
    settings = {"processor_class": TINY[kind].processor, **TINY[kind].settings}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def clip(samples: int, seed: int = 0) -> np.ndarray:
    """Noise that swells, float32 [samples]."""
    rng = np.random.default_rng(seed)
    swell = np.sin(np.linspace(0, 3, samples))
    return (0.3 * swell * rng.standard_normal(samples)).astype(np.float32)


def save_whole(kind: str, folder: Path) -> Path:
    """Write a whole checkpoint of `kind`: a thinker, and what speaks."""
    import transformers

    from raysft.families.audio_lm.types import TYPES

    save(f"{kind}_thinker", folder)
    spoken = tokenizer(OMNI)
    thinker = config_of(f"{kind}_thinker", spoken)
    thinker.pop("model_type")
    config = AutoConfig.for_model(kind, thinker_config=thinker, **copy.deepcopy(WHOLE[kind]))
    torch.manual_seed(0)
    whole = getattr(transformers, TYPES[kind].whole_net)(config)
    for parameter in whole.talker.parameters():  # transformers leaves its experts as memory was
        torch.nn.init.normal_(parameter, std=0.02)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    whole.save_pretrained(folder)
    torch.save({"one": {"ref_mel": torch.ones(2)}}, folder / "spk_dict.pt")
    return folder
