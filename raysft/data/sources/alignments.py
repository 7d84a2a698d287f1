"""Alignments of words: TextGrid (MFA's, Praat's), CTM and JSON -> (word, start, end), seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from raysft import stores
from raysft.data.sources.lines import lines
from raysft.errors import BadExample
from raysft.json_types import Json

Interval = tuple[str, float, float]
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def read(file: Path, name: str) -> list[Interval]:
    """The words of a file; name: of the utterance, in a CTM of several. Raises BadExample: not
    there, or no alignment."""
    if not stores.is_file(file):
        raise BadExample(f"its alignment {file} does not exist", "malformed record")
    end = file.suffix.lower()
    if end == ".textgrid":
        return textgrid("\n".join(line for _, line in lines(file)), file.name)
    if end == ".ctm":
        return _ctm(file, name)
    try:
        return listed(json.loads(file.read_bytes()), file.name)
    except ValueError as error:
        raise BadExample(
            f"its alignment {file.name} is no JSON: {error}", "malformed record"
        ) from None


def textgrid(text: str, name: str) -> list[Interval]:
    """Intervals of the tier `words` of a TextGrid, long or short. Raises BadExample."""
    for tier in text.split('"IntervalTier"')[1:]:
        quoted = _QUOTED.search(tier)
        if quoted is None or quoted[1].lower() != "words":
            continue
        body = re.split(r'"(?:IntervalTier|TextTier)"', tier[quoted.end() :])[0]
        body = re.sub(r"intervals? ?\[\d+\]:?", " ", body)
        found: list[Interval] = []
        at, numbers = 0, []
        for match in _QUOTED.finditer(body):
            numbers = [float(number) for number in _NUMBER.findall(body[at : match.start()])]
            if len(numbers) < 2:
                raise BadExample(
                    f"its alignment {name}: an interval has no two times", "malformed record"
                )
            found.append((match[1].replace('""', '"'), numbers[-2], numbers[-1]))
            at = match.end()
        return found
    raise BadExample(f"its alignment {name} has no tier `words`", "malformed record")


def _ctm(file: Path, name: str) -> list[Interval]:
    found = []
    for number, line in lines(file):
        fields = line.split()
        if len(fields) < 5:
            raise BadExample(
                f"its alignment {file.name}:{number} has {len(fields)} fields of 5",
                "malformed record",
            )
        if fields[0] == name:
            try:
                start, length = float(fields[2]), float(fields[3])
            except ValueError:
                raise BadExample(
                    f"its alignment {file.name}:{number} has no two times", "malformed record"
                ) from None
            found.append((fields[4], start, start + length))
    if not found:
        raise BadExample(f"its alignment {file.name} has no line of {name}", "malformed record")
    return filled(found)


def listed(value: Json, name: str) -> list[Interval]:
    """A list of {word, start, end}, or of [word, start, end]; or an object that has it as `words`
    or `tiers.words.entries` (MFA's). Raises BadExample."""
    if isinstance(value, dict) and isinstance(value.get("tiers"), dict):
        tier = value["tiers"].get("words")
        entries = tier.get("entries") if isinstance(tier, dict) else None
        if isinstance(entries, list) and all(isinstance(e, list) and len(e) == 3 for e in entries):
            value = [[word, start, end] for start, end, word in entries]
    if isinstance(value, dict):
        value = value.get("words")
    if not isinstance(value, list):
        raise BadExample(f"{name}: no list of words with their times", "malformed record")
    found = []
    for item in value:
        try:
            if isinstance(item, dict):
                item = [item.get("word", item.get("text")), item["start"], item["end"]]
            word, start, end = item
            found.append((str(word or ""), float(start), float(end)))
        except (KeyError, TypeError, ValueError):
            raise BadExample(
                f"{name}: {str(item)[:60]} is no word with its times (word, start, end)",
                "malformed record",
            ) from None
    return filled(found)


def filled(intervals: Sequence[Interval]) -> list[Interval]:
    """With the silences between words, where these are not listed."""
    found: list[Interval] = []
    at = 0.0
    for word, start, end in intervals:
        if start > at + 1e-6:
            found.append(("", at, start))
        found.append((word, start, end))
        at = end
    return found
