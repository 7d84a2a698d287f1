"""data.tokens_per_batch: auto, on the driver: workers find the number before there is a plan.

The run's config.yaml then holds it, so that starting again goes on with the same plan; `auto`
given again means what the run has. See `train.probe` for how it is found. The group is as small as
the run's may become (the fewest of [min, max] workers): fewer workers hold more each.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import ray
import ray.train

from raysft import failures
from raysft.config import Config
from raysft.data.encode import Encoder
from raysft.data.index.build import Index
from raysft.driver.group import Settings, interruptible, join, make_trainer, reason_of
from raysft.driver.shares import Shares
from raysft.errors import UserError


class _Answer:
    """What the workers say, told to the driver."""

    def __init__(self) -> None:
        self.budget: int | None = None
        self.mistake: str | None = None

    def tell(self, budget: int | None, mistake: str | None = None) -> None:
        self.budget, self.mistake = budget or self.budget, mistake or self.mistake

    def get(self) -> tuple[int | None, str | None]:
        return self.budget, self.mistake


def find(config: Config, folder: Path, encoder: Encoder, train: Index) -> int:
    """The budget for a run of `config` in `folder`, by a worker group of its own. Raises UserError
    where nothing fits, and where the group fails."""
    # Here, and below: Ray's controller, which imports this module, has no use for models.
    from raysft.train.probe import Lengths

    begun = time.monotonic()
    heard = None if config.data.audio_per_batch is None else train.heard
    answer = ray.remote(_Answer).options(num_cpus=0).remote()
    settings = {
        "encoder": ray.put(encoder),
        "lengths": asdict(Lengths.of(train.tokens, config.data.lanes, heard)),
        "answer": answer,
    }
    trainer = make_trainer(
        "probe",
        _worker,
        settings,
        config,
        Shares.of(config),
        folder,
        workers=config.parallel.min_workers,
        log_level="CRITICAL",
    )
    try:
        interruptible(trainer.fit)
    except ray.train.TrainingFailedError as error:
        _, mistake = ray.get(answer.get.remote())
        raise UserError(
            mistake
            or f"data.tokens_per_batch: auto: the probe failed: {reason_of(error)}; "
            "start again, or give a number"
        ) from error
    budget, _ = ray.get(answer.get.remote())
    assert budget is not None  # the group ended well
    seconds = time.monotonic() - begun
    print(f"data.tokens_per_batch: {budget:,} (auto, found in {seconds:.0f} s)", flush=True)
    return budget


def _worker(settings: Settings) -> None:
    """What each worker of the group runs."""
    from raysft import worker
    from raysft.models.base import SpeechModel
    from raysft.parallel import Strategy
    from raysft.train.probe import Lengths, find_budget

    config, world = join(settings, log_folder=None)
    encoder = ray.get(settings["encoder"])

    def factory() -> tuple[SpeechModel, Strategy]:
        speech_model, _ = worker.build_to_wrap(config, encoder, total_steps=0)
        return speech_model, worker.wrap(config, speech_model, world)

    try:
        budget = find_budget(config, factory, Lengths(**settings["lengths"]), world)
    except Exception as error:
        if failures.certain(error):
            ray.get(settings["answer"].tell.remote(None, failures.told(error)))
        raise
    if world.is_main:
        ray.get(settings["answer"].tell.remote(budget))
