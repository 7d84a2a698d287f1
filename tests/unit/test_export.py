"""An exported folder is one that plain transformers loads, with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
)

from raysft.config import schema
from raysft.data.encode import make_encoder
from raysft.data.example import Audio, Example
from raysft.data.text import byte_tokenizer
from raysft.errors import UserError
from raysft.export import export
from raysft.families.audio_lm.encode import FEATURES
from raysft.models import PREFIX, SpeechModel, build
from raysft.models.base import Document
from raysft.models.loading import grow_vocabulary
from tests.support.model_zoo import CONFIGS, clip_inputs, make, sequences, settings


def logits(net: torch.nn.Module, adapter: SpeechModel) -> torch.Tensor:
    documents = sequences(adapter, [9])
    ids = torch.tensor(documents[0].input_ids[None].astype(np.int64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if documents[0].arrays:
        inputs |= clip_inputs(adapter, documents[0].arrays[FEATURES][0])
    with torch.no_grad():
        return net.eval()(**inputs).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_exported_logits_equal_ours(name: str, tmp_path: Path) -> None:
    adapter = make(name, seed=5)
    folder = export(adapter, tmp_path / "new" / "out")
    auto = Qwen2AudioForConditionalGeneration if name == "qwen2_audio" else AutoModelForCausalLM
    net = auto.from_pretrained(folder)
    assert net.config.get_text_config()._attn_implementation == "sdpa"
    assert next(net.parameters()).dtype == torch.float32
    torch.testing.assert_close(
        logits(net, adapter), logits(adapter.model, adapter), rtol=1e-5, atol=1e-5
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == adapter.tokenizer.get_vocab()
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == adapter.stop_ids
    assert [p.name for p in folder.parent.iterdir()] == ["out"], "nothing is left beside it"


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_moe", "qwen2_audio"])
def test_weights_of_a_wrapped_model_are_exported_in_place_of_its_own(
    name: str, tmp_path: Path
) -> None:
    trained, adapter = make(name, seed=1), make(name, seed=2)
    weights = {PREFIX + k: v.clone() for k, v in trained.model.state_dict().items()}
    folder = export(adapter, tmp_path / "out", weights)
    auto = Qwen2AudioForConditionalGeneration if name == "qwen2_audio" else AutoModelForCausalLM
    torch.testing.assert_close(
        logits(auto.from_pretrained(folder), adapter),
        logits(trained.model, adapter),
        rtol=1e-5,
        atol=1e-5,
    )


def test_incomplete_weights_are_not_exported(tmp_path: Path) -> None:
    adapter = make("qwen3")
    weights = dict(adapter.model.state_dict())
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as model.norm.weight"):
        export(adapter, tmp_path / "out", weights)
    assert not list(tmp_path.iterdir())


def test_the_exported_processor_gives_the_inputs_that_were_trained_on(tmp_path: Path) -> None:
    model, data = settings("qwen2_audio"), schema.Data()
    encoder = make_encoder(model, data, "unused")
    adapter = build(model, data, encoder, 0)
    folder = export(adapter, tmp_path / "out")

    wave = np.random.default_rng(0).standard_normal(3210).astype(np.float32)
    example = Example("a", "asr", (Audio("a.wav"),), ("yes",), instruction="Write.")
    prompt = encoder.prompt(example, [wave])
    ours = adapter.features([Document(prompt.input_ids, prompt.labels, "asr", prompt.arrays)])

    processor = AutoProcessor.from_pretrained(folder)
    asked = [{"type": "text", "text": "Write."}, {"type": "audio", "audio": wave}]
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": asked}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert prompt.input_ids.tolist() == theirs["input_ids"][0].tolist()
    width = ours["feature_attention_mask"].shape[1]  # behind a clip's end the encoder is cut off
    mask, features = theirs["feature_attention_mask"].long(), theirs["input_features"]
    assert torch.equal(ours["feature_attention_mask"], mask[:, :width])
    assert not mask[:, width - 1 :].any()
    torch.testing.assert_close(ours["input_features"], features[..., :width], rtol=0, atol=1e-4)


def test_a_model_of_fbank_is_exported_with_its_extractor_in_place_of_a_processor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = settings("qwen2_audio"), schema.Data(features="fbank")
    encoder = make_encoder(model, data, "unused")
    adapter = build(model, data, encoder, 0)
    folder = export(adapter, tmp_path / "out")
    assert "no processor is exported" in caplog.text
    assert "max_length=100" in caplog.text

    wave = np.random.default_rng(0).standard_normal(3210).astype(np.float32)
    example = Example("a", "asr", (Audio("a.wav"),), ("yes",), instruction="")
    prompt = encoder.prompt(example, [wave])
    ours = adapter.features([Document(prompt.input_ids, prompt.labels, "asr", prompt.arrays)])
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    theirs = extractor(
        wave, sampling_rate=16000, padding="max_length", max_length=100, return_tensors="pt"
    )
    width = ours["feature_attention_mask"].shape[1]  # behind a clip's end the encoder is cut off
    assert torch.equal(ours["input_features"], theirs["input_features"].mT[..., :width])
    assert torch.equal(ours["feature_attention_mask"], theirs["attention_mask"].long()[:, :width])
    assert not theirs["attention_mask"][:, width - 1 :].any()
    # Whoever takes the processor all the same is stopped, not misled.
    with pytest.raises(ValueError, match="max_length"):
        processor = AutoProcessor.from_pretrained(folder)
        processor(text="<|AUDIO|>", audio=[wave], sampling_rate=16000, return_tensors="pt")

    # Training can go on from the folder, with the same features.
    path = schema.Model(path=str(folder))
    for kind in ("model", "fbank"):
        again = make_encoder(path, schema.Data(features=kind), "unused")
        assert np.array_equal(
            again.prompt(example, [wave]).arrays[FEATURES], prompt.arrays[FEATURES]
        )
        twice = build(path, schema.Data(features=kind), again, 0)
        assert (export(twice, tmp_path / kind) / "preprocessor_config.json").exists()
        assert not (tmp_path / kind / "processor_config.json").exists()


def test_a_model_with_a_template_of_its_own_is_exported_with_it_and_trained_on_by_it(
    tmp_path: Path,
) -> None:
    tokenizer = byte_tokenizer()
    markers = ["<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    tokenizer.chat_template = Qwen2AudioProcessor.default_chat_template.fget(None)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = settings("qwen2_audio").model_copy(update={"tokenizer": str(tmp_path / "tokenizer")})
    encoder = make_encoder(model, schema.Data(), "unused")
    folder = export(build(model, schema.Data(), encoder, 0), tmp_path / "out")

    wave = np.random.default_rng(0).standard_normal(3210).astype(np.float32)
    example = Example("a", "asr", (Audio("a.wav"),), ("yes",), instruction="Write.")
    ours = encoder.prompt(example, [wave]).input_ids.tolist()
    processor = AutoProcessor.from_pretrained(folder)
    asked = [{"type": "audio", "audio": wave}, {"type": "text", "text": "Write."}]
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": asked}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    assert ours == theirs["input_ids"][0]
    path = schema.Model(path=str(folder))
    assert (
        make_encoder(path, schema.Data(), "unused").prompt(example, [wave]).input_ids.tolist()
        == ours
    )
    # The hub's Qwen2-Audio has no template in its files: transformers' own is the model's.
    (folder / "chat_template.jinja").unlink()
    assert (
        make_encoder(path, schema.Data(), "unused").prompt(example, [wave]).input_ids.tolist()
        == ours
    )


@pytest.mark.parametrize("name", ["qwen3", "qwen2_audio"])
def test_training_goes_on_from_an_export_with_the_same_prompts(name: str, tmp_path: Path) -> None:
    """No template of somebody else's, whose tokens the model does not know, is written there."""
    model, data = settings(name), schema.Data()
    encoder = make_encoder(model, data, "unused")
    folder = export(build(model, data, encoder, 0), tmp_path / "out")
    again = make_encoder(schema.Model(path=str(folder)), data, "unused")
    assert again.template.source == encoder.template.source
    assert again.end_id == encoder.end_id
    given = (Audio("a.wav"),) if name == "qwen2_audio" else ("one",)
    waves = [np.ones(3210, np.float32)] * (name == "qwen2_audio")
    example = Example("a", "asr", given, ("yes",), instruction="Write.")
    first, second = (each.encode(example, waves) for each in (encoder, again))
    assert first.input_ids.tolist() == second.input_ids.tolist()


