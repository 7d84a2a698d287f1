"""A worker computes on what it was given, or says that it cannot."""

from __future__ import annotations

import socket

import pytest
import torch

from raysft.config import Config
from raysft.errors import UserError
from raysft.worker import device_of


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_torch_does_not_find_is_no_reason_to_train_on_the_cpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = Config.model_validate({"parallel": {"device": device}})
    with pytest.raises(UserError, match=f"device: {device}, .* on {socket.gethostname()}: look at"):
        device_of(config, gpu=True)


def test_who_was_given_no_gpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(Config(), gpu=False) == torch.device("cpu")
