"""A DeepSpeed JSON of the user's own (`parallel.deepspeed`), checked against the config.

Keys that raysft gives DeepSpeed itself may be left out, be "auto" or agree with the config; where
the config says nothing, the file's value becomes the config's (`filled`). What says how DeepSpeed
would work and not what is to come out is left aside, with a line (`unused`). All others go to
DeepSpeed as they are. Pure functions: nothing here imports torch or DeepSpeed.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeGuard

from raysft import paths
from raysft.config.schema import Config
from raysft.config.strategies import names, traits_of
from raysft.errors import Mistake, UserError
from raysft.json_types import Json, JsonObject

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
    """A key (or section) of DeepSpeed's, the value raysft gives it, and why, with the remedy.

    also: other values that ask for nothing else. hint: any other is left aside, not refused.
    """

    key: str
    value: object
    why: str
    also: tuple[object, ...] = ()
    hint: bool = False

    def agrees(self, value: object) -> bool:
        """Whether the user's `value` is what happens anyway."""
        if self.key == "optimizer.type" and isinstance(value, str):
            return value.lower() in ("adam", "adamw")  # DeepSpeed takes either for AdamW
        return value == self.value or value in self.also


# DeepSpeed's schedulers and ours; what each warms up for where nothing is said.
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
WARMUP = 1000
BETAS = [0.9, 0.999]  # of its Adam and AdamW, where the file names no others


def rules(config: Config) -> list[Rule]:
    """What a user's JSON must not contradict."""
    return [*_of_keys(config), *_of_raysft(config)]


def _of_keys(config: Config) -> list[Rule]:
    parallel, optim, train = config.parallel, config.optim, config.train
    traits = traits_of(parallel.strategy)
    zero = "zero_optimization"
    optimizer = "none" if parallel.offload == "none" else "cpu"
    parameters = "cpu" if parallel.offload == "parameters" else "none"
    found: list[tuple[str, object, str, object]] = [
        (f"{zero}.stage", traits.stage, "parallel.strategy", parallel.strategy),
        (f"{zero}.offload_optimizer.device", optimizer, "parallel.offload", parallel.offload),
        (f"{zero}.cpu_offload", optimizer == "cpu", "parallel.offload", parallel.offload),
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
        ("scheduler.type", _scheduler(optim.schedule), "optim.schedule", optim.schedule),
        ("scheduler.params.warmup_max_lr", optim.lr, "optim.lr", optim.lr),
        ("scheduler.params.warmup_num_steps", optim.warmup, "optim.warmup", optim.warmup),
        ("scheduler.params.total_num_steps", train.max_steps, "train.max_steps", train.max_steps),
    ]
    if "parameters" in traits.offloads:
        offload = parallel.offload
        found += [
            (f"{zero}.offload_param.device", parameters, "parallel.offload", offload),
            (f"{zero}.cpu_offload_param", parameters == "cpu", "parallel.offload", offload),
        ]
    return [Rule(key, value, f"{our} is {ours}; remove one") for key, value, our, ours in found]


def _scheduler(schedule: str) -> object:
    return next((name for name, ours in SCHEDULES.items() if ours == schedule), _ANY)


