"""The type of a model decides who trains it; what nobody can train is said with what can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raysft.config.schema import Model
from raysft.data.encode import model_family
from raysft.errors import UserError

FAMILIES = ("auto", "causal_lm", "audio_lm")
HEARING = (
    *("whisper", "wav2vec2", "qwen3_asr", "voxtral", "granite_speech", "seamless_m4t_v2", "csm"),
    *("qwen2_5_omni", "qwen3_omni_moe", "musicgen", "glmasr"),
)


def model(tmp_path: Path, family: str = "auto", **settings: Any) -> Model:
    """A checkpoint's folder as far as its config goes."""
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return Model(path=str(tmp_path), family=family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", HEARING)
def test_audio_models_of_other_kinds_are_refused_whatever_the_family(
    tmp_path: Path, kind: str, family: str
) -> None:
    parts = {"audio_config": {}} if kind == "glmasr" else {}
    with pytest.raises(UserError) as caught:
        model_family(model(tmp_path, family, model_type=kind, **parts))
    said = str(caught.value)
    assert f"model.path: {tmp_path}: models of type {kind!r} cannot be trained" in said
    assert "qwen2_audio" in said and "data.speech_tokens" in said
    assert "model.family" not in said and "\n" not in said


def test_what_can_be_trained_goes_to_its_family(tmp_path: Path) -> None:
    assert model_family(model(tmp_path, model_type="qwen2_audio")) == "audio_lm"
    assert model_family(model(tmp_path, model_type="qwen3")) == "causal_lm"
    assert model_family(model(tmp_path, model_type="gemma3n", audio_config={})) == "causal_lm"
    code = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    assert model_family(model(tmp_path, model_type="mine", auto_map=code)) == "causal_lm"


def test_a_text_model_as_audio_lm_says_what_hears_and_what_else_there_is(tmp_path: Path) -> None:
    said = r"set model.family=causal_lm.*audio_lm knows qwen2_audio; .*data\.speech_tokens"
    with pytest.raises(UserError, match=said):
        model_family(model(tmp_path, "audio_lm", model_type="qwen3"))


@pytest.mark.parametrize(("kind", "near"), [("qwen-3", "qwen3"), ("lama", "llama")])
def test_near_names_are_offered(kind: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"model.config: .*{kind}.*did you mean .*{near}"):
        model_family(Model(config={"model_type": kind}))


def test_another_model_of_its_kin_is_not_offered_in_its_place() -> None:
    settings = {"model_type": "qwen3_asr", "audio_config": {}}
    with pytest.raises(UserError) as raised:
        model_family(Model(config=settings))
    assert "did you mean" not in str(raised.value)


@pytest.mark.parametrize(
    ("inside", "said"),
    [("model.safetensors", "a folder that save_pretrained wrote"), ("adapter_config.json", "peft")],
)
def test_a_folder_without_a_config_is_said_at_once(inside: str, said: str, tmp_path: Path) -> None:
    (tmp_path / inside).write_text("{}")
    with pytest.raises(UserError, match=rf"model\.path: .* holds no config\.json: .*{said}"):
        model_family(Model(path=str(tmp_path)))


def test_near_names_are_offered_for_models_that_hear() -> None:
    settings = {"model_type": "qwen2_audoi", "audio_config": {}}
    with pytest.raises(UserError, match=r"qwen2_audoi.*did you mean qwen2_audio"):
        model_family(Model(config=settings))


def test_other_models_of_transformers_are_refused(tmp_path: Path) -> None:
    for kind in ("vit", "t5", "llava"):
        with pytest.raises(UserError, match=f"models of type '{kind}' cannot be trained"):
            model_family(model(tmp_path, model_type=kind))
