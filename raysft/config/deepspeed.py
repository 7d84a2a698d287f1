"""A DeepSpeed JSON of the user's own (`parallel.deepspeed`), checked against the config.

Keys that raysft gives DeepSpeed itself may be left out, be "auto" or agree with the config; all
others go to DeepSpeed as they are. Pure functions: nothing here imports torch or DeepSpeed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from raysft.config.schema import Config
from raysft.errors import UserError

AUTO = "auto"  # what transformers and accelerate write where they fill a value in: so do we
_ANY = object()  # a rule's value where none of the user's would do

# The keys of DeepSpeed 0.19, and below sections that are written often.
KNOWN: dict[str, tuple[str, ...]] = {
    "": (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("managed_gradient_accumulation", "optimizer", "scheduler", "steps_per_print"),
        *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        *("fp16", "bf16", "bfloat16", "torch_autocast", "data_types", "communication_data_type"),
        *("seq_parallel_communication_data_type", "gradient_clipping", "prescale_gradients"),
        *("gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather"),
        *("dump_state", "disable_python_gc", "wall_clock_breakdown", "memory_breakdown"),
        *("checkpoint", "aio", "activation_checkpointing", "comms_logger", "comms_config"),
        *("tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler", "log_level", "timers"),
        *("dataloader_drop_last", "vocabulary_size", "use_data_before_expert_parallelism"),
        *("autotuning", "compile", "compression_training", "curriculum_learning", "amp"),
        *("data_efficiency", "data_parallel_size", "datastates", "elasticity", "expert_parallel"),
        *("hybrid_engine", "pipeline", "sequence_parallel_size", "tensor_parallel"),
        "weight_quantization",
    ),
    "zero_optimization": (
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size"),
        *("use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size"),
        *("overlap_comm", "compute_grad_norm", "load_from_fp32_weights", "elastic_checkpoint"),
        *("offload_param", "offload_optimizer", "zenflow", "sub_group_size", "cpu_offload_param"),
        *("cpu_offload_use_pin_memory", "cpu_offload", "stage3_prefetch_bucket_size"),
        *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
        *("stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold"),
        *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"),
        *("stage3_gather_fp16_weights_on_model_save", "ignore_unused_parameters"),
        *("legacy_stage1", "round_robin_gradients", "parameter_alignment", "leaf_module"),
        *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"),
        *("zero_quantized_nontrainable_weights", "memory_efficient_linear"),
        *("pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings"),
        *("enable_sanity_checks", "save_muon_momentum_buffer_in_memory"),
    ),
    "zero_optimization.offload_optimizer": (
        *("device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write"),
        *("fast_init", "ratio", "super_offload", "cpuadam_cores_perc"),
    ),
    "zero_optimization.offload_param": (
        *("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
    ),
    "fp16": (
        *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window"),
        *("hysteresis", "consecutive_hysteresis", "min_loss_scale"),
        "fp16_master_weights_and_grads",
    ),
    "bf16": (
        *("enabled", "immediate_grad_update", "check_grad_overflow"),
        *("bf16_master_weights_and_grads", "bf16_optimizer_states"),
    ),
}


class Rule(NamedTuple):
    """A key (or section) of DeepSpeed's, the value raysft gives it, and why, with the remedy."""

    key: str
    value: Any
    why: str


def rules(config: Config) -> list[Rule]:
    """What a user's JSON must not contradict."""
    return [*_of_keys(config), *_of_raysft(config)]


def _of_keys(config: Config) -> list[Rule]:
    parallel, optim, train = config.parallel, config.optim, config.train
    zero = "zero_optimization"
    optimizer = "none" if parallel.offload == "none" else "cpu"
    parameters = "cpu" if parallel.offload == "parameters" else "none"
    found: list[tuple[str, Any, str, Any]] = [
        (f"{zero}.stage", stage_of(config), "parallel.strategy", parallel.strategy),
        (f"{zero}.offload_optimizer.device", optimizer, "parallel.offload", parallel.offload),
        (f"{zero}.offload_param.device", parameters, "parallel.offload", parallel.offload),
        (f"{zero}.cpu_offload", optimizer == "cpu", "parallel.offload", parallel.offload),
        (f"{zero}.cpu_offload_param", parameters == "cpu", "parallel.offload", parallel.offload),
        ("fp16.enabled", train.precision == "fp16", "train.precision", train.precision),
        ("bf16.enabled", train.precision == "bf16", "train.precision", train.precision),
        ("data_types.param_dtype", _ANY, "train.precision", train.precision),
        ("gradient_clipping", optim.clip, "optim.clip", optim.clip),
        ("optimizer.type", "AdamW", "optim.optimizer", optim.optimizer),
        ("optimizer.params.lr", optim.lr, "optim.lr", optim.lr),
        ("optimizer.params.betas", optim.betas, "optim.betas", optim.betas),
        ("optimizer.params.eps", optim.eps, "optim.eps", optim.eps),
        (
            "optimizer.params.weight_decay",
            optim.weight_decay,
            "optim.weight_decay",
            optim.weight_decay,
        ),
        ("scheduler", _ANY, "optim.schedule", optim.schedule),
    ]
    return [Rule(key, value, f"{our} is {ours}; remove one") for key, value, our, ours in found]


