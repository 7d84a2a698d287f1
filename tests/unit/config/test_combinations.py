"""What cannot work together is refused before anything starts, with the key and the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from raysft.config.combinations import contradictions
from raysft.config.load import validate
from raysft.config.schema import Config
from raysft.errors import UserError

BASE: dict[str, Any] = {
    "data": {"train": [{"path": "corpus.json"}]},
    "model": {"path": "a/base"},
}


def found(**changes: Any) -> list[str]:
    """Lines of the contradictions of BASE with section__key=value."""
    tree = {section: dict(values) for section, values in BASE.items()}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return [one.text for one in contradictions(Config.model_validate(tree))]


GRPO: dict[str, Any] = {"train__objective": "grpo"}
DPO: dict[str, Any] = {"train__objective": "dpo"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    # -- what is learnt
    (
        {"train__grpo": {"group": 4}},
        "train.grpo.group: does nothing with train.objective: sft; set train.objective: grpo",
    ),
    (
        {**GRPO, "train__grpo": {"group": 1}},
        "train.grpo.group: 1, but an answer is held against the others of its group; at least 2",
    ),
    ({**GRPO, "train__grpo": {"rewards": {}}}, "train.grpo.rewards: empty; name at least one"),
    (
        {**GRPO, "data__tokens_per_batch": 256},
        "train.grpo.max_new_tokens: 256 leaves no room for a prompt in data.tokens_per_batch: 256",
    ),
    (
        {**GRPO, "data__tokens_per_batch": "auto"},
        "data.tokens_per_batch: auto is found by steps of train.objective: sft; give a number",
    ),
    (
        {**GRPO, "model__config": {"model_type": "whisper"}, "model__path": None},
        "train.objective: grpo does not work with seq2seq; causal_lm or audio_lm can",
    ),
    (
        {"train__dpo": {"beta": 0.2}},
        "train.dpo.beta: does nothing with train.objective: sft; set train.objective: dpo",
    ),
    (
        {**DPO, "train__grpo": {"group": 4}},
        "train.grpo.group: does nothing with train.objective: dpo; set train.objective: grpo",
    ),
    (
        {**DPO, "train__dpo": {"loss": "ipo", "label_smoothing": 0.1}},
        "train.dpo.label_smoothing: does nothing with train.dpo.loss: ipo; leave it out",
    ),
    (
        {**DPO, "data__tokens_per_batch": "auto"},
        "data.tokens_per_batch: auto is found by steps of train.objective: sft; give a number",
    ),
    (
        {**DPO, "model__config": {"model_type": "whisper"}, "model__path": None},
        "train.objective: dpo does not work with seq2seq; causal_lm or audio_lm can",
    ),
    (
        {**DPO, "train__losses": {"z_loss": 0.1}},
        "train.losses: are of right answers, and train.objective: dpo learns from pairs; leave out",
    ),
    (
        {**GRPO, "model__family": "patch_lm"},
        "train.objective: grpo does not work with patch_lm; causal_lm or audio_lm can",
    ),
    ({**GRPO, "train__losses": {"z_loss": 0.1}}, "train.losses: are of right answers, and "),
    # -- evaluation
    (
        {"evaluate__beside": True},
        "evaluate.beside: there is nothing to evaluate while training goes on with "
        "evaluate.every: 0",
    ),
    (
        {"evaluate__workers": 2},
        "evaluate.workers: only evaluate.beside has workers that evaluate",
    ),
    # -- strategies
    (
        {
            "parallel__strategy": "ep",
            "model__path": None,
            "model__config": {"model_type": "qwen3"},
            "model__tokenizer": "bytes",
        },
        "parallel.strategy: ep shares the experts of a mixture among workers, but qwen3 has none",
    ),
    (
        {"parallel__ep_size": 2},
        "parallel.ep_size: only ep shares experts, not parallel.strategy: ddp",
    ),
    (
        {"parallel__strategy": "ep", "parallel__ep_size": 2, "parallel__workers": 3},
        "parallel.ep_size: 2 workers with all experts between them need a fixed number of workers "
        "that is a multiple of it, not parallel.workers: 3",
    ),
    (
        {"parallel__strategy": "ep", "parallel__ep_size": 2, "parallel__workers": [2, 4]},
        "parallel.ep_size: 2 workers with all experts between them need a fixed number of workers "
        "that is a multiple of it, not parallel.workers: [2, 4]",
    ),
    ({"parallel__replicate": 2}, "parallel.replicate: only fsdp has copies of shards, not ddp"),
    (
        {"parallel__strategy": "fsdp", "parallel__replicate": 2, "parallel__workers": 3},
        "parallel.replicate: 2 copies need a fixed number of workers that is a multiple of it",
    ),
    (
        {"parallel__strategy": "fsdp", "parallel__replicate": 2, "parallel__workers": [2, 4]},
        "parallel.replicate: 2 copies need a fixed number of workers that is a multiple of it",
    ),
    ({"parallel__offload": "optimizer"}, "does not go with parallel.strategy: ddp; remove it"),
    (
        {"parallel__offload": "optimizer", "parallel__strategy": "fsdp"},
        "parallel.offload: optimizer does not go with parallel.strategy: fsdp; use parameters",
    ),
    (
        {"parallel__offload": "parameters", "parallel__strategy": "zero2"},
        "parallel.offload: parameters does not go with parallel.strategy: zero2; use optimizer",
    ),
    ({"parallel__deepspeed": "ds.json"}, "parallel.deepspeed: does nothing with"),
    ({"parallel__memory_gb": 8}, "only data.tokens_per_batch: auto reads it"),
    (
        {"train__compile": True, "parallel__strategy": "zero3"},
        "train.compile: the hooks of zero3 break what is compiled; use ddp or fsdp",
    ),
    # -- experts
    (
        {"model__moe": {"experts": "grouped_gemm"}, "train__precision": "fp32"},
        "model.moe.experts: grouped_gemm computes in bfloat16 only; set train.precision: bf16, or",
    ),
    (
        {
            "model__moe": {"experts": "sonicmoe"},
            "train__precision": "bf16",
            "parallel__device": "cpu",
        },
        "model.moe.experts: sonicmoe computes on GPUs only, and parallel.device is cpu; use torch",
    ),
    # -- precision
    (
        {"train__tf32": True, "train__precision": "bf16"},
        "train.tf32: does nothing in bf16: it is of products in fp32 on GPUs; set train.precision",
    ),
    (
        {"train__tf32": True, "parallel__device": "cpu"},
        "train.tf32: does nothing on CPUs: it is of products in fp32 on GPUs",
    ),
    (
        {"train__static_shapes": True, "data__mode": "padded"},
        "train.static_shapes: true, but with data.mode: padded a row is as long as its longest",
    ),
    # -- adapters
    ({"peft__r": 8}, "peft.r: does nothing with peft.method: none; lora, qlora, adalora read it"),
    ({"peft__path": "adapter"}, "peft.path: does nothing with peft.method: none"),
    (
        {"peft__method": "ia3", "peft__alpha": 3},
        "peft.alpha: does nothing with peft.method: ia3; lora, qlora, adalora read it",
    ),
    (
        {"peft__method": "lora", "peft__virtual_tokens": 3},
        "peft.virtual_tokens: does nothing with peft.method: lora; prefix, prompt read it",
    ),
    (
        {"peft__method": "adalora", "peft__dora": True},
        "peft.dora: does nothing with peft.method: adalora",
    ),
    (
        {"peft__method": "lora", "train__freeze": ["*"]},
        "train.freeze: with peft.method: lora the model is frozen already",
    ),
    ({"peft__method": "prompt"}, "would reach the first document of a packed row only"),
    (
        {"peft__method": "prefix", "data__mode": "padded", "train__gradient_checkpointing": True},
        "train.gradient_checkpointing: peft.method: prefix",
    ),
    (
        {"peft__method": "prefix", "data__mode": "padded", "model__family": "audio_lm"},
        "peft.method: prefix does not work with audio_lm (transformers' audio models take no",
    ),
    (
        {"peft__method": "prompt", "data__mode": "padded", "model__family": "audio_lm"},
        "peft.method: prompt does not work with audio_lm (prompt tuning replaces the embeddings",
    ),
    *(
        (
            {"peft__method": "adalora", "parallel__strategy": f"zero{stage}"},
            f"peft.method: adalora ranks by whole gradients, which zero{stage} does not keep",
        )
        for stage in (1, 2, 3)
    ),
    *(
        (
            {"peft__method": "qlora", "parallel__strategy": strategy},
            f"peft.method: qlora keeps its base in 4 bits, which {strategy} cannot shard",
        )
        for strategy in ("fsdp", "zero1", "zero2", "zero3")
    ),
    (
        {"peft__method": "qlora", "model__path": None, "model__config": {"model_type": "qwen3"}},
        "peft.method: qlora quantises weights that are there: set model.path",
    ),
    # -- optimizers
    ({"optim__decay": 0.5}, "optim.decay: does nothing with optim.schedule: constant"),
    (
        {"optim__optimizer": "adamw8bit", "parallel__strategy": "zero1"},
        "optim.optimizer: adamw8bit cannot be partitioned by zero1",
    ),
    (
        {"data__tokens_per_batch": "auto", "parallel__device": "cpu"},
        "data.tokens_per_batch: auto on CPU needs a limit: set parallel.memory_gb",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:70])
def test_a_contradiction_is_named_with_its_remedy(changes: dict[str, Any], message: str) -> None:
    lines = found(**changes)
    assert any(message in line for line in lines), lines
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__strategy": "fsdp", "parallel__replicate": 2, "parallel__workers": 4},
        {"parallel__strategy": "fsdp", "parallel__offload": "parameters"},
        {"parallel__strategy": "zero1", "parallel__offload": "optimizer"},
        {"parallel__strategy": "zero3", "parallel__offload": "parameters"},
        {"peft__method": "lora", "peft__rslora": True, "peft__r": 8, "peft__path": "adapter"},
        {"peft__method": "prompt", "data__mode": "padded", "peft__virtual_tokens": 5},
        {"peft__method": "qlora"},
        {"optim__schedule": "wsd", "optim__decay": 0.5},
    ],
    ids=str,
)
def test_what_works_is_not_refused(changes: dict[str, Any]) -> None:
    assert found(**changes) == []


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("peft", "r", 0, "peft.r: expected a whole number greater than 0, found 0"),
        ("peft", "method", "lorra", "peft.method: expected 'none', 'lora', 'qlora', 'adalora'"),
        ("parallel", "strategy", "zero4", "parallel.strategy: expected 'ddp', 'fsdp', 'zero1'"),
        ("optim", "groups", [{"match": []}], "optim.groups.0.match: expected"),
    ],
)
def test_a_value_that_is_none_of_those_allowed_is_told_what_is(
    section: str, key: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError, match=r"a\.yaml: ") as caught:
        validate({**BASE, section: {key: value}}, "a.yaml")
    assert message in str(caught.value)
