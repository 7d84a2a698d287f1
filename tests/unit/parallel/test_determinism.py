"""A step computed again has the same bits, on several threads too."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from raysft.config import Config
from raysft.config.resume import rule_of
from raysft.parallel.determinism import settle

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These settings are of the whole process."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads = torch.get_num_threads()
    on, soft = (
        torch.are_deterministic_algorithms_enabled(),
        (torch.is_deterministic_algorithms_warn_only_enabled()),
    )
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(on, warn_only=soft)


def results(times: int = 12) -> int:
    """How many different gradients rows have that were taken many times, as a mixture's are."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 64, generator=generator, requires_grad=True)
    taken = torch.randint(0, 50, (8192,), generator=generator)
    above = torch.randn(8192, 64, generator=generator)
    found = set()
    for _ in range(times):
        rows.grad = None
        rows[taken].backward(above)
        assert rows.grad is not None
        found.add(rows.grad.numpy().tobytes())
    return len(found)


@pytest.mark.parametrize("deterministic", [None, True])
def test_rows_taken_many_times_have_the_same_gradient_each_time_on_four_threads(
    deterministic: bool | None,
) -> None:
    """Without it torch adds them in the order in which its threads arrive."""
    torch.set_num_threads(4)
    settle(deterministic, CPU)
    assert results() == 1


def test_what_has_no_such_algorithm_ends_a_run_that_asked_for_it_and_no_other() -> None:
    """`put_` is such an operation."""
    index, values = torch.tensor([0, 0]), torch.tensor([1.0, 2.0])
    settle(True, CPU)
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        torch.zeros(3).put_(index, values)
    settle(False, CPU)
    torch.zeros(3).put_(index, values)
    assert not torch.are_deterministic_algorithms_enabled()
    settle(None, CPU)
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        torch.zeros(3).put_(index, values)


def test_on_gpus_it_is_off_until_it_is_asked_for() -> None:
    settle(None, torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    settle(True, torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # flash attention would warn
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


def test_a_run_may_be_continued_with_another_choice() -> None:
    assert Config().train.deterministic is None
    assert rule_of("train.deterministic").rule == "free"
