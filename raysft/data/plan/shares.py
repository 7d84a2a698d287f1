"""How often what is seen: weights, temperature and caps of sources, and the groups of `data.mix`.

Between the config and the windows: decides the segments of each group (windows.Segment). A group
is what a share of `data.mix` is of: a source that is named there, or a task; without mix, all.

    weight        how often each example of the source is seen in a cycle
    temperature   times (n / largest n)^(1/T - 1), n the examples of a source, a task or a language
                  times their weights: each is then seen in proportion to n^(1/T), the largest as
                  often as its weight says. As languages are sampled for XLM-R (Conneau et al.,
                  2020; alpha is 1/T) and mT5 (Xue et al., 2021)
    caps          no more than that: of `max_examples`, or the share of its seconds that
                  `max_hours` is; another part in every cycle, until all were seen
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from raysft.config.schema import Data
from raysft.data.plan.windows import Segment
from raysft.errors import UserError
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    from raysft.data.index.table import Index

CAPS = ("max_examples", "max_hours")  # keys of a source
_AT_ONCE = 1 << 20  # examples of a column in memory
_CLOSE = 0.15  # of a number, to which weights are the same as counts or hours
_APART = 1.5  # times that the largest is the smallest, from which on they say something


@dataclass(frozen=True)
class Wanted:
    """What of sources the config asks for. weights, names: of each. max_examples: of an epoch;
    passes: that max_hours allows; None: no limit."""

    weights: Sequence[float]
    names: Sequence[str] = ()
    max_examples: Sequence[int | None] = ()
    passes: Sequence[float | None] = ()
    caps: list[JsonObject] = field(default_factory=list)
    """Of the sources that have any, as json can write them."""

    def limit(self, source: int, count: int) -> float:
        """Passes of a source of `count` examples, at most."""
        most = self.max_examples[source] if self.max_examples else None
        passes = self.passes[source] if self.passes else None
        limits = [most / max(1, count) if most is not None else None, passes]
        return min((limit for limit in limits if limit is not None), default=float("inf"))

    def settings(self, data: Data) -> JsonObject:
        """What a plan depends on that is not always there."""
        temperature = data.temperature
        found = {} if temperature is None else {"temperature": temperature.model_dump()}
        return found | ({"caps": self.caps} if self.caps else {})


def wanted_of(index: Index) -> Wanted:
    """What the config of an index asks for of its sources."""
    sources = index.described
    passes: list[float | None] = [None] * len(sources)
    if any("max_hours" in source for source in sources):
        hours = hours_of(index.source, index.seconds, len(sources))
        for number, source in enumerate(sources):
            if "max_hours" in source and hours[number]:
                passes[number] = source["max_hours"] / hours[number]
    caps = [
        {"source": number, **{key: source[key] for key in CAPS if key in source}}
        for number, source in enumerate(sources)
    ]
    return Wanted(
        [source["weight"] for source in sources],
        [source["name"] for source in sources],
        [source.get("max_examples") for source in sources],
        passes,
        [cap for cap in caps if len(cap) > 1],
    )


def hours_of(source: np.ndarray, seconds: np.ndarray, sources: int) -> list[float]:
    """Hours of audio of each source."""
    found = np.zeros(sources)
    for at in range(0, len(source), _AT_ONCE):
        some = slice(at, at + _AT_ONCE)
        found += np.bincount(source[some], seconds[some], sources)
    return (found / 3600).tolist()


def effective(
    wanted: Wanted, counts: np.ndarray, data: Data, langs: Sequence[str] = ()
) -> np.ndarray:
    """Passes an epoch, float64 [kinds, sources], of examples that share a cycle.

    counts: int [kinds, sources] of examples; kinds: tasks where data.temperature is by task.
    langs: of each kind its language, where it is by lang: all of a language counts together, of
    whatever task and source it is.
    """
    weights = np.broadcast_to(np.asarray(wanted.weights, np.float64), counts.shape).copy()
    if data.temperature is not None:
        sizes = counts * weights
        if data.temperature.by == "source":
            own = sizes.sum(axis=0, keepdims=True)
        elif data.temperature.by == "task":
            own = sizes.sum(axis=1, keepdims=True)
        else:
            number = np.unique(langs, return_inverse=True)[1]
            own = np.bincount(number, sizes.sum(axis=1))[number][:, None]
        own = np.broadcast_to(own, counts.shape)
        there = own > 0
        ratio = own[there] / own.max(initial=1.0)
        weights[there] *= ratio ** (1 / data.temperature.T - 1)
    totals = counts.sum(axis=0).tolist()
    limits = [wanted.limit(source, count) for source, count in enumerate(totals)]
    return np.minimum(weights, np.array(limits))


class Seen(NamedTuple):
    """A language: how many examples it has, how many of them are seen, and how many with those of
    other languages in its groups."""

    name: str
    examples: int
    seen: float
    beside: float


@dataclass(frozen=True)
class Dealt:
    """What an epoch sees of what, or with `data.mix` a pass of a group.

    counts: int64 [kinds, sources] of examples. passes: float64, of each of them. names: of each
    kind and source that has examples, its group. langs: of each kind its language, where the plan
    counts by it.
    """

    counts: np.ndarray
    passes: np.ndarray
    names: Mapping[tuple[int, int], str]
    langs: Sequence[str] = ()

    def segments(self, groups: Sequence[str]) -> list[list[Segment]]:
        """Of each group; groups: their names, none where there is no mix."""
        found: list[list[Segment]] = [[] for _ in groups or [""]]
        place = {name: number for number, name in enumerate(groups or [""])}
        for (kind, source), name in sorted(self.names.items()):
            weight = float(self.passes[kind, source])
            found[place[name]].append(Segment(kind, source, weight))
        return found

    def seen(self, source: int) -> float:
        """Examples of a source."""
        return float((self.counts[:, source] * self.passes[:, source]).sum())

    def beside(self, source: int) -> float:
        """Examples of the groups that examples of this source are in, its own among them."""
        return self._beside({name for (_, one), name in self.names.items() if one == source})

    def languages(self) -> list[Seen]:
        """Of each language, by name; none where the plan does not count by them."""
        found = []
        for lang in sorted(set(self.langs)):
            kinds = [kind for kind, name in enumerate(self.langs) if name == lang]
            own = {name for (kind, _), name in self.names.items() if kind in kinds}
            seen = float((self.counts[kinds] * self.passes[kinds]).sum())
            found.append(Seen(lang, int(self.counts[kinds].sum()), seen, self._beside(own)))
        return found

    def _beside(self, groups: Collection[str]) -> float:
        """Examples of these groups."""
        mine = [place for place, name in self.names.items() if name in groups]
        return float(sum(self.counts[place] * self.passes[place] for place in mine))


def grouped(
    data: Data, tasks: Sequence[str], sources: Sequence[str], present: np.ndarray
) -> dict[tuple[int, int], str]:
    """(task, source) -> the group of `data.mix` its examples belong to: a source that is named
    there goes before its tasks. Raises UserError for names that are none, or mean two things, and
    where something is left.

    present: bool [tasks, sources].
    """
    mix = data.mix
    known = [name for name, there in zip(tasks, np.any(present, axis=1).tolist()) if there]
    for key in mix:
        if key not in sources and key not in known:
            near = get_close_matches(key, [*known, *sources], 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(
                f"data.mix.{key}: is no source and no task of the training data{meant}; there are "
                f"the sources {', '.join(sources)} and the tasks {', '.join(known)}"
            )
        if key in sources and key in known:
            column, row = present[:, sources.index(key)], present[tasks.index(key)]
            if column.sum() > 1 or row.sum() > 1:
                raise UserError(
                    f"data.mix.{key}: is the name of a source and of a task, which are not the "
                    f"same examples: give the source another name (data.train."
                    f"{sources.index(key)}.name)"
                )
    found = {}
    left = []
    for task, source in np.argwhere(present).tolist():
        name = sources[source] if sources[source] in mix else tasks[task]
        if name not in mix:
            left.append(f"{tasks[task]} of {sources[source]}")
        found[task, source] = name
    if left:
        raise UserError(
            f"data.mix: says nothing of {', '.join(left[:3])}{', ...' * (len(left) > 3)}: name the "
            "source or the task there too"
        )
    if unused := [key for key in mix if key not in found.values()]:
        raise UserError(
            f"data.mix.{unused[0]}: has no example, for all of this task are of sources that are "
            "named there too: remove it"
        )
    return found


def agreeing(wanted: list[str], present: list[str]) -> str:
    """How data.mix and the tasks of the data come to agree."""
    said = []
    if more := [name for name in wanted if name not in present]:
        said.append(
            f"add data of {', '.join(more)} (clips with their texts serve as asr and as tts: give "
            f"the file a second entry in data.train, {{path: ..., task: {more[0]}}})"
        )
    if less := [name for name in present if name not in wanted]:
        said.append(f"name {', '.join(less)} in data.mix too")
    return ", and ".join(said)


def explained(weights: Sequence[float], counts: Sequence[int], hours: Sequence[float]) -> str:
    """What weights mean that look like numbers of clips or hours; "": they do not."""
    given = np.asarray(weights, np.float64)
    if len(given) < 2 or given.max() < _APART * given.min():
        return ""
    for what, amounts in (("hours", hours), ("numbers of examples", counts)):
        own = np.asarray(amounts, np.float64)
        if own.min() <= 0:
            continue
        ratio = given / own
        if ratio.max() <= (1 + _CLOSE) * ratio.min():
            shares = given * np.asarray(counts)
            became = ", ".join(f"{share:.0%}" for share in shares / shares.sum())
            plain = np.asarray(counts) / np.sum(counts)
            alike = ", ".join(f"{share:.0%}" for share in plain)
            listed = ", ".join(f"{weight:g}" for weight in given)
            return (
                f"the weights {listed} are as the sources' {what} are. A weight is how often each "
                f"example is seen in an epoch, so sources would be {became} of what is seen: the "
                f"large ones count twice. Without weights they are {alike}, which is by their size"
            )
    return ""
