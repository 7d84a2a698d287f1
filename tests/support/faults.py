"""Runs in which one call of the system fails: every open, read, stat, write, fsync, rename, ...

`Lab` starts a process that has torch loaded and the library made of faults.c before the C library;
it forks the processes of each life of a run. Nothing of raysft is changed: Python's own calls and
those of C libraries fail alike, where they fail in life. A site is a function and a path below the
lab's folder, drawn names as #: "open data/clip3.wav".
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.conftest import tone
from tests.support.models import AUDIO
from tests.support.worlds import ROOT

CLIPS = ("wav", "flac", "ogg", "mp3") * 4
TIMEOUT_S = 120
# Exit codes of a life that ended by itself.
DONE, SAID, AGAIN, DEFECT = 0, 3, 4, 5


@dataclass(frozen=True)
class Fault:
    """`times` calls at a site fail with an errno, from the nth on.

    halved: before they fail, one write is done by half, as on a disk that becomes full.
    """

    site: str
    nth: int = 1
    times: int = 1
    error: int = errno.EIO
    halved: bool = False

    def __str__(self) -> str:
        lasts = "" if self.times == 1 else f" x{self.times}"
        half = " halved" if self.halved else ""
        return f"{self.site} #{self.nth}{lasts} {errno.errorcode[self.error]}{half}"


@dataclass(frozen=True)
class Life:
    """How one life of a run ended: the worst exit code of its processes, what they said, and the
    calls that failed, by their sites."""

    code: int
    said: str
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What a run came to, by which two are compared."""

    ledger: list[tuple[int, int, int, tuple[str, ...]]]
    losses: list[tuple[int, float, float]]
    evaluations: list[dict[str, Any]]
    weights: str
    quarantined: int
    audit: str


def compiled(folder: Path) -> Path | None:
    """The library of faults.c; None where the machine has no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = folder / "faults.so"
    source = Path(__file__).with_suffix(".c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    return library


class Lab:
    """Lives of runs below `folder`, with and without faults."""

    def __init__(self, library: Path, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        folder.mkdir(parents=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faults"],
            cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process that forks."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def ask(self, name: str, **case: Any) -> dict[str, Any]:
        """What the server says to a case, of the folder called `name`."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        case = {"folder": str(self.folder / name), "steps": self.steps, **case}
        self._server.stdin.write(json.dumps(case) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def live(
        self,
        name: str,
        *faults: Fault,
        workers: int = 1,
        rank: int = 0,
        log: Path | None = None,
        retry_s: float = 2.0,
        kill_at: int = 0,
    ) -> Life:
        """One life of the run in the folder `name`; its data are made where they are not there.

        rank: the worker in which the call fails. log: where all calls are listed. kill_at: the step
        after whose line of metrics rank 0 kills itself (0: never).
        """
        folder = self.folder / name
        if not folder.exists():
            write_data(folder / "data")
        case = {"faults": [*map(vars, faults)], "workers": workers, "rank": rank}
        case |= {"log": log and str(log), "retry_s": retry_s, "kill_at": kill_at}
        found = self.ask(name, **case)
        return Life(found["code"], found["said"], tuple(found["failed"]))

    def result(self, name: str) -> Result:
        """What the run in the folder `name` came to."""
        folder = self.folder / name / "runs" / "run"
        found = self.ask(name, result=True)
        lines = [
            (line["epoch"], line["step"], line["lane"], tuple(line["ids"]))
            for path in (folder / "ledger").glob("*.jsonl")
            for line in map(json.loads, path.read_text().splitlines())
        ]
        metrics = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        evaluations = [*map(json.loads, (folder / "eval.jsonl").read_text().splitlines())]
        quarantine = folder / "quarantine.jsonl"
        return Result(
            sorted(lines),
            [(line["step"], line["loss"], line["grad_norm"]) for line in metrics],
            evaluations,
            found["weights"],
            len(quarantine.read_text().splitlines()),
            found["audit"],
        )

    def sites(self, workers: int = 1, rank: int = 0, kill_at: int = 0) -> Counter[str]:
        """Every site of an undisturbed run, and how many calls there are at it; with kill_at, of
        the start after the one that was killed there."""
        name = f"counted{workers}{rank}{kill_at}"
        log = self.folder / f"{name}.log"
        if not log.exists():
            if kill_at:
                life = self.live(name, workers=workers, kill_at=kill_at)
                assert life.code == -signal.SIGKILL, life.said
            life = self.live(name, workers=workers, rank=rank, log=log)
            assert life.code == DONE, life.said
        return Counter(log.read_text().splitlines())


def write_data(folder: Path) -> None:
    """16 clips of four kinds, 12 texts, and 4 clips to evaluate."""
    import soundfile

    folder.mkdir(parents=True)
    lines = []
    for number, suffix in enumerate(CLIPS):
        name = f"clip{number}.{suffix}"
        soundfile.write(folder / name, tone(0.3 + number / 20, 16000, 200 + 9 * number), 16000)
        lines.append({"task_type": "asr", "wav_path": name, "text": f"text {number}"})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[::4]))
    items = [{"id": f"t{n}", "instruction": f"say {n}", "output": f"it is {n}"} for n in range(12)]
    (folder / "text.json").write_text(json.dumps(items))


