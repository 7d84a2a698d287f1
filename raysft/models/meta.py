"""Models of shapes alone: made without memory, where only what they would be is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_meta() -> Iterator[None]:
    """Tensors that are made within a `with` block have a shape and no content.

    So would those of a module that is imported there for the first time, for good: transformers
    imports modules when a model is made, and with them torchaudio's Kaldi front end, which keeps
    one. It is imported before.
    """
    import torchaudio.compliance.kaldi  # noqa: F401

    with torch.device("meta"):
        yield
