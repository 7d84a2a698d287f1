"""What DeepSpeed is told: our config as its JSON, with what the user adds (`parallel.deepspeed`).

The size of a batch means nothing here: losses are normalised before DeepSpeed sees them, and the
loop says which turn is a step's last.
"""

from __future__ import annotations

from raysft.config.deepspeed import added, check
from raysft.config.schema import Config
from raysft.config.strategies import traits_of
from raysft.errors import UserError
from raysft.json_types import Json, JsonObject
from raysft.parallel.scale import START

# Elements reduced together. DeepSpeed's 500 million would hold 2 GB for it.
BUCKET = 50_000_000


def make_settings(config: Config, pin_memory: bool) -> JsonObject:
    """DeepSpeed's config for a run.

    pin_memory: of what is offloaded to the host. Raises UserError where the user's JSON contradicts
    the config.
    """
    mistakes = check(config)
    if mistakes:
        raise UserError(mistakes[0].text)
    settings = _defaults(config, pin_memory)
    for key, value in {**added(config), **_own(config)}.items():
        _put(settings, key, value)
    return settings


def _defaults(config: Config, pin_memory: bool) -> JsonObject:
    """What a user may change."""
    settings: JsonObject = {
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a step
        "zero_optimization": {"reduce_bucket_size": BUCKET},
    }
    if config.train.precision != "fp32":
        # As under fsdp: half-precision gradients are summed and added up in float32.
        settings["communication_data_type"] = "fp32"
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    for key, offloads in _offloads(config).items():
        if offloads:
            settings["zero_optimization"][key] = {"pin_memory": pin_memory}
    return settings


def _own(config: Config) -> JsonObject:
    """What follows from the config, by dotted key."""
    precision = config.train.precision
    found: JsonObject = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip,
        "zero_optimization.stage": traits_of(config.parallel.strategy).stage,
        # Offloaded or not, AdamW is torch's: DeepSpeed's own for the CPU has to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "fp16.enabled": precision == "fp16",
        "bf16.enabled": precision == "bf16",
    }
    if precision == "fp16":
        found["fp16.loss_scale"] = START  # not DeepSpeed's to change, see `Zero`
    for key, offloads in _offloads(config).items():
        found[f"zero_optimization.{key}.device"] = "cpu" if offloads else "none"
    return found


def _offloads(config: Config) -> dict[str, bool]:
    """Section of DeepSpeed's -> whether `parallel.offload` asks for it."""
    asked = config.parallel.offload
    found = {"offload_optimizer": asked != "none"}
    if "parameters" in traits_of(config.parallel.strategy).offloads:
        found["offload_param"] = asked == "parameters"
    return found


def _put(settings: JsonObject, key: str, value: Json) -> None:
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[last] = value
