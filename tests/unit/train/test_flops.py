"""FLOPs against torch's own counter, and what metrics.jsonl says of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raysft.data.example import Sequence
from raysft.families.audio_lm import cut
from raysft.models import SpeechModel
from raysft.parallel import World
from raysft.run.lines import read_lines
from raysft.train import flops
from raysft.train.feed import turn_of
from raysft.train.loop import train
from tests.support import worlds
from tests.support.model_zoo import CONFIGS, batch_of, loss_of, make, sequences

LENGTHS = [40, 10, 33]


def counted(adapter: SpeechModel, *items: Sequence) -> tuple[float, float]:
    """What torch sees of a forward and backward pass, and what we say of it."""
    batch = batch_of(*(items or sequences(adapter, LENGTHS)))
    laid_out = adapter.collate(batch)
    with FlopCounterMode(display=False) as counter:
        loss_of(adapter, laid_out).sum.backward()
    counts = turn_of(adapter, batch).counts
    return float(counter.get_total_flops()), flops.cost_of(adapter.model).total(counts)


@pytest.mark.parametrize("name", ["llama", "qwen3_tied"])
def test_full_training_costs_what_torch_counts(name: str) -> None:
    adapter = make(name, intermediate_size=256, hidden_size=64)
    seen, said = counted(adapter)
    assert said == pytest.approx(seen, rel=0.06)


def test_an_audio_encoder_counts_by_what_a_clip_has(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make("qwen2_audio", "padded")
    whole = flops.cost_of(adapter.model)
    adapter.freeze(["*audio_tower*"])
    frozen = flops.cost_of(adapter.model)
    assert whole.frame > 2.5 * frozen.frame > 0
    assert whole.attended == 3 * frozen.attended == 12
    assert whole.token == frozen.token
    # torch counts no kernel's attention on CPUs. A single clip needs no mask.
    adapter.net.model.audio_tower.config._attn_implementation = "eager"
    monkeypatch.setattr(cut.attention, "document_mask", lambda *row, **more: None)
    # Of clips of a few frames, those behind their end would count for much.
    frames, tokens = 95, 24
    clip = torch.randn(frames + adapter.front_end.tail, adapter.mels).numpy()
    ids = np.array([adapter.audio_token_id] * tokens + [1, 2, 3], np.int32)
    labels = np.where(ids == adapter.audio_token_id, -100, ids)
    seen, said = counted(adapter, Sequence("clip", "asr", ids, labels, {"features": [clip]}))
    assert said == pytest.approx(seen, rel=0.15)


def test_of_experts_those_count_that_a_token_is_sent_to() -> None:
    every = make("qwen3_moe", num_experts_per_tok=4)
    two = make("qwen3_moe", num_experts_per_tok=2)
    experts = 3 * 32 * 16 * 4  # three matrices of four experts
    difference = flops.cost_of(every.model).token - flops.cost_of(two.model).token
    assert difference == 6 * 2 * experts / 2


def test_frozen_weights_cost_4n_and_those_that_train_6n() -> None:
    adapter = make("llama")
    full = flops.cost_of(adapter.model)
    adapter.freeze(["*_proj.weight", "lm_head.weight"])
    frozen = flops.cost_of(adapter.model)
    assert frozen.token / full.token == pytest.approx(4 / 6)
    assert frozen.supervised / full.supervised == pytest.approx(4 / 6)
    # Two layers, four heads of 8: 6 L H D.
    assert frozen.pair == full.pair == 6 * 2 * 4 * 8
    assert full.supervised == 6 * adapter.model.lm_head.weight.numel()


def test_lora_adds_its_own_matrices() -> None:
    peft = pytest.importorskip("peft")
    adapter = make("llama")
    base = flops.cost_of(adapter.model)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(adapter.model, settings)
    found = flops.cost_of(wrapped)
    added = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert found.token == pytest.approx(base.token * 4 / 6 + 6 * added)


def test_a_share_of_the_peak_is_told_only_where_the_peak_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    assert flops.peak_flops(torch.device("cpu"), "bf16") is None
    for name, peak in (("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA L40S", 362e12), ("X", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops(cuda, "bf16") == peak
        assert flops.peak_flops(cuda, "fp32") is None


def test_metrics_tell_rates_utilisation_and_memory(tmp_path: Path) -> None:
    config = worlds.tiny(tmp_path, train__max_steps=4, log__every=2)
    job = worlds.start(config, World.current())
    train(job)
    for line in read_lines(tmp_path / "runs" / "run" / "metrics.jsonl"):
        seconds = line["seconds"]
        assert line["tokens_per_s_worker"] == line["tokens_per_s"]
        rate = line["supervised_tokens"] / seconds
        assert line["supervised_tokens_per_s"] == pytest.approx(rate, rel=0.01)
        assert line["audio_seconds_per_s"] == pytest.approx(
            line["audio_seconds"] / seconds, rel=0.01, abs=0.01
        )
        assert line["peak_memory_gb"] > 0.1
        assert "mfu" not in line
        least = job.cost.token * line["tokens"] + job.cost.supervised * line["supervised_tokens"]
        assert least < line["tflops"] * 1e12 * seconds < 1.2 * least


STRANGE = {
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "rwkv": {"model_type": "rwkv", "hidden_size": 32, "num_hidden_layers": 2},
    "jamba": {
        "model_type": "jamba",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "use_mamba_kernels": False,
    },
}


@pytest.mark.parametrize("name", STRANGE)
def test_models_that_are_not_attention_alone_have_no_number(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, name, STRANGE[name])
    assert flops.cost_of(make(name, "padded").model) is None


@pytest.mark.parametrize("name", ["llama", "qwen3_tied", "qwen3_moe", "deepseek_v2"])
def test_formulas_that_torch_confirms_are_used(name: str) -> None:
    assert flops.formula_holds(make(name).net)


def test_a_run_of_a_model_without_a_number_trains(tmp_path: Path) -> None:
    config = worlds.tiny(
        tmp_path,
        train__max_steps=2,
        log__every=1,
        data__mode="padded",
        model__config=STRANGE["mamba"],
    )
    assert train(worlds.start(config, World.current())) == 2
    lines = read_lines(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert lines and all("tflops" not in line and line["loss"] > 0 for line in lines)
