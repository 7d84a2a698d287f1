"""Examples of judging: which dimension is asked about at a step, in which words, by which rater.

Stands beside `example.Example`, whose `judged` this is: what is asked and answered is drawn anew
for each use, from the generator of (seed, epoch, step, lane, slot). Nothing is drawn of dimensions
that nobody rated.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from raysft.scorers.rated import Rated

NEAR = 0.8  # of the longest wording of a dimension: shorter ones are not measured
Asked = tuple[str, str]  # what is asked, and the answer


@dataclass(frozen=True, slots=True)
class Dimension:
    """What may be asked of one dimension, and what raters said.

    label: its name in answers of several. wordings: rubrics of which one is drawn. line: what the
    rubric of all dimensions says of it. by_rater: a rating of each rater, None where there is none.
    """

    rated: Rated
    label: str
    wordings: tuple[str, ...]
    line: str
    by_rater: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """A recording with its dimensions, those that were rated, in the fixed order.

    before, after: what stands around a rubric. thought: what the answer begins with. header: of the
    rubric of all dimensions; None: one dimension is asked about. free: they are asked about in any
    order. together: one rater gives all ratings; else each is any rater's.
    """

    dimensions: tuple[Dimension, ...]
    before: str
    after: str
    thought: str = ""
    header: str | None = None
    free: bool = False
    together: bool = False

    def drawn(self, rng: np.random.Generator) -> Asked:
        """A dimension, any as likely as any other, then one of its raters, then a wording; or all
        dimensions."""
        if self.header is None:
            one = self.dimensions[rng.integers(len(self.dimensions))]
            given = _given(one)
            rating = given[rng.integers(len(given))]
            wording = one.wordings[rng.integers(len(one.wordings))]
            return self._one(wording, rating)
        dimensions = list(self.dimensions)
        if self.free:
            dimensions = [dimensions[place] for place in rng.permutation(len(dimensions))]
        if self.together:
            raters = self._raters()
            rater = raters[rng.integers(len(raters))]
            found = [(one, one.by_rater[rater]) for one in dimensions if rater < len(one.by_rater)]
            return self._all([(one, rating) for one, rating in found if rating is not None])
        all_given = [(one, _given(one)) for one in dimensions]
        return self._all([(one, own[rng.integers(len(own))]) for one, own in all_given])

    def settled(self) -> Asked:
        """What evaluation asks: the first dimension (there is one) in its first wording, or all in
        the fixed order; the answer is the mean over raters as a rating."""
        if self.header is None:
            first = self.dimensions[0]
            return self._one(first.wordings[0], first.rated.settled)
        return self._all([(one, one.rated.settled) for one in self.dimensions])

    def worded(self, name: str) -> Asked:
        """As `settled`, in the wording that falls to an example of this name."""
        first = self.dimensions[0]
        number = zlib.crc32(name.encode("utf-8", "surrogatepass")) % len(first.wordings)
        return self._one(first.wordings[number], first.rated.settled)

    def forms(self) -> list[Asked]:
        """What may be drawn, as far as it may be the longest."""
        if self.header is not None:
            return [self.settled()]
        found = []
        for one in self.dimensions:
            longest = max(map(_size, one.wordings))
            near = (text for text in one.wordings if _size(text) >= NEAR * longest)
            found += [self._one(text, _given(one)[0]) for text in near]
        return found

    def _raters(self) -> list[int]:
        """Those who rated the most dimensions: all of them, where anybody did."""
        count = max(len(one.by_rater) for one in self.dimensions)
        rated = [
            sum(n < len(one.by_rater) and one.by_rater[n] is not None for one in self.dimensions)
            for n in range(count)
        ]
        return [rater for rater, many in enumerate(rated) if many == max(rated)]

    def _one(self, wording: str, rating: int) -> Asked:
        return f"{self.before}{wording}{self.after}", self._answer(str(rating))

    def _all(self, rated: list[tuple[Dimension, int]]) -> Asked:
        rubric = "\n".join([self.header or "", *(one.line for one, _ in rated)])
        answer = "".join(f"[{one.label}]{rating}" for one, rating in rated)
        return f"{self.before}{rubric}{self.after}", self._answer(answer)

    def _answer(self, text: str) -> str:
        return f"{self.thought}<answer>{text}</answer>"


def _given(one: Dimension) -> list[int]:
    return [rating for rating in one.by_rater if rating is not None]


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
