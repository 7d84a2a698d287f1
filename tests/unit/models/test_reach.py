"""What no batch reaches is frozen by name: it neither stops a resume nor other workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from raysft.config import schema
from raysft.data.encode import make_encoder
from raysft.data.text import byte_tokenizer
from raysft.models import build, reach
from raysft.parallel import World
from raysft.train.flops import cost_of, formula_holds
from raysft.train.loop import train
from raysft.worker import describe
from tests.support import worlds
from tests.support.model_zoo import CONFIGS, make


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 that could see, as google/gemma-3-4b-it."""
    folder = tmp_path_factory.mktemp("gemma")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {
        **small,
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 320,
        "sliding_window": 16,
        **{"pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257},
    }
    vision = {
        **small,
        "model_type": "siglip_vision_model",
        "num_hidden_layers": 1,
        **{"image_size": 28, "patch_size": 14},
    }
    tokens = {"image_token_index": 319, "boi_token_index": 318, "eoi_token_index": 317}
    config = CONFIG_MAPPING["gemma3"](
        text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_vision_tower_is_frozen_by_name_and_a_run_resumes(gemma: Path, tmp_path: Path) -> None:
    changes = {"model__path": str(gemma), "model__config": None, "model__tokenizer": None}
    config = worlds.tiny(tmp_path, train__max_steps=2, **changes)
    job = worlds.start(config, World.current())
    names = job.start["unreached"]
    assert names
    assert all("vision" in name or "multi_modal" in name for name in names)
    assert "that no batch reaches: " in describe(job)
    assert train(job) == 2
    longer = worlds.tiny(tmp_path, train__max_steps=4, **changes)
    assert train(worlds.start(longer, World.current())) == 4


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_are_reached_train_whole(name: str) -> None:
    adapter = make(name)
    assert list(adapter.unreached) == []
    assert any(p.requires_grad for p in adapter.net.parameters())


def test_a_name_is_told_once_for_all_layers() -> None:
    names = [f"model.vision_tower.encoder.layers.{i}.{k}" for i in range(9) for k in "ab"]
    assert reach.summary(["x.y", *names]) == "x.y, model.vision_tower.encoder.layers (18)"


def test_flops_leave_out_what_is_not_reached(gemma: Path) -> None:
    model = schema.Model(path=str(gemma))
    adapter = build(model, schema.Data(), make_encoder(model, schema.Data(), "unused"), 0)
    whole, reached = cost_of(adapter.net), cost_of(adapter.net, adapter.unreached)
    assert whole is not None
    assert reached is not None
    assert reached.token < whole.token
    assert formula_holds(adapter.net)
