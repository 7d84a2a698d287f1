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
    """A key (or section) of DeepSpeed's, the value raysft gives it, and what says so."""

    key: str
    value: Any
    because: str


def rules(config: Config) -> list[Rule]:
    """What a user's JSON must not contradict."""
    parallel, optim, precision = config.parallel, config.optim, config.train.precision
    offload = f"parallel.offload is {parallel.offload}"
    zero = "zero_optimization"
    where = {
        "optimizer": "none" if parallel.offload == "none" else "cpu",
        "param": "cpu" if parallel.offload == "parameters" else "none",
    }
    lanes = f"a step is {config.data.lanes} micro-batches (data.lanes), filled by tokens"
    mean = "workers' gradients are averaged"
    master = "master weights and optimizer state are in float32"
    scaling = "train.precision: fp16 scales the loss by a rule of its own"
    found = [
        Rule(f"{zero}.stage", stage_of(config), f"parallel.strategy is {parallel.strategy}"),
        Rule("fp16.enabled", precision == "fp16", f"train.precision is {precision}"),
        Rule("bf16.enabled", precision == "bf16", f"train.precision is {precision}"),
        Rule("gradient_clipping", optim.clip, f"optim.clip is {optim.clip}"),
        Rule(f"{zero}.offload_optimizer.device", where["optimizer"], offload),
        Rule(f"{zero}.offload_param.device", where["param"], offload),
        Rule("optimizer.type", "AdamW", f"optim.optimizer is {optim.optimizer}"),
        Rule("optimizer.params.lr", optim.lr, f"optim.lr is {optim.lr}"),
        Rule("optimizer.params.betas", optim.betas, f"optim.betas is {optim.betas}"),
        Rule("optimizer.params.eps", optim.eps, f"optim.eps is {optim.eps}"),
        Rule(
            "optimizer.params.weight_decay",
            optim.weight_decay,
            f"optim.weight_decay is {optim.weight_decay}",
        ),
        Rule("optimizer", _ANY, "raysft makes the optimizer (optim)"),
        Rule("scheduler", _ANY, f"optim.schedule is {optim.schedule}"),
        Rule("train_batch_size", _ANY, lanes),
        Rule("train_micro_batch_size_per_gpu", _ANY, lanes),
        Rule("gradient_accumulation_steps", _ANY, lanes),
        Rule("managed_gradient_accumulation", True, lanes),
        Rule("gradient_allreduce_op", "mean", mean),
        Rule(f"{zero}.compute_grad_norm", True, "every step's gradient norm is reported"),
        Rule(f"{zero}.round_robin_gradients", False, "checkpoints need parameters in their order"),
        Rule(f"{zero}.zenflow", _ANY, "raysft takes whole steps"),
        Rule(f"{zero}.offload_optimizer.super_offload", False, "AdamW is torch's"),
        *(Rule(f"{zero}.{key}", _ANY, offload) for key in ("cpu_offload", "cpu_offload_param")),
        Rule("zero_force_ds_cpu_optimizer", False, "AdamW is torch's"),
        Rule("fp16.fp16_master_weights_and_grads", False, master),
        Rule("fp16", _ANY, scaling),
        Rule("bf16.check_grad_overflow", True, "a step whose gradient is not finite is skipped"),
        Rule("bf16.bf16_master_weights_and_grads", False, master),
        Rule("bf16.bf16_optimizer_states", False, master),
        Rule("bfloat16", _ANY, "its name is bf16"),
        Rule("data_types.param_dtype", _ANY, f"train.precision is {precision}"),
    ]
    own = "raysft does that itself or not at all"
    sections = (
        *("amp", "torch_autocast", "compile", "weight_quantization", "compression_training"),
        *("checkpoint", "datastates", "elasticity", "autotuning", "curriculum_learning"),
        *("data_efficiency", "hybrid_engine", "tensor_parallel", "expert_parallel", "pipeline"),
        *("sequence_parallel_size", "data_parallel_size"),
    )
    return [*found, *(Rule(section, _ANY, own) for section in sections)]


def stage_of(config: Config) -> int:
    """1, 2 or 3: of parallel.strategy zero1, zero2 or zero3."""
    return int(config.parallel.strategy.removeprefix("zero"))


def check(config: Config) -> list[str]:
    """One line for each mistake in `parallel.deepspeed`."""
    if config.parallel.deepspeed is None or not config.parallel.strategy.startswith("zero"):
        return []
    try:
        tree = read(config.parallel.deepspeed)
    except UserError as error:
        return [str(error)]
    where = f"parallel.deepspeed {config.parallel.deepspeed}"
    found = _unknown(tree)
    unknown = {line.split(":")[0] for line in found}
    ours = rules(config)
    for key, value in leaves(tree):
        if any(key == name or key.startswith(f"{name}.") for name in unknown) or value == AUTO:
            continue
        rule = next((r for r in ours if key == r.key or key.startswith(f"{r.key}.")), None)
        if rule is None or value == rule.value or _switched_off(tree, key):
            continue
        shown = json.dumps(value)
        found.append(f"{key} is {shown}, but {rule.because}; remove one")
    return [f"{where}: {line}".replace("; remove one", _remedy(line)) for line in found]


def _remedy(line: str) -> str:
    """Where no key of the config would help, only DeepSpeed's can go."""
    because = line.partition(", but ")[2]
    ours = because.startswith(("parallel.", "train.precision is", "optim."))
    return "; remove one" if ours else "; remove it"


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


def _unknown(tree: dict[str, Any]) -> list[str]:
    found = []
    for section, known in KNOWN.items():
        node: Any = tree
        for part in filter(None, section.split(".")):
            node = node.get(part) if isinstance(node, dict) else None
        if section and isinstance(node, dict | str | type(None)) is False:
            found.append(f"{section}: expected {{...}}, found {json.dumps(node)}")
        for key in node if isinstance(node, dict) else ():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
                found.append(f"{section + '.' if section else ''}{key}: unknown key{hint}")
    return found


def _switched_off(tree: dict[str, Any], key: str) -> bool:
    """Whether a section that holds `key` says `enabled: false`, so that nothing in it counts."""
    node: Any = tree
    for part in key.split(".")[:-1]:
        node = node[part]
        if node.get("enabled") is False:
            return not key.endswith(".enabled") or part not in ("fp16", "bf16")
    return False
