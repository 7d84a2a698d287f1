"""What a run is about to do, in words: the dry run, and the summary before the first step.

Runs on the driver, on what `prepare` has prepared; trains nothing.
"""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

import numpy as np

from raysft.config import Config
from raysft.config.strategies import traits_of
from raysft.data.clips.recordings import FILE, Pools
from raysft.data.encode import TEMPLATE, Encoder, kept_template
from raysft.data.index.build import Index
from raysft.data.plan.plan import Plan, Summary
from raysft.data.plan.shares import hours_of
from raysft.data.quarantine import kind_of
from raysft.data.quarantine import summary as quarantined
from raysft.driver.placed import Placed
from raysft.driver.preflight import Prepared, Say, prepare, silent
from raysft.driver.shown import examples
from raysft.run.folder import is_trained, run_folder, with_budget

ASSUMED = 4096  # tokens_per_batch of a dry run where the run itself would find it


def dry_run(
    config: Config,
    say: Say = silent,
    show: int = 0,
    colours: bool = False,
    placed: Placed | None = None,
) -> str:
    """What a run would do, as text: steps, padding, tokens by task, memory. Trains nothing.

    config: as `folder.resolve` gives it. show, colours: see `shown.examples`. placed: its fewest
    workers; None: on one node.
    """
    assumed = []
    if config.data.tokens_per_batch == "auto":
        config = with_budget(config, ASSUMED)
        assumed = [
            f"tokens_per_batch {ASSUMED:,} is assumed here; auto: the run finds it at its start"
        ]
    with tempfile.TemporaryDirectory() as scratch:
        _as_the_run(config, Path(scratch))
        prepared = prepare(config, Path(scratch), say=say)
        epoch = prepared.plan.summary(0)
        index = prepared.train
        lines = [
            *assumed,
            f"examples        {len(index):,} usable, {len(prepared.rejected):,} unusable"
            + (f": {quarantined(map(kind_of, prepared.rejected))}" if prepared.rejected else ""),
            f"audio           {_duration(index.seconds)}{_computed(index, config)}",
            *([f"units           {prepared.encoder.units}"] if prepared.encoder.units else []),
            *_sources(index, prepared.plan.newest, config),
            *_languages(prepared.plan.newest, config),
            f"steps           {prepared.total_steps:,} in all, {epoch.steps:,} an epoch",
            f"micro-batches   {epoch.micro_batches:,} an epoch, {config.data.lanes} a step",
            f"tokens          {epoch.tokens:,} an epoch ({_by_task(epoch)})",
            f"padding         {epoch.padding:.2%} of computed positions",
            f"unfilled        {epoch.unfilled:.2%} of the budget",
            *_memory(config, prepared.encoder, prepared.total_steps, placed or Placed()),
        ]
        lines += [f"unusable        {q.id}: {q.reason}" for q in prepared.rejected[:10]]
        if show:
            budget = config.data.budget
            lines += ["", *examples(index, prepared.encoder, budget, show, colours)]
        return "\n".join(lines)


def _as_the_run(config: Config, scratch: Path) -> None:
    """Prompts of the run that is there already: of another day they would be indexed anew."""
    kept = kept_template(run_folder(config))
    if kept is not None and is_trained(config):
        (scratch / TEMPLATE).write_text(kept, encoding="utf-8")
        recordings = Pools.load(run_folder(config))
        if recordings.recordings:
            (scratch / FILE).write_bytes(recordings.to_bytes())


def summary(prepared: Prepared, folder: Path) -> list[str]:
    """What a run is about to train on, and where: shown before its first step."""
    config = prepared.config
    steps = f"{prepared.total_steps:,}" if prepared.total_steps else "none"
    unused = []
    if prepared.rejected:
        reasons = quarantined(map(kind_of, prepared.rejected))
        unused = [f"unused  {_examples(len(prepared.rejected))}: {reasons}"]
    lines = [
        f"train   {_amount(prepared.train)}",
        *([f"eval    {_amount(prepared.eval)}"] if prepared.eval is not None else []),
        *unused,
        f"steps   {steps}, of {config.data.lanes} micro-batches of up to "
        f"{config.data.tokens_per_batch:,} tokens",
        *([f"units   {prepared.encoder.units}"] if prepared.encoder.units else []),
        f"run     {folder}",
    ]
    if config.log.tensorboard:
        lines.append(f"curves  tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}")
    return lines


