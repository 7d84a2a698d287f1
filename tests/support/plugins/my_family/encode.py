"""Examples of my_family -> token ids."""

from __future__ import annotations

from pathlib import Path

from raysft.config.schema import Data, Model
from raysft.families.causal_lm.encode import CausalLMEncoder


class MyEncoder(CausalLMEncoder):
    """Encodes as causal_lm does."""


def make_encoder(model: Model, data: Data, run_folder: Path, kept: str | None) -> MyEncoder:
    """See `raysft.data.encode.Encode`."""
    return MyEncoder(model, data, None, kept)
