"""The type of a model decides who trains it; what nobody can train is said with what can."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from raysft.config import families
from raysft.config.families import Family, named, register
from raysft.config.load import describe, validate
from raysft.config.schema import Data, Model
from raysft.data.encode import make_encoder, model_family, net_class
from raysft.errors import UserError
from raysft.export import export_run
from raysft.models import build
from raysft.parallel import World
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support import outside
from tests.support.model_zoo import batch_of, loss_of, sequences
from tests.support.models import AUDIO, CAUSAL
from tests.support.worlds import ROOT, start, tiny

FAMILIES = ("auto", "causal_lm", "audio_lm")
HEARING = (
    *(
        "wav2vec2",
        "voxtral_realtime",
        "seamless_m4t_v2",
        "csm",
        "musicgen",
        "kyutai_speech_to_text",
    ),
    *("speecht5", "mine_asr"),
)


def model(tmp_path: Path, family: str = "auto", **settings: Any) -> Model:
    """A checkpoint's folder as far as its config goes."""
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return Model(path=str(tmp_path), family=family)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a test adds go with it."""
    monkeypatch.setattr(families, "_ROWS", dict(families._ROWS))


def refused(**sections: Any) -> str:
    """What is said of a config with these sections."""
    with pytest.raises(UserError) as raised:
        validate({"data": {"train": ["a.jsonl"], "mode": "padded"}, **sections}, "here")
    return str(raised.value)


def alone(code: str) -> None:
    """Run in a fresh process; what it asserts holds."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    assert model_family(model(tmp_path, model_type="qwen2_audio")).name == "audio_lm"
    assert model_family(model(tmp_path, model_type="whisper")).name == "seq2seq"
    assert model_family(model(tmp_path, model_type="qwen3")).name == "causal_lm"
    assert model_family(model(tmp_path, model_type="gemma3n", audio_config={})).name == "causal_lm"
    code = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    assert model_family(model(tmp_path, model_type="mine", auto_map=code)).name == "causal_lm"


@pytest.mark.parametrize("family", ["causal_lm", "audio_lm"])
def test_a_whisper_is_trained_whole_or_not_at_all(tmp_path: Path, family: str) -> None:
    """AutoModelForCausalLM would make a decoder of it that hears nothing."""
    with pytest.raises(UserError, match=r"'whisper' cannot be .*set model\.family=seq2seq"):
        model_family(model(tmp_path, family, model_type="whisper"))


