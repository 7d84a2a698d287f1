"""A model that is made of shapes alone leaves the rest of the process as it was."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import numpy as np
from raysft.config.schema import Model
from raysft.data.clips.features import Fbank
from raysft.models import loading

config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
          "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 8}
net = loading.skeleton(Model(config=config))
assert next(net.parameters()).is_meta
assert np.isfinite(Fbank(16000, 80)(np.ones(16000, np.float32))).all()
"""


def test_clips_are_heard_after_a_model_was_made_of_shapes() -> None:
    """In a process of its own: what is imported first is imported while it is made."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
