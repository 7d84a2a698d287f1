"""What unchanged data came to before: the index itself, without its parts being read and joined.

Beside build.py, in the index's folder:

    parts/<key>.json    which index some files came to, valid while the files' digests and their
                        cached parts stay as they are; the key is made of sources, files and digests

Joining reads every part: 60 bytes an example, a hash of them and a sort of all ids, a minute and
some gigabytes for a hundred million. What is kept spares that. What may change without the data
files does is looked at all the same: clips that were replaced, and clips that could not be used.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raysft import patience
from raysft.data.encode.base import Measures
from raysft.data.index import part as parts
from raysft.data.index.table import Index, Repeats
from raysft.data.sources import ResolvedSource
from raysft.errors import UserError


@dataclass(frozen=True)
class Known:
    """What the files of some sources came to; `places`: of their cached parts, below `folder`."""

    path: Path
    folder: Path
    places: Sequence[Path]

    @classmethod
    def of(
        cls,
        files: Sequence[tuple[ResolvedSource, Path]],
        digests: Sequence[str],
        places: Sequence[Path],
        encoder: Measures,
        folder: Path,
    ) -> Known:
        """For files with these digests, whose parts lie at `places`."""
        sources = [[s.key, s.name, s.weight, s.format, s.task, *s.caps.items()] for s, _ in files]
        facts = [parts.VERSION, parts.MEASURED, encoder.fingerprint, encoder.sample_rate]
        named = [[str(file), place.name] for (_, file), place in zip(files, places)]
        key = parts.digest_of(*facts, sources, named, list(digests))
        return cls(folder / "parts" / f"{key}.json", folder, places)

    def index(self) -> Index | None:
        """The index, where it and all parts are as they were; None: they are not."""
        try:
            found = json.loads(patience.patiently(self.path.read_bytes, self.path))
            repeats = found["repeats"]
            if found["parts"] != self._states():
                return None
            index = Index.load(self.folder / found["index"])
            index.repeats = repeats and Repeats(repeats[0], (repeats[1][0], repeats[1][1]))
        except (OSError, ValueError, KeyError, TypeError, IndexError, UserError):
            return None  # then it is joined, and whatever is wrong shows there
        return index

    def keep(self, index: Index) -> None:
        """Remember that they came to `index`; in a folder that is only to be read, nothing is."""
        repeats = index.repeats
        content = {
            "index": index.folder.name,
            "parts": self._states(),
            "repeats": repeats and [repeats.count, list(repeats.rows)],
        }
        with contextlib.suppress(UserError):
            parts.write_whole(self.path, lambda stream: stream.write(json.dumps(content).encode()))

    def _states(self) -> list[list[int]]:
        """Bytes and time of change of each part."""

        def state(place: Path) -> list[int]:
            found = patience.patiently(lambda: os.stat(place), place)
            return [found.st_size, found.st_mtime_ns]

        return [state(place) for place in self.places]
