"""Units with their words in time: what USDM's pre-training weaves into one row of speech and text.

    {"id": "a1", "units": "17 17 4 96 ...", "alignment": "a1.TextGrid"}        JSON lines
    a1_unit.txt and a1.TextGrid (or .ctm, .json) in a folder

Units are numbers, as a text or a list; an alignment is a file (TextGrid, CTM, JSON) or a list of
{word, start, end} (seconds). What is woven is drawn anew at every step, see raysft.data.weave; the
tokens `<|continue|>` and `<|correspond|>` have to be known (model.extra_tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from raysft import stores
from raysft.config.schema import Source
from raysft.data.example import Example, Woven
from raysft.data.sources import alignments, json_lines
from raysft.data.sources.base import Split, clip_path, default_id, id_field, load_record
from raysft.data.sources.folders import some_files
from raysft.data.sources.json_files import first_records
from raysft.data.sources.layout import LISTED, Layout, below_all, fault, refuse_fault
from raysft.data.sources.lines import lines
from raysft.data.weave import Word, on_units
from raysft.errors import BadExample, UserError
from raysft.json_types import Json, JsonObject

_UNITS = "_unit.txt"
_ENDS = (".TextGrid", ".textgrid", ".ctm", ".json")


class Interleaved(Layout):
    """The format `interleaved`."""

    name = "interleaved"
    describe = "speech units and word alignments (USDM): JSON lines, or X_unit.txt and X.TextGrid"

    def sniff(self, path: Path) -> bool:
        """Whether it is a folder of such pairs, or a line has units and an alignment."""
        if stores.is_dir(path):
            return any(file.name.endswith(_UNITS) for file in some_files(path))
        return any({"units", "alignment"} <= record.keys() for record in first_records(path))

    def files(self, path: Path, split: Split) -> list[Path]:
        """The file, or the folder."""
        return [path]

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """Alignments may have changed: it is always listed."""
        return None

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """An utterance each."""
        for name, at, units, alignment in _found(file):
            try:
                numbers = _numbers(units)
                if isinstance(alignment, str):
                    place = stores.at(clip_path(alignment, file))
                    intervals = alignments.read(place, name)
                else:
                    intervals = alignments.listed(alignment, "alignment")
                words = on_units(intervals, len(numbers))
            except BadExample as error:
                yield fault(name, str(error), at)
                continue
            told = [[word.text, word.start, word.stop] for word in words]
            yield {LISTED: 1, "id": name, "units": numbers, "words": told, "at": at}

    def parse(self, raw: bytes, file: Path, line: int, task: str | None = None) -> Example:
        """The example of a listed record."""
        record = load_record(raw)
        refuse_fault(record)
        if LISTED not in record:
            raise BadExample("is no record of a listing", "malformed record")
        words = tuple(Word(str(text), int(a), int(b)) for text, a, b in record["words"])
        woven = Woven(tuple(record["units"]), words)
        return Example(id_field(record, file, line), task or "pretrain", (), (), woven=woven)


def _found(file: Path) -> Iterator[tuple[str, str, Json, Json]]:
    """(id, place for messages, units, alignment) of each utterance."""
    if not stores.is_dir(file):
        for item in json_lines.items(file):
            at = f"{file.name}:{item.line}"
            try:
                if item.raw is None:
                    raise BadExample(item.error or "")
                record = load_record(item.raw)
                name = id_field(record, file, item.line)
            except BadExample as error:
                yield default_id(file, item.line), f"{at}: {error}", None, None
                continue
            yield name, at, record.get("units"), record.get("alignment")
        return
    for units in below_all(file):
        if not units.name.endswith(_UNITS):
            continue
        stem = units.name.removesuffix(_UNITS)
        beside = [units.with_name(stem + end) for end in _ENDS]
        found = next((one for one in beside if stores.is_file(one)), None)
        if found is None:
            raise UserError(f"{units} has no alignment beside it: {stem}.TextGrid, .ctm or .json")
        yield stem, str(units), " ".join(line for _, line in lines(units)), str(found)


def _numbers(units: Json) -> list[int]:
    given = units.split() if isinstance(units, str) else units
    try:
        if not isinstance(given, list) or not given:
            raise ValueError
        return [int(number) for number in given]
    except (TypeError, ValueError):
        raise BadExample(
            f"field 'units' is {str(units)[:60]!r}, expected numbers", "malformed record"
        ) from None


FORMAT = Interleaved()
