"""Learned positions end: rows beyond them are named before anything starts, answers end there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raysft.data import quarantine
from raysft.driver.preflight import prepare
from raysft.errors import UserError
from raysft.run.folder import open_run
from tests.support import worlds
from tests.unit.models.test_proof import documents, made

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}


@pytest.mark.parametrize("config", [GPT2, OPT], ids=lambda c: c["model_type"])
def test_the_proof_finds_where_learned_positions_end(config: dict[str, Any]) -> None:
    assert made(config).verdict.learned == 64


def test_rotary_positions_do_not_end() -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llama = {"model_type": "llama", **small, "num_attention_heads": 4}
    assert made({**llama, "max_position_embeddings": 64}).verdict.learned is None


def test_answers_end_where_the_positions_end() -> None:
    adapter = made(GPT2)
    adapter.stop_ids = [-1]  # nothing else ends them
    prompts = documents([60, 3, 64, 10])
    singly = [adapter.generate([prompt], 100)[0] for prompt in prompts]
    assert adapter.generate(prompts, 100) == singly
    taken = [adapter._batches([n], 100)[0][1] for n in (60, 64, 3)]
    assert taken == [5, 1, 62]
    assert adapter._batches([65], 100) == []


def test_rows_beyond_them_are_quarantined_with_that_reason(tmp_path: Path) -> None:
    texts = [("a" * n, "xyz") for n in (4, 10, 90, 20)]
    items = [
        {"id": f"t{i}", "instruction": "s", "input": given, "output": said}
        for i, (given, said) in enumerate(texts)
    ]
    (tmp_path / "train.json").write_text(json.dumps(items))
    changes = {
        "data__train": [{"path": str(tmp_path / "train.json")}],
        "data__max_quarantined": 0.5,
        "data__tokens_per_batch": 400,
        "model__config": GPT2,
    }
    config = worlds.tiny(tmp_path, **changes)
    prepared = prepare(config, open_run(config))
    assert [item.id for item in prepared.rejected] == ["t2"]
    assert "the model has learned 64" in prepared.rejected[0].reason
    assert (
        quarantine.summary([quarantine.kind_of(prepared.rejected[0])])
        == "1 beyond learned positions"
    )
    assert len(prepared.train) == 3


def test_what_workers_would_refuse_is_refused_before_they_start(tmp_path: Path) -> None:
    config = worlds.tiny(
        tmp_path, model__config={"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1}
    )
    with pytest.raises(UserError, match=r"packed is not exact.*use data.mode: padded"):
        prepare(config, open_run(config))
