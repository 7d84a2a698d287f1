"""The jobs as functions: `from raysft import load_config, prepare, train, sweep, evaluate, export,
dry_run, transcribe, synthesize, clone`.

The jobs call these and nothing else, so that a program does what a command line does: the same
checks, the same folders, the same UserError with the same line for whatever a user can mend. Each
function opens Ray for itself (see `driver.session.ray_session`) and is to be called in the main
thread. Libraries are imported where they are needed: Ray and torch, 10 s, not before a mistake is
said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from raysft import paths
from raysft.config import Config, load_config
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.run.folder import reopen

if TYPE_CHECKING:
    from torch import nn

    from raysft.driver.launch import Outcome
    from raysft.driver.sweep import Swept
    from raysft.prepare.run import Prepared
    from raysft.synthesis.run import Utterances
    from raysft.transcribe.run import Transcripts

__all__ = [
    "clone",
    "dry_run",
    "evaluate",
    "export",
    "load_config",
    "modality_routing",
    "prepare",
    "report",
    "sweep",
    "synthesize",
    "train",
    "transcribe",
]

Progress = Callable[[JsonObject], None]
"""Called with each report of driver and workers: `raysft.progress.ProgressLine()` prints them."""


def _silent(line: JsonObject) -> None:
    """For a program that nobody watches."""


@contextmanager
def _session(starts: Config | None = None) -> Iterator[None]:
    """Ray, started while this process imports what is needed. starts: of workers that will be, for
    which processes are started at once."""
    from raysft.driver.session import libraries, ray_session

    imported = libraries()
    with ray_session():
        if starts is not None:
            from raysft.driver import warm

            warm.processes(starts)
        imported()
        yield


def train(config: Config, progress: Progress = _silent) -> Outcome:
    """Train, or continue the run if its folder exists; returns how it ended. With `config.stages`
    each of them in order (`driver.stages.Staged`).

    config: see `load_config`. Raises UserError; KeyboardInterrupt, or SystemExit on SIGTERM, after
    a checkpoint was saved.
    """
    if config.stages:
        return _stages(config, progress)

    from raysft.driver import preflight

    preflight.check(config)

    from raysft.driver.session import destination

    progress({"doing": destination()})
    with _session(config):
        from raysft.driver import launch

        return launch.run(config, progress)


def _stages(config: Config, progress: Progress) -> Outcome:
    from raysft.driver import stages

    checked = stages.check(config)
    if stages.all_finished(config):
        return stages.run(config, progress)

    from raysft.driver.session import destination

    progress({"doing": destination()})
    with _session(next(iter(checked.values()), None)):
        return stages.run(config, progress)


def dry_run(
    config: Config, progress: Progress = _silent, *, show: int = 0, colours: bool = False
) -> str:
    """What `train` would do, as text: steps, padding, tokens by task, memory. Writes no run.

    show: so many examples as the model reads them, what is supervised in green (colours) or between
    white square brackets. Raises UserError.
    """
    from raysft.driver import preflight

    if config.stages:
        return _dry_stages(config, progress, show, colours)
    checked = preflight.check(config, writes=False)

    from raysft.driver.session import destination

    progress({"doing": destination()})
    with _session():
        from raysft.driver import launch

        return launch.dry_run(checked, progress, show, colours)


def _dry_stages(config: Config, progress: Progress, show: int, colours: bool) -> str:
    from raysft.driver import stages

    checked = stages.check(config, writes=False)

    from raysft.driver.session import destination

    progress({"doing": destination()})
    with _session():
        return stages.dry_run(config, checked, progress, show, colours)


def evaluate(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    data: str | None = None,
    step: str = "last",
    progress: Progress = _silent,
) -> Outcome:
    """Evaluate a checkpoint of the run in folder `run`; returns figures, and the new folder below
    the run's evaluations that has them, with every reference and hypothesis.

    overrides: `key=value`, of the run's config. data: a source in place of its data.eval. step: a
    step, `best` (by checkpoint.best) or `last`. Of the run nothing is changed. Raises UserError.
    """
    asked = list(overrides)
    if data is not None:
        asked.append(f"data.eval={dumps([data], ensure_ascii=False)}")
    folder = paths.argument(str(run), "RUN")
    config = reopen(folder, [*asked, "checkpoint.resume=auto"])

    from raysft.driver import preflight

    config = preflight.check_evaluation(config, folder, step)

    with _session(config):
        from raysft.driver import launch

        return launch.evaluate(config, folder.absolute(), progress, step)


def export(run: str | Path, out: str | Path, *, step: str = "last", merge: bool = False) -> int:
    """Write a checkpoint of the run in folder `run` to the new folder `out`, which transformers, or
    peft, loads by from_pretrained; returns its step. Needs neither Ray nor the training data.

    step: a step, `best` (by checkpoint.best) or `last`. merge: of a run with adapters the whole
    model, not the adapter. Raises UserError.
    """
    folder, target = paths.argument(str(run), "RUN"), paths.argument(str(out), "OUT")

    from raysft import remarks
    from raysft.driver import preflight

    preflight.check_export(folder, target, step)

    from raysft.export import export_run

    remarks.quiet()
    return export_run(folder, target, merge=merge, step=step)


def prepare(config: Config, progress: Progress = _silent) -> Prepared:
    """Write `config.data.train` as shards into the folder `config.prepare.path`, or go on with a
    preparation that was interrupted; returns what there is.

    Raises UserError; KeyboardInterrupt, or SystemExit on SIGTERM: shards that are whole stay.
    """
    from raysft.prepare import check

    check.check(config)

    from raysft.driver.session import destination

    progress({"doing": destination()})
    with _session():
        from raysft.prepare import run

        return run.run(config, progress)


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of a run, of a sweep, or of several runs beside each other; returns its path:
    report.html in the folder (of several, in the one above the first), or `out`. Needs no Ray.
    Of folders with results of judging, none of them a run: pictures of how these agree with the
    raters, in the first of them or in the folder `out`; returns that of the correlations.

    Raises UserError where a folder is none, or there is nothing to show yet.
    """
    from raysft.page import build, judged

    target = None if out is None else paths.argument(str(out), "--out")
    places = [paths.argument(str(folder), "RUN") for folder in folders]
    rated = [judged.holds_results_alone(place) for place in places]
    if all(rated):
        return judged.draw(places, target)[0]
    if any(rated):
        raise UserError(
            f"{places[rated.index(False)]}: no results of judging are here, beside those of "
            f"{places[rated.index(True)]}: name folders of one kind"
        )
    return build.write(places, target)