def test_the_chat_template_is_exported(tmp_path: Path) -> None:
    adapter = make("qwen3")
    adapter.tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    folder = export(adapter, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        export(make("qwen3"), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        export(make("qwen3"), tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "x"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert (export(make("qwen3"), tmp_path) / "config.json").exists()


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make("qwen3")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter.tokenizer, "save_pretrained", full)
    with pytest.raises(UserError, match=r"cannot write .*out: No space left on device"):
        export(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "shipped",
    [
        {"temperature": 0.9, "top_p": 0.6},  # Llama-2
        {"temperature": 1e-6, "repetition_penalty": 1.1},
        {"do_sample": False, "top_k": 7, "typical_p": 0.9, "min_p": 0.1},
        {"early_stopping": True, "length_penalty": 2.0},
        {"output_scores": True, "output_attentions": True},
        {"use_cache": False, "cache_implementation": "static"},
    ],
)
def test_a_base_with_an_invalid_generation_config_is_exported_without_what_is_invalid(
    shipped: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = export(make("llama"), tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 257, **shipped}))
    model = schema.Model(path=str(base))
    adapter = build(model, schema.Data(), make_encoder(model, schema.Data(), "unused"), 0)
    caplog.clear()
    folder = export(adapter, tmp_path / "out")
    written = json.loads((folder / "generation_config.json").read_text())
    GenerationConfig.from_pretrained(folder).validate(strict=True)
    left = [name for name in shipped if name not in written and name != "do_sample"]
    assert written.get("repetition_penalty") == shipped.get("repetition_penalty")
    assert {name for name in shipped if name not in written} >= set(left) and left
    for name in left:
        assert f"{name}: {shipped[name]}" in caplog.text
    ids = torch.tensor([[5, 6, 7]])
    plain = AutoModelForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=4)
    greedy = {"do_sample": False, "num_return_sequences": 1, "max_new_tokens": 4}
    ours = adapter.net.generate(ids, **greedy)
    assert plain.tolist() == ours.tolist()