def _tree(case: dict[str, Any]) -> dict[str, Any]:
    folder, steps = Path(case["folder"]), case["steps"]
    sources = [{"path": str(folder / "data" / name)} for name in ("train.jsonl", "text.json")]
    return {
        "run": {"name": "run", "storage_path": str(folder / "runs"), "seed": 3},
        "data": {
            "train": sources,
            "eval": [{"path": str(folder / "data" / "dev.jsonl")}],
            "lanes": 2,
            "tokens_per_batch": 160,
            "window": 16,
            "retry_s": case["retry_s"],
            "index_path": str(folder / "index"),
        },
        "model": AUDIO,
        "optim": {"lr": 1e-3},
        "train": {"max_steps": steps},
        "log": {"every": 1},
        "checkpoint": {"every": max(1, steps // 6)},
        "evaluate": {"every": steps // 2, "max_new_tokens": 2},
        "parallel": {"workers": case["workers"]},
    }


def _worker(case: dict[str, Any], rank: int, store: str) -> int:
    """One process of a life."""
    import torch.distributed as dist

    from raysft import failures
    from raysft.config import Config
    from raysft.errors import UserError
    from raysft.parallel import World
    from raysft.train.loop import train
    from tests.support.worlds import start

    try:
        config = Config.model_validate(_tree(case))
        if case["workers"] > 1:
            size = case["workers"]
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        if rank == case["rank"]:
            _arm(case)
        train(start(config, World.current(), partial(_kill, case)))
        if case["workers"] > 1:
            dist.barrier()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return SAID
    except Exception as error:  # noqa: BLE001 - told apart by raysft's own rule
        print(f"error: {failures.told(error)}", file=sys.stderr, flush=True)
        if not failures.certain(error):
            return AGAIN
        traceback.print_exc()
        return DEFECT
    return DONE


def _kill(case: dict[str, Any], line: dict[str, Any]) -> None:
    """After a step of that number, and once the checkpoint before it is published."""
    at, every = case["kill_at"], _tree(case)["checkpoint"]["every"]
    if not at or "loss" not in line or line["step"] < at:
        return
    saved = Path(case["folder"], "runs/run/checkpoints", f"step_{(at - 1) // every * every}")
    until = time.monotonic() + TIMEOUT_S
    while not (saved / "COMMITTED").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(case: dict[str, Any]) -> None:
    library = ctypes.CDLL(None)
    for fault in case["faults"]:
        nth, times = (ctypes.c_long(fault[name]) for name in ("nth", "times"))
        library.faults_add(fault["site"].encode(), nth, times, fault["error"], fault["halved"])
    write = os.O_CREAT | os.O_WRONLY | os.O_APPEND
    log = os.open(case["log"], write) if case["log"] else -1
    failed = os.open(f"{case['folder']}.failed", write | os.O_TRUNC)
    library.faults_begin(case["folder"].encode(), log, failed)


def _result(case: dict[str, Any]) -> dict[str, str]:
    from raysft.audit import audit
    from raysft.run.catalogue import Catalogue
    from raysft.run.storage import open_storage
    from raysft.train.checkpoint import read_weights

    run = Path(case["folder"]) / "runs" / "run"
    saved, _ = Catalogue(open_storage(run, None)).newest()
    assert saved is not None
    digest = hashlib.sha256()
    for name, tensor in sorted(read_weights(saved).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return {"weights": f"{saved.step} {digest.hexdigest()}", "audit": audit(run).summary()}


def _forked(function: Any, out: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = function()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _serve(case: dict[str, Any]) -> dict[str, Any]:
    folder = Path(case["folder"])
    out = folder.with_suffix(".said")
    out.unlink(missing_ok=True)
    if case.get("result"):

        def told() -> int:
            out.write_text(json.dumps(_result(case)))
            return 0

        _, status = os.waitpid(_forked(told, str(out.with_suffix(".error"))), 0)
        assert status == 0, out.with_suffix(".error").read_text()
        return json.loads(out.read_text())
    store = folder.with_suffix(".store")
    store.unlink(missing_ok=True)
    ranks = range(case["workers"])
    left = {_forked(lambda r=r: _worker(case, r, f"file://{store}"), str(out)) for r in ranks}
    worst, until = 0, time.monotonic() + TIMEOUT_S
    while left:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            time.sleep(0.005)
            if time.monotonic() > until:
                worst = -signal.SIGALRM
                for other in left:
                    os.kill(other, signal.SIGKILL)
                until += TIMEOUT_S
            continue
        left.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not worst:
            worst = code
            for other in left:  # it would wait for this one
                os.kill(other, signal.SIGKILL)
    failed = folder.with_suffix(".failed")
    return {
        "code": worst,
        "said": out.read_text() if out.exists() else "",
        "failed": failed.read_text().splitlines() if failed.exists() else [],
    }


@contextmanager
def _answers() -> Iterator[Any]:
    """Standard output for answers alone."""
    handle = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(handle, "w") as stream:
        yield stream


def main() -> None:
    """Answer cases until the input ends."""
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.qwen2_audio.modeling_qwen2_audio  # noqa: F401

    import raysft.audit
    import raysft.driver.preflight
    import raysft.worker  # noqa: F401
    from tests.support import worlds  # noqa: F401

    with _answers() as answers:
        for line in sys.stdin:
            answers.write(json.dumps(_serve(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
