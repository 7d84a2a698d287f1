"""Runs of a mixture: kinds of tokens in training, evaluation, generation; what experts do."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3OmniMoeForConditionalGeneration,
)

import raysft
from raysft.config import Config
from raysft.config.load import to_yaml, validate
from raysft.driver.preflight import prepare
from raysft.errors import UserError
from raysft.export import export_run
from raysft.models import routing
from raysft.models.modality import CONFIG
from raysft.models.routers import routers
from raysft.parallel import World
from raysft.report import draw
from raysft.run.lines import read_lines
from raysft.train.loads import Loads
from raysft.train.loop import train
from tests.support import audio_zoo as zoo
from tests.support import worlds
from tests.support.documents import blocks
from tests.support.mixtures import MIXTURES
from tests.support.models import CAUSAL
from tests.unit.models.test_routing import PLAN, mixture

torch.set_num_threads(1)

UNIT = 259  # the first of 20 units; below are bytes and three special tokens
GROUPS: dict[str, Any] = {
    "text": {"ids": "rest", "experts": "0-3"},
    "audio": {"ids": "259-278", "experts": "4-7"},
}
MODEL: dict[str, Any] = {
    "tokenizer": "bytes",
    "speech_units": 20,
    "config": {
        **CAUSAL["config"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [],
    },
}


def model(**moe: Any) -> dict[str, Any]:
    """MODEL with keys of model.moe."""
    return {**copy.deepcopy(MODEL), "moe": {"modality": {"groups": GROUPS}, **moe}}


def corpus(folder: Path, more: list[dict[str, Any]] | None = None) -> Path:
    """Items of asr and tts in turn, where a letter is a unit."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    items = []
    for number in range(40):
        text = "".join(rng.choice(list("abcdefghij "), rng.integers(3, 20)))
        spoken = "".join(f"[Hu{2 * (ord(c) % 10)}]" for c in text)
        pair = (spoken, text) if number % 2 else (text, spoken)
        items.append(
            {"id": f"u{number}", "instruction": "Go.", "input": pair[0], "output": pair[1]}
        )
    path = folder / "corpus.json"
    path.write_text(json.dumps(items + (more or [])))
    return path


def config_of(folder: Path, name: str = "run", **changes: Any) -> Config:
    """A config of MODEL, checked as a file's; changes: of sections, key by key."""
    tree = worlds.tiny(folder, name).model_dump()
    tree["data"]["train"] = [{"path": str(corpus(folder / "data"))}]
    tree["model"] = MODEL
    for section, keys in changes.items():
        tree[section] = keys if section == "model" else {**tree[section], **keys}
    return validate(tree, "test")