def _of_raysft(config: Config) -> list[Rule]:
    zero = "zero_optimization"
    lanes = f"a step is data.lanes: {config.data.lanes} micro-batches, filled by tokens"
    master = "master weights and optimizer state are float32"
    own = "raysft does that itself or not at all"
    sections = (
        *("amp", "torch_autocast", "compile", "weight_quantization", "compression_training"),
        *("checkpoint", "datastates", "elasticity", "autotuning", "curriculum_learning"),
        *("data_efficiency", "hybrid_engine", "tensor_parallel", "expert_parallel", "pipeline"),
        "optimizer",
    )
    rises = "rates rise linearly from zero, and fall to zero"
    scaled = "the loss is scaled by a rule that all strategies share"
    one = (1,)
    same = (False,) if config.optim.weight_decay == 0 else ()  # without decay it means nothing
    whole = "only zero3 has parameters to offload"
    found = [
        Rule(f"{zero}.offload_param.device", "none", whole, hint=True),
        Rule(f"{zero}.cpu_offload_param", False, whole, hint=True),
        Rule("train_batch_size", _ANY, lanes),
        Rule("train_micro_batch_size_per_gpu", _ANY, lanes, one),
        Rule("gradient_accumulation_steps", _ANY, lanes, one),
        Rule("managed_gradient_accumulation", True, lanes),
        Rule("gradient_allreduce_op", "mean", "workers' gradients are averaged"),
        Rule(f"{zero}.compute_grad_norm", True, "the norm of every step's gradient is reported"),
        Rule(
            f"{zero}.round_robin_gradients",
            False,
            "checkpoints need parameters in their order",
            hint=True,
        ),
        Rule(f"{zero}.zenflow", _ANY, "every weight moves in every step", (None,)),
        Rule(f"{zero}.offload_optimizer.super_offload", False, "AdamW is torch's", hint=True),
        Rule("zero_force_ds_cpu_optimizer", False, "AdamW is torch's", hint=True),
        Rule("optimizer.params.adam_w_mode", True, "weight decay is AdamW's", same),
        Rule("optimizer.params.bias_correction", True, "AdamW corrects its averages"),
        Rule("optimizer.params.amsgrad", False, "AdamW here is without amsgrad"),
        *(
            Rule(f"optimizer.params.{name}", True, "AdamW is torch's", (False, None), hint=True)
            for name in ("torch_adam", "fused", "foreach", "fp32_optimizer_states")
        ),
        Rule("scheduler.params.warmup_min_lr", 0, rises),
        Rule("scheduler.params.warmup_min_ratio", 0, rises),
        Rule("scheduler.params.cos_min_ratio", 0, rises),
        Rule("scheduler.params.warmup_type", "linear", rises),
        Rule("scheduler.params.last_batch_iteration", -1, "the checkpoint says where a run stands"),
        Rule("scheduler", _ANY, "optim.schedule and optim.warmup say all of it"),
        Rule("fp16.loss_scale", 0, scaled),
        Rule("fp16.auto_cast", False, "train.precision says what is computed in"),
        Rule("fp16.fp16_master_weights_and_grads", False, master),
        # As DeepSpeed has them by itself: nobody has asked for anything.
        Rule("fp16.initial_scale_power", 16, scaled, hint=True),
        Rule("fp16.loss_scale_window", 1000, scaled, hint=True),
        Rule("fp16.hysteresis", 2, scaled, hint=True),
        Rule("fp16.consecutive_hysteresis", False, scaled, hint=True),
        Rule("fp16.min_loss_scale", 1, scaled, hint=True),
        Rule("bf16.check_grad_overflow", True, "a step whose gradient is not finite is skipped"),
        Rule("bf16.bf16_master_weights_and_grads", False, master),
        Rule("bf16.bf16_optimizer_states", False, master),
        Rule("bfloat16", _ANY, "DeepSpeed's key is bf16"),
        Rule("sequence_parallel_size", _ANY, own, one),
        Rule("data_parallel_size", _ANY, own),
        *(Rule(section, _ANY, own, (False, None)) for section in sections),
    ]
    return [rule._replace(why=f"{rule.why}; remove it") for rule in found]


def check(config: Config) -> list[Mistake]:
    """What is wrong with the file of `parallel.deepspeed`."""
    path = config.parallel.deepspeed
    if path is None:
        return []
    try:
        tree = read(path)
    except UserError as error:
        return [Mistake("parallel.deepspeed", str(error))]
    unknown = _unknown(tree) | _mistyped(tree)
    zero = traits_of(config.parallel.strategy).stage is not None
    if not zero:  # perhaps as the file's stage cannot be read: nothing else of it is asked for
        unknown = {key: unknown[key] for key in _STAGE if key in unknown}
    found = [f"{key}: {hint}" for key, hint in unknown.items()]
    for key, value, rule in _against(config, tree) if zero else ():
        if not rule.hint and not any(_below(key, name) for name in unknown):
            found.append(f"{key} is {json.dumps(value)}, but {rule.why}")
    return [Mistake("parallel.deepspeed", f"parallel.deepspeed {path}: {line}") for line in found]


def wrong_stage(config: Config) -> bool:
    """Whether it is for a mistake in the file that it gives parallel.strategy no stage."""
    if config.parallel.deepspeed is None:
        return False
    try:
        tree = read(config.parallel.deepspeed)
    except UserError:
        return False
    return any(key in _STAGE for key in _unknown(tree) | _mistyped(tree))


