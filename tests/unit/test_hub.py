"""Models that are not to be had: one line at once, before anything starts."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants as constants
import pytest

from raysft import hub
from raysft.config import load_config
from raysft.driver import preflight
from raysft.errors import UserError


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, a hub that may be asked, and no answer remembered from another test."""
    hub.check.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class _Hub(http.server.BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "slow" in self.path:
            time.sleep(2)
            return  # whoever asked has gone
        found = self.path == "/api/models/org/there"
        body = b'{"id": "org/there"}' if found else b"{}"
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing into the tests' output."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that has one model; what it was asked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    _Hub.asked.clear()
    yield _Hub.asked
    server.shutdown()


def cache(here: Path, name: str, file: str) -> None:
    repo = here / "cache" / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / file).write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)


def refused(given: str, key: str = "model.path") -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        hub.check(given, key)
    assert time.monotonic() - began < 5, "no minutes of retries"
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{key}: ")
    return text


@pytest.mark.parametrize("given", ["./none", "/none/at/all", "~/none", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_question_to_the_hub(
    given: str, asked: list[str], here: Path
) -> None:
    (here / "nine").mkdir()
    assert "does not exist" in refused(given)
    assert "did you mean" in refused("./nina")
    assert asked == []


def test_without_a_network_what_is_in_the_cache_is_used_and_the_rest_is_one_line(
    here: Path,
) -> None:
    text = refused("org/none")
    assert f"no such folder ({here}/org/none), and it is not in the hub's cache" in text
    assert "http://127.0.0.1:9 cannot be reached" in text
    assert not constants.HF_HUB_OFFLINE
    for name, key, file in (
        ("org/model", "model.path", "config.json"),
        ("tokens", "model.tokenizer", "tokenizer.json"),
        ("org/adapter", "peft.path", "adapter_config.json"),
    ):
        constants.HF_HUB_OFFLINE = False
        cache(here, name, file)
        hub.check(name, key)
        assert constants.HF_HUB_OFFLINE, "this process asks no more"
        assert os.environ["HF_HUB_OFFLINE"] == "1", "nor do those it starts"
    assert "which HF_HUB_OFFLINE keeps to" in refused("org/none")


def test_a_hub_that_does_not_answer_is_waited_for_once(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.5)
    assert "cannot be reached" in refused("org/slow")
    assert len(asked) == 1


def test_the_hub_is_asked_once_and_its_no_is_one_line(asked: list[str]) -> None:
    hub.check("org/there", "model.path")
    hub.check("org/there", "model.path")
    assert asked == ["/api/models/org/there"]
    assert "has none of that name (or it is private: set HF_TOKEN)" in refused("org/none")
    assert "it is no id of the hub" in refused("not an id!")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.path=org/none", "model.path"),
        ("model.path=./none", "model.path"),
        ("model.tokenizer=org/none", "model.tokenizer"),
        ("model.tokenizer=none/at/all", "model.tokenizer"),
        ("peft.path=org/none", "peft.path"),
        ("peft.path=./none", "peft.path"),
    ],
)
def test_every_key_that_names_a_model_is_looked_at_before_anything_starts(
    here: Path, override: str, key: str
) -> None:
    config = here / "a.yaml"
    config.write_text(
        "data: {train: [t.jsonl]}\npeft: {method: lora}\n"
        + (
            "model: {tokenizer: bytes}\n"
            if key == "model.path"
            else "model: {config: {model_type: qwen3}, tokenizer: bytes}\n"
        )
    )
    began = time.monotonic()
    with pytest.raises(UserError, match=f"{key}: "):
        preflight.check(load_config(config, [override]))
    assert time.monotonic() - began < 10
