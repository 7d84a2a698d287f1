"""Train without Ray in real processes over gloo: what the tests of exactness run.

`run` starts a group of them; `fork` gives tests that need many lives of a process one in
milliseconds.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tests.support.objects  # noqa: F401 - so that what is forked knows objects://
from tests.support.models import CAUSAL

if TYPE_CHECKING:
    from raysft.config import Config
    from raysft.parallel import World
    from raysft.run.ownership import Permit
    from raysft.train.job import Job

ROOT = Path(__file__).resolve().parents[2]
_forks = multiprocessing.get_context("forkserver")
_LOADED = [
    "tests.support.worlds",
    "raysft.worker",
    "raysft.parallel.ddp",
    "raysft.parallel.fsdp",
    "torch._dynamo",
    "raysft.families.audio_lm.model",
    "raysft.families.causal_lm.model",
    "raysft.families.seq2seq.model",
    "transformers.models.qwen2_audio.modeling_qwen2_audio",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.whisper.modeling_whisper",
    "tests.support.proven",
]


def fork(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Call `target` in a new process that has torch loaded already. `exitcode`: 0, 1 after an
    error (its traceback is on stderr), or minus the signal that killed it."""
    _forks.set_forkserver_preload(_LOADED)  # for the first one
    process = _forks.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def die_at(operation: int) -> None:
    """From now on, this process kills itself instead of its n-th change of the file system (of
    names, or to make something durable), whichever thread makes it."""
    count = itertools.count(1)

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(count) == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "link", "unlink", "rmdir", "mkdir"):
        setattr(os, name, watched(getattr(os, name)))


def units(folder: Path) -> Path:
    """A file of 60 items of units below `folder`, made once."""
    corpus = folder / "units.json"
    if not corpus.exists():
        items = [
            {"id": f"u{i}", "input": f"[Hu{i % 20}]" * (1 + i % 7), "output": f"text {i}"}
            for i in range(60)
        ]
        corpus.write_text(json.dumps(items))
    return corpus


def tiny(folder: Path, name: str = "run", **changes: Any) -> Config:
    """tiny(folder, section__key=value, ...): a language model over 60 items of units; a step takes
    milliseconds and is saved."""
    from raysft.config import Config

    corpus = units(folder)
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": name, "storage_path": str(folder / "runs"), "seed": 1},
        "data": {
            "train": [{"path": str(corpus)}],
            "lanes": 2,
            "tokens_per_batch": 120,
            "window": 16,
            "index_path": str(folder / "index"),
        },
        "model": {**CAUSAL, "speech_units": 20},
        "optim": {"lr": 3e-3, "weight_decay": 0.1},
        "train": {"max_steps": 12},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 1},
    }
    return Config.model_validate(changed(tree, changes))


def changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config with the changes section__key=value."""
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return tree


def resolved(config: Config) -> Config:
    """`config` as a start of its run has it."""
    from raysft.run.folder import resolve, run_folder

    return resolve(config, run_folder(config))


def start(
    config: Config,
    world: World,
    progress: Callable[[dict[str, Any]], None] | None = None,
    permit: Permit | None = None,
) -> Job:
    """The job of one process, made as a Ray Train worker's is, with an in-process reader.

    permit: of the driver that owns the run; None: nobody owns it before it trains."""
    from raysft.run.folder import open_run
    from raysft.run.ownership import ANYONE

    if world.is_main:
        open_run(config, permit or ANYONE)
    world.barrier()
    return join(config, world, progress, permit)


def join(
    config: Config,
    world: World,
    progress: Callable[[dict[str, Any]], None] | None = None,
    permit: Permit | None = None,
) -> Job:
    """`start`, of a run that is open already."""
    import torch

    from raysft import patience, remarks, worker
    from raysft.data.plan.plan import Cursor
    from raysft.driver.preflight import prepare
    from raysft.run.catalogue import Catalogue
    from raysft.run.folder import run_folder
    from raysft.run.ownership import ANYONE

    torch.set_num_threads(1)
    patience.allow(config.patience_s)
    remarks.quiet()
    folder = run_folder(config)
    saved, _ = Catalogue.of(config.checkpoint, folder).newest()
    cursor = Cursor.from_json(saved.meta()["cursor"]) if saved else None
    found = prepare(config, folder, cursor, permit=permit or ANYONE)
    data = worker.Data.in_process(config, found.encoder, folder, found.train, found.eval)
    return worker.build_job(config, folder, world, data, found.total_steps, progress)


def drive(
    config: Config,
    said: Path | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    lease_s: float = 30.0,
) -> None:
    """Driver and worker in one process, in the order in which `launch.run` does things: own the
    run, open it, plan, train. Exit code 5 where it is another's; `said` then has the words."""
    from raysft.errors import UserError
    from raysft.parallel import World
    from raysft.run.folder import check_run, run_folder
    from raysft.run.ownership import Ownership
    from raysft.train.loop import train

    try:
        check_run(config)
        with Ownership.take(run_folder(config), lease_s=lease_s) as owner:
            job = start(config, World.current(), progress, owner)
            job.lease = replace(owner.lease, group=1)
            train(job)
    except UserError as error:
        if said is not None:
            said.write_text(str(error))
        os._exit(5)


def run(size: int, *configs: Path, kill_at: int = 0, module: str = "tests.support.worlds") -> int:
    """Run each config with `size` processes, one after the other; returns rank 0's exit code.

    kill_at: a step of the last config after whose metrics line rank 0 kills itself with SIGKILL
        (0: never).
    module: whose `main` the processes call, with the arguments of this one's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        workers = [
            fork(_member, module, f"{scratch}/store", rank, size, kill_at, configs)
            for rank in range(size)
        ]
        workers[0].join()
        for worker in workers[1:]:
            if workers[0].exitcode:
                worker.kill()  # it would wait for rank 0 for ever
            worker.join()
        return workers[0].exitcode or 0


def _member(
    module: str, store: str, rank: int, size: int, kill_at: int, configs: tuple[Path, ...]
) -> None:
    """One process of `run`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "RENDEZVOUS": store}
    os.chdir(ROOT)
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    importlib.import_module(module).main(size, kill_at, list(configs))


def main(size: int, kill_at: int, paths: list[Path]) -> None:
    """One process: the same path as a Ray Train worker's, with an in-process reader."""
    import torch.distributed as dist

    from raysft.config import load_config
    from raysft.parallel import World
    from raysft.train.loop import train

    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=int(os.environ["RANK"]),
        world_size=size,
    )

    def die(line: dict[str, Any]) -> None:
        if kill_at and "loss" in line and line["step"] >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for path in paths:
        config = load_config(path, [f"parallel.workers={size}"])
        train(start(config, World.current(), die if path == paths[-1] else None))
    dist.barrier()
    dist.destroy_process_group()
