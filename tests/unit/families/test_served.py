"""Exported models that hear, served by transformers' own pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import pipeline

from raysft.export import export
from tests.support import audio_zoo as zoo
from tests.unit.families.test_audio_types import encoder_of, examples, model_of

KINDS = [
    "qwen3_asr",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("glmasr", "granite_speech")),
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fun_asr_nano",)),
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_served_by_the_pipeline_for_any_input(kind: str, tmp_path: Path) -> None:
    path = zoo.save(kind, tmp_path / "base")
    ours = model_of(path)
    weights = {
        f"lm.{name}": tensor + torch.full_like(tensor, 0.01)
        for name, tensor in ours.net.state_dict().items()
    }
    out = export(model_of(path), tmp_path / "out", weights)
    ours.supervised.load_state_dict(weights)
    served = pipeline("any-to-any", model=str(out), dtype=torch.float32)
    for example, wave in examples()[:2]:
        asked = [
            {"type": "audio", "audio": wave},
            {"type": "text", "text": example.instruction},
        ]
        (found,) = served(
            text=[{"role": "user", "content": asked}],
            generate_kwargs={"max_new_tokens": 5, "do_sample": False},
            return_full_text=False,
        )
        (said,) = ours.generate([encoder_of(path).prompt(example, [wave])], 5)
        assert found["generated_text"] == said