def sweep(config: Config, progress: Progress = _silent) -> Swept:
    """Try the points of `config.sweep.space`, each as a run of its own, or go on with a sweep whose
    folder exists; returns the table of its trials, the best first.

    Raises UserError; KeyboardInterrupt, or SystemExit on SIGTERM, after the trials have saved.
    """
    from raysft.driver import sweep as swept

    swept.check(config)

    from raysft.driver.session import destination, ray_session

    progress({"doing": destination()})
    with ray_session():
        return swept.run(config, progress)


def transcribe(
    model: str | Path,
    audio: Sequence[str | Path],
    *,
    prompt: str | None = None,
    lang: str | None = None,
    task: str | None = None,
    checkpoint: str | None = None,
    batch_seconds: float | None = None,
    max_new_tokens: int | None = None,
) -> Transcripts:
    """What a model hears: iterate over it for a `Transcript` of each clip, in order. Needs no Ray.

    model: a run's folder, an exported folder, or a hub id. audio: clips, folders of clips, and
    manifests of any format. prompt: the instruction, in place of the one that the run was trained
    with, or that an example brings. lang: as examples have it; task: of clips, asr where it is left
    out. checkpoint: of a run, a step, `best` or `last`. batch_seconds: of audio at a time.
    max_new_tokens: of an answer. Raises UserError; what is wrong with a clip is in its transcript.
    """
    from raysft.transcribe import asked

    wanted = asked.read(audio, asked.Wishes(prompt, lang, task))

    from raysft import remarks
    from raysft.transcribe.model import load
    from raysft.transcribe.run import BATCH_SECONDS, Transcripts

    remarks.quiet()
    answering = load(str(model), checkpoint)
    return Transcripts(answering, wanted, batch_seconds or BATCH_SECONDS, max_new_tokens)


def synthesize(
    model: str | Path,
    texts: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    speaker: str | Path | None = None,
    speaker_text: str | None = None,
    decoder: str | Path | None = None,
    task: str = "tts",
    checkpoint: str | None = None,
) -> Utterances:
    """What a model says: iterate over it for an `Utterance` of each text, in order. Needs no Ray.

    model: a run's folder, or an exported one. texts: what is to be said; or files: of a text a
    line (.txt), or manifests of any format. overrides: `speak.KEY=VALUE`. speaker: a clip that each
    text is said after; speaker_text: what it says, where each text is to be said in its voice.
    decoder: of a model that writes units, a run or an export of the flow decoder that speaks them.
    task: whose instruction is used (data.prompts); with `dialog` texts are clips, and what is said
    replies to them. checkpoint: of a run, a step, `best` or `last`. Raises UserError.
    """
    from raysft.synthesis import asked

    clip = None if speaker is None else str(Path(speaker).absolute())
    wanted = asked.read(texts, task, clip, speaker_text)

    from raysft import remarks
    from raysft.synthesis.run import Utterances, settings_of
    from raysft.transcribe.model import load

    remarks.quiet()
    answering = load(str(model), checkpoint)
    speaks = None if decoder is None else load(str(decoder))
    return Utterances(answering, wanted, settings_of(answering, overrides), speaks)


def clone(
    model: str | Path,
    prompt_audio: str | Path,
    prompt_text: str,
    text: str | Sequence[str],
    overrides: Sequence[str] = (),
    *,
    decoder: str | Path | None = None,
    checkpoint: str | None = None,
) -> Utterances:
    """What a model says in the voice of a clip: an `Utterance` of `text`, or of each of them.

    prompt_audio, prompt_text: the clip, and what it says. The rest, as `synthesize` takes it: a
    language model of units takes a decoder beside it, but for a pair; what makes units of the clip,
    and an embedding for a decoder that reads one, are speak.speech_tokens and speak.speakers.
    """
    texts = [text] if isinstance(text, str) else text
    return synthesize(
        model,
        texts,
        overrides,
        speaker=prompt_audio,
        speaker_text=prompt_text,
        decoder=decoder,
        checkpoint=checkpoint,
    )


def modality_routing(net: nn.Module, folder: str | Path | None = None) -> None:
    """Send the tokens of a model to the experts of their kind, as it was trained with
    model.moe.modality, in every forward pass from here on, generation too. To be called after
    `from_pretrained`: without it the model's own router sends them to any.

    net: of transformers, or of peft around one. Kinds are told from input_ids alone. folder: of an
    exported adapter; or where the model was loaded from, if it cannot be told from it. With
    gradient checkpointing each forward pass has to be followed by its backward pass. Raises
    UserError where the model was trained without.
    """
    from raysft.models.routing import restore

    restore(net, None if folder is None else str(folder))