def unused(config: Config) -> list[str]:
    """One line for each wish in `parallel.deepspeed` that is left aside: results are the same."""
    path = config.parallel.deepspeed
    if path is None:
        return []
    tree = read(path)
    found = [
        f"parallel.deepspeed {path}: {key} {json.dumps(value)} is not used: "
        f"{rule.why.removesuffix('; remove it')}"
        for key, value, rule in _against(config, tree)
        if rule.hint
    ]
    theirs, kind = dict(leaves(tree)), "scheduler.params.warmup_type"
    if theirs.get("scheduler.type") in SCHEDULES and kind not in theirs and config.optim.warmup:
        found.append(
            f'parallel.deepspeed {path}: {kind} is not given, which is "log" to DeepSpeed: here '
            'rates rise linearly; say "linear" if that is meant'
        )
    return found


def _against(config: Config, tree: JsonObject) -> Iterator[tuple[str, Json, Rule]]:
    """What the file says that is not what happens: key, value, and the rule."""
    ours, precision = rules(config), config.train.precision
    scheduler = tree.get("scheduler")
    if isinstance(scheduler, dict) and scheduler.get("type") in list(SCHEDULES):
        # What is not said is said too.
        params = scheduler.get("params")
        given = {"warmup_num_steps": WARMUP, **(params if isinstance(params, dict) else {})}
        tree = {**tree, "scheduler": {**scheduler, "params": given}}
    for key, value in leaves(tree):
        section, _, name = key.partition(".")
        off = section in ("fp16", "bf16") and name not in ("", "enabled") and section != precision
        rule = _rule(ours, key)
        if value == AUTO or off or rule is None or rule.agrees(value):
            continue
        if not _switched_off(tree, key, rule):
            yield key, value, rule


def filled(tree: JsonObject) -> JsonObject:
    """A config's plain tree with the file's values where it has none of its own: the strategy,
    offloading, precision, clipping, AdamW's numbers, the schedule.

    A file that cannot be read changes nothing, nor does a value of the wrong kind: `check` says so.
    """
    parallel = tree.get("parallel")
    path = parallel.get("deepspeed") if isinstance(parallel, dict) else None
    if not isinstance(path, str):
        return tree
    try:
        file = read(paths.absolute(path))
    except UserError:
        return tree
    wrong = _mistyped(file)
    theirs = {key: value for key, value in leaves(file) if key not in wrong}
    result = dict(tree)
    for key, value in _meant(theirs).items():
        section, _, name = key.partition(".")
        ours = result.get(section)
        ours = {} if ours is None else ours
        other = key == "train.max_steps" and isinstance(ours, dict) and "epochs" in ours
        if value != AUTO and isinstance(ours, dict) and name not in ours and not other:
            result[section] = {**ours, name: value}
    return result


def _meant(theirs: JsonObject) -> JsonObject:
    """What a file's values are by our keys."""
    zero = "zero_optimization"
    found: JsonObject = {}
    stage = theirs.get(f"{zero}.stage")
    if named := names(lambda traits: traits.stage is not None and traits.stage == stage):
        found["parallel.strategy"] = named[0]
    for what, ours in (("param", "parameters"), ("optimizer", "optimizer")):
        old = theirs.get(f"{zero}.cpu_offload{'_param' * (what == 'param')}")  # of DeepSpeed 0.3
        there = old is True or theirs.get(f"{zero}.offload_{what}.device") == "cpu"
        if there and (what == "optimizer" or theirs.get(f"{zero}.stage", 3) == 3):
            found.setdefault("parallel.offload", ours)
    for half in ("bf16", "fp16"):
        if theirs.get(f"{half}.enabled") is True:
            found["train.precision"] = half
        elif theirs.get(f"{half}.enabled") is False:
            found.setdefault("train.precision", "fp32")
    plain = {
        "gradient_clipping": "optim.clip",
        "scheduler.params.warmup_max_lr": "optim.lr",
        "scheduler.params.warmup_num_steps": "optim.warmup",
        "scheduler.params.total_num_steps": "train.max_steps",
        **{f"optimizer.params.{n}": f"optim.{n}" for n in ("lr", "betas", "eps", "weight_decay")},
    }
    found |= {ours: theirs[key] for key, ours in plain.items() if key in theirs}
    kind = theirs.get("optimizer.type")
    if isinstance(kind, str) and kind.lower() in ("adam", "adamw"):
        found.setdefault("optim.betas", list(BETAS))
    if theirs.get("scheduler.type") in SCHEDULES:
        found["optim.schedule"] = SCHEDULES[theirs["scheduler.type"]]
        found.setdefault("optim.warmup", WARMUP)
    return found