def _amount(index: Index) -> str:
    """Examples, and how long they are where there is audio."""
    said = _examples(len(index))
    return f"{said}, {_duration(index.seconds)} of audio" if np.any(index.seconds) else said


def _examples(count: int) -> str:
    return f"{count:,} example" + ("" if count == 1 else "s")


def _sources(index: Index, plan: Plan, config: Config) -> list[str]:
    """Of each source, where there are several, how often an epoch sees it; with data.mix, what its
    group sees in a pass."""
    if len(index.sources) < 2:
        return []
    hours = hours_of(index.source, index.seconds, len(index.sources))
    of = _span(config)
    lines: list[str] = []
    for number, source in enumerate(index.sources):
        seen = plan.dealt.seen(number)
        mine = int(np.count_nonzero(index.source == number))
        heard = f", {hours[number]:,.1f} hours" if hours[number] else ""
        times, share = seen / max(1, mine), seen / max(1.0, plan.dealt.beside(number))
        lines.append(
            f"{'sources' if not lines else '':15} {source.name}: {_examples(mine)}{heard}, seen "
            f"{times:.3g} times {of}, {share:.1%} of it"
        )
    return lines


def _languages(plan: Plan, config: Config) -> list[str]:
    """Of each language, where the plan counts by them, how often an epoch sees it."""
    lines: list[str] = []
    for name, count, seen, beside in plan.dealt.languages():
        times, share = seen / max(1, count), seen / max(1.0, beside)
        lines.append(
            f"{'languages' if not lines else '':15} {name or 'none named'}: {_examples(count)}, "
            f"seen {times:.3g} times {_span(config)}, {share:.1%} of it"
        )
    return lines


def _span(config: Config) -> str:
    return "a pass of its share of data.mix" if config.data.mix else "an epoch"


def _computed(index: Index, config: Config) -> str:
    """What the encoder computes, where that is more than there is."""
    augment = config.data.augment
    slow = ", at their slowest," if augment is not None and augment.slower else ","
    heard, seconds = (float(np.sum(c, dtype=np.float64)) for c in (index.heard, index.seconds))
    if heard < 1.005 * seconds:
        return ""
    computed = _duration(index.heard)
    return f"; with what clips are padded to{slow} the encoder computes {computed}"


def _duration(lengths: np.ndarray) -> str:
    seconds = float(np.sum(lengths, dtype=np.float64))
    if seconds < 360:
        return f"{seconds:,.0f} seconds"
    return f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _by_task(epoch: Summary) -> str:
    return ", ".join(f"{task} {tokens:,}" for task, tokens in epoch.tokens_by_task.items())


def _memory(config: Config, encoder: Encoder, total_steps: int, placed: Placed) -> list[str]:
    """What a worker holds, by `estimate`, and how many copies of the model there are."""
    from raysft import worker
    from raysft.train import replicas
    from raysft.train.estimate import estimate

    speech_model, _ = worker.build_model(config, encoder, total_steps, later=True)
    sizes = worker.sizes_of(speech_model)
    workers = config.parallel.min_workers
    found = estimate(config, speech_model, workers)
    sharding, copies = [], replicas.Copies(1, "")
    if traits_of(config.parallel.strategy).replicates and workers > 1:
        copies = replicas.decide(config, found, placed.nodes, placed.memory)
        if not placed.known and config.parallel.replicate == "auto":
            copies = replicas.Copies(1, "auto: assumed here, until its nodes are there")
        sharding = [f"sharding        {copies.describe(workers)}"]
    state = found.state(workers // copies.number)
    return [
        f"precision       {config.train.precision}",
        f"parameters      {sizes['parameters']:,} ({sizes['trained']:,} trained)",
        *sharding,
        f"memory          {state / 2**20:,.0f} MiB of state and about "
        f"{found.activations / 2**20:,.0f} MiB of activations a worker (estimate)",
    ]
