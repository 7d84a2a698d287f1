"""What tests of the index share."""

from __future__ import annotations

import pytest

from tests.support.indexes import chunked_small, recorded_probes


@pytest.fixture
def probes(monkeypatch):
    return recorded_probes(monkeypatch)


@pytest.fixture
def small_chunks(monkeypatch):
    chunked_small(monkeypatch)