def added(config: Config) -> JsonObject:
    """What the user's JSON adds to what raysft sets: dotted key -> value."""
    if config.parallel.deepspeed is None:
        return {}
    ours, tree = rules(config), read(config.parallel.deepspeed)
    return {k: v for k, v in leaves(tree) if v != AUTO and _rule(ours, k) is None}


def read(path: str) -> JsonObject:
    """The JSON at `path`. Raises UserError where there is none, or where a key comes twice."""
    where = f"parallel.deepspeed {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not text; a NUL in its name
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{where}: cannot be read: {reason}; name a DeepSpeed JSON") from None

    def once(pairs: list[tuple[str, Json]]) -> JsonObject:
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


def leaves(tree: JsonObject, prefix: str = "") -> Iterator[tuple[str, Json]]:
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


def _unknown(tree: JsonObject) -> dict[str, str]:
    """Keys that DeepSpeed does not have, or that are no section, and what is wrong with each."""
    found = {}
    for section, known in KNOWN.items():
        node: object = tree
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


_STAGE = ("zero_optimization", "zero_optimization.stage")
_Kind = tuple[str, Callable[[object], bool]]
_ABOVE: _Kind = ("a number greater than 0", lambda v: _number(v) and v > 0)
_FROM: _Kind = ("a number of at least 0", lambda v: _number(v) and v >= 0)
_COUNT: _Kind = ("a whole number greater than 0", lambda v: _number(v) and v > 0 and v == int(v))
_SWITCH: _Kind = ("true or false", lambda v: isinstance(v, bool))
_TEXT: _Kind = ("text", lambda v: isinstance(v, str))
_SECTION: _Kind = ("{...}", lambda v: isinstance(v, dict) or v in (None, False))
# What is wanted of the values that become the config's, and a test for it.
_KINDS: dict[str, _Kind] = {
    "zero_optimization.stage": ("1, 2 or 3", lambda v: type(v) is int and v in (1, 2, 3)),
    "zero_optimization.cpu_offload": _SWITCH,
    "zero_optimization.cpu_offload_param": _SWITCH,
    "fp16.enabled": _SWITCH,
    "bf16.enabled": _SWITCH,
    "gradient_clipping": _FROM,
    "optimizer": _SECTION,
    "optimizer.type": _TEXT,
    "optimizer.params": _SECTION,
    "optimizer.params.lr": _ABOVE,
    "optimizer.params.betas": (
        "a list of 2 numbers",
        lambda v: isinstance(v, list) and len(v) == 2 and all(map(_number, v)),
    ),
    "optimizer.params.eps": _ABOVE,
    "optimizer.params.weight_decay": _FROM,
    "scheduler": _SECTION,
    "scheduler.type": _TEXT,
    "scheduler.params": _SECTION,
    "scheduler.params.warmup_max_lr": _ABOVE,
    "scheduler.params.warmup_num_steps": _FROM,
    "scheduler.params.total_num_steps": _COUNT,
}


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mistyped(tree: JsonObject) -> dict[str, str]:
    """Keys whose value is not of the kind DeepSpeed has there, and what is wrong with each."""
    found = {}
    for key, (wanted, fits) in _KINDS.items():
        *above, name = key.split(".")
        node: object = tree
        for part in above:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or name not in node:
            continue
        value = node[name]
        if value == AUTO or fits(value):
            continue
        hint = ""
        if key == "zero_optimization.stage" and value == 0 and _number(value):
            hint = "; without ZeRO, remove parallel.deepspeed"
        elif isinstance(value, str) and (value in ("true", "false") or _plain(value)):
            hint = "; write it without quotes"
        found[key] = f"expected {wanted}, found {json.dumps(value)}{hint}"
    return found


def _plain(text: str) -> bool:
    """Whether a text is a number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _switched_off(tree: JsonObject, key: str, rule: Rule) -> bool:
    """Whether a section above `key` says `enabled: false`, and may: nothing in it counts then."""
    if rule.key.endswith(".enabled"):
        return False
    node = tree
    for part in key.split(".")[:-1]:
        node = node[part]
        if node.get("enabled") is False:
            return True
    return False
