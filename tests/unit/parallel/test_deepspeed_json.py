"""A DeepSpeed JSON of the user's own: what it adds, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raysft.config import Config, load_config
from raysft.config.deepspeed import KNOWN, check, unused
from raysft.config.load import validate
from raysft.errors import UserError
from raysft.parallel.deepspeed_json import make_settings


def make_config(strategy: str, **parallel: Any) -> Config:
    settings = {"strategy": strategy, **parallel}
    return Config.model_validate({"parallel": settings, "optim": {"lr": 0.03, "clip": 0.05}})


def joined(folder: Path, tree: Any, strategy: str = "zero3", **parallel: Any) -> list[str]:
    """What `check` says, without the path."""
    path = folder / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    config = make_config(strategy, deepspeed=str(path), **parallel)
    found = [mistake.text for mistake in check(config)]
    assert all(line.startswith(f"parallel.deepspeed {path}: ") for line in found)
    return [line.removeprefix(f"parallel.deepspeed {path}: ") for line in found]


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage is 2, but parallel.strategy is zero3; remove one",
        ),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but train.precision is auto; "),
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
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 0}}},
            'scheduler.type is "WarmupDecayLR", but optim.schedule is constant; remove one',
        ),
        (  # which warms up for 1,000 steps by itself
            {"scheduler": {"type": "WarmupLR"}},
            "scheduler.params.warmup_num_steps is 1000, but optim.warmup is 0; remove one",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"amsgrad": True}}},
            "optimizer.params.amsgrad is true, but AdamW here is without amsgrad; remove it",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "zero_optimization.off"),
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
    assert found.text.startswith("parallel.deepspeed nowhere/ds.json: cannot be read: No such file")


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


# -- files as people have them -------------------------------------------------------------------

AUTOS = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
SCALE = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
ADAM = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
WARM = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
STAGE_2 = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 5e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 5e8,
    "contiguous_gradients": True,
}
STAGE_3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
CPU = {"device": "cpu", "pin_memory": True}
FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "trainer, stage 2": (
        {
            **AUTOS,
            "fp16": SCALE,
            "optimizer": {"type": "AdamW", "params": ADAM},
            "scheduler": {"type": "WarmupLR", "params": WARM},
            "zero_optimization": {**STAGE_2, "offload_optimizer": CPU},
            "steps_per_print": 2000,
            "wall_clock_breakdown": False,
        },
        {"parallel.strategy": "zero2", "parallel.offload": "optimizer"},
    ),
    "trainer, stage 3": (
        {
            **AUTOS,
            "bf16": {"enabled": True},
            "fp16": SCALE,
            "optimizer": {"type": "Adam", "params": {**ADAM, "lr": 3e-5, "weight_decay": 0.01}},
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {**WARM, "total_num_steps": "auto", "warmup_num_steps": 50},
            },
            "zero_optimization": {**STAGE_3, "offload_optimizer": CPU, "offload_param": CPU},
            "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1},
        },
        {
            "parallel.strategy": "zero3",
            "parallel.offload": "parameters",
            "train.precision": "bf16",
            "optim.lr": 3e-5,
            "optim.weight_decay": 0.01,
            "optim.schedule": "linear",
            "optim.warmup": 50,
        },
    ),
    "llama-factory": (
        {
            **AUTOS,
            "zero_allow_untested_optimizer": True,
            "fp16": SCALE,
            "bf16": {"enabled": "auto"},
            "zero_optimization": {**STAGE_2, "round_robin_gradients": True},
        },
        {"parallel.strategy": "zero2", "parallel.offload": "none"},
    ),
    "of long ago": (
        {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.5,
            "fp16": {"enabled": False, "loss_scale": 128, "initial_scale_power": 32},
            "zero_optimization": {"stage": 2, "cpu_offload": True},
            "optimizer": {"type": "adam", "params": {"adam_w_mode": False, "torch_adam": True}},
            "sequence_parallel_size": 1,
            "elasticity": {"enabled": False},
            "amp": {"enabled": "auto", "opt_level": "auto"},
        },
        {
            "parallel.strategy": "zero2",
            "parallel.offload": "optimizer",
            "train.precision": "fp32",
            "optim.clip": 0.5,
            "optim.betas": [0.9, 0.999],  # what it leaves unsaid is DeepSpeed's
        },
    ),
    "half a file": (
        {
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "Adam", "params": ADAM},
        },
        {"parallel.strategy": "zero3", "train.precision": "bf16"},
    ),
}


def loaded(folder: Path, tree: Any, overrides: tuple[str, ...] = ()) -> Config:
    """A config that says nothing of training beside the file, and overrides."""
    (folder / "ds.json").write_text(json.dumps(tree))
    (folder / "c.yaml").write_text(
        f"data: {{train: [a.jsonl]}}\nmodel: {{path: {folder}}}\n"
        f"parallel: {{deepspeed: {folder / 'ds.json'}}}\n"
    )
    return load_config(folder / "c.yaml", overrides)


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_people_have_it_is_taken_and_says_what_the_config_does_not(
    name: str, tmp_path: Path
) -> None:
    tree, meant = FILES[name]
    config = loaded(tmp_path, tree)
    for key, value in meant.items():
        section, _, field = key.partition(".")
        assert getattr(getattr(config, section), field) == value, key
    settings = make_settings(config, pin_memory=False)
    offload = settings["zero_optimization"]["offload_optimizer"]["device"]
    assert offload == ("none" if config.parallel.offload == "none" else "cpu")
    assert settings["gradient_clipping"] == config.optim.clip
    assert settings["train_micro_batch_size_per_gpu"] == 1
    assert not {"optimizer", "scheduler"} & settings.keys()
    assert settings["zero_optimization"].get("round_robin_gradients", False) is False
    assert "auto" not in json.dumps(settings)
    # What the run writes down, and reads again, says the same.
    again = validate(config.model_dump(mode="json"), "config.yaml")
    assert again == config


@pytest.mark.parametrize("name", FILES)
def test_what_the_config_says_itself_counts_and_a_contradiction_names_both(
    name: str, tmp_path: Path
) -> None:
    tree, meant = FILES[name]
    said = {"optim.lr": 7e-4, "optim.clip": 0.25, "optim.weight_decay": 0.5, "optim.warmup": 3}
    said |= {"parallel.offload": "none", "optim.schedule": "cosine", "train.precision": "fp16"}
    wrong = {key for key in said if key in meant and meant[key] != said[key]}
    if name == "of long ago":
        wrong.add("optim.weight_decay")  # its adam_w_mode is another decay
    if name == "trainer, stage 2":
        wrong.add("optim.schedule")
    overrides = tuple(f"{key}={value}" for key, value in said.items())
    if not wrong:
        config = loaded(tmp_path, tree, overrides)
        assert config.optim.lr == 7e-4 and config.train.precision == "fp16"
        return
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, tree, overrides)
    for key in wrong - {"optim.weight_decay"}:
        assert f"but {key} is {said[key]}" in str(caught.value), key
    if name == "of long ago":
        assert "adam_w_mode is false, but weight decay is AdamW's" in str(caught.value)


def test_wishes_that_change_no_result_are_left_aside_with_a_line(tmp_path: Path) -> None:
    tree = {
        "zero_optimization": {**STAGE_2, "round_robin_gradients": True, "offload_param": CPU},
        "zero_force_ds_cpu_optimizer": True,
        "fp16": {**SCALE, "enabled": True, "hysteresis": 4},
    }
    config = loaded(tmp_path, tree)
    path = tmp_path / "ds.json"
    assert unused(config) == [
        f"parallel.deepspeed {path}: zero_optimization.round_robin_gradients true is not used: "
        "checkpoints need parameters in their order",
        f'parallel.deepspeed {path}: zero_optimization.offload_param.device "cpu" is not used: '
        "only zero3 has parameters to offload",
        f"parallel.deepspeed {path}: zero_force_ds_cpu_optimizer true is not used: "
        "AdamW is torch's",
        f"parallel.deepspeed {path}: fp16.hysteresis 4 is not used: "
        "the loss is scaled by a rule that all strategies share",
    ]


def test_a_schedule_of_the_file_is_ours_or_refused(tmp_path: Path) -> None:
    for kind, ours in (("WarmupLR", "constant"), ("WarmupCosineLR", "cosine")):
        tree = {"zero_optimization": {"stage": 1}, "scheduler": {"type": kind, "params": {}}}
        config = loaded(tmp_path, tree)
        assert (config.optim.schedule, config.optim.warmup) == (ours, 1000)
    tree["scheduler"] = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5}}
    with pytest.raises(UserError, match=r'scheduler.type is "OneCycle", but optim.schedule is'):
        loaded(tmp_path, tree)
    tree["scheduler"] = {"type": "WarmupLR", "params": {**WARM, "warmup_type": "log"}}
    with pytest.raises(UserError, match=r'warmup_type is "log", but rates rise linearly from zero'):
        loaded(tmp_path, tree)


def test_betas_and_the_rise_that_a_file_leaves_unsaid_are_deepspeeds_or_remarked(
    tmp_path: Path,
) -> None:
    tree: dict[str, Any] = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}}
    assert loaded(tmp_path, tree).optim.betas == [0.9, 0.999]
    assert loaded(tmp_path, tree, ("optim.betas=[0.8,0.9]",)).optim.betas == [0.8, 0.9]
    tree["optimizer"]["params"] = {"betas": "auto"}
    assert loaded(tmp_path, tree).optim.betas == Config().optim.betas
    del tree["optimizer"]
    assert loaded(tmp_path, tree).optim.betas == Config().optim.betas
    tree["scheduler"] = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 5}}
    (line,) = unused(loaded(tmp_path, tree))
    assert line.startswith(f"parallel.deepspeed {tmp_path / 'ds.json'}: scheduler.params.warmup_ty")
    assert 'is not given, which is "log" to DeepSpeed: here rates rise linearly' in line
    tree["scheduler"]["params"]["warmup_num_steps"] = 0
    assert unused(loaded(tmp_path, tree)) == []
    tree["scheduler"]["params"] = {"warmup_num_steps": 5, "warmup_type": "linear"}
    assert unused(loaded(tmp_path, tree)) == []


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        (
            {"zero_optimization": {"stage": "3"}},
            'zero_optimization.stage: expected 1, 2 or 3, found "3"; write it without quotes',
        ),
        ({"zero_optimization": True}, "zero_optimization: expected {...}, found true"),
        (
            {"zero_optimization": {"stage": True}},
            "zero_optimization.stage: expected 1, 2 or 3, found true",
        ),
        (
            {"zero_optimization": {"stage": 3.0}},
            "zero_optimization.stage: expected 1, 2 or 3, found 3.0",
        ),
        (
            {"zero_optimization": {"stage": 0}},
            "zero_optimization.stage: expected 1, 2 or 3, found 0; without ZeRO, remove "
            "parallel.deepspeed",
        ),
        (
            {"gradient_clipping": "1.0"},
            'gradient_clipping: expected a number of at least 0, found "1.0"; write it without '
            "quotes",
        ),
        ({"gradient_clipping": -1}, "gradient_clipping: expected a number of at least 0, found -1"),
        (
            {"bf16": {"enabled": "true"}},
            'bf16.enabled: expected true or false, found "true"; write it without quotes',
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}},
            "optimizer.params.betas: expected a list of 2 numbers, found 0.9",
        ),
        (
            {"scheduler": {"type": ["WarmupLR"]}},
            'scheduler.type: expected text, found ["WarmupLR"]',
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": [1]}},
            "scheduler.params: expected {...}, found [1]",
        ),
        ({"optimizer": "AdamW"}, 'optimizer: expected {...}, found "AdamW"'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "10"}}},
            "scheduler.params.warmup_num_steps: expected a number of at least 0, found "
            '"10"; write it without quotes',
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_mistake_named_by_the_files_key(
    tree: dict[str, Any], line: str, tmp_path: Path
) -> None:
    """Where the config says nothing of it: nothing that follows from it is a second mistake."""
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, {"zero_optimization": {"stage": 2}, **tree})
    assert (
        str(caught.value)
        == f"{tmp_path / 'c.yaml'}: parallel.deepspeed {tmp_path / 'ds.json'}: {line}"
    )


@pytest.mark.parametrize(
    ("objective", "key"), [("grpo", "train.grpo.beta"), ("dpo", "train.objective")]
)
def test_a_reference_is_of_one_copy_of_the_weights(
    objective: str, key: str, tmp_path: Path
) -> None:
    tree = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    with pytest.raises(UserError) as found:
        loaded(tmp_path, tree, (f"train.objective={objective}",))
    said = str(found.value)
    assert f"{key}: the reference is of one copy of the weights" in said and "\n" not in said
    assert loaded(tmp_path, tree).parallel.strategy == "zero3"


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
