"""Families of models: a row each. Whoever has to know what a model is asks its row.

Pure data: the modules and classes that a row names are imported when they are asked for. A new
family is a row here and a folder in `raysft.families`, or a row given to `register`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from raysft.config.marks import one_of
from raysft.errors import UserError

AUTO = "auto"  # model.family: by the model's type
CAUSAL_LM = "AutoModelForCausalLM"
_UNTRIED = "a large mixture of experts that has not been tried on clips here"
_STREAM = "it hears step by step beside its text, not in place of tokens"
REMEDIES = ("lora", "adalora", "ia3")  # peft.method to name instead of one that cannot be had


@dataclass(frozen=True)
class Family:
    """Models of one kind, and what encodes for them and trains them.

    name: as `model.family` has it.
    encode: module with `make_encoder`, see `raysft.data.encode.Encode`.
    model: module with `make_model`, see `raysft.models.Build`.
    types: model type -> the class that builds it, "module:class".
    asked_for: those of `types` that it trains only where model.family names it: with `auto` they
        are another family's.
    every_causal_lm: whether it takes all types of AutoModelForCausalLM as well.
    hears: whether its models read audio as it is.
    writes: whether they read and write text: others have no tokenizer.
    speaks: whether they speak mel spectrograms (`Encoder.sounds`).
    alone: whether no other family may take its types, though AutoModelForCausalLM has them: as
        half a model.
    parts: their modules beside the language model, which is quantised without them.
    objectives: what `train.objective` may be; beside sft they ask of its models that their losses
        are `models.supervised.Supervised`; grpo, that they sample tokens.
    refused_types: model type that looks like one of its own -> why it cannot be trained.
    refused_keys: key of `data` or `model` that cannot be set -> why, and the remedy.
    refused_methods: `peft.method` that cannot train them -> why.
    """

    name: str
    encode: str
    model: str
    types: Mapping[str, str] = field(default_factory=dict)
    asked_for: tuple[str, ...] = ()
    every_causal_lm: bool = False
    hears: bool = False
    writes: bool = True
    speaks: bool = False
    alone: bool = False
    parts: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ("sft",)
    refused_types: Mapping[str, str] = field(default_factory=dict)
    refused_keys: Mapping[str, str] = field(default_factory=dict)
    refused_methods: Mapping[str, str] = field(default_factory=dict)

    def encode_module(self) -> ModuleType:
        """The module that makes its encoders. Imports neither torch nor transformers."""
        return import_module(self.encode)

    def model_module(self) -> ModuleType:
        """The module that makes its models. Imports torch and transformers."""
        return import_module(self.model)

    def net_class(self, kind: str | None) -> Any:
        """The class of transformers that builds models of type `kind`: of that model, or an auto
        class. Raises UserError for a type that is none of the family's."""
        self.check_type(kind)
        return pkgutil.resolve_name(self.types.get(kind or "", f"transformers:{CAUSAL_LM}"))

    def check_type(self, kind: str | None) -> None:
        """Raises UserError for a model type that cannot be one of the family's."""
        if not self.every_causal_lm and kind not in self.types:
            raise UserError(
                f"model.family: {self.name} knows {', '.join(self.types)}, not {kind!r}"
            )

    def refusal(self, method: str) -> str | None:
        """Why peft.method `method` cannot train these models; None: it can."""
        why = self.refused_methods.get(method)
        if why is None:
            return None
        others = [name for name in REMEDIES if name not in self.refused_methods]
        remedy = one_of(others or ["none"])
        return f"{method} does not work with {self.name} ({why}); use {remedy}"


_ROWS: dict[str, Family] = {}


def register(family: Family) -> None:
    """Add a row to the table, in every process that reads the config or makes encoders or models.

    With `model.family: auto` a type that two rows have goes to the one that came first. Raises
    UserError for a name that another row has.
    """
    if _ROWS.get(family.name) is family:
        return
    if family.name == AUTO or family.name in _ROWS:
        raise UserError(f"there is a family {family.name} already: give this one another name")
    _ROWS[family.name] = family


def families() -> tuple[Family, ...]:
    """All rows, in the order in which they came."""
    return tuple(_ROWS.values())


def named(name: str) -> Family:
    """The row of this name. Raises UserError where there is none."""
    if name not in _ROWS:
        known = one_of([repr(choice) for choice in choices()])
        raise UserError(f"model.family: expected {known}, found {name!r}")
    return _ROWS[name]


def choices() -> list[str]:
    """What `model.family` takes."""
    return [AUTO, *_ROWS]


def owner(kind: str | None) -> Family | None:
    """The row that names the model type `kind` itself, for `auto`; None: no row does."""
    rows = (row for row in families() if kind in row.types and kind not in row.asked_for)
    return next(rows, None)