def test_speech_models_that_look_alike_are_refused_with_the_reason(tmp_path: Path) -> None:
    for kind, reason in named("seq2seq").refused_types.items():
        with pytest.raises(UserError) as raised:
            model_family(model(tmp_path, model_type=kind))
        assert f"{kind!r} cannot be trained on audio ({reason}): " in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("muse_spark", "has not been tried on clips here"),
        ("vibevoice_asr", "its encoder draws noise"),
        ("kyutai_speech_to_text", "it hears step by step"),
    ],
)
def test_what_keeps_a_model_that_hears_from_training_is_said(
    tmp_path: Path, kind: str, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        model_family(model(tmp_path, model_type=kind, audio_config={}))


@pytest.mark.parametrize("kind", ["gemma4", "phi4_multimodal"])
def test_text_models_that_hear_too_are_trained_on_audio_where_that_is_asked_for(
    tmp_path: Path, kind: str
) -> None:
    settings = {"model_type": kind, "audio_config": {}}
    assert model_family(model(tmp_path, **settings)).name == "causal_lm"
    assert model_family(model(tmp_path, "causal_lm", **settings)).name == "causal_lm"
    assert model_family(model(tmp_path, "audio_lm", **settings)).name == "audio_lm"


def test_a_text_model_as_audio_lm_says_what_hears_and_what_else_there_is(tmp_path: Path) -> None:
    said = (
        r"set model.family=causal_lm.*audio_lm knows qwen2_audio, qwen3_asr, .*data\.speech_tokens"
    )
    with pytest.raises(UserError, match=said):
        model_family(model(tmp_path, "audio_lm", model_type="qwen3"))


@pytest.mark.parametrize(("kind", "near"), [("qwen-3", "qwen3"), ("lama", "llama")])
def test_near_names_are_offered(kind: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"model.config: .*{kind}.*did you mean .*{near}"):
        model_family(Model(config={"model_type": kind}))


def test_another_model_of_its_kin_is_not_offered_in_its_place() -> None:
    settings = {"model_type": "qwen9_tts", "audio_config": {}}
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


@pytest.mark.parametrize("family", families.families(), ids=lambda family: family.name)
def test_what_a_row_names_is_there(family: Family) -> None:
    assert callable(family.encode_module().make_encoder)
    assert callable(family.model_module().make_model)
    for kind in family.types:
        part = {"qwen2_5_omni": "_thinker", "qwen3_omni_moe": "_thinker"}.get(kind, "")
        assert family.net_class(kind).config_class.model_type == f"{kind}{part}"
        assert families.owner(kind) == (None if kind in family.asked_for else family)


def test_a_name_that_is_no_family_is_refused_with_those_there_are() -> None:
    said = (
        "model.family: expected 'auto', 'causal_lm', 'audio_lm', 'patch_lm', 'seq2seq', "
        "'flow_decoder' or 'pair'"
    )
    assert said in refused(model={**CAUSAL, "family": "audio"})
    with pytest.raises(UserError, match=said):
        model_family(Model(**CAUSAL).model_copy(update={"family": "audio"}))
    names = "auto|causal_lm|audio_lm|patch_lm|seq2seq|flow_decoder|pair"
    assert f"  model.family ({names}; default 'auto')\n" in describe()


@pytest.mark.usefixtures("table")
def test_a_name_is_given_once() -> None:
    for _ in "it and itself":
        register(outside.TEXT_FAMILY)
    for row in (replace(outside.TEXT_FAMILY), replace(named("audio_lm")), Family("auto", "", "")):
        with pytest.raises(UserError, match=f"there is a family {row.name} already"):
            register(row)


@pytest.mark.usefixtures("table")
def test_a_new_type_of_audio_model_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config = outside.HEARING, outside.OutsideAudioConfig
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, kind, config)
    given = Model(**{**AUDIO, "config": {**AUDIO["config"], "model_type": kind}})
    with pytest.raises(UserError, match=f"{kind}' cannot be trained on audio: "):
        model_family(given)
    register(outside.HEARING_FAMILY)
    assert model_family(given) is outside.HEARING_FAMILY
    assert model_family(Model(**AUDIO)) is named("audio_lm")
    said = refused(model=given.model_dump(), peft={"method": "prefix"})
    assert "prefix does not work with outside_audio_lm (its attention takes none)" in said
    data = Data()
    adapter = build(given, data, make_encoder(given, data, "unused"), 0)
    assert type(adapter.net) is outside.OutsideAudio
    plain = build(Model(**AUDIO), data, make_encoder(Model(**AUDIO), data, "unused"), 0)
    losses = []
    for one in (adapter, plain):
        one.model.eval()
        heard = sequences(one, [5, 9], mels=80)
        losses.append(loss_of(one, one.collate(batch_of(*heard))).sum.item())
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("table")
def test_a_new_family_is_a_folder_and_a_row(tmp_path: Path) -> None:
    register(outside.TEXT_FAMILY)
    changes = {"train__max_steps": 2, "model__speech_units": 20}
    runs = {}
    for family in ("outside_lm", "auto"):
        config = tiny(tmp_path, family, model__family=family, **changes)
        job = start(config, World.current())
        train(job)
        runs[family] = job
    assert type(runs["outside_lm"].stream.speech_model) is outside.OutsideLM
    losses = [
        [line["loss"] for line in read_lines(job.folder / "metrics.jsonl")] for job in runs.values()
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    export_run(runs["outside_lm"].folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    config = tiny(tmp_path, "noisy", model__family="outside_lm", data__unit_noise=0.1)
    with pytest.raises(UserError, match=r"data\.unit_noise: outside_lm has its own noise"):
        make_encoder(config.model, config.data, tmp_path)
    said = refused(model={**CAUSAL, "family": "audio"})
    assert "'flow_decoder', 'pair' or 'outside_lm' (did you mean audio_lm?)" in said


@pytest.mark.usefixtures("table")
def test_a_type_of_another_family_is_sent_there() -> None:
    register(Family("outside_encoder", "", "", types={"bert": "transformers:BertModel"}))
    for config, family in ((AUDIO, "audio_lm"), (CAUSAL, "causal_lm")):
        given = Model(**{**config, "family": "outside_encoder"})
        with pytest.raises(UserError, match=rf"as outside_encoder \(set model.family={family}\)"):
            model_family(given)
    assert net_class(Model(config={"model_type": "bert"})).__name__ == "BertModel"


def test_the_table_loads_nothing_that_it_names() -> None:
    alone("""
import sys, raysft.config, raysft.families, raysft.data.encode
assert not {"torch", "transformers"} & set(sys.modules)
assert not [name for name in sys.modules if name.startswith("raysft.families.")]
""")


@pytest.mark.slow
def test_a_model_is_built_without_the_code_of_another_family() -> None:
    """Seconds at the start of every worker, where it loaded that."""
    alone("""
import sys
from raysft.config.schema import Data, Model
from raysft.data.encode import make_encoder
from raysft.models import build
from tests.support.models import CAUSAL
model, data = Model(**CAUSAL), Data()
build(model, data, make_encoder(model, data, "unused"), 0)
loaded = [name for name in sys.modules if "audio_lm" in name or "modeling_qwen2_audio" in name]
assert not loaded, loaded
""")
