"""What a scorer is: a row that says what is measured, of what, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from raysft.scorers.rated import Rated

CROSS_ENTROPY = "cross_entropy"  # the term of a loss that perplexity is of

Wants = Literal["text", "losses", "speech"]
SPEAKING = ("tts", "edit", "flow")  # tasks whose answers are speech
Better = Literal["min", "max"]
Sums = dict[str, Any]  # by name; values add up with +, over parts of a corpus and over workers


class Settings(Protocol):
    """What scorers are asked to do: the keys of `evaluate` that they look at."""

    @property
    def normalize(self) -> Sequence[str]:
        """What is made equal before texts are compared."""

    @property
    def spelling(self) -> str | None:
        """A file of spellings made equal."""

    @property
    def bleu_tokenize(self) -> str | Mapping[str, str]:
        """What words are for BLEU: a tokenizer of sacrebleu, or those of some sources."""


@dataclass(frozen=True)
class Figure:
    """A number that a scorer gives: `NAME/SOURCE` or `NAME/TASK` in eval.jsonl.

    unit: percent: a share, which people read times 100; none: the number as it is.
    better: which of two values is the better one, for checkpoint.best.
    """

    name: str
    unit: Literal["percent", "none"] = "none"
    better: Better = "min"

    def shown(self, value: float) -> str:
        """`value` for people."""
        return f"{value:.2%}" if self.unit == "percent" else f"{value:,.4g}"


@dataclass(frozen=True)
class Answer:
    """What a scorer of texts is given: an example's transcript, and what the model made of it.

    lang: as the example has it. hypothesis: without the name of a language before it. rated: what
    raters said of what it rates; probability: of each the mean by the model's probabilities, None
    where it has none.
    """

    id: str
    source: str
    task: str
    lang: str | None
    reference: str
    hypothesis: str
    rated: tuple[Rated, ...] = ()
    probability: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Loss:
    """What a scorer of losses is given, of a batch: a term's sum over `tokens`, or what else it is
    counted in (values of frames, utterances), and its weight in the loss."""

    sum: float
    tokens: float
    term: str = CROSS_ENTROPY
    weight: float = 1.0


@dataclass(frozen=True)
class Spoken:
    """What a scorer of speech is given: an example as the model spoke it, and, as its bound, its
    real clip by way of the same mel and vocoder.

    reference: what is said in it; None where nothing says so. heard: by `evaluate.asr`; None where
    there is none. distortion: in dB, of the real clip. similarity: cosine with the real clip's
    speaker; None where nothing tells speakers apart (`evaluate.speakers`).
    """

    id: str
    task: str
    reference: str | None
    heard: str | None
    heard_bound: str | None
    distortion: float
    distortion_bound: float
    similarity: float | None = None
    similarity_bound: float | None = None


@dataclass(frozen=True)
class Scorer:
    """One kind of measurement of an evaluation. Needs no torch, jiwer or sacrebleu to be made.

    figures: those it can give.
    count: of some `Answer`s of a source, `Loss`es or `Spoken`s of a task, never none: their sums.
        Called on the worker that has them.
    result: figures by name, of the sums of all workers; what cannot be divided is left out.
    wants: text: what the model generates, by source; losses: those of right answers, by task;
        speech: what it speaks, by task, where `evaluate` asks for that.
    tasks: of the examples whose texts are wanted, where `evaluate.metrics` does not name the task.
    only: tasks whose losses are wanted; (): of all.
    signature: how its figures of a source are made, where they mean little without; eval.jsonl has
        it.
    objective: `train.objective` of the runs that have its figures; "": all.
    """

    name: str
    figures: tuple[Figure, ...]
    count: Callable[[Sequence[Any], Settings], Sums]
    result: Callable[[Sums], dict[str, float]]
    wants: Wants = "text"
    tasks: tuple[str, ...] = ("asr",)
    only: tuple[str, ...] = ()
    signature: Callable[[Settings, str], str] | None = None
    objective: str = ""


TRANSLATED = ("translation", "st", "s2tt", "captioning")  # tasks of many right answers


class Metric(Protocol):
    """What is asked of a metric of sacrebleu."""

    def corpus_score(self, hypotheses: list[str], references: list[list[str]]) -> object: ...

    def get_signature(self) -> object: ...


def signature_of(metric: Metric) -> str:
    """How sacrebleu made its figures."""
    metric.corpus_score(["a"], [["a"]])  # how many references there are is told by a score only
    return str(metric.get_signature())


def share_of_right(
    name: str, figure: str, tasks: tuple[str, ...], same: Callable[[str, str, Settings], bool]
) -> Scorer:
    """The share of answers that are their references. same: (answer, reference, settings)."""

    def count(answers: Sequence[Answer], settings: Settings) -> Sums:
        right = sum(same(one.hypothesis, one.reference, settings) for one in answers)
        return {"right": right, "answers": len(answers)}

    return Scorer(
        name,
        (Figure(figure, "percent", better="max"),),
        count,
        lambda sums: {figure: sums["right"] / sums["answers"]},
        tasks=tasks,
    )


def added(parts: Iterable[Sums]) -> Sums:
    """The sums of all parts, each name's values added in their order."""
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total
