"""A server that answers as Weights & Biases does, as far as a run and `wandb sync` need it, and
keeps what it is sent: W&B's own programs talk to it, so that its rows are what a user would see.

It keeps rows as W&B does: by their place in the stream, which who goes on asks for first.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

KEY = "a" * 40


class WandbServer(ThreadingHTTPServer):
    """`with WandbServer() as server`. rows: of each run, in order; given: what a run was begun with
    (its group, its name, its config); files: contents by name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.given: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error."""

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to talk to it."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}

    def sync(self, folder: Path) -> None:
        """`wandb sync` of all that starts of a run have left in its folder."""
        program = Path(sys.executable).with_name("wandb")
        starts = sorted((folder / "wandb").glob("offline-run-*"))
        done = subprocess.run(
            [program, "sync", "--yes", *starts],
            cwd=folder,  # where it leaves a log
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
        )
        assert not done.returncode, done.stdout + done.stderr

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """To a question in GraphQL."""
        name = given.get("name") or ""
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "us"}}
        if query == "RunResumeStatus":
            return {"model": {**project, "bucket": self._bucket(name)}}
        if query == "UpsertBucket":
            new = name not in self.rows
            self.rows.setdefault(name, [])
            self.given.setdefault(name, given)
            return {"upsertBucket": {"bucket": self._bucket(name, project), "inserted": new}}
        if query == "CreateRunFiles":
            url = self.environment["WANDB_BASE_URL"]
            files = [{"name": file, "uploadUrl": f"{url}/up/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if query == "Viewer":
            return {"viewer": {"id": "u", "entity": "us", "username": "us", "flags": "{}"}}
        if query == "ArtifactType":
            return {"project": None}
        if query == "CreateArtifact":  # of a table: is there already
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED"}}}
        return {}

    def _bucket(self, name: str, project: dict[str, Any] | None = None) -> dict[str, Any] | None:
        if name not in self.rows:
            return None
        return {
            "id": "b",
            "name": name,
            "displayName": name,
            "project": project,
            "config": "{}",
            "wandbConfig": '{"t": 1}',
            "tags": [],
            "summaryMetrics": json.dumps(self.summaries.get(name, {})),
            "historyLineCount": len(self.rows[name]),
            "historyTail": json.dumps([json.dumps(row) for row in self.rows[name][-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
        }

    def take(self, name: str, files: dict[str, Any]) -> None:
        """Lines of a run's streams."""
        if (history := files.get("wandb-history.jsonl")) is not None:
            rows, at = self.rows.setdefault(name, []), history["offset"]
            assert at <= len(rows), "a gap"
            rows[at : at + len(history["content"])] = map(json.loads, history["content"])
        if (summary := files.get("wandb-summary.json")) is not None:
            self.summaries[name] = json.loads(summary["content"][-1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix("/up/")] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        given = json.loads(self._body())
        if self.path.endswith("/file_stream"):
            self.server.take(self.path.split("/")[-2], given.get("files", {}))
            self._reply({"limits": {}})
            return
        query = given.get("operationName") or given["query"].split("(")[0].split()[-1]
        self._reply({"data": self.server.answer(query, given.get("variables") or {})})

    def _body(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

    def _reply(self, content: dict[str, Any]) -> None:
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
