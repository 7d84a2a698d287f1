"""Whether what `evaluate.asr` and `evaluate.speakers` name can be used, from files alone: asked
before anything is read, indexed or loaded. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

import numpy as np

from raysft import hub, paths
from raysft.config import Config, listeners
from raysft.config.families import Family
from raysft.config.listeners import SPEAKERS
from raysft.config.prepare import Speakers
from raysft.config.schema import Model
from raysft.data.encode import Encoder, model_family, require_template
from raysft.data.index.table import Index
from raysft.errors import UserError
from raysft.run import plans, stages
from raysft.run.catalogue import unreadable
from raysft.run.evaluations import choose
from raysft.run.folder import check_base, read_config
from raysft.scorers import SPEAKING, figures_of


class Listener(Protocol):
    """See `raysft.prepare.listener`. sample_rate: Hz of the clips it is given."""

    sample_rate: int

    def hear(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> float32 [dimensions]. Raises BadExample for one too short."""


KEY, OTHERS = "evaluate.asr", "evaluate.speakers"
TASK = "asr"
ADAPTER = "adapter_config.json"


def check(config: Config) -> None:
    """Raises UserError, naming the key, where the model of `config` does not speak, or what is to
    hear it does not hear."""
    settings = config.evaluate
    if not settings.speaks:
        return
    family = model_family(config.model)
    if not family.speaks:
        raise UserError(
            f"{KEY if settings.asr else OTHERS}: models of family {family.name} do not speak by "
            "themselves, or are not heard yet: leave it out (what is written is measured by "
            "evaluate.metrics)"
        )
    if settings.asr is not None:
        _check_asr(settings.asr)
    if settings.speakers is not None:
        try:
            listeners.check(SPEAKERS, settings.speakers)
        except UserError as error:
            raise UserError(str(error).replace(SPEAKERS, OTHERS)) from None
        path, model = settings.speakers.path, settings.speakers.model
        if path is not None and not Path(path).is_file():
            raise UserError(f"{OTHERS}.path: {path} does not exist, or is no file")
        if model is not None:
            hub.check(model, f"{OTHERS}.model", settings.speakers.revision)


def _check_asr(given: str) -> None:
    folder = Path(paths.model(given))
    if (folder / "config.yaml").is_file():
        own = read_config(folder)
        choose(folder, own.checkpoint, "last", unreadable)
        _check_hears(given, model_family(own.model), own.data.speech_tokens is not None)
        require_template(folder)
        check_base(own, folder)
        learnt = plans.tasks(folder)
        if learnt and TASK not in learnt:
            raise UserError(
                f"{KEY}: {given} was trained on {', '.join(sorted(learnt))} and does not "
                f"transcribe: name a run that was trained on {TASK}"
            )
    elif (folder / ADAPTER).is_file():
        return  # what it is over is read with it
    elif folder.is_dir() and not (folder / "config.json").is_file():
        try:
            stages.refuse_folder(folder)
        except UserError as error:
            raise UserError(f"{KEY}: {error}") from None
        raise UserError(
            f"{KEY}: {given}: neither a run (config.yaml) nor a model (config.json) nor an adapter "
            "is here; name a run that transcribes, or its export"
        )
    else:
        hub.check(str(folder) if folder.is_absolute() else given, KEY)
        _check_hears(given, model_family(Model(path=paths.model(given))), False)


def _check_hears(given: str, family: Family, units: bool) -> None:
    if family.writes and (family.hears or units):
        return
    what = "reads no audio" if family.writes else "writes no text"
    raise UserError(
        f"{KEY}: {given} is a model of family {family.name}, which {what}: name a run that "
        "transcribes, or its export"
    )


def check_tools(config: Config, encoder: Encoder) -> None:
    """Open, and close again, the vocoder and what tells speakers apart. encoder: of the model that
    speaks. Raises UserError where they cannot be had, or do not go with it."""
    settings = config.evaluate
    if not settings.speaks:
        return
    if encoder.latents_per_second:
        raise UserError(
            f"{KEY}: its model learns latents of a column, beside which there are no clips to "
            "compare with: leave it out"
        )
    mel = encoder.sounds if encoder.speaker is None else encoder.speaker.sounds
    if mel is not None:
        from raysft.synthesis.vocoders import vocoder_of  # torch

        vocoder_of(config.speak.vocoder, mel)
    if settings.speakers is not None:
        listener_of(settings.speakers)


def listener_of(settings: Speakers) -> Listener:
    """What tells speakers apart. Raises UserError where it cannot be had."""
    return cast(Listener, listeners.opened(SPEAKERS, settings, OTHERS, Path()))  # which keeps none


def check_data(config: Config, index: Index) -> None:
    """Raises UserError where nothing in data.eval is to be spoken, or a source is called as the
    task that figures would be of."""
    settings = config.evaluate
    if not settings.speaks:
        return
    key = KEY if settings.asr else OTHERS
    there = {index.tasks[number] for number in set(index.task.tolist())}
    speaking = [task for task in SPEAKING if task in there]
    if not speaking:
        raise UserError(
            f"{key}: data.eval has no example that is spoken (task {', '.join(SPEAKING)}); its "
            f"tasks are {', '.join(sorted(there)) or 'none'}: name a source of one, or leave it out"
        )
    for number, source in enumerate(index.sources):
        own = {index.tasks[task] for task in set(index.task[index.source == number].tolist())}
        if source.name in speaking and any(figures_of(one, settings.metrics) for one in own):
            raise UserError(
                f"{key}: data.eval has a source named {source.name}, as the task whose speech is "
                f"measured as wer/{source.name}: give the source another name"
            )
