"""patch_lm and pair under adapters, and patch_lm on a mixture: what trains, speaks and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from raysft import synthesize
from raysft.config import Config
from raysft.driver.preflight import prepare
from raysft.errors import UserError
from raysft.export import export_run
from raysft.transcribe.model import load as answering
from tests.support import pairs, patches
from tests.support.in_process import losses, run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
HEADS = ["pooling", "flow_head", "stop_head"]
TRAIN = {"max_steps": 3, "precision": "fp32"}
SPEAK = {"max_seconds": 0.2, "flow": {"steps": 2}}


def data(folder: Path) -> dict[str, Any]:
    """To train on, and to be evaluated on."""
    path = str(patches.corpus(folder / "corpus", 12))
    return {"train": [{"path": path}], "eval": [{"path": path, "name": "dev"}]} | {
        "tokens_per_batch": 400
    }


def language_model(folder: Path) -> Path:
    """A text model of widths that bitsandbytes takes on every processor."""
    torch.manual_seed(0)
    sizes = {**patches.TEXT, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    del sizes["model_type"]
    Qwen3ForCausalLM(Qwen3Config(vocab_size=262, **sizes)).save_pretrained(folder / "lm")
    return folder / "lm"


def speaks(place: Path) -> None:
    (one,) = synthesize(place, ["one"])
    assert one.seconds > 0 and not one.error


def test_new_heads_under_an_adapter_have_to_be_trained(tmp_path: Path) -> None:
    model = {**patches.model(), "path": str(language_model(tmp_path))}
    del model["config"]
    for saved in ([], ["pooling", "stop_head"]):
        tree = {"data": data(tmp_path), "model": model, "run": {"name": "x"}}
        tree["peft"] = {"method": "lora", "modules_to_save": saved}
        tree["data"]["index_path"] = str(tmp_path / "index")
        match = r"peft\.modules_to_save: .*flow_head.* are new to the model at model\.path"
        with pytest.raises(UserError, match=match):
            prepare(Config.model_validate(tree), tmp_path)


@pytest.mark.slow
def test_qlora_leaves_the_heads_whole_and_trains_them(tmp_path: Path) -> None:
    model = {**patches.model(), "path": str(language_model(tmp_path))}
    del model["config"]
    peft = {"method": "qlora", "r": 2, "modules_to_save": HEADS}
    folder = run(
        tmp_path,
        data=data(tmp_path),
        model=model,
        peft=peft,
        train=TRAIN,
        evaluate={"every": 3, "generate": False},
        speak=SPEAK,
    )
    assert len(losses(folder)) == 3
    net = answering(str(folder)).speech_model.net
    in_4_bits = [n for n, m in net.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert in_4_bits and all("language_model" in name for name in in_4_bits)
    speaks(folder)
    export_run(folder, tmp_path / "adapter")
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for part in (*HEADS, "lora_A"):
        assert any(part in name and bool(value.abs().any()) for name, value in trained.items())
    export_run(folder, tmp_path / "merged", merge=True)
    speaks(tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.parametrize(("own", "method"), [(False, "none"), (True, "none"), (False, "lora")])
def test_kinds_of_tokens_have_their_experts_and_routers(
    own: bool, method: str, tmp_path: Path
) -> None:
    model = patches.model()
    model["config"] |= {"model_type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 4}
    model["config"] |= {"num_experts_per_tok": 2, "mlp_only_layers": []}
    groups = {"text": {"ids": "rest", "experts": "0-1"}, "audio": {"ids": "audio"}}
    groups["audio"]["experts"] = "2-3"
    modality = {"groups": groups, **({"from": "one_router"} if own else {})}
    model["moe"] = {"modality": modality}
    folder = run(
        tmp_path,
        data=data(tmp_path),
        model=model,
        peft={"method": method},
        train=TRAIN,
        evaluate={"every": 3},
        speak=SPEAK,
    )
    assert len(losses(folder)) == 3
    speaks(folder)
    export_run(folder, tmp_path / "out", merge=method != "none")
    speaks(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adalora", "ia3"])
def test_both_halves_of_a_pair_take_adapters(method: str, tmp_path: Path) -> None:
    peft: dict[str, Any] = {"method": method}
    if method == "ia3":  # which trains no single rows
        peft["modules_to_save"] = ["embed_tokens", "lm_head"]
    given = pairs.data(tmp_path / "data", tokens_per_batch=500)
    folder = run(tmp_path, data=given, model=pairs.model(), peft=peft, train=TRAIN)
    assert len(losses(folder)) == 3
    export_run(folder, tmp_path / "out", merge=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()
