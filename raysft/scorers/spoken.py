"""What becomes of speech that a model spoke: what is heard in it, and how near it is to the real
clip. Each figure has a bound beside it: the real clip by way of the same mel and vocoder."""

from __future__ import annotations

from collections.abc import Sequence

from raysft.scorers.base import Answer, Figure, Scorer, Settings, Spoken, Sums
from raysft.scorers.error_rates import SCORER as RATES

BOUND = "_bound"


def _count(spoken: Sequence[Spoken], settings: Settings) -> Sums:
    found: Sums = {"spoken": len(spoken), "heard": 0}
    said = [(one, one.reference) for one in spoken if one.reference is not None]
    for bound in ("", BOUND):
        answers = [
            Answer(one.id, one.task, one.task, None, reference, heard)
            for one, reference in said
            if (heard := getattr(one, f"heard{bound}")) is not None
        ]
        if answers:
            found["heard"] = len(answers)
            counted = RATES.count(answers, settings)
            found |= {f"rates{bound} {name}": value for name, value in counted.items()}
        for name in ("distortion", "similarity"):
            values = [getattr(one, f"{name}{bound}") for one in spoken]
            values = [value for value in values if value is not None]
            found[f"{name}{bound}"] = sum(values)
            found[f"{name}{bound} count"] = len(values)
    return found


def _result(sums: Sums) -> dict[str, float]:
    figures: dict[str, float] = {}
    for bound in ("", BOUND):
        head = f"rates{bound} "
        rates = {k.removeprefix(head): v for k, v in sums.items() if k.startswith(head)}
        if rates:
            figures |= {f"{name}{bound}": value for name, value in RATES.result(rates).items()}
        for name, figure in (("distortion", "mcd"), ("similarity", "speaker_similarity")):
            if count := sums[f"{name}{bound} count"]:
                figures[f"{figure}{bound}"] = sums[f"{name}{bound}"] / count
    return figures | {name: float(sums[name]) for name in ("heard", "spoken") if sums[name]}


SCORER = Scorer(
    "spoken",
    (
        Figure("wer_bound", "percent"),
        Figure("cer_bound", "percent"),
        Figure("mcd"),
        Figure("mcd_bound"),
        Figure("speaker_similarity", better="max"),
        Figure("speaker_similarity_bound", better="max"),
        Figure("heard", better="max"),
        Figure("spoken", better="max"),
    ),
    _count,
    _result,
    wants="speech",
)
"""With `wer` and `cer`, which are rows of `error_rates`. heard, spoken: how many examples WER, and
all else, are of."""
