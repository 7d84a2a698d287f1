"""The loss in chunks is the loss of all logits at once, and holds less."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from raysft.config import Config
from raysft.config.losses import load
from raysft.losses import CROSS_ENTROPY, Sums, Term
from raysft.losses import chunked as loss
from raysft.models import PREFIX, SpeechModel
from raysft.parallel import World, make_strategy
from tests.support.model_zoo import batch_of, gradients, loss_of, make, sequences, worst
from tests.support.worlds import fork

LENGTHS = [9, 4, 17, 9, 12]
CHUNKED, WHOLE = 5, 10**6


def loss_and_gradients(
    adapter: SpeechModel,
    rows: int,
    half: torch.dtype | None = None,
    factor: float = 0.5,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    adapter.supervised.rows = rows
    batch = adapter.collate(batch_of(*sequences(adapter, LENGTHS)))
    with torch.autocast("cpu", half) if half else nullcontext():
        found = loss_of(adapter, batch)
    (found.sum * factor).backward()
    values = [found.sum.item(), found.count.item()]
    values += [x.item() for task in sorted(found.by_task) for x in found.by_task[task]]
    return values, gradients(adapter)


@pytest.mark.parametrize("name", ["llama", "qwen3_tied", "qwen3_moe", "qwen2_audio"])
def test_chunks_give_the_loss_and_the_gradient_of_all_logits(name: str) -> None:
    adapter = make(name)
    whole, wanted = loss_and_gradients(adapter, WHOLE)
    chunked, found = loss_and_gradients(adapter, CHUNKED)
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert worst(found, wanted) < 2e-6


def test_a_head_with_a_bias() -> None:
    adapter = make("llama")
    head = adapter.model.lm_head
    head.bias = nn.Parameter(torch.randn(head.out_features))
    whole, wanted = loss_and_gradients(adapter, WHOLE)
    chunked, found = loss_and_gradients(adapter, CHUNKED)
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert "lm_head.bias" in found
    assert worst(found, wanted) < 2e-6


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half: torch.dtype) -> None:
    adapter = make("llama")
    whole, wanted = loss_and_gradients(adapter, WHOLE, half, factor=4.0)
    chunked, found = loss_and_gradients(adapter, CHUNKED, half, factor=4.0)
    assert chunked == pytest.approx(whole, rel=1e-5)
    # Sums over chunks of a head's gradient, which is in half precision, are rounded otherwise.
    assert worst(found, wanted) < (2e-2 if half is torch.bfloat16 else 2e-3)


def test_a_frozen_head_has_no_gradient_and_passes_on_the_right_one() -> None:
    adapter = make("llama")
    adapter.freeze(["lm_head.weight", "model.embed_tokens.weight"])
    whole, wanted = loss_and_gradients(adapter, WHOLE)
    chunked, found = loss_and_gradients(adapter, CHUNKED)
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert "lm_head.weight" not in found
    assert worst(found, wanted) < 2e-6


def test_the_loss_is_that_of_the_heads_weights_alone() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 300)
    hidden, targets = torch.randn(41, 16, requires_grad=True), torch.randint(0, 300, (41,))
    expected = F.cross_entropy(head(hidden), targets, reduction="none")
    (expected.sum() * 0.3).backward()
    wanted = [x.grad.clone() for x in (hidden, *head.parameters())]
    for x in (hidden, *head.parameters()):
        x.grad = None
    found = loss.chunked_losses(head, head.forward, hidden, targets, rows=8)
    (found[0, -1] * 0.3).backward()
    torch.testing.assert_close(found[0, :-1], expected.detach(), rtol=1e-6, atol=1e-6)
    assert found[0, -1].item() == pytest.approx(expected.sum().item(), rel=1e-6)
    for x, gradient in zip((hidden, *head.parameters()), wanted, strict=True):
        torch.testing.assert_close(x.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half", [None, torch.float16])
@pytest.mark.parametrize("rows", [CHUNKED, WHOLE])
def test_weights_of_tasks_are_those_of_a_plain_sum(rows: int, half: torch.dtype | None) -> None:
    """What is trained is weighted; what is reported by task, and in evaluation, is not."""
    adapter = make("llama")
    documents = sequences(adapter, LENGTHS)
    for number, document in enumerate(documents):
        document.task = ("asr", "tts", "other")[number % 3]
    batch = adapter.collate(batch_of(*documents))
    plain, weights = [], {"asr": 0.25, "tts": 3.0}
    with torch.autocast("cpu", half) if half else nullcontext():
        for document in documents:  # one by one, by torch alone
            ids, labels = (
                torch.tensor(np.asarray(x)).long() for x in (document.input_ids, document.labels)
            )
            logits = adapter.model(ids[None]).logits[0, :-1].float()
            loss = F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            plain.append((document.task, loss))
    total = sum(weights.get(task, 1.0) * loss for task, loss in plain)
    (total * 0.5).backward()
    wanted = gradients(adapter)
    adapter.model.zero_grad()
    adapter.task_weights.update(weights)
    adapter.supervised.rows = rows
    for training in (False, True):
        adapter.supervised.train(training)
        with torch.autocast("cpu", half) if half else nullcontext():
            found = loss_of(adapter, batch)
        expected = total.item() if training else sum(loss.item() for _, loss in plain)
        assert found.sum.item() == pytest.approx(expected, rel=3e-3 if half else 1e-5)
        for task in ("asr", "tts", "other"):
            alone = sum(loss.item() for name, loss in plain if name == task)
            assert found.by_task[task][0].item() == pytest.approx(alone, rel=3e-3 if half else 1e-5)
    (found.sum * 0.5).backward()
    assert worst(gradients(adapter), wanted) < (2e-2 if half else 1e-5)


@pytest.mark.parametrize("half", [None, torch.float16])
@pytest.mark.parametrize("rows", [CHUNKED, WHOLE])
def test_a_second_loss_of_tokens_is_trained_by_its_weight_and_reported_by_its_name(
    rows: int, half: torch.dtype | None
) -> None:
    adapter = make("llama")
    documents = sequences(adapter, LENGTHS)
    plain, log_z = [], []
    with torch.autocast("cpu", half) if half else nullcontext():
        for document in documents:  # one by one, by torch alone
            ids, labels = (
                torch.tensor(np.asarray(x)).long() for x in (document.input_ids, document.labels)
            )
            logits = adapter.model(ids[None]).logits[0, :-1].float()
            plain.append(F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
            log_z.append(torch.log(logits.exp().sum(-1))[labels[1:] != -100].square().sum())
    (0.5 * (sum(plain) + 0.3 * sum(log_z))).backward()
    wanted = gradients(adapter)
    adapter.more_losses.append(("z_loss", load("z_loss"), 0.3))
    adapter.supervised.rows = rows
    with torch.autocast("cpu", half) if half else nullcontext():
        found = loss_of(adapter, adapter.collate(batch_of(*documents)))
    close = {"rel": 3e-3 if half else 1e-5}
    first, second = found.terms
    assert (first.name, second.name) == (CROSS_ENTROPY, "z_loss")
    assert first.sum.item() == pytest.approx(sum(plain).item(), **close)
    assert second.sum.item() == pytest.approx(sum(log_z).item(), **close)
    assert second.weight == 0.3 and second.trained is None
    by_task = sum(x.item() for x, _ in second.by_task.values())
    assert by_task == pytest.approx(second.sum.item(), rel=1e-6)
    (found.sum * 0.5).backward()
    assert worst(gradients(adapter), wanted) < (2e-2 if half else 1e-5)


def test_terms_are_each_divided_by_their_count_and_add_up_by_their_weights() -> None:
    one, two = torch.tensor(6.0), torch.tensor(3.0)
    terms = [
        Term(CROSS_ENTROPY, one, torch.tensor(4), {"asr": (one, torch.tensor(2))}),
        Term("flow", two, torch.tensor(10), {}, two, "frames", 0.5),
        Term("penalty", two, torch.tensor(1), trained=two, counted=None, reported=False),
    ]
    sums = Sums.zeros(terms, 2, torch.device("cpu"))
    for _ in range(2):
        sums.add(terms, ["asr", "tts"])
    assert sums.means(["asr", "tts"]) == pytest.approx(
        {"loss": 1.65, "loss/asr": 3.0, "term/cross_entropy": 1.5, "term/flow": 0.3}
    )


def test_without_gradients_the_losses_are_the_same() -> None:
    adapter = make("qwen3")
    batch = adapter.collate(batch_of(*sequences(adapter, LENGTHS)))
    whole = loss_of(adapter, batch)
    adapter.supervised.rows = CHUNKED
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            chunked = loss_of(adapter, batch)
        assert chunked.sum.item() == pytest.approx(whole.sum.item(), rel=1e-6)


def test_the_head_is_as_it_was_afterwards() -> None:
    adapter = make("qwen3")
    ids = torch.arange(6).unsqueeze(0)
    before = adapter.model(ids).logits
    loss_and_gradients(adapter, CHUNKED)
    assert torch.equal(adapter.model(ids).logits, before)
    assert "forward" not in adapter.model.lm_head.__dict__


def test_hooks_on_the_head_see_one_call_whatever_the_number_of_chunks() -> None:
    adapter = make("qwen3")
    calls: list[int] = []
    adapter.model.lm_head.register_forward_hook(lambda m, args, out: calls.append(1))
    loss_and_gradients(adapter, 1)
    assert calls == [1]


@pytest.mark.parametrize("config", [{"model_type": "cohere"}, {"model_type": "granite"}])
def test_a_model_that_changes_its_logits_keeps_its_own_loss(config: dict[str, str]) -> None:
    scale = {"logit_scale": 0.3} if config["model_type"] == "cohere" else {"logits_scaling": 3.0}
    adapter = make("llama", **config, **scale)
    whole, wanted = loss_and_gradients(adapter, WHOLE)
    chunked, found = loss_and_gradients(adapter, CHUNKED)
    assert chunked == whole
    assert worst(found, wanted) == 0


# -- by several processes ------------------------------------------------------------------------


def _worker(rank: int, size: int, store: str, strategy: str) -> None:
    """Each rank has sequences of its own; both also take a turn in which one has nothing."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    plain, items = make("qwen3_tied"), None
    batches = []
    for number in range(size):
        items = sequences(plain, [9 + 5 * number, 7], seed=number)
        batches.append(plain.collate(batch_of(*items)))
    sum(loss_of(plain, batch).sum for batch in batches).backward()
    wanted = gradients(plain)

    adapter = make("qwen3_tied")
    adapter.supervised.rows = CHUNKED
    adapter.tasks[:] = plain.tasks
    config = Config.model_validate({"parallel": {"strategy": strategy}})
    wrapped = make_strategy(config, adapter.supervised, World.current())
    turns = [batches[rank], batches[0] if rank == 0 else adapter.dummy()]
    found = {}
    for number, turn in enumerate(turns):
        with wrapped.accumulate(last=number == 1):
            wrapped.backward(wrapped.module(turn)[0].trained * (size if number == 0 else 0.0))
    for name, parameter in adapter.supervised.named_parameters():
        gradient = parameter.grad
        found[name.removeprefix(PREFIX)] = getattr(gradient, "full_tensor", lambda g=gradient: g)()
    assert worst(found, wanted) < 5e-6
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_workers_find_the_gradient_of_one(strategy: str, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    workers = [fork(_worker, rank, 2, store, strategy) for rank in range(2)]
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]


# -- memory --------------------------------------------------------------------------------------


def _peak(answer: str) -> None:
    """Writes by how many MiB the loss of 2,048 rows raises this process's peak."""
    torch.set_num_threads(1)
    head = nn.Linear(64, 50_000, bias=False)
    hidden, targets = torch.randn(2048, 64, requires_grad=True), torch.zeros(2048, dtype=torch.long)

    def peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it holds now
    before = peak()
    rows = loss.chunk_rows(head.out_features, hidden.device)
    loss.chunked_losses(head, head.forward, hidden, targets, rows)[0, -1].backward()
    Path(answer).write_text(str((peak() - before) // 1024))


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads VmHWM")
def test_memory_is_that_of_a_chunk_not_of_all_logits(tmp_path: Path) -> None:
    process = fork(_peak, str(tmp_path / "peak"))
    process.join(120)
    # All logits are 390 MiB, three times: with their softmax and gradient. A chunk is 64 MiB.
    assert int((tmp_path / "peak").read_text()) < 280