def any_text() -> Family:
    """The row that takes types of AutoModelForCausalLM that no row names."""
    return next(row for row in families() if row.every_causal_lm)


def by_type() -> str:
    """Which types `auto` gives to which family, in words."""
    said = [
        f"{kind}: {row.name}"
        for row in families()
        for kind in row.types
        if kind not in row.asked_for
    ]
    return ", ".join([*said, f"others: {any_text().name}"])


_OBJECTIVES = ("sft", "grpo", "dpo")
_UNTOLD = "only seq2seq is told which language is spoken: leave it out"
_NO_CHAT = "patch_lm writes the sequences of Ming-UniAudio: leave it out"
_NO_TEXT = "flow_decoder reads no text: leave it out"
_NO_DIALOGUE = (
    "seq2seq writes no dialogue: tokens of language and task stand before the text; leave it out"
)

register(
    Family(
        name="causal_lm",
        encode="raysft.families.causal_lm.encode",
        model="raysft.families.causal_lm.model",
        every_causal_lm=True,
        objectives=_OBJECTIVES,
        refused_keys={
            "data.language": _UNTOLD,
            "data.audio_per_batch": "causal_lm has no audio encoder: leave it out",
        },
    )
)
register(
    Family(
        name="audio_lm",
        encode="raysft.families.audio_lm.encode",
        model="raysft.families.audio_lm.model",
        types={
            "qwen2_audio": "transformers:Qwen2AudioForConditionalGeneration",
            "qwen3_asr": "transformers:Qwen3ASRForConditionalGeneration",
            "qwen2_5_omni": "transformers:Qwen2_5OmniThinkerForConditionalGeneration",
            "qwen2_5_omni_thinker": "transformers:Qwen2_5OmniThinkerForConditionalGeneration",
            "qwen3_omni_moe": "transformers:Qwen3OmniMoeThinkerForConditionalGeneration",
            "qwen3_omni_moe_thinker": "transformers:Qwen3OmniMoeThinkerForConditionalGeneration",
            "audioflamingo3": "transformers:AudioFlamingo3ForConditionalGeneration",
            "musicflamingo": "transformers:MusicFlamingoForConditionalGeneration",
            "glmasr": "transformers:GlmAsrForConditionalGeneration",
            "granite_speech": "transformers:GraniteSpeechForConditionalGeneration",
            "granite_speech_plus": "transformers:GraniteSpeechPlusForConditionalGeneration",
            "phi4_multimodal": "transformers:Phi4MultimodalForCausalLM",
            "gemma4": "transformers:Gemma4ForConditionalGeneration",
            "gemma4_unified": "transformers:Gemma4UnifiedForConditionalGeneration",
            "moss_transcribe_diarize": "transformers:MossTranscribeDiarizeForConditionalGeneration",
            "gemma3n": "transformers:Gemma3nForConditionalGeneration",
            "fun_asr_nano": "transformers:FunAsrNanoForConditionalGeneration",
            "voxtral": "transformers:VoxtralForConditionalGeneration",
        },
        asked_for=(
            *("phi4_multimodal", "gemma4", "gemma4_unified", "gemma3n"),
            "moss_transcribe_diarize",
        ),  # with auto they are trained on text
        refused_types={
            "voxtral_realtime": _STREAM,
            "kyutai_speech_to_text": _STREAM,
            "vibevoice_asr": "its dialogues say in text how many seconds a clip has, and its "
            "encoder draws noise for each clip",
            "nemo_speechlm": "its encoder adds to each frame who speaks, decided by a threshold, "
            "and its Mamba layers carry a state from one document to the next",
            "muse_spark": _UNTRIED,
            "dots3_note": _UNTRIED,
            "inkling_mm_model": _UNTRIED,
            "nemotron_h_omni": "its Mamba layers carry a state from one document to the next",
        },
        hears=True,
        objectives=_OBJECTIVES,
        parts=(
            *("audio_tower", "multi_modal_projector", "embed_audio", "embed_tokens_extend"),
            *("encoder", "projector", "visual", "vision_tower", "embed_vision"),
        ),
        refused_keys={
            "data.language": _UNTOLD,
            "data.speech_tokens": "audio_lm reads audio as it is: leave data.speech_tokens out, "
            "or set model.family: causal_lm",
            "model.unit_markers": "stand around units, which audio_lm does not read: leave it out",
            "model.extra_tokens": "are for causal_lm: leave them out",
            "model.speech_units": "audio_lm reads audio as it is, no units: leave it out, or set "
            "model.family: causal_lm",
        },
        refused_methods={
            "prefix": "transformers' audio models take no prefix",
            "prompt": "prompt tuning replaces the embeddings in which the audio lies: it would be "
            "ignored",
        },
    )
)
register(
    Family(
        name="patch_lm",
        encode="raysft.families.patch_lm.encode",
        model="raysft.families.patch_lm.model",
        types={"raysft_patch_lm": "raysft.families.patch_lm.net:PatchLMForCausalLM"},
        every_causal_lm=True,
        hears=True,
        speaks=True,
        alone=True,
        parts=("pooling", "flow_head", "stop_head"),
        refused_keys={
            "data.language": _UNTOLD,
            "data.supervise": _NO_CHAT,
            "data.template": _NO_CHAT,
            "data.features": "patch_lm reads the frames of model.patches: leave it out",
            "data.speech_tokens": "patch_lm hears and speaks patches, no units: leave it out",
            "data.unit_noise": "patch_lm hears and speaks patches, no units: leave it out",
            "data.audio_per_batch": "patch_lm has no audio encoder: leave it out",
            "model.unit_markers": "patch_lm hears and speaks patches, no units: leave it out",
            "model.extra_tokens": "are for causal_lm: leave them out",
            "model.speech_units": "patch_lm hears and speaks patches, no units: leave it out",
        },
        refused_methods={
            "prefix": "transformers' own models alone take a prefix",
            "prompt": "prompt tuning replaces the embeddings in which patches lie: they would be "
            "ignored",
        },
    )
)
register(
    Family(
        name="seq2seq",
        encode="raysft.families.seq2seq.encode",
        model="raysft.families.seq2seq.model",
        types={
            "whisper": "transformers:WhisperForConditionalGeneration",
            "moonshine": "transformers:MoonshineForConditionalGeneration",
            "cohere_asr": "transformers:CohereAsrForConditionalGeneration",
            "canary": "transformers:CanaryForConditionalGeneration",
            "speech_to_text": "transformers:Speech2TextForConditionalGeneration",
        },
        hears=True,
        alone=True,
        refused_types={"moonshine_streaming": "it has not been tried here"},
        refused_keys={
            "data.prompts": _NO_DIALOGUE,
            "data.supervise": _NO_DIALOGUE,
            "data.template": _NO_DIALOGUE,
            "data.features": "seq2seq reads its model's own features: leave it out",
            "data.speech_tokens": "seq2seq reads audio as it is: leave data.speech_tokens out",
            "data.unit_noise": "seq2seq reads audio as it is, no units: leave it out",
            "data.audio_per_batch": "what seq2seq's encoder computes of a clip counts in "
            "data.tokens_per_batch: leave it out",
            "model.unit_markers": "stand around units, which seq2seq does not read: leave them out",
            "model.extra_tokens": "are for causal_lm: leave them out",
            "model.speech_units": "seq2seq reads audio as it is, no units: leave it out",
        },
        refused_methods={
            "prefix": "its decoder begins with tokens of language and task",
            "prompt": "its decoder begins with tokens of language and task",
        },
    )
)
register(
    Family(
        name="flow_decoder",
        encode="raysft.families.flow_decoder.encode",
        model="raysft.families.flow_decoder.model",
        types={"raysft_flow_decoder": "raysft.families.flow_decoder.net:FlowDecoder"},
        writes=False,
        speaks=True,
        alone=True,
        refused_keys={
            **dict.fromkeys(
                (
                    *("data.language", "data.prompts", "data.supervise", "data.template"),
                    *("model.tokenizer", "model.unit_markers", "model.extra_tokens"),
                ),
                _NO_TEXT,
            ),
            "data.features": "flow_decoder reads no clips, and learns the mel of model.config.mel: "
            "leave it out",
            "data.unit_noise": "flow_decoder learns what units sound like: leave it out",
            "data.audio_per_batch": "flow_decoder has no audio encoder: leave it out",
            "data.augment": "flow_decoder would learn to make what was varied: leave it out",
            "model.speech_units": "flow_decoder has model.config.codebooks: leave it out",
            "model.unit_token": "flow_decoder reads units as they are: leave it out",
        },
        refused_methods={
            "qlora": "its weights are few",
            "prefix": "it reads no prompt of tokens",
            "prompt": "it reads no prompt of tokens",
        },
    )
)
register(
    Family(
        name="pair",
        encode="raysft.families.pair.encode",
        model="raysft.families.pair.model",
        types={"raysft_pair": "raysft.families.pair.net:PairForCausalLM"},
        speaks=True,
        alone=True,
        refused_keys={
            "data.language": _UNTOLD,
            "data.features": "a pair reads no clips, and learns the mel of its decoder: leave it "
            "out",
            "data.unit_noise": "the decoder of a pair learns what units sound like: leave it out",
            "data.audio_per_batch": "a pair has no audio encoder: leave it out",
            "data.augment": "the decoder of a pair would learn to make what was varied: leave it "
            "out",
        },
        refused_methods={
            "qlora": "the weights of its decoder are few: train stages apart",
            "prefix": "transformers' own models alone take a prefix",
            "prompt": "transformers' own models alone take positions",
        },
    )
)
