"""The routers' balance loss is trained where a config asks for it, as transformers computes it."""

from __future__ import annotations

import pytest
import torch

from raysft.errors import UserError
from raysft.losses import CROSS_ENTROPY
from raysft.models import SpeechModel, balance
from tests.support.model_zoo import (
    CONFIGS,
    SMALL,
    batch_of,
    gradients,
    loss_of,
    make,
    sequences,
    worst,
)

ASKED = {"output_router_logits": True, "router_aux_loss_coef": 5.0}
MIXTRAL = {
    "model_type": "mixtral",
    **SMALL,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
LENGTHS = [9, 17, 4]


@pytest.fixture(autouse=True)
def mixtral(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "mixtral", MIXTRAL)


def reference(adapter: SpeechModel) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers' own loss of a padded batch, balance loss included, times its tokens."""
    items = sequences(adapter, LENGTHS)
    longest = max(LENGTHS)
    ids, labels, mask = (torch.full((len(items), longest), v) for v in (0, -100, 0))
    for row, item in enumerate(items):
        n = len(item.input_ids)
        ids[row, :n] = torch.from_numpy(item.input_ids)
        labels[row, :n] = torch.from_numpy(item.labels)
        labels[row, 0] = -100
        mask[row, :n] = 1
    net = adapter.net
    config = net.config.get_text_config()
    used, config._attn_implementation = config._attn_implementation, "sdpa"
    loss = net(input_ids=ids, labels=labels, attention_mask=mask, use_cache=False).loss
    config._attn_implementation = used
    loss = loss * (labels != -100).sum()
    loss.backward()
    return loss.item(), gradients(adapter)


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_micro_batch_is_worth_what_transformers_says(name: str, mode: str) -> None:
    adapter = make(name, mode, **ASKED)
    expected, wanted = reference(adapter)
    found = loss_of(adapter, adapter.collate(batch_of(*sequences(adapter, LENGTHS))))
    found.sum.backward()
    assert found.sum.item() == pytest.approx(expected, rel=1e-5)
    assert worst(gradients(adapter), wanted) < 1e-4
    balance = next(term.sum for term in found.terms if term.name == "balance")
    plain = sum(loss.item() for loss, _ in found.by_task.values())
    assert (found.sum - balance).item() == pytest.approx(plain, rel=1e-5)
    assert balance.item() > 1


def test_gradient_checkpointing_keeps_it() -> None:
    results = []
    for recompute in (False, True):
        adapter = make("mixtral", **ASKED)
        if recompute:
            adapter.enable_gradient_checkpointing()
        adapter.net.train()
        loss_of(adapter, adapter.collate(batch_of(*sequences(adapter, LENGTHS)))).sum.backward()
        results.append(gradients(adapter))
    assert worst(*results) < 1e-6


def test_a_turn_without_examples_adds_none() -> None:
    adapter = make("mixtral", **ASKED)
    found = loss_of(adapter, adapter.dummy())
    found.sum.backward()
    assert [term.sum.item() for term in found.terms] == [0.0, 0.0]
    assert all(not g.any() for g in gradients(adapter).values())


def test_without_being_asked_for_there_is_none() -> None:
    adapter = make("mixtral")
    assert [term.name for term in adapter.loss(adapter.dummy())] == [CROSS_ENTROPY]


def test_one_that_a_model_does_not_have_is_refused() -> None:
    adapter = make("llama")
    adapter.net.config.output_router_logits = True
    with pytest.raises(UserError, match=r"output_router_logits: true.*llama; set") as caught:
        balance.coefficient(adapter.net)
    assert "\n" not in str(caught.value)
