"""`peft.path`: an adapter in peft's layout to begin with, if it is one of the same kind.

Weights come from safetensors only. Whatever would make it another adapter than the config says is
an error that names both.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel

from raysft.adapters.experts import Matrix, named, take_from_files
from raysft.config.schema import Config
from raysft.errors import UserError
from raysft.models.loading import line_of
from raysft.models.targets import matched

# Key of our config -> attribute of peft's.
ALIKE = {
    "r": "r",
    "init_r": "init_r",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "virtual_tokens": "num_virtual_tokens",
}


@dataclass(frozen=True)
class Start:
    """An adapter to begin with. where: for messages."""

    where: str
    folder: Path
    settings: PeftConfig


def find(
    config: Config,
    ours: PeftConfig,
    names: Iterable[str],
    net: PreTrainedModel,
    of_experts: list[Matrix],
) -> Start | None:
    """What is at `peft.path`; None where that is not given.

    ours: the settings that the config gives, and `names` the layers that they mean in the plain
    model `net`; of_experts: what has adapters beside them. Raises UserError where it is no adapter,
    or not of this method, shape, targets and base.
    """
    if config.peft.path is None:
        return None
    where = f"peft.path {config.peft.path}"
    folder = _folder(config.peft.path, where)
    try:
        theirs = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: no adapter there: {line_of(error)}") from None
    start = Start(where, folder, theirs)
    _compare(start, config, ours, set(names), net)
    if named(getattr(theirs, "target_parameters", None), net) != {m.parameter for m in of_experts}:
        has = "some of its experts" if theirs.target_parameters else "no expert"
        raise UserError(
            f"{where}: it adapts {has}, which are not those of peft.experts: "
            f"{str(config.peft.experts).lower()}"
        )
    if getattr(theirs, "rank_pattern", None):
        raise UserError(
            f"{where}: its ranks have been cut by AdaLoRA already, and cannot fall once more; "
            "export its run with --merge and begin from that as model.path"
        )
    return start


def fill(model: PeftModel, start: Start, of_experts: list[Matrix]) -> None:
    """Give the adapters of `model` the weights of `start`. of_experts: those beside peft's.

    Raises UserError where some are missing, do not fit, or have no place.
    """
    try:
        weights = safetensors.torch.load_file(start.folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{start.where}: no adapter_model.safetensors: {line_of(error)}") from None
    try:
        lacks = take_from_files(of_experts, model, weights)
        loaded = set_peft_model_state_dict(model, weights)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{start.where}: its weights do not fit: {line_of(error)}") from None
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if model.active_peft_config.is_prompt_learning:  # one table, and it had the right shape
        return
    missing = set(loaded.missing_keys) - {f"{m.update}.{part}" for m in of_experts for part in "AB"}
    lacking = [lacks] if lacks else sorted(trained & missing)
    if lacking or loaded.unexpected_keys:
        what = f"lacks {lacking[0]}" if lacking else f"also has {loaded.unexpected_keys[0]}"
        raise UserError(
            f"{start.where}: it {what}; peft.modules_to_save and the units that are new to the "
            "tokenizer have to be those it was trained with"
        )


def _folder(path: str, where: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if path.startswith(("/", ".", "~")):
        raise UserError(f"{where}: no such folder")
    try:
        return Path(snapshot_download(path, allow_patterns=["adapter_*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{where}: neither a folder nor on the hub: {line_of(error)}") from None


def _compare(
    start: Start, config: Config, ours: PeftConfig, names: set[str], net: PreTrainedModel
) -> None:
    where, theirs, peft = start.where, start.settings, config.peft
    if theirs.peft_type != ours.peft_type:
        raise UserError(
            f"{where}: it is a {_value(theirs.peft_type)} adapter, but peft.method is {peft.method}"
        )
    for key, attribute in ALIKE.items():
        their, our = getattr(theirs, attribute, None), getattr(ours, attribute, None)
        if their != our and hasattr(peft, key):
            raise UserError(f"{where}: its {attribute} is {their}, but peft.{key} gives {our}")
    if not ours.is_prompt_learning and _targeted(theirs, net) != names:
        raise UserError(
            f"{where}: its target_modules {_shown(theirs.target_modules)} are not those of "
            f"peft.target_modules, {_shown(ours.target_modules)}"
        )
    base, own = theirs.base_model_name_or_path or None, config.model.path
    if _resolved(base) != _resolved(own):
        raise UserError(
            f"{where}: it was trained on {base}, but model.path is {own}; name the same base"
        )


def _targeted(theirs: PeftConfig, net: PreTrainedModel) -> set[str]:
    """Layers that an adapter of these settings has in the plain model `net`."""
    saved = matched(theirs.modules_to_save or [], net)
    return {
        name
        for name in matched(theirs.target_modules or [], net)
        if not any(name == module or name.startswith(f"{module}.") for module in saved)
    } - set(matched(theirs.exclude_modules or [], net))


def _shown(wanted: Any) -> str:
    return wanted if isinstance(wanted, str) else f"[{', '.join(sorted(wanted or []))}]"


def _value(kind: object) -> str:
    return str(getattr(kind, "value", kind)).lower()


def _resolved(path: str | None) -> str | None:
    """A local folder by its real path, however it is written; a hub id as it is."""
    if path is not None and os.path.exists(os.path.expanduser(path)):
        return str(Path(path).expanduser().resolve())
    return path
