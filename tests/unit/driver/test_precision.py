"""train.precision: auto on the driver, and what workers find in their environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from raysft.config import Config
from raysft.driver.precision import choose, settled
from raysft.driver.shares import Shares, worker_environment
from raysft.errors import UserError
from raysft.models.experts import slow
from raysft.parallel import precision


def config(**train: object) -> Config:
    return Config.model_validate({"train": train})


def test_auto_is_bf16_where_all_gpus_have_it_and_fp32_where_none_has() -> None:
    assert choose({"a": True, "b": True}) == ("bf16", "the GPUs have it")
    assert choose({"a": False})[0] == "fp32"
    with pytest.raises(UserError, match=r"GPUs of b have no bfloat16.*set it to bf16"):
        choose({"a": True, "b": False})


def test_on_cpus_it_is_fp32_and_a_precision_that_is_named_stays() -> None:
    found, line = settled(config(), gpu=False)
    assert found.train.precision == "fp32"
    assert line == "train.precision: fp32 (auto: workers compute on CPUs)"
    for name in ("bf16", "fp16", "fp32"):
        given = config(precision=name)
        assert settled(given, gpu=True) == (given, None)
    assert precision.settled(config(), torch.device("cpu")).train.precision == "fp32"


def test_what_is_chosen_is_held_against_the_other_keys() -> None:
    given = Config.model_validate({"model": {"moe": {"experts": "grouped_gemm"}}})
    with pytest.raises(UserError, match=r"computes in bfloat16 only; .* auto is fp32 here"):
        settled(given, gpu=False)


def test_products_of_float32_are_in_tf32_only_where_it_is_asked_for() -> None:
    """Those of convolutions too, for which torch has it on by itself."""
    before = torch.backends.cudnn.allow_tf32
    try:
        precision.use_tf32(False)
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert not torch.backends.cudnn.allow_tf32
        precision.use_tf32(True)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        precision.use_tf32(False)
        torch.backends.cudnn.allow_tf32 = before


def test_slow_products_of_experts_are_said() -> None:
    assert slow("torch", torch.bfloat16, (9, 0)) is None
    assert slow("loop", torch.float32, (8, 0)) is slow("auto", torch.float32, (9, 0)) is None
    said = slow("torch", torch.float16, (9, 0))
    assert said is not None and "slow in float16" in said and "train.precision: bf16" in said
    said = slow("torch", torch.bfloat16, (8, 0))
    assert said is not None and "slow on a GPU of compute capability 8.0" in said


def environment(gpu: bool, **train: object) -> dict[str, str]:
    """Beside what all workers have."""
    shares = Shares(gpu, {"CPU": 1.0}, threads=4, room=1, data_cpus=1.0)
    found = worker_environment(config(**train), shares)
    assert found.pop("TORCH_GLOO_LAZY_INIT") == "1"
    assert found.pop("RAYSFT_PRELOAD").endswith("raysft.worker")
    assert not gpu or found.pop("OMP_NUM_THREADS") == "4"
    return found


def test_the_environment_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment(gpu=False, deterministic=True) == {"GOMP_SPINCOUNT": "10000"}
    grown = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert environment(gpu=True) == grown
    same = {**grown, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert environment(gpu=True, deterministic=True) == same
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert environment(gpu=True) == {}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    assert environment(gpu=True) == {"PYTORCH_ALLOC_CONF": "backend:native"}


SCRIPT = """
import json, os, ray
from raysft.config import Config
from raysft.driver import precision

def sees():
    return os.environ.get("CUDA_VISIBLE_DEVICES") == "7"

ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)

@ray.remote(num_gpus=1, num_cpus=0)
class Other:
    def here(self):
        return True

other = Other.remote()  # another job has the GPU
ray.get(other.here.remote())
found, line = precision.settled(Config(), gpu=True)
print(json.dumps([list(precision.ask(sees).values()), found.train.precision, line]))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nodes_are_asked_about_gpus_that_are_in_use() -> None:
    """Of a GPU that only Ray believes in: torch finds none."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "7", "RAY_ADDRESS": ""},
    )
    seen, chosen, line = json.loads(done.stdout.splitlines()[-1])
    assert seen == [True]
    assert (chosen, line) == ("fp32", "train.precision: fp32 (auto: the GPUs have no bfloat16)")
