"""Adapters: losses, batches, generation and the making of models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from raysft.config import schema
from raysft.data.encode import make_encoder
from raysft.data.example import Example, MicroBatch, Sequence
from raysft.data.tokenizer import byte_tokenizer
from raysft.errors import UserError
from raysft.families.audio_lm.encode import FEATURES
from raysft.models import PREFIX, SpeechModel, build
from tests.support.model_zoo import (
    CONFIGS,
    batch_of,
    gradients,
    loss_of,
    make,
    plain_loss,
    sequences,
    settings,
    worst,
)

LENGTHS = [9, 4, 17, 9, 12]
MODES = ["packed", "padded"]


# -- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_left_and_right_padding_give_equal_losses(name: str) -> None:
    adapter = make(name, "padded")
    mb = batch_of(*sequences(adapter, LENGTHS))
    right = loss_of(adapter, adapter.collate(mb, side="right")).sum.item()
    left = loss_of(adapter, adapter.collate(mb, side="left")).sum.item()
    assert left == pytest.approx(right, rel=1e-5)


def test_losses_by_task_add_up_to_the_whole() -> None:
    adapter = make("qwen3")
    items = sequences(adapter, LENGTHS)
    losses = loss_of(adapter, adapter.collate(batch_of(*items)))
    assert set(losses.by_task) == {"asr", "tts"}
    assert sum(s.item() for s, _ in losses.by_task.values()) == pytest.approx(losses.sum.item())
    for task, (total, count) in losses.by_task.items():
        own = [item for item in items if item.task == task]
        assert count.item() == sum((item.labels[1:] != -100).sum() for item in own)
        assert total.item() == pytest.approx(
            sum(plain_loss(adapter, item).item() for item in own), rel=1e-5
        )


@pytest.mark.parametrize("mode", MODES)
def test_the_first_token_of_a_document_is_never_predicted(mode: str) -> None:
    adapter = make("qwen3", mode)
    ids = np.arange(5, dtype=np.int32)
    items = [Sequence(str(i), "asr", ids, ids) for i in range(3)]
    losses = loss_of(adapter, adapter.collate(batch_of(*items)))
    assert losses.count.item() == 3 * 4
    assert losses.sum.item() == pytest.approx(3 * plain_loss(adapter, items[0]).item(), rel=1e-5)


def test_the_head_sees_supervised_positions_only() -> None:
    adapter = make("qwen3")
    seen: list[int] = []
    adapter.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[-2]))
    losses = loss_of(adapter, adapter.collate(batch_of(*sequences(adapter, LENGTHS))))
    assert seen == [losses.count.item()]


def test_losses_are_float32_under_bf16_autocast() -> None:
    adapter = make("qwen3")
    batch = adapter.collate(batch_of(*sequences(adapter, LENGTHS)))
    exact = loss_of(adapter, batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss_of(adapter, batch)
    losses.sum.backward()
    assert losses.sum.dtype == torch.float32
    assert losses.sum.item() == pytest.approx(exact.sum.item(), rel=0.03)
    assert all(g.dtype == torch.float32 for g in gradients(adapter).values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_dummy_batch_has_no_loss_and_zero_gradients_everywhere(name: str, mode: str) -> None:
    adapter = make(name, mode)
    losses = loss_of(adapter, adapter.dummy())
    assert (losses.sum.item(), losses.count.item()) == (0.0, 0)
    losses.sum.backward()
    assert all(not g.any() for g in gradients(adapter).values())


@pytest.mark.parametrize("mode", MODES)
def test_an_audio_model_reaches_its_encoder_whatever_the_batch(mode: str) -> None:
    adapter = make("qwen2_audio", mode)
    text = Sequence("text", "asr", *[np.arange(6, dtype=np.int32)] * 2)
    batch = adapter.collate(batch_of(text))
    losses = loss_of(adapter, batch)
    losses.sum.backward()
    gradients(adapter)  # none is missing
    assert losses.sum.item() == pytest.approx(plain_loss(adapter, text).item(), rel=1e-5)


def test_a_clip_of_one_audio_token_trains() -> None:
    adapter = make("qwen2_audio")
    ids = np.array([adapter.audio_token_id, 1, 2], np.int32)
    labels = np.array([-100, -100, 2], np.int32)
    clip = np.ones((4 + adapter.front_end.tail, 8), np.float32)
    tiny = Sequence("tiny", "asr", ids, labels, {FEATURES: [clip]})
    other = sequences(adapter, [5])[0]
    alone = loss_of(adapter, adapter.collate(batch_of(tiny))).sum.item()
    rest = loss_of(adapter, adapter.collate(batch_of(other))).sum.item()
    both = loss_of(adapter, adapter.collate(batch_of(tiny, other))).sum.item()
    assert math.isfinite(alone)
    assert both == pytest.approx(alone + rest, rel=1e-5)


def test_clips_go_with_their_sequences_when_a_row_is_reordered() -> None:
    adapter = make("qwen2_audio")
    items = sequences(adapter, [12, 3, 7])
    items[0].input_ids = np.concatenate([items[0].input_ids, items[1].input_ids])  # two clips
    items[0].labels = np.concatenate([items[0].labels, items[1].labels])
    items[0].arrays = {FEATURES: [item.arrays[FEATURES][0] for item in items[:2]]}
    alone = sum(loss_of(adapter, adapter.collate(batch_of(item))).sum.item() for item in items)
    together = loss_of(adapter, adapter.collate(batch_of(*items))).sum.item()
    assert together == pytest.approx(alone, rel=1e-5)


def test_features_that_do_not_fit_the_audio_tokens_are_an_error() -> None:
    adapter = make("qwen2_audio")
    item = sequences(adapter, [6])[0]
    item.arrays = {}
    with pytest.raises(ValueError, match="s0: 2 audio tokens have no features"):
        adapter.collate(batch_of(item))


# -- under strategies ----------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_moe", "qwen2_audio"])
def test_wrapped_models_give_the_same_loss_and_gradient(name: str, strategy: str) -> None:
    plain = make(name)
    batch = plain.collate(batch_of(*sequences(plain, LENGTHS)))
    expected = loss_of(plain, batch)
    expected.sum.backward()
    wanted = gradients(plain)

    adapter = make(name)
    adapter.enable_gradient_checkpointing()
    again = adapter.collate(batch_of(*sequences(adapter, LENGTHS)))
    module: torch.nn.Module = adapter.supervised
    if strategy == "ddp":
        module = DistributedDataParallel(module)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for part in list(module.modules()):
            if type(part).__name__.endswith(("DecoderLayer", "EncoderLayer")):
                fully_shard(part, mesh=mesh)
        fully_shard(module, mesh=mesh)
    for turn in (again, adapter.dummy()):
        losses = module(turn)[0]
        losses.trained.backward()
        if turn is again:
            assert losses.sum.item() == pytest.approx(expected.sum.item(), rel=1e-6)
    found = {}
    for key, parameter in adapter.supervised.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            found[key.removeprefix(PREFIX)] = grad.full_tensor() if strategy == "fsdp" else grad
    assert worst(found, wanted) < 1e-5


# -- making models -------------------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first, state = make("qwen2_audio"), torch.get_rng_state()
    torch.manual_seed(2)
    second, other = make("qwen2_audio"), make("qwen2_audio", seed=1)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator is left alone"
    for (name, a), b, c in zip(
        first.model.state_dict().items(),
        second.model.state_dict().values(),
        other.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b), name
        fixed = "embed_positions" in name or "norm" in name or name.endswith("bias")
        assert fixed or not torch.equal(a, c), name


def test_random_audio_encoders_have_sinusoid_positions() -> None:
    table = make("qwen2_audio").model.model.audio_tower.embed_positions.weight
    assert not table.requires_grad
    # sin^2 + cos^2 = 1 for each period, at the scale of 0.3
    torch.testing.assert_close(
        table[:, :16] ** 2 + table[:, 16:] ** 2, torch.full((50, 16), 0.09), rtol=1e-4, atol=1e-5
    )


def saved(adapter: SpeechModel, folder: Path) -> schema.Model:
    adapter.save(folder)
    return schema.Model(path=str(folder))


def build_anew(model: schema.Model, seed: int = 0) -> SpeechModel:
    return build(model, schema.Data(), make_encoder(model, schema.Data(), "unused"), seed)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_tied", "qwen2_audio"])
def test_a_larger_tokenizer_grows_the_embeddings_and_keeps_the_old_rows(
    name: str, tmp_path: Path
) -> None:
    old = make(name)
    model = saved(old, tmp_path / "model")
    encoder = make_encoder(model, schema.Data(), "unused")
    before = len(encoder.tokenizer)
    encoder.tokenizer.add_tokens([f"<|unit{i}|>" for i in range(10)])
    grown = [build(model, schema.Data(), encoder, 3) for _ in range(2)]
    for ends in ("get_input_embeddings", "get_output_embeddings"):
        rows, first, second = (getattr(a.model, ends)().weight for a in (old, *grown))
        assert first.shape[0] == before + 10
        assert torch.equal(first[:before], rows)
        assert torch.equal(first, second)
        assert len(first[before:].unique(dim=0)) == 10
        assert (first[before:] - rows.mean(0)).abs().max() < rows.std()
    assert grown[0].model.config.get_text_config().vocab_size == before + 10


def test_a_smaller_tokenizer_never_shrinks_the_embeddings(tmp_path: Path) -> None:
    model = saved(make("qwen3", vocab_size=300), tmp_path / "model")
    adapter = build_anew(model)
    assert adapter.model.get_input_embeddings().num_embeddings == 300


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "qwen33"}, "model.config.*qwen33.*qwen3"),
        (
            {"model_type": "qwen3", "hiden_size": 8},
            "model.config.hiden_size: unknown key for qwen3; did you mean hidden_size",
        ),
        ({"model_type": "qwen3", "hidden_size": "8"}, "model.config: .*hidden_size.*str"),
        ({"model_type": "wav2vec2"}, "model.config: .*AutoModelForCausalLM"),
    ],
)
def test_a_config_that_makes_no_model_is_one_readable_line(
    config: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_anew(schema.Model(config=config, tokenizer="bytes"))
    assert "\n" not in str(caught.value)


def test_a_path_next_to_a_config_is_refused(tmp_path: Path) -> None:
    both = schema.Model(path=str(tmp_path), config=CONFIGS["qwen3"], tokenizer="bytes")
    with pytest.raises(UserError, match="give exactly one"):
        build_anew(both)


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    adapter = make("qwen3")
    model = saved(adapter, tmp_path)
    weights = adapter.model.state_dict()
    weights.pop("model.layers.1.mlp.up_proj.weight")
    adapter.model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match=r"missing.*layers.1.mlp.up_proj"):
        build_anew(model)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    adapter = make("qwen3")
    model = saved(adapter, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(adapter.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        build_anew(model)


def test_a_tokenizer_of_another_audio_model_is_refused() -> None:
    with pytest.raises(UserError, match="audio token"):
        make("qwen2_audio", audio_token_index=7)


@pytest.mark.parametrize("kind", ["qwen2_audio", "opt"])
def test_layers_skipped_at_random_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "ffn_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config, key = {"model_type": "opt", **small, "layerdrop": 0.1}, r"\.layerdrop"
    if kind == "qwen2_audio":
        audio = {**CONFIGS[kind]["audio_config"], "encoder_layerdrop": 0.1}
        config, key = {**CONFIGS[kind], "audio_config": audio}, r"audio_config\.encoder_layerdrop"
    extractor = {"chunk_length": 1} if kind == "qwen2_audio" else {}
    model = schema.Model(config=config, tokenizer="bytes", feature_extractor=extractor)
    with pytest.raises(UserError, match=rf"model\.config.*{key}: 0\.1.*set it to 0"):
        build_anew(model)
    if kind == "qwen2_audio":
        saved(make(kind), tmp_path)
        there = json.loads((tmp_path / "config.json").read_text())
        there["audio_config"]["encoder_layerdrop"] = 0.1
        (tmp_path / "config.json").write_text(json.dumps(there))
        with pytest.raises(UserError, match=rf"model\.path.*config\.json: {key}: 0\.1"):
            build_anew(schema.Model(path=str(tmp_path)))


def test_freezing_takes_patterns_and_names_what_is_near() -> None:
    adapter = make("qwen2_audio")
    frozen = adapter.freeze(["model.audio_tower.*", "lm_head.weight"])
    assert "lm_head.weight" in frozen
    loss_of(adapter, adapter.dummy()).sum.backward()
    trained = gradients(adapter)
    assert trained and not any(name in trained for name in frozen)
    with pytest.raises(UserError, match=r"model.audio_towr.\*.*audio_tower"):
        adapter.freeze(["model.audio_towr.*"])
    with pytest.raises(UserError, match="nothing is left to train"):
        adapter.freeze(["*"])


# -- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_batched_answers_equal_those_of_one_prompt_at_a_time(name: str, mode: str) -> None:
    adapter = make(name, mode)
    prompts = sequences(adapter, LENGTHS)
    alone = [adapter.generate([prompt], 12)[0] for prompt in prompts]
    assert adapter.generate(prompts, 12) == alone
    assert any(alone)


def test_answers_are_greedy_and_end_before_the_first_stop_token() -> None:
    adapter = make("qwen3")
    prompt = sequences(adapter, [6])[0]
    ids, greedy = torch.tensor(prompt.input_ids[None].astype(np.int64)), []
    with torch.no_grad():
        for _ in range(8):
            following = adapter.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            greedy.append(following.item())
            ids = torch.cat([ids, following.view(1, 1)], 1)
    stop = next(i for i, token in enumerate(greedy) if i > 1 and token not in greedy[:i])
    adapter.stop_ids = [greedy[stop]]
    expected = adapter.tokenizer.decode(greedy[:stop], skip_special_tokens=True)
    assert adapter.generate([prompt], 8) == [expected]


def test_generation_ignores_sampling_settings_and_leaves_the_model_as_it_was() -> None:
    adapter = make("qwen3")
    prompts = sequences(adapter, LENGTHS)
    expected = adapter.generate(prompts, 8)
    adapter.model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    own = adapter.model.generation_config
    adapter.model.train()
    assert adapter.generate(prompts, 8) == expected
    assert adapter.model.training
    assert adapter.model.generation_config is own
    assert adapter.generate([], 8) == []


def test_an_empty_micro_batch_is_collated() -> None:
    adapter = make("qwen2_audio")
    batch = adapter.collate(MicroBatch.join(0, 1, 2, []))
    assert batch["keep"].numel() == 0
    assert batch.keys() == adapter.dummy().keys()


def test_an_answer_is_given_without_what_the_chat_template_writes_around_it(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}"
        "<think>\n\n</think>\n{% endif %}{{ m['content'] }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    model = settings("qwen3").model_copy(update={"tokenizer": str(tmp_path)})
    encoder = make_encoder(model, schema.Data(), "unused")
    adapter = build(model, schema.Data(), encoder, 0)
    learnt = encoder.encode(Example("a", "asr", ("x",), ("one two",), instruction="go"), [])
    answer = learnt.labels[learnt.labels != -100].tolist()
    assert "<think>" in encoder.tokenizer.decode(answer)
    assert adapter._text(answer, adapter.stop_ids) == "one two"
