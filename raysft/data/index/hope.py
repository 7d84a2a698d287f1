"""When indexing has no hope: a wrong root, or far more unusable examples than are allowed.

Under build.py, which shows it every result. A corpus of a million lines under a wrong folder would
else be looked at to its end, and leave 190 MB of reasons that are all the same.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from raysft.data.index.part import Job, Part, Rejected
from raysft.data.quarantine import kind_of, summary
from raysft.errors import UserError

IN_A_ROW = 4096  # clips of a source, its first ones, that are not there
MANY = 100_000  # unusable examples from which on their share is looked at
TIMES = 2  # what is allowed is the share at which it stops: the rest may be better


class Hope:
    """Counts what cannot be used, and raises UserError when there is no use in going on.

    most: the share of unusable examples that is allowed; 1: it never raises.
    """

    def __init__(self, split: str, most: float) -> None:
        self._split, self._most = split, most
        self._missing: Counter[str] = Counter()  # of a source's first examples; by its key
        self._found: set[str] = set()  # sources of which a clip is there
        self._rejected: list[Rejected] = []
        self._examples = 0

    def check(self, job: Job, part: Part) -> None:
        """Take in what was measured: in the order of the files' lines."""
        if self._most >= 1 or job.chunk is None:  # those looked at again are no sample of a source
            return
        key = job.source.key
        clips = [item for item in part.rejected if item.audio]
        missing = [item for item in clips if kind_of(item) == "missing"]
        if len(part.rows) or len(missing) < len(clips):
            self._found.add(key)
        self._missing[key] += len(missing)
        if key not in self._found and self._missing[key] >= IN_A_ROW:
            raise UserError(none_there(key, job.file, missing[0], self._missing[key]))
        self._examples += len(part.rows) + len(part.rejected)
        self._rejected += part.rejected
        if len(self._rejected) >= MANY and (
            len(self._rejected) > TIMES * self._most * self._examples
        ):
            first = self._rejected[0]
            raise UserError(
                f"data.max_quarantined: of the first {self._examples:,} examples of "
                f"data.{self._split} {len(self._rejected):,} are unusable, more than twice what is "
                f"allowed ({self._most:.1%}): {summary(map(kind_of, self._rejected))}; "
                f"the first: {first.id}: {first.reason}"
            )


def none_there(key: str, file: Path, first: Rejected, count: int) -> str:
    """That none of a source's first clips is there, and what to look at."""
    gone = Path(first.path).parent
    while not gone.parent.exists():
        gone = gone.parent
    where = f"there is no folder {gone}" if not gone.exists() else f"the folder {gone} is there"
    return (
        f"{key}: none of the first {count:,} clips of {file} is there; the first, of line "
        f"{first.line}: {first.path} ({where}). Relative paths begin at the folder of their file, "
        f"{file.parent}: put the file or the clips where they belong, mount their storage, or "
        "correct the paths"
    )
