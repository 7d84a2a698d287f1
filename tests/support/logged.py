"""Runs that log, in processes of their own, killed once their loggers have more than a checkpoint
holds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.support.worlds import fork, start, tiny

STEPS, SAVED, KILLED = 12, 4, 7


def config_of(folder: Path, **changes: Any) -> Any:
    """A run of 12 steps, each of them logged, with a checkpoint at 4 and 8 and an evaluation at 3,
    6, 9 and the end."""
    from raysft.config import Config

    tree = tiny(
        folder,
        train__max_steps=STEPS,
        checkpoint__every=SAVED,
        data__eval=[{"path": str(folder / "units.json"), "name": "dev"}],
        evaluate__every=3,
        evaluate__max_new_tokens=2,
        evaluate__max_examples=4,
    ).model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return Config.model_validate(tree)


def trained(config: Any, killed: bool = False, environment: dict[str, str] | None = None) -> int:
    """The exit code of a process that trains. killed: with SIGKILL after step KILLED, once every
    logger has all figures of the step before."""
    process = fork(_train, config.model_dump(mode="json"), killed, environment or {})
    process.join()
    return process.exitcode or 0


def _train(tree: dict[str, Any], killed: bool, environment: dict[str, str]) -> None:
    os.environ |= environment
    from raysft.config import Config
    from raysft.parallel import World
    from raysft.run.folder import run_folder
    from raysft.train.loop import train

    config = Config.model_validate(tree)
    folder = run_folder(config)

    def die(line: dict[str, Any]) -> None:
        if killed and "loss" in line and line["step"] == KILLED:
            until = time.monotonic() + 200
            while not _there(config, folder) and time.monotonic() < until:
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)

    train(start(config, World.current(), die))


def _there(config: Any, folder: Path) -> bool:
    """Whether what is logged has gone beyond the checkpoint, and that is published."""
    if not (folder / "checkpoints" / f"step_{SAVED}" / "COMMITTED").exists():
        return False
    found = []
    if config.log.wandb is not None:
        # Plain text in a file of messages: of the evaluation at 6, and of the step after it.
        texts = [path.read_bytes() for path in (folder / "wandb").glob("*run-*/*.wandb")]
        found.append(any(text.count(b"train/grad_norm") >= KILLED - 1 for text in texts))
    if config.log.mlflow is not None:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=config.log.mlflow.tracking_uri)
        experiment = client.get_experiment_by_name(config.log.mlflow.experiment)
        runs = client.search_runs([experiment.experiment_id]) if experiment is not None else []
        found.append(any(run.data.metrics.get("eval/step") == 6 for run in runs))
    return all(found)
