"""Imported before tests fork: the tiny model is proven once, and not in every process.

Without threads and without a backward pass, which would not go on in a fork.
"""

from __future__ import annotations

import torch

from raysft.config import schema
from raysft.models import proof
from raysft.models.loading import skeleton
from tests.support.models import CAUSAL

torch.set_num_threads(1)
proof.prove(skeleton(schema.Model.model_validate(CAUSAL)))
