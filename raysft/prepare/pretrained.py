"""Models of transformers that hear: loaded in fp32, asked without gradients, one clip at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from raysft.errors import BadExample, UserError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import FeatureExtractionMixin, PreTrainedModel

UNHEARD = {"masked_spec_embed"}  # weights that only training uses
_Result = TypeVar("_Result")


def device() -> str:
    """Where models of this process compute."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def extractor(key: str, path: str, revision: str | None) -> FeatureExtractionMixin:
    """What makes a model's inputs of a clip. Raises UserError naming `key` where there is none."""
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path}: no feature extractor there: {first_line(error)}") from None


def net(key: str, automatic: str, path: str, revision: str | None) -> PreTrainedModel:
    """A model by a class of transformers, such as AutoModel. Raises UserError naming `key`: there
    is none, or weights of it are missing."""
    import torch
    import transformers

    made = getattr(transformers, automatic)
    try:
        model, told = made.from_pretrained(
            path, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path}: no such model there: {first_line(error)}") from None
    if missing := sorted(set(told["missing_keys"]) - UNHEARD):
        raise UserError(
            f"{key}: {path} has no weights for {missing[0]} and {len(missing) - 1} others of a "
            f"{type(model).__name__}: name a model of that kind"
        )
    return model.eval().to(device())


def inputs(prepare: FeatureExtractionMixin, clip: np.ndarray, rate: int) -> dict[str, torch.Tensor]:
    """A batch of one clip, float32 [samples] at `rate` Hz, where the model computes."""
    made = prepare(clip, sampling_rate=rate, return_tensors="pt")
    return {name: value.to(device()) for name, value in made.items()}


def heard(
    key: str, path: str, clip: np.ndarray, rate: int, hear: Callable[[np.ndarray], _Result]
) -> _Result:
    """What `hear` makes of a clip, without gradients. Raises BadExample where the clip is too short
    for the model (a second is not), UserError where the device has no room for it."""
    import torch

    try:
        with torch.no_grad():
            return hear(clip)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{key}: {path}: no room for a clip of {len(clip) / rate:.1f} s beside what else is on "
            "the device: set data.max_seconds, or give each maker more (prepare.gpus)"
        ) from None
    except (RuntimeError, ValueError, IndexError) as error:
        if len(clip) >= rate or not _works(hear, rate):
            raise
        raise BadExample(
            f"too short for {path}: {len(clip) / rate:.3f} s ({first_line(error)})", "too short"
        ) from None


def _works(hear: Callable[[np.ndarray], object], rate: int) -> bool:
    """Whether a model hears a second."""
    import torch

    try:
        with torch.no_grad():
            hear(np.zeros(rate, np.float32))
    except (RuntimeError, ValueError, IndexError):
        return False
    return True
