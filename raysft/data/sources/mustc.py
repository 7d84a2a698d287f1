"""MuST-C: a YAML list of segments, and a file of lines beside it for each language.

    - {duration: 3.5, offset: 1.5, speaker_id: spk.1, wav: ted_1.wav}      train.yaml
    hello there                                                            train.en, train.de

The clips lie in ../wav, or below `root`; with several languages `columns: {text: de}` in the entry
says whose lines are the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from raysft import stores
from raysft.config.schema import Source
from raysft.data.sources import json_lines
from raysft.data.sources.base import clip_path, folder_of, kind, text_field
from raysft.data.sources.layout import Layout, below, fault, listed, seconds
from raysft.data.sources.lines import lines
from raysft.errors import BadExample, UserError, first_line
from raysft.json_types import Json, JsonObject


class MustC(Layout):
    """The format `mustc`."""

    name = "mustc"
    options = ("root", "columns")
    describe = (
        "MuST-C: a YAML list of segments (duration, offset, wav), and .en, .de, ... beside it"
    )

    def sniff(self, path: Path) -> bool:
        """Whether its first line is a segment's."""
        if stores.is_dir(path) or path.suffix not in (".yaml", ".yml"):
            return False
        head = json_lines.head(path, 1 << 12)
        return head.startswith(b"- {") and b"offset:" in head and b"wav:" in head

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """The texts."""
        return [self._texts(file, given)]

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """A segment each."""
        texts = [text.strip() for _, text in _all_lines(self._texts(file, given))]
        segments = list(_segments(file))
        if len(texts) != len(segments):
            raise UserError(
                f"{file} has {len(segments):,} segments, {self._texts(file, given).name} "
                f"{len(texts):,} lines: they are to be as many"
            )
        root = given.root or f"{folder_of(file).rpartition('/')[0]}/wav"
        counts: dict[str, int] = {}
        for number, (segment, text) in enumerate(zip(segments, texts), 1):
            at = f"{file.name}:{number}"
            try:
                if not isinstance(segment, dict):
                    raise BadExample(f"is {kind(segment)}, expected {{duration, offset, wav}}")
                wav = text_field(segment, "wav")
                path = clip_path(wav, file, root)
                start, length = seconds(segment, "offset"), seconds(segment, "duration")
                if start is None or length is None:
                    raise BadExample("has no offset or no duration")
            except BadExample as error:
                yield fault(f"{file.stem}_{number}", str(error), at)
                continue
            counts[wav] = counts.get(wav, -1) + 1
            name = f"{Path(wav).stem}_{counts[wav]}"
            clip: JsonObject = {"path": below(path, folder_of(file)), "start": start}
            clip["stop"] = start + length
            speaker = segment.get("speaker_id")
            yield listed(
                name, text, [clip], speaker=None if speaker is None else str(speaker), at=at
            )

    def _texts(self, file: Path, given: Source) -> Path:
        found = [one for one in sorted(file.parent.glob(f"{file.stem}.*")) if one != file]
        wanted = (given.columns or {}).get("text")
        names = ", ".join(one.suffix[1:] for one in found) or "none"
        if wanted is not None:
            found = [one for one in found if one.suffix == f".{wanted}"]
        if len(found) != 1:
            raise UserError(
                f"{file}: languages beside it: {names}; say whose lines are learnt: "
                "columns: {text: de}"
            )
        return found[0]


def _segments(file: Path) -> Iterator[Json]:
    """Of the list, a line each, or over several lines. Raises UserError naming the line."""
    texts = [line for _, line in _all_lines(file)]
    starts = [n for n, line in enumerate(texts) if line.startswith("- ")]
    for start, stop in zip(starts, [*starts[1:], len(texts)]):
        try:
            yield from yaml.safe_load("\n".join(texts[start:stop]))
        except yaml.YAMLError as error:
            raise UserError(
                f"{file}:{start + 1} is no segment in YAML: {first_line(error)}"
            ) from None


def _all_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Also those that are blank: they count."""
    known = dict(lines(file))
    with stores.opened(file) as stream:
        for number, _ in enumerate(stream, 1):
            yield number, known.get(number, "")


FORMAT = MustC()