def test_a_valid_generation_config_stays_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = export(make("llama"), tmp_path / "base")
    shipped = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}  # Qwen2.5
    (base / "generation_config.json").write_text(json.dumps(shipped))
    model = schema.Model(path=str(base))
    adapter = build(model, schema.Data(), make_encoder(model, schema.Data(), "unused"), 0)
    folder = export(adapter, tmp_path / "out")
    written = json.loads((folder / "generation_config.json").read_text())
    assert shipped.items() <= written.items() and "left out" not in caplog.text


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen2_audio"])
@pytest.mark.parametrize("grown", [0, 7])
def test_tied_tables_are_one_after_the_way_out_and_back(
    name: str, grown: int, tmp_path: Path
) -> None:
    model = settings(name)
    text = model.config["text_config"] if name == "qwen2_audio" else model.config
    text["tie_word_embeddings"] = True
    encoder = make_encoder(model, schema.Data(), "unused")
    adapter = build(model, schema.Data(), encoder, 0)
    if grown:
        grow_vocabulary(adapter.net, adapter.net.get_input_embeddings().num_embeddings + grown, 0)
    folder = export(adapter, tmp_path / "out", dict(adapter.net.state_dict()))
    auto = Qwen2AudioForConditionalGeneration if name == "qwen2_audio" else AutoModelForCausalLM
    net, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ends = net.get_input_embeddings().weight, net.get_output_embeddings().weight
    ours = adapter.net.get_input_embeddings().weight, adapter.net.get_output_embeddings().weight
    # Qwen2-Audio's head is outside of its text model, and not tied whatever that says.
    assert (ends[0] is ends[1]) == (ours[0] is ours[1]) == (name == "qwen3_tied")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, ends, strict=True))
