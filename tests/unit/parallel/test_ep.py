"""Which workers hold experts together, and which experts cannot be shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysft.config import Config
from raysft.driver import preflight
from raysft.errors import UserError
from raysft.parallel.ep import ep_size
from tests.support import worlds
from tests.support.models import CAUSAL

MIXTURE = {**CAUSAL["config"], "model_type": "qwen3_moe", "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("workers", "of_a_node", "experts", "size"),
    [
        (8, 8, [64], 8),
        (16, 8, [64], 8),
        (16, 8, [60], 4),  # not 8, which does not divide 60
        (6, 6, [8, 16], 2),
        (6, 3, [8], 1),
        (4, None, [8], 4),  # the workers are not told by node
    ],
)
def test_as_many_of_a_nodes_workers_as_divide_all(
    workers: int,
    of_a_node: int | None,
    experts: list[int],
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if of_a_node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(of_a_node))
    assert ep_size(None, workers, experts) == size


def test_a_size_that_is_asked_for_is_taken_where_it_divides() -> None:
    assert [ep_size(n, 8, [64]) for n in (1, 2, 4, 8)] == [1, 2, 4, 8]
    with pytest.raises(UserError, match=r"parallel\.ep_size: 8 .*; 1, 2 or 4 would"):
        ep_size(8, 8, [12, 64])


def config(folder: Path, model: dict[str, Any], **parallel: Any) -> Config:
    settings = {"strategy": "ep", "workers": 4, **parallel}
    more = {f"parallel__{key}": value for key, value in settings.items()}
    return worlds.tiny(folder, model__config=model, data__lanes=4, **more)


def test_what_cannot_be_shared_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    preflight.check(config(tmp_path, {**MIXTURE, "num_experts": 8}, ep_size=2))
    with pytest.raises(UserError, match=r"4 workers cannot hold 6 experts .*; 1 or 2 would"):
        preflight.check(config(tmp_path, {**MIXTURE, "num_experts": 6}, ep_size=4))
    with pytest.raises(UserError, match=r"parallel\.strategy: ep .* Qwen3ForCausalLM has none"):
        preflight.check(config(tmp_path, CAUSAL["config"]))
