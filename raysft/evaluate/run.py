"""Evaluate a model on data.eval: every worker takes batches i, i + W, ... and counts their sums.

Batches are a function of the index and the budget alone, so results do not depend on the number of
workers. Loss comes from the whole sequence (teacher-forced); what compares texts (WER, BLEU, ...)
goes by what the model generates from the sequence up to its last supervised run of tokens. What is
counted, and which figures come of the sums of all workers, is the scorers' (`raysft.scorers`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from raysft.config.evaluation import Evaluate
from raysft.data.example import MicroBatch, Quarantined
from raysft.data.example import Sequence as Encoded
from raysft.data.plan import pack
from raysft.evaluate.answers import keeps_tab, limit_for, transcript
from raysft.evaluate.judging import Digits, counting
from raysft.json_types import JsonObject
from raysft.losses.term import Term
from raysft.models.base import SpeechModel
from raysft.models.pairs import both
from raysft.parallel import World
from raysft.patience import patient
from raysft.run.lines import encoded
from raysft.scorers import Answer, Loss, Scorer, Sums, added, figures_of, scorers
from raysft.scorers.rated import Rated
from raysft.scorers.ratings import scored
from raysft.train.step import to_device

Read = Callable[[list[np.ndarray]], Iterator[MicroBatch]]
Counted = dict[tuple[str, str, str], Sums]  # by a scorer, what figures are of, and a task


@dataclass
class Corpus:
    """What evaluation needs of an index: lengths, names, and the reference texts by row. rated:
    what raters said of each; None: of no example anything."""

    tokens: np.ndarray
    source: np.ndarray
    source_names: list[str]
    references: Callable[[np.ndarray], list[str | None]]
    rated: Callable[[np.ndarray], list[tuple[Rated, ...]]] | None = None


@dataclass(frozen=True)
class Answered:
    """An answer, of index row `row`. tokens: its reference takes; limit: tokens it might have."""

    row: int
    answer: Answer
    tokens: int
    limit: int


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


def prompts_of(speech_model: SpeechModel, batch: MicroBatch) -> list[Encoded]:
    """The sequences of a micro-batch, each cut before its last supervised run of tokens: its one
    answer, or the last turn of a conversation."""
    found = []
    for id_, document in zip(batch.ids, speech_model.documents(batch) if batch.ids else []):
        end = len(document.labels) - len(last_answer(document.labels))
        found.append(
            Encoded(
                id_,
                document.task,
                document.input_ids[:end],
                np.full(end, -100, np.int32),
                document.arrays,
            )
        )
    return found


def answer_lengths(batch: MicroBatch) -> list[int]:
    """Tokens of each right answer of a micro-batch, without the one that ends it."""
    rows = np.split(batch.labels, np.cumsum(batch.lengths)[:-1]) if len(batch.lengths) else []
    return [max(0, len(last_answer(row)) - 1) for row in rows]


def last_answer(labels: np.ndarray) -> np.ndarray:
    """The part of a sequence's labels [T] from its last supervised run of tokens on; empty where
    nothing is supervised."""
    supervised = np.flatnonzero(labels != -100)
    if not len(supervised):
        return labels[:0]
    breaks = np.flatnonzero(np.diff(supervised) > 1)
    return labels[supervised[breaks[-1] + 1 if len(breaks) else 0] :]


def evaluate(
    module: torch.nn.Module,
    speech_model: SpeechModel,
    corpus: Corpus,
    read: Read,
    settings: Evaluate,
    world: World,
    autocast: Callable[[], AbstractContextManager[object]],
    final: bool,
    predictions: Path | None = None,
    synced: bool = False,
    seen: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Figures of losses by task, of texts by source: the same on every worker. A collective.

    `read` turns lists of index rows into micro-batches, in order. `predictions` is a file of JSON
    lines (id, source, reference, hypothesis; `ratings` of what was rated) that rank 0 writes.
    `synced`: sharded parameters, so every worker must run the same number of forward passes.
    `seen` is called before each round of batches with how many are done and how many there are;
    `tell`, on rank 0, with what has to be known of the figures.
    """
    plan = batches(corpus, settings.tokens_per_batch, None if final else settings.max_examples)
    mine = plan[world.rank :: world.size]
    rounds = -(-len(plan) // world.size)
    answered: list[Answered] = []
    losses: dict[str, list[Loss]] = {}
    unusable: list[Quarantined] = []
    stream = read(mine)
    generates = settings.generate and speech_model.writes
    judges = corpus.rated is not None and speech_model.writes
    digits = Digits.of(speech_model.tokenizer) if judges else None
    beside = counting(speech_model, digits) if digits is not None else nullcontext(set[str]())
    with beside as terms, torch.inference_mode(mode=not synced), torch.no_grad():
        for number in range(rounds):
            seen(number, rounds)
            rows = mine[number] if number < len(mine) else np.zeros(0, np.int64)
            batch = next(stream) if number < len(mine) else MicroBatch.join(0, 0, 0, [])
            unusable += batch.quarantined
            with autocast():
                found = module(to_device(speech_model.collate(both(batch)), world.device))
            for term in _right(found, terms):
                for task, (loss, count) in term.by_task.items():
                    one = Loss(float(loss), float(count), term.name, term.weight)
                    losses.setdefault(task, []).append(one)
            if generates:
                answered += _transcribe(
                    speech_model, corpus, batch, rows, settings, autocast, synced, digits
                )
    world.barrier(lambda: seen(rounds, rounds))  # some have had longer answers
    spaced = generates and not keeps_tab(speech_model.tokenizer)
    answered = _transcripts(world, answered, spaced)
    counted = _count(losses, [one.answer for one in answered], settings)
    parts = world.gather((counted, answered, unusable))
    if world.is_main:
        everything = sorted((one for _, part, _ in parts for one in part), key=lambda one: one.row)
        if digits is not None and not digits.ways:
            tell(
                "model.tokenizer: digits are no tokens of their own, so that no rating has "
                "probabilities: figures are those of what is answered"
            )
        for text in _remarks(everything, [q for *_, part in parts for q in part]):
            tell(text)
        if predictions is not None and everything:
            _write(predictions, everything)
    return _figures([part for part, *_ in parts], corpus.source_names, settings)


def _right(terms: list[Term], names: Collection[str] = ()) -> list[Term]:
    """Those of a model's terms that say how well it gives right answers: its first, those that are
    counted in something else, and those with `names`; not what is added to the first."""
    first, *others = terms
    return [
        first,
        *(
            t
            for t in others
            if t.name in names or (t.reported and t.counted not in (None, first.counted))
        ),
    ]


def _transcribe(
    speech_model: SpeechModel,
    corpus: Corpus,
    batch: MicroBatch,
    rows: np.ndarray,
    settings: Evaluate,
    autocast: Callable[[], AbstractContextManager[object]],
    synced: bool,
    digits: Digits | None = None,
) -> list[Answered]:
    """The answers to those examples of a batch that have a reference and a metric, as the model
    gives them. By place: ids may repeat."""
    prompts = prompts_of(speech_model, batch)
    asked = {task for task in batch.tasks if figures_of(task, settings.metrics)}
    wanted = [place for place, prompt in enumerate(prompts) if prompt.task in asked]
    if not wanted and not synced:
        return []
    lengths = answer_lengths(batch)
    limit = limit_for([lengths[place] for place in wanted], settings.max_new_tokens)
    with autocast():
        chosen = [prompts[place] for place in wanted]
        if digits is None:
            texts = speech_model.generate(chosen, limit, synced_gpus=synced)
        else:
            answers = speech_model.answers(chosen, limit, synced, digits.watched)
            texts = [answer.text for answer in answers]
    if not wanted:
        return []
    rows = rows[np.array(batch.slots, np.int64)[wanted]]
    rated: list[tuple[Rated, ...]] = [()] * len(wanted)
    chances: list[tuple[float | None, ...]] = [()] * len(wanted)
    if digits is not None and corpus.rated is not None:
        rated = corpus.rated(rows)
        chances = [
            tuple(digits.probability(answer, one, speech_model.tokenizer) for one in own)
            for answer, own in zip(answers, rated, strict=True)
        ]
    return [
        Answered(
            int(row),
            Answer(
                id=prompts[place].id,
                source=corpus.source_names[corpus.source[row]],
                task=prompts[place].task,
                lang=batch.langs[place],
                reference=reference,
                hypothesis=text,
                rated=own,
                probability=chance,
            ),
            lengths[place],
            limit,
        )
        for place, row, reference, text, own, chance in zip(
            wanted, rows, corpus.references(rows), texts, rated, chances, strict=True
        )
        if reference is not None
    ]


def _transcripts(world: World, answered: list[Answered], spaced: bool) -> list[Answered]:
    """With the transcript of each answer as its hypothesis. A collective."""
    langs = set().union(*world.gather({one.answer.lang for one in answered if one.answer.lang}))
    found = []
    for one in answered:
        text = transcript(one.answer.hypothesis, one.answer.lang, langs, spaced)
        found.append(replace(one, answer=replace(one.answer, hypothesis=text)))
    return found


def _asked(row: Scorer, task: str, settings: Evaluate) -> set[str]:
    """Names of those figures of a row that a task has."""
    own = {figure.name for figure in row.figures}
    return own if row.wants == "losses" else own & set(figures_of(task, settings.metrics))


def measured(answers: list[Answer], settings: Evaluate) -> dict[str, float]:
    """Figures of answers that are all there, by name: wer/SOURCE."""
    sources = list(dict.fromkeys(answer.source for answer in answers))
    return _figures([_count({}, answers, settings)], sources, settings)


def _count(losses: dict[str, list[Loss]], answers: list[Answer], settings: Evaluate) -> Counted:
    """What each scorer counts in a worker's losses by task, and answers by source and task."""
    texts: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        texts.setdefault((answer.source, answer.task), []).append(answer)
    of_losses = {(task, task): losses[task] for task in losses}
    found: Counted = {}
    for row in scorers():
        if row.wants == "speech":  # see `raysft.hearing`
            continue
        groups = of_losses.items() if row.wants == "losses" else texts.items()
        for (group, task), items in groups:
            if _asked(row, task, settings):
                found[row.name, group, task] = row.count(items, settings)
    return found


def _figures(parts: list[Counted], sources: list[str], settings: Evaluate) -> dict[str, float]:
    """Of what all workers counted: figures of losses, then those of texts, each of the tasks of a
    source that have it. sources: in order."""
    values: dict[str, float] = {}
    for wants in ("losses", "text"):
        figures = [(row, figure.name) for row in scorers() for figure in row.figures]
        figures = [(row, figure) for row, figure in figures if row.wants == wants]
        names = {row.name for row, _ in figures}
        groups = {group for part in parts for name, group, _ in part if name in names}
        for group in sorted(groups) if wants == "losses" else sources:
            for row, figure in figures:
                own = [
                    sums
                    for part in parts
                    for (name, of, task), sums in part.items()
                    if (name, of) == (row.name, group) and figure in _asked(row, task, settings)
                ]
                found = row.result(added(own)) if own else {}
                if figure in found:
                    values[f"{figure}/{group}"] = found[figure]
    return values


@patient
def _write(predictions: Path, answered: list[Answered]) -> None:
    predictions.parent.mkdir(parents=True, exist_ok=True)
    with open(predictions, "wb") as out:
        for one in answered:
            keys = ("id", "source", "reference", "hypothesis")
            line: JsonObject = {key: getattr(one.answer, key) for key in keys}
            if one.answer.rated:
                line["ratings"] = [asdict(found) for found in scored(one.answer)]
            out.write(encoded(line))


def _remarks(answered: list[Answered], unusable: list[Quarantined]) -> Iterator[str]:
    """What a reader of the figures has to know of them."""
    for source in dict.fromkeys(one.answer.source for one in answered):
        own = [one for one in answered if one.answer.source == source]
        longer = [one.tokens for one in own if one.tokens > one.limit]
        if longer:
            yield (
                f"evaluate.max_new_tokens: {len(longer)} of {len(own)} references of {source} are "
                f"longer than the {max(one.limit for one in own)} tokens an answer may have (up to "
                f"{max(longer)}) and can never be right; raise it, or leave it out: the limit then "
                "follows the references"
            )
    if unusable:
        first = unusable[0]
        yield (
            f"{len(unusable)} examples of data.eval cannot be read and are in no figure; the "
            f"first, of {first.source}: {first.id}: {first.reason}"
        )