def _of_raysft(config: Config) -> list[Rule]:
    zero = "zero_optimization"
    lanes = f"a step is data.lanes: {config.data.lanes} micro-batches, filled by tokens"
    master = "master weights and optimizer state are float32"
    own = "raysft does that itself or not at all"
    sections = (
        *("amp", "torch_autocast", "compile", "weight_quantization", "compression_training"),
        *("checkpoint", "datastates", "elasticity", "autotuning", "curriculum_learning"),
        *("data_efficiency", "hybrid_engine", "tensor_parallel", "expert_parallel", "pipeline"),
        *("sequence_parallel_size", "data_parallel_size", "optimizer"),
    )
    found = [
        ("train_batch_size", _ANY, lanes),
        ("train_micro_batch_size_per_gpu", _ANY, lanes),
        ("gradient_accumulation_steps", _ANY, lanes),
        ("managed_gradient_accumulation", True, lanes),
        ("gradient_allreduce_op", "mean", "workers' gradients are averaged"),
        (f"{zero}.compute_grad_norm", True, "the norm of every step's gradient is reported"),
        (f"{zero}.round_robin_gradients", False, "checkpoints need parameters in their order"),
        (f"{zero}.zenflow", _ANY, "every weight moves in every step"),
        (f"{zero}.offload_optimizer.super_offload", False, "AdamW is torch's"),
        ("zero_force_ds_cpu_optimizer", False, "AdamW is torch's"),
        ("fp16.fp16_master_weights_and_grads", False, master),
        ("fp16", _ANY, "the loss is scaled by a rule that all strategies share"),
        ("bf16.check_grad_overflow", True, "a step whose gradient is not finite is skipped"),
        ("bf16.bf16_master_weights_and_grads", False, master),
        ("bf16.bf16_optimizer_states", False, master),
        ("bfloat16", _ANY, "DeepSpeed's key is bf16"),
        *((section, _ANY, own) for section in sections),
    ]
    return [Rule(key, value, f"{why}; remove it") for key, value, why in found]


def stage_of(config: Config) -> int:
    """1, 2 or 3: of parallel.strategy zero1, zero2 or zero3."""
    return int(config.parallel.strategy.removeprefix("zero"))


def check(config: Config) -> list[str]:
    """One line for each mistake in `parallel.deepspeed`."""
    path = config.parallel.deepspeed
    if path is None or not config.parallel.strategy.startswith("zero"):
        return []
    try:
        tree = read(path)
    except UserError as error:
        return [str(error)]
    unknown, ours = _unknown(tree), rules(config)
    found = [f"{key}: {hint}" for key, hint in unknown.items()]
    for key, value in leaves(tree):
        if value == AUTO or any(_below(key, name) for name in unknown):
            continue
        rule = _rule(ours, key)
        if rule is not None and value != rule.value and not _switched_off(tree, key, rule):
            found.append(f"{key} is {json.dumps(value)}, but {rule.why}")
    return [f"parallel.deepspeed {path}: {line}" for line in found]


def added(config: Config) -> dict[str, Any]:
    """What the user's JSON adds to what raysft sets: dotted key -> value."""
    if config.parallel.deepspeed is None:
        return {}
    ours, tree = rules(config), read(config.parallel.deepspeed)
    return {k: v for k, v in leaves(tree) if v != AUTO and _rule(ours, k) is None}


def read(path: str) -> dict[str, Any]:
    """The JSON at `path`. Raises UserError where there is none, or where a key comes twice."""
    where = f"parallel.deepspeed {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{where}: cannot be read: {reason}; name a DeepSpeed JSON") from None

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UserError(f"{where}: {twice} is given twice; remove one")
        return dict(pairs)

    try:
        tree = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: line {error.lineno} is not JSON: {error.msg}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected {{...}}, found {type(tree).__name__}")
    return tree


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value that is no section; an empty section has none."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _rule(ours: list[Rule], key: str) -> Rule | None:
    """The first one for a key or a section above it."""
    return next((rule for rule in ours if _below(key, rule.key)), None)


def _below(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _unknown(tree: dict[str, Any]) -> dict[str, str]:
    """Keys that DeepSpeed does not have, or that are no section, and what is wrong with each."""
    found = {}
    for section, known in KNOWN.items():
        node: Any = tree
        for part in filter(None, section.split(".")):
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if node is None or node == AUTO:
            continue
        if not isinstance(node, dict):
            found[section] = f"expected {{...}}, found {json.dumps(node)}"
            continue
        for key in set(node) - set(known):
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            found[f"{section}.{key}" if section else key] = f"unknown key{hint}"
    return dict(sorted(found.items()))


def _switched_off(tree: dict[str, Any], key: str, rule: Rule) -> bool:
    """Whether a section above `key` says `enabled: false`, and may: nothing in it counts then."""
    if rule.key.endswith(".enabled"):
        return False
    node: Any = tree
    for part in key.split(".")[:-1]:
        node = node[part]
        if node.get("enabled") is False:
            return True
    return False
