"""An audio model, encoded and trained as Qwen2-Audio is: a row, and the class of its type."""

from __future__ import annotations

from transformers import AutoConfig, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from raysft.config.families import Family, register


class MyAudioConfig(Qwen2AudioConfig):
    """Of the model type `my_audio`."""

    model_type = "my_audio"


class MyAudio(Qwen2AudioForConditionalGeneration):
    """Its class."""

    config_class = MyAudioConfig


AutoConfig.register("my_audio", MyAudioConfig, exist_ok=True)
register(
    Family(
        name="my_audio_lm",
        encode="raysft.families.audio_lm.encode",
        model="raysft.families.audio_lm.model",
        types={"my_audio": "my_audio_model:MyAudio"},
        hears=True,
        parts=("audio_tower", "multi_modal_projector"),
    )
)