def watched(
    net: Any, is_audio: Callable[[torch.Tensor], torch.Tensor], first: int
) -> dict[str, list[int]]:
    """Look at every token that goes to experts of `net` from here on: an audio token to those from
    `first` on, another one to those before. Returns tokens of text and audio, of every layer."""
    given: list[torch.Tensor] = []
    seen = {"training": [0, 0], "evaluation": [0, 0], "generation": [0, 0]}

    def embedded(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        given[:] = [args[0]]

    def sent(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        experts, audio = args[1], is_audio(given[0]).flatten()
        assert ((experts >= first).all(1) == audio).all()
        assert ((experts < first).all(1) == ~audio).all()
        when = "training" if module.training else "evaluation"
        when = "generation" if given[0].shape[1] == 1 else when
        seen[when][0] += int((~audio).sum())
        seen[when][1] += int(audio.sum())

    net.get_input_embeddings().register_forward_pre_hook(embedded)
    for name, module in net.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(sent)
    return seen


@pytest.mark.parametrize("mode", ["packed", pytest.param("padded", marks=pytest.mark.slow)])
def test_no_token_reaches_experts_of_another_kind_in_a_whole_run(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"path": str(corpus(tmp_path / "data"))}
    config = config_of(
        tmp_path,
        model=model(balance=0.01, z_loss=0.001),
        data={"mode": mode, "eval": [{**data, "name": "dev"}]},
        evaluate={"every": 3, "max_new_tokens": 6, "max_examples": 6},
        train={"max_steps": 6},
    )
    job = worlds.start(worlds.resolved(config), World.current())
    net = job.strategy.module.lm
    seen = watched(net, lambda ids: ids >= UNIT, 4)
    train(job)
    for when, counts in seen.items():
        assert all(counts) or (when == "generation" and any(counts)), seen
    lines = read_lines(job.folder / "metrics.jsonl")
    assert all(line["term/balance/text"] > 0 and line["term/z/audio"] >= 0 for line in lines)
    for line in lines:  # what is said of the model is its cross-entropy
        assert line["loss"] == pytest.approx(line["term/cross_entropy"], rel=1e-6)
    experts = read_lines(job.folder / "experts.jsonl")
    assert [line["step"] for line in experts] == [line["step"] for line in lines]
    for line, told in zip(lines, experts, strict=True):
        counts = {kind: np.array(table) for kind, table in told["tokens"].items()}
        assert not counts["text"][:, 4:].any() and not counts["audio"][:, :4].any()
        # Two experts a token and layer; no padding, and no document that is nobody's.
        assert sum(table.sum() for table in counts.values()) == 2 * 2 * line["tokens"]
        for kind, own in (("text", slice(0, 4)), ("audio", slice(4, 8))):
            table = counts[kind][:, own]
            assert line[f"experts/dead/{kind}"] == pytest.approx((table == 0).mean(), abs=1e-6)
            most = (table.max(1) / table.mean(1)).max()
            assert line[f"experts/load_max/{kind}"] == pytest.approx(most, abs=1e-4)
            assert 0 < line[f"experts/entropy/{kind}"] <= 1
    draw(job.folder)
    assert (job.folder / "experts.png").read_bytes()[1:4] == b"PNG"

    export_run(job.folder, tmp_path / "exported")
    assert CONFIG in json.loads((tmp_path / "exported" / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/moe.md", "python")
    names: dict[str, Any] = {}
    exec(code.text, names)
    again = names["net"].eval()
    ids = torch.tensor([[72, 105, *range(UNIT, UNIT + 6), 33]])
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=ids).logits, net.eval()(input_ids=ids).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    "start",
    [pytest.param(None, marks=pytest.mark.slow), "one_router"],
    ids=["one router", "a router each"],
)
def test_positions_of_clips_are_a_kind(tmp_path: Path, start: str | None) -> None:
    base = zoo.save_whole("qwen3_omni_moe", tmp_path / "base")
    lines = []
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", zoo.clip(4000 + 900 * number, number), 16000)
        line = {"task_type": "asr", "wav_path": str(tmp_path / f"{number}.wav"), "text": "one two"}
        lines.append(json.dumps(line) + "\n")
    (tmp_path / "clips.jsonl").write_text("".join(lines))
    data = [{"path": str(tmp_path / "clips.jsonl")}]
    groups: dict[str, Any] = {"text": {"ids": "rest"}, "audio": {"ids": "audio"}}
    if start is None:
        groups["text"]["experts"], groups["audio"]["experts"] = "0-1", "2-3"
    config = config_of(
        tmp_path,
        model={"path": str(base), "moe": {"modality": {"groups": groups, "from": start}}},
        data={"train": data, "eval": data, "tokens_per_batch": 150},
        evaluate={"max_new_tokens": 3},
        train={"max_steps": 3, "gradient_checkpointing": True},
    )
    job = worlds.start(worlds.resolved(config), World.current())
    net = job.strategy.module.lm
    audio_id = net.config.audio_token_id
    seen = None if start else watched(net, lambda ids: ids == audio_id, 2)
    before = {
        name: weight.clone() for name, weight in net.named_parameters() if ".mlp.gate." in name
    }
    train(job)
    if seen is not None:
        assert all(all(seen[when]) for when in ("training", "evaluation"))
        assert seen["generation"][0] and not seen["generation"][1]
    after = dict(net.named_parameters())
    assert not any(
        torch.equal(after[name], weight) for name, weight in before.items() if ".mlp." in name
    )
    if start:
        gate = next(name for name in before if ".by_kind." not in name).removesuffix(".weight")
        assert not torch.equal(after[f"{gate}.weight"], after[f"{gate}.by_kind.audio"])
    export_run(job.folder, tmp_path / "out")
    kind = Qwen3OmniMoeForConditionalGeneration
    whole = kind.from_pretrained(tmp_path / "out").eval()
    raysft.modality_routing(whole)
    ids = torch.tensor([[5, audio_id, audio_id, 7, 9]])
    with torch.no_grad():  # the embeddings of two positions of a clip, as they would be without it
        found = whole.thinker(input_ids=ids).logits
        torch.testing.assert_close(found, net.eval()(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_workers_and_a_kill_change_nothing_of_what_is_told(tmp_path: Path) -> None:
    paths, configs = [], []
    for name in ("one", "two"):
        config = config_of(
            tmp_path,
            name,
            model=model(balance=0.01, balance_over="sequence", z_loss=0.001),
            log={"every": 3, "tensorboard": False},
            checkpoint={"every": 4},
            train={"max_steps": 9},
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(to_yaml(config))
        paths.append(path)
        configs.append(config)
    train(worlds.start(worlds.resolved(configs[0]), World.current()))
    assert worlds.run(2, paths[1], kill_at=6) != 0  # two steps after a checkpoint
    assert worlds.run(2, paths[1]) == 0
    told = [read_lines(tmp_path / "runs" / name / "experts.jsonl") for name in ("one", "two")]
    assert len(told[0]) == 3
    for one, two in zip(*told, strict=True):
        for kind, table in one["tokens"].items():  # a choice may turn on a last bit
            close = np.abs(np.array(table) - np.array(two["tokens"][kind])).max()
            assert close <= 2, kind
    lines = [read_lines(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two")]
    for one, two in zip(*lines, strict=True):
        for key in ("loss", "term/balance", "term/z/text", "experts/entropy/audio"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), key


def test_a_mixture_without_kinds_is_told_of_too(tmp_path: Path) -> None:
    config = config_of(tmp_path, train={"max_steps": 2, "gradient_checkpointing": True})
    job = worlds.start(worlds.resolved(config), World.current())
    train(job)
    for line, told in zip(
        read_lines(job.folder / "metrics.jsonl"),
        read_lines(job.folder / "experts.jsonl"),
        strict=True,
    ):
        assert np.sum(told["tokens"]["all"]) == 2 * 2 * line["tokens"]
        assert told["layers"] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
        assert line["experts/load_max"] >= 1 and "experts/dead" in line


def test_experts_that_stay_without_tokens_are_warned_of_once() -> None:
    net = mixture("qwen3_moe")
    routed = routing.attach(net, PLAN)
    assert routed is not None
    loads, world = Loads(routed, 30), World.current()

    def steps(step: int, idle: list[int], audio: bool = True) -> str | None:
        for number, kind in enumerate(PLAN.kinds):
            if audio or not number:
                routed.seen.tokens[:, number] += 9
                routed.seen.chosen[:, number, list(kind.experts)] += 5
        routed.seen.chosen[1, :, idle] = 0
        return loads.take(world, step, 10).dead

    assert steps(10, [1]) is None
    assert steps(20, [1, 2]) is None
    text = steps(30, [1, 2])
    assert text is not None and "1 of model.layers.1.mlp.gate" in text and "2 of" not in text
    state = loads.state(world)
    again = Loads(routed, 30)
    again.load(json.loads(json.dumps(state)), world)
    loads = again
    assert "2 of model.layers.1" in (steps(40, [1, 2]) or "")
    assert steps(50, [1, 2]) is None
    for step in range(60, 100, 10):  # without audio its experts are not dead
        assert steps(step, [], audio=False) is None


BAD: list[tuple[dict[str, Any], str]] = [
    ({"groups": {**GROUPS, "audio": {"ids": "259-278", "experts": "4-9"}}}, "0-7"),
    ({"groups": {**GROUPS, "audio": {"ids": "259-278", "experts": "3-7"}}}, "overlaps"),
    ({"groups": {**GROUPS, "audio": {"ids": "259-278", "experts": "4-6"}}}, "7 are in no group"),
    (
        {
            "groups": {
                "text": {"ids": "rest", "experts": "0-6"},
                "audio": {"ids": "259-278", "experts": 7},
            }
        },
        "top_k: 1",
    ),
    ({"groups": {"text": {"ids": "0-270", "experts": "0-3"}, "audio": GROUPS["audio"]}}, "259-270"),
    ({"groups": {"text": {"ids": "0-258", "experts": "0-7"}}}, "id 259"),
    ({"groups": {"text": {"ids": "0-2x", "experts": "0-7"}}}, "expected a range"),
    ({"groups": {"text": {"ids": "rest"}}}, "experts: missing"),
    ({"groups": {"text": {"ids": "rest", "expert": "0-7"}}}, "unknown key"),
    ({"groups": {**GROUPS, "audio": {"ids": "audio", "experts": "4-7"}}}, "hears nothing"),
    ({"groups": {**GROUPS, "more": {"ids": "900-910", "experts": "4-7"}}}, "overlaps"),
    ({"groups": GROUPS, "softmax": "all", "from": "one_router"}, "leave it out"),
]


@pytest.mark.parametrize(("modality", "says"), BAD, ids=[says for _, says in BAD])
def test_what_cannot_be_is_one_line_before_anything_starts(
    tmp_path: Path, modality: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as error:
        config = config_of(tmp_path, model={**MODEL, "moe": {"modality": modality}})
        folder = tmp_path / "run"
        folder.mkdir()
        prepare(config, folder)
    assert says in str(error.value) and "model.moe.modality" in str(error.value)
    assert "\n" not in str(error.value)


def test_more_that_cannot_be(tmp_path: Path) -> None:
    def refusal(of: dict[str, Any], **changes: Any) -> str:
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        folder.mkdir()
        with pytest.raises(UserError) as error:
            prepare(config_of(tmp_path, model=of, **changes), folder)
        return str(error.value)

    dense = {**copy.deepcopy(worlds.CAUSAL), "speech_units": 20}
    assert "has no experts" in refusal({**dense, "moe": {"modality": {"groups": GROUPS}}})
    assert "has no experts" in refusal({**dense, "moe": {"balance": 0.1}})
    asks = model()
    asks["config"]["output_router_logits"] = True
    assert "output_router_logits" in refusal(asks)
    sigmoid = {**model(), "config": {"model_type": "deepseek_v3", **MIXTURES["deepseek_v3"]}}
    sigmoid["moe"]["modality"] = {"groups": GROUPS, "softmax": "all"}
    assert "sigmoid" in refusal(sigmoid)
    odd = {"text": {"ids": "rest", "experts": [0, 1, 2, 5]}, "audio": GROUPS["audio"]}
    odd["audio"] = {"ids": "259-278", "experts": [3, 4, 6, 7]}
    sigmoid["moe"]["modality"] = {"groups": odd}
    assert "whole groups" in refusal(sigmoid)
    one = model()
    one["moe"]["modality"] = {"groups": GROUPS, "from": "one_router"}
    assert "modules_to_save" in refusal(one, peft={"method": "lora", "r": 8})
    assert "peft.method" in refusal(model(), peft={"method": "prompt"}, data={"mode": "padded"})
    assert "balance_over" in refusal({**MODEL, "moe": {"balance_over": "sequence"}})


def test_an_example_with_a_token_of_no_kind_is_named(tmp_path: Path) -> None:
    bad = {"id": "accent", "instruction": "Go.", "input": "[Hu3]", "output": "caf\u00e9"}
    groups = {**GROUPS, "text": {"ids": ["0-127", "256-258"], "experts": "0-3"}}
    config = config_of(
        tmp_path,
        model={**MODEL, "moe": {"modality": {"groups": groups}}},
        data={"train": [{"path": str(corpus(tmp_path / "bad", [bad]))}]},
    )
    folder = tmp_path / "run"
    folder.mkdir()
    (rejected,) = prepare(config, folder).rejected
    assert rejected.id == "accent" and rejected.kind == "no kind"
    assert "(id 195) is in no group" in rejected.reason


def test_keys_that_contradict_a_checkpoint_are_refused(tmp_path: Path) -> None:
    job = worlds.start(
        worlds.resolved(config_of(tmp_path, model=model(), train={"max_steps": 1})), World.current()
    )
    train(job)
    export_run(job.folder, tmp_path / "out")
    path = {"path": str(tmp_path / "out"), "speech_units": 20}
    swapped = {
        "text": {"ids": "rest", "experts": "4-7"},
        "audio": {"ids": "259-278", "experts": "0-3"},
    }
    fewer = {**GROUPS, "audio": {"ids": "260-278", "experts": "4-7"}}
    (tmp_path / "a").mkdir()
    for modality in (
        {"groups": swapped},
        {"groups": fewer},
        {"groups": GROUPS, "softmax": "all"},
        {"groups": GROUPS, "renormalize": True},
    ):
        with pytest.raises(UserError, match="checkpoint"):
            prepare(
                config_of(tmp_path, model={**path, "moe": {"modality": modality}}), tmp_path / "a"
            )
    for moe in (None, {"modality": {"groups": GROUPS}}):  # as it was
        config = config_of(tmp_path, f"again{moe is None}", model={**path, "moe": moe})
        again = worlds.start(worlds.resolved(config), World.current())
        assert again.routing is not None and again.routing.plan is not None
        assert [kind.name for kind in again.routing.plan.kinds] == ["text", "audio"]
        assert routers(again.strategy.module)


@pytest.mark.parametrize("several", [False, True], ids=["one router", "a router each"])
def test_an_adapter_says_how_the_tokens_of_its_base_are_routed(
    several: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    settings = {k: v for k, v in MODEL["config"].items() if k != "model_type"}
    base = AutoConfig.for_model("qwen3_moe", **settings, vocab_size=279, eos_token_id=257)
    AutoModelForCausalLM.from_config(base).save_pretrained(tmp_path / "base")
    own = {key: value for key, value in model().items() if key != "config"}
    peft: dict[str, Any] = {"method": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    if several:  # routers that are copies train only whole
        own["moe"]["modality"]["from"] = "one_router"
        peft["modules_to_save"] = ["gate"]
    config = config_of(
        tmp_path,
        model={**own, "path": str(tmp_path / "base")},
        peft=peft,
        train={"max_steps": 2},
        checkpoint={"every": 1, "keep": 2},
    )
    job = worlds.start(worlds.resolved(config), World.current())
    gates = {n: p.clone() for n, p in job.strategy.module.named_parameters() if ".gate." in n}
    train(job)
    after = dict(job.strategy.module.named_parameters())
    moved = {name for name, gate in gates.items() if not torch.equal(gate, after[name])}
    assert moved == {name for name in gates if ".modules_to_save." in name}
    assert len(moved) == (4 if several else 0)  # two kinds, two layers
    if several:
        gate = min(moved).partition(".by_kind.")[0]
        assert not torch.equal(after[f"{gate}.weight"], after[f"{gate}.by_kind.audio"])
    export_run(job.folder, tmp_path / "adapter")
    export_run(job.folder, tmp_path / "merged", merge=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with pytest.raises(UserError, match="was trained without"):
        raysft.modality_routing(adapted)
    if several:  # the base's own routers are none of the adapter's
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        with pytest.raises(UserError, match=r"in its folder; .*modality_routing\(net, folder\)"):
            raysft.modality_routing(PeftModel.from_pretrained(kept, tmp_path / "adapter"))
    raysft.modality_routing(adapted, tmp_path / "adapter")
    raysft.modality_routing(merged)
    ids = torch.tensor([[72, 105, *range(UNIT, UNIT + 6), 33]])
    with torch.no_grad():
        found = adapted(input_ids=ids).logits
        torch.testing.assert_close(found, merged(input_ids=ids).logits, rtol=0, atol=1e-5)
        whole = job.strategy.module.eval().lm(input_ids=ids).logits
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    begun = config_of(
        tmp_path,
        "begun",
        model={**own, "path": str(tmp_path / "base")},
        peft={**peft, "path": str(tmp_path / "adapter")},
    )
    for name, weight in worlds.start(
        worlds.resolved(begun), World.current()
    ).strategy.module.named_parameters():
        assert torch.equal(weight, after[name]), name
