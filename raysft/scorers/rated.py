"""What raters said of a recording: what an answer that is a rating is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Rated:
    """One dimension of a recording.

    original: id of its record. kind: role or arche. annotated: its field of the record's
    annotations. ratings: those that were given, one a rater,
    whole numbers of the scale. lowest, highest: of the scale. label: how an answer names the
    dimension where it rates several (`[PitchDynamics]4`); "": it rates one. context: fields of the
    record that results show.
    """

    original: str
    kind: str
    dimension: str
    annotated: str
    ratings: tuple[int, ...]
    lowest: int = 1
    highest: int = 5
    label: str = ""
    context: Mapping[str, str] = field(default_factory=dict)

    @property
    def truth(self) -> float:
        """The mean of the ratings."""
        return sum(self.ratings) / len(self.ratings)

    @property
    def settled(self) -> int:
        """The mean as a rating: rounded, halves up."""
        return (2 * sum(self.ratings) + len(self.ratings)) // (2 * len(self.ratings))
