"""Models whose matrices are read later: the same as those that transformers has loaded whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raysft.config import schema
from raysft.data.encode import net_class
from raysft.errors import UserError
from raysft.models import loading
from raysft.parallel import checkpoint_rows, unread
from raysft.parallel.checkpoint_rows import Want
from tests.support import audio_zoo as zoo
from tests.support.mixtures import MIXTURES
from tests.support.model_zoo import CONFIGS

FAST = ("gemma3n", "granite_speech", "qwen3_omni_moe_thinker")
TEXT: dict[str, dict[str, Any]] = {
    **{name: {**settings, "model_type": name} for name, settings in MIXTURES.items()},
    **{name: CONFIGS[name] for name in ("llama", "qwen3_tied")},
}


def text(folder: Path, name: str, **more: Any) -> Path:
    """A checkpoint in files of some KB."""
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**TEXT[name], **more}))
    net.save_pretrained(folder / name, max_shard_size="20KB")
    return folder / name


def both(kind: Any, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel, unread.Unread]:
    """Loaded whole; with stand-ins, and what reads them."""
    settings = {"dtype": torch.float32, "output_loading_info": True}
    whole, info = kind.from_pretrained(folder, **settings)
    with unread.reading_later():
        net, told = kind.from_pretrained(folder, **settings)
    for key, names in info.items():
        assert set(map(str, names)) == set(map(str, told[key])), key
    unseen = unread.of(net)
    assert unseen is not None
    unseen.stand_in(net)
    return whole, net, unseen


def same(whole: PreTrainedModel, net: PreTrainedModel, folder: Path) -> None:
    """Parameters, buffers that are saved and others, configs, and what an export writes."""
    one, other = whole.state_dict(), net.state_dict()
    assert one.keys() == other.keys()
    one |= dict(whole.named_buffers())
    other |= dict(net.named_buffers())
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    trains = [[p.requires_grad for p in model.parameters()] for model in (whole, net)]
    assert trains[0] == trains[1]
    assert whole.generation_config.to_dict() == net.generation_config.to_dict()
    for name, model in (("a", whole), ("b", net)):
        model.save_pretrained(folder / name)
    a, b = (load_file(folder / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    texts = [(folder / name / "config.json").read_text() for name in "ab"]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("chunk", [1, checkpoint_rows.CHUNK_BYTES])
def test_text_models_are_those_that_are_loaded_whole(
    name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_rows, "CHUNK_BYTES", chunk)
    whole, net, unseen = both(AutoModelForCausalLM, text(tmp_path, name))
    assert any(unread.is_stand_in(p) for p in net.parameters())
    assert not any(unread.is_stand_in(p) for p in net.parameters() if p.ndim < 2)
    unseen.realise(net)
    same(whole, net, tmp_path)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow)
        for kind in sorted(zoo.TINY)
    ],
)
def test_audio_models_are_those_that_are_loaded_whole(kind: str, tmp_path: Path) -> None:
    folder = zoo.save(kind, tmp_path / "base")
    whole, net, unseen = both(net_class(schema.Model(path=str(folder))), folder)
    unseen.realise(net)
    same(whole, net, tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v2"])
def test_rows_are_read_together_and_those_of_a_part_alone(name: str, tmp_path: Path) -> None:
    whole, net, unseen = both(AutoModelForCausalLM, text(tmp_path, name))
    known = dict(whole.named_parameters())
    got: dict[str, torch.Tensor] = {}
    wants = []
    for path, place in unseen.places(net).items():
        rows = known[path].shape[0]
        start, stop = rows // 3, max(rows // 3, rows - 1)

        def take(value: torch.Tensor, path: str = path) -> None:
            got[path] = value

        wants.append(Want(place.key, start, stop, torch.bfloat16, take))
    unseen.read(wants[::-1])
    assert len(got) == len(wants) > 10
    for want, path in zip(wants, unseen.places(net), strict=True):
        assert torch.equal(got[path], known[path][want.start : want.stop].bfloat16()), path
        assert got[path].dtype == torch.bfloat16
    for path, parameter in net.named_parameters():
        if path in got and parameter.shape[0] > 2:
            part = unseen.part(parameter, 1, 2)
            assert torch.equal(unseen.rows(part, [1, 0]), known[path][[2, 1]]), path


def test_of_experts_only_those_that_are_wanted_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, net, unseen = both(AutoModelForCausalLM, text(tmp_path, "qwen3_moe"))
    read: list[str] = []
    own = checkpoint_rows.CheckpointRows._load

    def load(self: Any, net: Any, tensors: Any, device: str = "cpu") -> Any:
        read.extend(tensors)
        return own(self, net, tensors, device)

    monkeypatch.setattr(checkpoint_rows.CheckpointRows, "_load", load)
    key = next(name for name in unseen.places(net) if name.endswith("experts.gate_up_proj"))
    unseen.read([Want(key, 2, 4, torch.float32, lambda rows: None)])
    numbers = {name.split("experts.")[1].split(".")[0] for name in read}
    assert numbers == {"2", "3"}
    assert len(read) == 4  # gate and up of each


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_both_in_the_checkpoint(equal: bool, tmp_path: Path) -> None:
    folder = text(tmp_path, "qwen3_tied")
    for file in folder.glob("model*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            table = tensors["model.embed_tokens.weight"]
            head = table.clone() if equal else table + 1
            save_file({"lm_head.weight": head}, folder / "model-head.safetensors", {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text_of = index.read_text()
        index.write_text(
            text_of.replace(
                '"weight_map": {', '"weight_map": {"lm_head.weight": "model-head.safetensors",'
            )
        )
    whole, net, unseen = both(AutoModelForCausalLM, folder)
    assert (net.lm_head.weight is net.model.embed_tokens.weight) is equal
    unseen.realise(net)
    same(whole, net, tmp_path)


def test_a_vocabulary_grows_by_the_rows_that_it_would_have(tmp_path: Path) -> None:
    for name in ("llama", "qwen3_tied"):
        whole, net, unseen = both(AutoModelForCausalLM, text(tmp_path, name))
        for model in (whole, net):
            loading.grow_vocabulary(model, model.config.vocab_size + 7, seed=3)
        table = net.get_input_embeddings().weight
        size = table.shape[0]
        assert unread.is_stand_in(table)
        rows = unseen.rows(table, [size - 9, size - 1, size - 7])
        expected = whole.get_input_embeddings().weight[[size - 9, size - 1, size - 7]]
        torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-6)
        unseen.realise(net)
        for a, b in zip(whole.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_what_a_checkpoint_lacks_is_said_before_anything_is_read(tmp_path: Path) -> None:
    folder = text(tmp_path, "llama")
    net = AutoModelForCausalLM.from_pretrained(folder)
    kept = {k: v for k, v in net.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with unread.deferring(), pytest.raises(UserError, match=r"1 weights are missing.*up_proj"):
        loading.from_path(schema.Model(path=str(folder)), AutoModelForCausalLM)
    kept["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with unread.deferring(), pytest.raises(UserError, match=r"another shape.*up_proj"):
        loading.from_path(schema.Model(path=str(folder)), AutoModelForCausalLM)


def test_stand_ins_have_no_content_and_take_no_memory() -> None:
    big = nn.Parameter(unread._nothing(torch.Size((200_000, 200_000)), torch.float32))
    assert unread.is_stand_in(big)
    assert big.untyped_storage().nbytes() == 4
    assert torch.isnan(big[3, 5])
    unread.cast(big, torch.bfloat16)
    assert unread.is_stand_in(big)
    assert big.dtype == torch.bfloat16
    assert not unread.is_stand_in(nn.Parameter(torch.zeros(3, 4)))
    assert not unread.is_stand_in(nn.Parameter(torch.zeros(1, 1)))
