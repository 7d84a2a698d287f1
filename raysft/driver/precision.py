"""train.precision: auto, on the driver: bf16 where the cluster's GPUs have it, else fp32.

Asked once, at the first start of a run: its config.yaml then holds the answer, for workers, exports
and later starts. Costs a Ray task on each node with GPUs, some seconds for torch to be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysft.config import Config
from raysft.config.combinations import contradictions
from raysft.config.precision import with_precision
from raysft.config.training import Precision
from raysft.errors import UserError

_T = TypeVar("_T")
WITHIN_S = 120.0
# Else Ray hides the GPUs of a node from tasks that take none, as these do: others may train there.
_SEES_GPUS = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}


def settled(config: Config, gpu: bool) -> tuple[Config, str | None]:
    """`config` in the precision that auto is here, and a line that says so; unchanged, and None,
    where it names one.

    gpu: workers take GPUs. Raises UserError where these do not agree, and where what is chosen
    contradicts another key.
    """
    if config.train.precision != "auto":
        return config, None
    chosen, why = _of_gpus() if gpu else ("fp32", "workers compute on CPUs")
    found = with_precision(config, chosen)
    before = {mistake.text for mistake in contradictions(config)}
    for mistake in contradictions(found):
        if mistake.text not in before:
            raise UserError(f"{mistake.text} (train.precision: auto is {chosen} here: {why})")
    return found, f"train.precision: {chosen} (auto: {why})"


def _of_gpus() -> tuple[Precision, str]:
    try:
        found = ask(_have_bf16)
    except ray.exceptions.RayError as error:
        raise UserError(
            f"train.precision: auto: the cluster's GPUs could not be asked within {WITHIN_S:g} s "
            f"({type(error).__name__}); start again, or set it to bf16, fp16 or fp32"
        ) from error
    return choose(found)


def ask(function: Callable[[], _T]) -> dict[str, _T]:
    """What `function` says on each node with GPUs, which it sees, in use or not. Raises RayError
    where one does not answer."""
    nodes = {
        node["NodeID"]: node["NodeName"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0)
    }
    asked = {
        name: ray.remote(function)
        .options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env=_SEES_GPUS,
        )
        .remote()
        for node, name in nodes.items()
    }
    return dict(zip(asked, ray.get(list(asked.values()), timeout=WITHIN_S), strict=True))


def choose(found: dict[str, bool]) -> tuple[Precision, str]:
    """What to compute in, and why. found: node -> whether its GPUs have bfloat16.

    Raises UserError where some have and others have not.
    """
    if not found:
        return "bf16", "no GPU is there yet, and those of today have it"
    if all(found.values()):
        return "bf16", "the GPUs have it"
    if not any(found.values()):
        return "fp32", "the GPUs have no bfloat16"
    lacking = ", ".join(name for name, has in found.items() if not has)
    raise UserError(
        f"train.precision: auto: GPUs of {lacking} have no bfloat16, those of other nodes have it; "
        "set it to bf16 (and keep workers off those nodes), fp16 or fp32"
    )


def _have_bf16() -> bool:
    """Whether the GPUs of this node compute in bfloat16."""
    import torch  # here, not above: the driver has no use for it

    from raysft.parallel import precision

    return torch.cuda.is_available() and all(
        precision.has_bf16(number) for number in range(torch.cuda.device_count())
    )
