"""Everything between a config and the first step: checks, encoder, indexes, plan.

Runs on the driver. Costs one pass over the headers of new data (spread over the cluster where Ray
runs, then cached) and one read of the length column.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from raysft import hub, paths, patience
from raysft.config import Config, places
from raysft.config.strategies import traits_of
from raysft.data import sources
from raysft.data.clips import speech_tokens
from raysft.data.clips.audio import Limits, load
from raysft.data.clips.stalled import ClipReader
from raysft.data.encode import (
    TEMPLATE,
    Encoder,
    check_model,
    make_encoder,
    require_template,
)
from raysft.data.example import Audio, Quarantined
from raysft.data.index.build import Index, build_index
from raysft.data.plan.generations import Generations
from raysft.data.plan.plan import Cursor, Plan
from raysft.data.plan.shares import explained, hours_of
from raysft.data.quarantine import OVER_BUDGET, kind_of
from raysft.data.quarantine import summary as quarantined
from raysft.driver import learnable, pools
from raysft.driver.metrics import tell_of_metrics
from raysft.driver.session import check_kept
from raysft.driver.unknown import unknown_text
from raysft.errors import BadExample, UserError
from raysft.hearing import check as hearing
from raysft.json_types import JsonObject
from raysft.loggers import check as loggers
from raysft.run import epochs, plans
from raysft.run.catalogue import unreadable
from raysft.run.evaluations import choose, is_given, metrics_of
from raysft.run.folder import check_run, read_config, resolve, run_folder
from raysft.run.ownership import ANYONE, Permit, refuse_held
from raysft.run.storage import write_whole
from raysft.scorers import bleu
from raysft.scorers.normalize import read_spelling

log = logging.getLogger(__name__)

SHOWN_S = 1.0  # between two reports of how far something is
MOST_TIMES = 100  # that a source's examples are seen in an epoch


@dataclass
class Prepared:
    """What there is to know before a worker starts."""

    config: Config
    encoder: Encoder
    train: Index
    eval: Index | None
    plan: Generations
    total_steps: int
    rejected: list[Quarantined]


class Say(Protocol):
    """Shown to the user while something lasts."""

    def __call__(self, text: str, share: float | None = None) -> None:
        """share: of it that is done; None: it begins."""


def silent(text: str, share: float | None = None) -> None:
    """For callers that nobody watches."""


def saying(progress: Callable[[JsonObject], None]) -> Say:
    """As reports of `progress`."""

    def say(text: str, share: float | None = None) -> None:
        progress({"doing": text} if share is None else {"doing": text, "share": share})

    return say


def check(config: Config, writes: bool = True) -> Config:
    """Look for mistakes that show without reading data or weights: run folder, sources, layers
    that are to have adapters. Returns the config as `folder.resolve` gives it.

    writes: into the run's folder. Raises UserError.
    """
    patience.allow(config.patience_s)
    check_kept(
        run__storage_path=config.run.storage_path,
        data__index_path=config.data.index_path,
    )
    config = resolve(config, run_folder(config))
    check_run(config)
    if writes:
        refuse_held(run_folder(config))
    loggers.check(config.log, writes)
    _check_weights(config)
    if config.model.tokenizer not in (None, places.BYTES):
        hub.check(config.model.tokenizer, "model.tokenizer")
    if config.peft.path is not None:
        hub.check(config.peft.path, "peft.path")
    check_model(config.model)
    _check_experts(config)
    _check_names(config)
    sources.resolve_all(config.data.train, "train")
    pools.check(config)
    _check_evaluation_data(config)
    return config


def _check_weights(config: Config) -> None:
    """Weights as other tools have them, relative to each other: clips, hours, shares of 100.

    Not of a run that is there: it began with what its weights are."""
    weights = [source.weight for source in config.data.train]
    most, least = max(weights, default=1.0), min(weights, default=1.0)
    if most <= MOST_TIMES or (run_folder(config) / "config.yaml").is_file():
        return
    remedy = "leave weights out to see every example once, and sources by their size"
    if len(weights) > 1:
        remedy += f"; or divide all weights by the same number, which mixes alike ({MOST_TIMES} is "
        remedy += f"the most: {least:g} and {most:g} could be {least / most:.3g} and 1)"
    raise UserError(
        f"data.train.{weights.index(most)}.weight: {most:g}: a weight is how often each example of "
        f"a source is seen in an epoch, no number of clips or hours, so these would be seen "
        f"{most:,.0f} times; {remedy}"
    )


def check_evaluation(config: Config, run: Path, step: str) -> Config:
    """As `check`, of an evaluation of `step` of a run: its training data may be gone."""
    patience.allow(config.patience_s)
    check_kept(RUN=run)
    config = resolve(config, run_folder(config))
    check_run(config)
    choose(run, config.checkpoint, step, unreadable)
    if not config.data.eval:
        raise UserError("data.eval: empty; name a source, e.g. --data test.jsonl")
    _check_evaluation_data(config)
    return config


def check_export(run: Path, out: Path, step: str) -> None:
    """As `check`, of an export."""
    check_kept(OUT=out)
    paths.check_new_folder("export", out)
    config = read_config(run)
    patience.allow(config.patience_s)
    choose(run, config.checkpoint, step, unreadable)


def _check_evaluation_data(config: Config) -> None:
    hearing.check(config)
    sources.resolve_all(config.data.eval, "eval")
    if config.evaluate.spelling is not None:
        read_spelling(config.evaluate.spelling)
    words = config.evaluate.bleu_tokenize
    for name in [words] if isinstance(words, str) else words.values():
        if name.endswith("mecab"):
            bleu.metric(name)  # for its refusal


def _check_experts(config: Config) -> None:
    """Whether there are experts that `model.moe` and the strategy can be about, without weights."""
    shared = "experts" in traits_of(config.parallel.strategy).shards
    if not shared and config.model.moe is None:
        return
    from raysft.models import experts  # torch: only where it is needed
    from raysft.models.loading import skeleton
    from raysft.parallel import ep

    net = skeleton(config.model)
    if shared:
        ep.check(config.parallel, net)
    if config.model.moe is not None:
        experts.check(net)
        if config.model.moe.experts == "grouped_gemm":
            experts.require_installed()


def _check_names(config: Config, encoder: Encoder | None = None, total_steps: int = 0) -> None:
    """Look names of layers and parameters up in the model, without its weights."""
    if config.peft.method != "none":
        from raysft.adapters import attach as peft  # torch: only where it is needed

        peft.check(config, encoder.new_ids if encoder is not None else (), total_steps)
    elif config.train.freeze or config.optim.groups:
        from raysft.models.loading import skeleton
        from raysft.models.targets import freeze
        from raysft.parallel.optim import parameter_groups

        net = skeleton(config.model)
        freeze(net, config.train.freeze)
        parameter_groups(net.named_parameters(), config.optim)


def prepare(
    config: Config,
    folder: Path,
    cursor: Cursor | None = None,
    say: Say = silent,
    permit: Permit = ANYONE,
) -> Prepared:
    """Encoder, indexes and plan; writes the index cache, plan.json, and a speech tokenizer.

    cursor: of the checkpoint that the run in `folder` goes on from; None: it starts. permit: asked
    before anything is written into `folder`.
    """
    patience.allow(config.patience_s)
    if cursor is not None:
        require_template(folder)
        pools.require(config, folder)
    encoder, index = read_train(config, folder, say, permit)
    evaluation = None
    if config.data.eval:
        evaluation = _index(config, "eval", encoder, say)
    _check_best(config, evaluation)
    if (least := min(source.weight for source in config.data.train)) >= 2:
        say(
            f"data.train: with these weights every example is seen {least:g} times an epoch or "
            "more; divided by the smallest they mix alike, in shorter epochs"
        )
    _explain_weights(config, index)
    say("planning batches")
    newest = Plan.of(index, config.data, config.run.seed)
    _check_usable(config, index, newest)
    plan = plans.follow(folder, index, config.data, config.run.seed, cursor, permit)
    plan.kept = epochs.Kept(folder, permit)
    learnable.check(config, index, plans.tasks(folder))
    rejected = [*index.rejected, *_oversize(newest, index, config)]
    rejected += evaluation.rejected if evaluation is not None else []
    steps = total_steps(config, plan)
    _check_names(config, encoder, steps)
    return Prepared(config, encoder, index, evaluation, plan, steps, rejected)


def _explain_weights(config: Config, index: Index) -> None:
    """Say of weights that look like numbers of clips or hours what they do. It may be meant."""
    sources = len(index.sources)
    counts = np.bincount(index.source, minlength=sources).tolist()
    hours = hours_of(index.source, index.seconds, sources)
    if told := explained([source.weight for source in config.data.train], counts, hours):
        log.warning("data.train: %s", told)


def _check_best(config: Config, evaluation: Index | None) -> None:
    """Refuse a checkpoint.best that no evaluation will give."""
    best = config.checkpoint.best
    if best is None:
        return
    given = []
    if evaluation is not None:
        given = metrics_of(evaluation, config.evaluate, config.train.objective)
    if not is_given(best, given):
        raise UserError(
            f"checkpoint.best: {best} is not measured; an evaluation on data.eval gives "
            f"{', '.join(given) or 'nothing: it is empty'}"
        )


def read_eval(config: Config, run: Path, folder: Path, say: Say = silent) -> tuple[Encoder, Index]:
    """Encoder and index of data.eval, to evaluate the run in `run`. Writes the index cache, and
    into `folder` what there is to remember; of the run neither data nor plan are looked at."""
    patience.allow(config.patience_s)
    require_template(run)
    encoder = make_encoder(config.model, config.data, run, config.train.objective)
    encoder.limits = Limits.of(config.data, folder)
    hearing.check_tools(config, encoder)
    _prove(config, encoder)
    return encoder, _index(config, "eval", encoder, say)


def read_train(
    config: Config, folder: Path, say: Say = silent, permit: Permit = ANYONE
) -> tuple[Encoder, Index]:
    """Encoder and index of the training data; writes the index cache, a speech tokenizer, and which
    recordings clips are varied with."""
    patience.allow(config.patience_s)
    recordings = pools.listed(config, folder, _cache(config), say)
    units = config.data.speech_tokens
    if units is not None:
        if not speech_tokens.location(units, folder).exists():
            permit.require()
            say(f"fitting {units.clusters} speech units on up to {units.fit_clips:,} clips")
        speech_tokens.fit_or_load(units, folder, clips_of(config), config.run.seed)
    say("loading the tokenizer")
    encoder = make_encoder(config.model, config.data, folder, config.train.objective)
    hearing.check_tools(config, encoder)
    permit.require()
    _keep_template(encoder, folder)
    say("proving that batches are exact for this model")
    _prove(config, encoder)
    index = _index(config, "train", encoder, say)
    if recordings is not None and encoder.augment is not None:
        recordings = pools.voices(config, recordings, index, say)
        pools.keep(recordings, folder, permit)
        encoder.augment = encoder.augment.with_pools(recordings)
    return encoder, index


def _prove(config: Config, encoder: Encoder) -> None:
    """Prove what is exact for the model, and tell the encoder: how many positions an example may
    take, and what workers need not prove again. Raises UserError where batches are not exact."""
    from raysft.models import balance, modality, proof  # torch: only where it is needed
    from raysft.models.loading import skeleton

    net = skeleton(config.model)
    proof.refuse_early(net, config.data.mode)
    balance.coefficient(net)
    encoder.verdict = encoder.verdict or proof.prove(net)
    proof.check(encoder.verdict, config.data.mode)
    learned = encoder.verdict.learned
    if learned is not None and config.peft.method in ("prefix", "prompt"):
        learned -= config.peft.virtual_tokens
    encoder.limit(learned)
    plan = modality.plan_of(config.model, net, encoder)
    if plan is not None:
        encoder.group(plan.table(modality.size_of(net, encoder)))


def _index(config: Config, split: Literal["train", "eval"], encoder: Encoder, say: Say) -> Index:
    """The index of data.train or data.eval. Says how far it is every few seconds."""
    given = config.data.train if split == "train" else config.data.eval
    count = f"{len(given)} source" + ("s" if len(given) > 1 else "")
    say(f"indexing data.{split}: {count}")
    told = time.monotonic()

    def stages(stage: str, done: int, total: int) -> None:
        nonlocal told
        if done < total and time.monotonic() - told >= SHOWN_S:
            told = time.monotonic()
            say(f"indexing data.{split}: {stage}", share=done / total)

    most = config.data.max_quarantined
    temperature = config.data.temperature if split == "train" else None
    languages = temperature is not None and temperature.by == "lang"
    cache = _cache(config)
    index = build_index(given, split, encoder, cache, most=most, stages=stages, languages=languages)
    if split == "eval":
        hearing.check_data(config, index)
    if not encoder.writes:
        return index
    for line in unknown_text(encoder, index):
        log.warning("data.%s: %s", split, line)
    if split == "eval":
        tell_of_metrics(config, index, say)
    return index


def _keep_template(encoder: Encoder, folder: Path) -> None:
    """Write the template of a run that starts: whatever becomes of the model's template, or of the
    date in it, the run keeps its prompts."""
    path = folder / TEMPLATE
    if path.exists():
        return
    if encoder.template.remark:
        log.warning("data.template: %s", encoder.template.remark)
    try:
        content = encoder.template.source.encode()
        patience.patiently(lambda: write_whole(path, content), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _cache(config: Config) -> Path:
    if config.data.index_path is not None:
        return Path(paths.absolute(config.data.index_path))
    return Path(paths.absolute(config.run.storage_path)) / "index"


def total_steps(config: Config, plan: Generations) -> int:
    """The last step: `train.max_steps`, or that of the last epoch, whichever comes first."""
    if config.train.epochs is None and config.train.max_steps is not None:
        return config.train.max_steps
    steps = sum(plan.count_steps(epoch) for epoch in range(config.train.epochs or 1))
    return min(steps, config.train.max_steps or steps)


def _oversize(plan: Plan, index: Index, config: Config) -> list[Quarantined]:
    found = []
    for row, example in zip(plan.oversize, index.examples(plan.oversize)):
        audio = example.audio()
        path = audio[0].path if audio else ""
        reason = _over_budget(index, row, config)
        found.append(
            Quarantined(example.id, index.source_name(int(row)), path, reason, OVER_BUDGET)
        )
    return found


def _over_budget(index: Index, row: int, config: Config) -> str:
    budget, audio = config.data.budget, config.data.audio_per_batch
    if index.tokens[row] <= budget and audio is not None:
        heard = float(index.heard[row])
        return f"has {heard:g} s for the encoder, more than data.audio_per_batch={audio:g}"
    return f"takes {index.tokens[row]} positions, more than data.tokens_per_batch={budget}"


def _check_usable(config: Config, train: Index, plan: Plan) -> None:
    rejected = train.rejected
    examples = len(train) + len(rejected)
    unusable = len(rejected) + len(plan.oversize)
    if unusable <= config.data.max_quarantined * examples:
        return
    kinds = [*map(kind_of, rejected), *[OVER_BUDGET] * len(plan.oversize)]
    if rejected:
        first = f"{rejected[0].id}: {rejected[0].reason}"
        which = "all but those over budget" if len(plan.oversize) else "all"
        rest = f"; {which} are named in {train.folder / 'rejected.jsonl'}"
    else:
        row = plan.oversize[0]
        first, rest = f"{train.ids(np.array([row]))[0]}: {_over_budget(train, row, config)}", ""
    raise UserError(
        f"data.max_quarantined: {unusable} of {examples} examples are unusable, more than "
        f"{config.data.max_quarantined:.1%}: {quarantined(kinds)}; the first: {first}{rest}"
    )


def clips_of(config: Config) -> Iterator[np.ndarray]:
    """Up to `fit_clips` clips of data.train, drawn evenly (Algorithm R, Vitter 1985), decoded."""
    settings = config.data.speech_tokens
    assert settings is not None
    rng = random.Random(config.run.seed)  # noqa: S311 - a sample, not a secret
    chosen: list[Audio] = []
    seen = 0
    for source in sources.resolve_all(config.data.train, "train"):
        for file in source.files:
            for located in sources.scan(source, file, keep=_cache(config) / "commands"):
                for audio in located.example.audio() if located.example else ():
                    seen += 1
                    if len(chosen) < settings.fit_clips:
                        chosen.append(audio)
                    elif (place := rng.randrange(seen)) < settings.fit_clips:
                        chosen[place] = audio
    if not chosen:
        raise UserError(
            "data.speech_tokens: no audio in data.train to fit it on; remove it, or set "
            "data.speech_tokens.path to a fitted one"
        )
    limits = Limits.of(config.data)
    # What takes more units than a micro-batch holds is never trained on: not decoded either.
    budget = config.data.tokens_per_batch
    most = math.inf if budget == "auto" else budget * settings.stack / 100
    decode = partial(load, rate=speech_tokens.SAMPLE_RATE, limits=limits, most_seconds=most)
    reader = ClipReader(limits)
    for clip in chosen:
        try:
            yield reader.call(decode, clip)
        except BadExample:
            continue  # named in quarantine.jsonl when it is read for training
