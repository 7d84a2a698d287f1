"""Damaged files of every container: each is read right, or named; none ends the process.

A file counts as read right where index and decoding agree, and the length is that of ffmpeg's
decode within 2%. Where ffmpeg reads nothing of a file, it has to be as long as it was before it was
damaged.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from raysft.data.clips.audio import Limits, load, probe, resampled_length
from raysft.data.clips.file import MISSING_SHARE
from raysft.data.clips.stalled import ClipReader
from raysft.data.encode.base import EXCESS
from raysft.data.quarantine import OTHER, kind
from raysft.errors import BadExample
from tests.support.audio_files import KINDS, damaged, encoded, ffmpeg_samples

RATE = 16000
FLOW = 0.02
LIMITS = Limits(max_seconds=60.0, read_timeout_s=60.0)


def name(number: int) -> str:
    """Files of all kinds in turn."""
    return f"{number}.{[*KINDS][number % len(KINDS)]}"


def work(folder: str, first: int, last: int) -> None:
    """Write and read files number first .. last - 1; a line of JSON each: what came of it.

    In a process of its own: what a decoder does to it is the answer.
    """
    reader = ClipReader(LIMITS, in_a_row=10**9)
    for number in range(first, last):
        path = Path(folder) / name(number)
        path.write_bytes(damaged(name(number).split(".", 1)[1], number))
        print(json.dumps({"number": number}), flush=True)
        found: list[int | str] = []
        for by in (
            partial(probe, limits=LIMITS),
            partial(load, rate=RATE, limits=LIMITS, most_seconds=60.0),
        ):
            try:
                result = reader.call(by, str(path))
            except BadExample as error:
                found.append(str(error))
            else:
                rated = isinstance(result, tuple)
                found.append(
                    resampled_length(result.samples, result.rate, RATE) if rated else len(result)
                )
        print(json.dumps({"number": number, "found": found}), flush=True)


def verdict(path: Path, number: int, found: list[int | str]) -> str:
    """read, or quarantined and why; anything else is a fault."""
    for reason in found:
        if isinstance(reason, str):
            if not reason.startswith(f"{path}: ") or "\n" in reason or kind(reason) == OTHER:
                return f"an unclear reason: {reason}"
            return f"quarantined: {kind(reason)}"
    indexed, decoded = found
    if not indexed * (1 - MISSING_SHARE) <= decoded <= indexed * (1 + EXCESS):
        return "quarantined: not as long as indexed"  # by the encoder and the reader
    theirs = ffmpeg_samples(str(path), RATE)
    if theirs:
        right = abs(decoded - theirs) <= FLOW * theirs
    else:
        original = path.name.split(".", 1)[1]
        (path.parent / "original").write_bytes(encoded(original))
        theirs = len(load(str(path.parent / "original"), RATE))
        right = abs(decoded - theirs) <= FLOW * theirs
    return "read" if right else f"{decoded} samples, {theirs} by ffmpeg"


def fuzz(folder: Path, first: int, last: int) -> Counter[str]:
    """What came of files number first .. last - 1, counted; fails on the first fault."""
    counts: Counter[str] = Counter()
    faults: dict[str, str] = {}
    number = first
    while number < last:
        code = f"from {__name__} import work; work({str(folder)!r}, {number}, {last})"
        command = [sys.executable, "-c", code]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                result = json.loads(line)
                number = result["number"]
                if "found" in result:
                    path = folder / name(number)
                    said = verdict(path, number, result["found"])
                    if not said.startswith(("read", "quarantined")):
                        faults[path.name] = said
                    counts[said if said.startswith(("read", "quarantined")) else "fault"] += 1
                    if path.name not in faults:
                        path.unlink()
                    number += 1
            errors = process.stderr.read()
        if process.returncode:
            faults[name(number)] = f"the process ended: {process.returncode}: {errors[-500:]}"
            counts["fault"] += 1
            number += 1
    assert not faults, f"{counts}: {faults}"
    return counts


def test_damaged_files_are_read_right_or_named(tmp_path):
    counts = fuzz(tmp_path, 0, 8 * len(KINDS))
    assert counts["read"] > 2 * len(KINDS)
    assert counts.total() == 8 * len(KINDS)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_damaged_files_are_read_right_or_named(tmp_path):
    started = time.monotonic()
    counts = fuzz(tmp_path, 1000, 11_000)
    print(f"{counts}, {time.monotonic() - started:.0f} s")
    assert counts["read"] > 3000
    assert counts.total() == 10_000
