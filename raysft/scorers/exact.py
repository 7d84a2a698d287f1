"""The share of answers that are their references, but for white space at the ends and between
words."""

from __future__ import annotations

from raysft.scorers.base import share_of_right

SCORER = share_of_right(
    "exact",
    "exact_match",
    ("qa", "question_answering"),
    lambda answer, reference, settings: answer.split() == reference.split(),
)
