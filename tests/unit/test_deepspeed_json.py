"""A DeepSpeed JSON of the user's own: what it adds, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raysft.config import Config
from raysft.config.deepspeed import KNOWN, check
from raysft.parallel.deepspeed_json import make_settings


def make_config(strategy: str, **parallel: Any) -> Config:
    settings = {"strategy": strategy, **parallel}
    return Config.model_validate({"parallel": settings, "optim": {"lr": 0.03, "clip": 0.05}})


def joined(folder: Path, tree: Any, strategy: str = "zero3", **parallel: Any) -> list[str]:
    """What `check` says, without the path."""
    path = folder / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    config = make_config(strategy, deepspeed=str(path), **parallel)
    found = check(config)
    assert all(line.startswith(f"parallel.deepspeed {path}: ") for line in found)
    return [line.removeprefix(f"parallel.deepspeed {path}: ") for line in found]


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage is 2, but parallel.strategy is zero3; remove one",
        ),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but train.precision is fp32; "),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but optim.clip is 0.05; "),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            'zero_optimization.offload_param.device is "nvme", but parallel.offload is none; ',
        ),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train_micro_batch_size_per_gpu is 4, but a step is data.lanes: 8 micro-batches, "
            "filled by tokens; remove it",
        ),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, but a step is "),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
            "optimizer.params.lr is 0.1, but optim.lr is 0.03; remove one",
        ),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb", but optim.optimizer is adamw'),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler.type is "WarmupLR", but optim.schedule'),
        ({"elasticity": {"enabled": True}}, "elasticity.enabled is true, but raysft does that"),
        ({"zero_optimisation": {}}, "zero_optimisation: unknown key; did you mean zero_optimizat"),
        (
            {"zero_optimization": {"reduce_bucketsize": 5}},
            "zero_optimization.reduce_bucketsize: unknown key; did you mean reduce_bucket_size?",
        ),
        ({"zero_optimization": 3}, "zero_optimization: expected {...}, found 3"),
        ("[1]", "expected {...}, found list"),
        ('{\n"fp16": }', "line 2 is not JSON: "),
        ('{"timers": {}, "timers": {}}', "timers is given twice; remove one"),
    ],
)
def test_a_json_that_contradicts_the_config_is_refused_with_both_keys(
    tree: Any, line: str, tmp_path: Path
) -> None:
    (found,) = joined(tmp_path, tree)
    assert found.startswith(line)


def test_a_json_that_is_not_there_is_refused() -> None:
    (found,) = check(make_config("zero1", deepspeed="nowhere/ds.json"))
    assert found.startswith("parallel.deepspeed nowhere/ds.json: cannot be read: No such file")


def test_a_json_joins_what_agrees_what_is_auto_and_what_is_its_own(tmp_path: Path) -> None:
    """As transformers' examples have it."""
    tree = {
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "reduce_bucket_size": "auto",
            "sub_group_size": 1000,
        },
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "wall_clock_breakdown": True,
        "amp": {"enabled": False, "opt_level": "O1"},
    }
    assert joined(tmp_path, tree, offload="optimizer") == []
    config = make_config("zero3", offload="optimizer", deepspeed=str(tmp_path / "ds.json"))
    settings = make_settings(config, pin_memory=False)
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["sub_group_size"]) == (3, 1000)
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_param"] == {"device": "none"}
    assert zero["reduce_bucket_size"] > 0, "auto is ours to fill"
    assert settings["gradient_clipping"] == 0.05
    assert settings["wall_clock_breakdown"] is True
    assert not {"optimizer", "amp", "train_batch_size"} & settings.keys()
    assert settings["fp16"] == {"enabled": False}


def test_known_keys_are_those_of_deepspeed() -> None:
    """In a process of its own: DeepSpeed is imported by the workers that use it only."""
    source = (
        "import json\n"
        "from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config\n"
        "from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as Z\n"
        "from deepspeed.runtime.zero import offload_config as o\n"
        "names = lambda m: [f.alias or n for n, f in m.model_fields.items()]\n"
        "print(json.dumps({'zero_optimization': names(Z), 'fp16': names(DeepSpeedFP16Config),"
        "'bf16': names(DeepSpeedBF16Config),"
        "'zero_optimization.offload_param': names(o.DeepSpeedZeroOffloadParamConfig),"
        "'zero_optimization.offload_optimizer': names(o.DeepSpeedZeroOffloadOptimizerConfig)}))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = json.loads(printed.splitlines()[-1])
    assert {section: sorted(keys) for section, keys in found.items()} == {
        section: sorted(KNOWN[section]) for section in found
    }
