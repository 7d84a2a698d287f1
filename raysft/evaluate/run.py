"""Evaluate a model on data.eval: every worker takes batches i, i + W, ...; rank 0 scores them all.

Batches are a function of the index and the budget alone, so results do not depend on the number of
workers. Loss comes from the whole sequence (teacher-forced); WER and CER come from what the model
generates from the sequence up to its first supervised token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysft.config.schema import Evaluate
from raysft.data import pack
from raysft.data.example import MicroBatch, Quarantined
from raysft.data.example import Sequence as Encoded
from raysft.evaluate.answers import keeps_tab, limit_for, transcript
from raysft.evaluate.score import error_rates
from raysft.models.base import Adapter
from raysft.parallel import World
from raysft.patience import patient
from raysft.run.lines import encoded
from raysft.train.evaluations import TRANSCRIBED
from raysft.train.step import to_device

Read = Callable[[list[np.ndarray]], Iterator[MicroBatch]]


@dataclass
class Corpus:
    """What evaluation needs of an index: lengths, names, and the reference texts by row."""

    tokens: np.ndarray
    source: np.ndarray
    source_names: list[str]
    references: Callable[[np.ndarray], list[str | None]]


def batches(corpus: Corpus, budget: int, limit: int | None) -> list[np.ndarray]:
    """Index rows of each evaluation batch: by source, sorted by length, n x longest <= budget.

    A row longer than the budget is a batch of its own: evaluation leaves nothing out.
    """
    found = []
    for source in range(len(corpus.source_names)):
        rows = np.flatnonzero(corpus.source == source)
        if limit is not None and len(rows) > limit:
            rows = rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]
        lengths = corpus.tokens[rows]
        longest = int(lengths.max(initial=1))
        found += [rows[part] for part in pack.padded(lengths, max(budget, longest))]
    return found


def prompts_of(adapter: Adapter, batch: MicroBatch) -> list[Encoded]:
    """The sequences of a micro-batch, each cut before its first supervised token."""
    found = []
    for id_, document in zip(batch.ids, adapter.documents(batch) if batch.ids else []):
        supervised = np.flatnonzero(document.labels != -100)
        end = int(supervised[0]) if len(supervised) else len(document.labels)
        found.append(
            Encoded(
                id_,
                document.task,
                document.input_ids[:end],
                np.full(end, -100, np.int32),
                document.clips,
            )
        )
    return found


def answer_lengths(batch: MicroBatch) -> list[int]:
    """Tokens of each right answer of a micro-batch, without the one that ends it."""
    ends = np.cumsum(batch.lengths)
    supervised = np.concatenate([[0], np.cumsum(batch.labels != -100)])
    return [
        max(0, int(supervised[end] - supervised[end - n]) - 1)
        for end, n in zip(ends, batch.lengths)
    ]


def evaluate(
    module: torch.nn.Module,
    adapter: Adapter,
    corpus: Corpus,
    read: Read,
    settings: Evaluate,
    world: World,
    autocast: Callable[[], AbstractContextManager[Any]],
    final: bool,
    predictions: Path | None = None,
    synced: bool = False,
    seen: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Losses by task, WER and CER by source: the same values on every worker. A collective.

    `read` turns lists of index rows into micro-batches, in order. `predictions` is a file of JSON
    lines (id, source, reference, hypothesis) that rank 0 writes. `synced`: sharded parameters, so
    every worker must run the same number of forward passes. `seen` is called before each round
    of batches with how many are done and how many there are; `tell`, on rank 0, with what has to
    be known of the figures.
    """
    plan = batches(corpus, settings.tokens_per_batch, None if final else settings.max_examples)
    mine = plan[world.rank :: world.size]
    rounds = -(-len(plan) // world.size)
    results: list[dict[str, Any]] = []
    losses: dict[str, list[float]] = {}
    unusable: list[Quarantined] = []
    stream = read(mine)
    with torch.inference_mode(mode=not synced), torch.no_grad():
        for number in range(rounds):
            seen(number, rounds)
            rows = mine[number] if number < len(mine) else np.zeros(0, np.int64)
            batch = next(stream) if number < len(mine) else MicroBatch.join(0, 0, 0, [])
            unusable += batch.quarantined
            with autocast():
                found = module(to_device(adapter.collate(batch), world.device))
            for task, (loss, count) in found.by_task.items():
                total = losses.setdefault(task, [0.0, 0.0])
                total[0] += float(loss)
                total[1] += float(count)
            if settings.generate:
                results += _transcribe(adapter, corpus, batch, rows, settings, autocast, synced)
    spaced = settings.generate and not keeps_tab(adapter.tokenizer)
    return _score(world, corpus, losses, results, unusable, settings, spaced, predictions, tell)


def _transcribe(
    adapter: Adapter,
    corpus: Corpus,
    batch: MicroBatch,
    rows: np.ndarray,
    settings: Evaluate,
    autocast: Callable[[], AbstractContextManager[Any]],
    synced: bool,
) -> list[dict[str, Any]]:
    """Row, id, source, language, reference and answer of each example of a batch that has a
    transcript; `tokens` its reference takes, `limit` they had. By place: ids may repeat."""
    prompts = prompts_of(adapter, batch)
    wanted = [place for place, prompt in enumerate(prompts) if prompt.task in TRANSCRIBED]
    if not wanted and not synced:
        return []
    lengths = answer_lengths(batch)
    limit = limit_for([lengths[place] for place in wanted], settings.max_new_tokens)
    with autocast():
        texts = adapter.generate([prompts[place] for place in wanted], limit, synced_gpus=synced)
    if not wanted:
        return []
    rows = rows[np.array(batch.slots, np.int64)[wanted]]
    return [
        {
            "row": int(row),
            "id": prompts[place].id,
            "source": corpus.source_names[corpus.source[row]],
            "lang": batch.langs[place],
            "reference": reference,
            "answer": text,
            "tokens": lengths[place],
            "limit": limit,
        }
        for place, row, reference, text in zip(
            wanted, rows, corpus.references(rows), texts, strict=True
        )
        if reference is not None
    ]


def _score(
    world: World,
    corpus: Corpus,
    losses: dict[str, list[float]],
    results: Sequence[dict[str, Any]],
    unusable: list[Quarantined],
    settings: Evaluate,
    spaced: bool,
    predictions: Path | None,
    tell: Callable[[str], None],
) -> dict[str, float]:
    values: dict[str, float] = {}
    parts = world.gather((losses, list(results), unusable))
    tasks = sorted({task for part, *_ in parts for task in part})
    for task in tasks:
        loss = sum(part[task][0] for part, *_ in parts if task in part)
        count = sum(part[task][1] for part, *_ in parts if task in part)
        if count:
            values[f"loss/{task}"] = loss / count
            values[f"perplexity/{task}"] = math.exp(min(loss / count, 700.0))
    everything = sorted((r for _, part, _ in parts for r in part), key=lambda r: r["row"])
    langs = {r["lang"] for r in everything if r["lang"]}
    for result in everything:
        result["hypothesis"] = transcript(result["answer"], result["lang"], langs, spaced)
    for source in corpus.source_names:
        own = [r for r in everything if r["source"] == source]
        if own:
            rates = error_rates(
                [r["reference"] for r in own],
                [r["hypothesis"] for r in own],
                settings.normalize,
                settings.spelling,
            )
            values.update({f"{metric}/{source}": rate for metric, rate in rates.items()})
    if world.is_main:
        for text in _remarks(everything, [q for *_, part in parts for q in part]):
            tell(text)
    if predictions is not None and world.is_main and everything:
        _write(predictions, everything)
    return values


@patient
def _write(predictions: Path, results: list[dict[str, Any]]) -> None:
    predictions.parent.mkdir(parents=True, exist_ok=True)
    with open(predictions, "wb") as out:
        for result in results:
            line = {key: result[key] for key in ("id", "source", "reference", "hypothesis")}
            out.write(encoded(line))


def _remarks(results: list[dict[str, Any]], unusable: list[Quarantined]) -> Iterator[str]:
    """What a reader of the figures has to know of them."""
    for source in dict.fromkeys(r["source"] for r in results):
        own = [r for r in results if r["source"] == source]
        longer = [r["tokens"] for r in own if r["tokens"] > r["limit"]]
        if longer:
            yield (
                f"evaluate.max_new_tokens: {len(longer)} of {len(own)} references of {source} are "
                f"longer than the {max(r['limit'] for r in own)} tokens an answer may have (up to "
                f"{max(longer)}) and can never be right; raise it, or leave it out: the limit then "
                "follows the references"
            )
    if unusable:
        first = unusable[0]
        yield (
            f"{len(unusable)} examples of data.eval cannot be read and are in no figure; the "
            f"first, of {first.source}: {first.id}: {first.reason}"
        )
