"""prepare.html: what it shows is what the shards hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from raysft.config.prepare import Prepare
from raysft.prepare import shard, summary
from tests.unit.page.test_page import BROWSER, seen

TOLD = "s<1></script>"  # a speaker is nobody's markup


def shards(folder: Path, tokens: bool = True) -> tuple[list[Path], list[dict[str, object]]]:
    """Two shards, and their rows."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for n in range(60):
        samples, spoken = int(rng.integers(8000, 80000)), int(rng.integers(5, 50))
        content = bytes(int(rng.integers(10, 90)))
        rows.append(
            {
                **{"utt": f"u{n}", "wav": "a.wav", shard.AUDIO: content, "text": "x"},
                **{"spk": ("", "s0", TOLD)[n % 3], "utt_embedding": None, "spk_embedding": None},
                "speech_token": np.zeros(spoken, np.int32) if tokens else None,
                **{"seconds": samples / 16000, "tokens": spoken if tokens else 0, "task": "asr"},
                **{"samples": samples, "sample_rate": 16000, "audio_bytes": len(content)},
            }
        )
    paths = [folder / f"{number:06d}.parquet" for number in range(2)]
    for path, some in zip(paths, (rows[:40], rows[40:])):
        shard.write(path, {name: [row[name] for row in some] for name in shard.SCHEMA.names})
    lines = [
        {"id": "a", "source": "s", "path": "p", "reason": "p: no such file", "kind": "missing"},
        {"id": "b", "source": "s", "path": "q", "reason": "q: no such file", "kind": "missing"},
        {"id": "c", "source": "s", "path": "r", "reason": "r: silent", "kind": "silent"},
    ]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return paths, rows


def asked() -> dict[str, object]:
    return {"prepare": Prepare(rows=40).model_dump(mode="json"), "tools": {"speech_tokens": None}}


def written(folder: Path, tokens: bool = True) -> tuple[Path, list[dict[str, object]]]:
    paths, rows = shards(folder, tokens)
    page = folder / summary.PAGE
    page.write_bytes(summary.page(folder, asked(), summary.gather(paths), len(paths), 3))
    return page, rows


def test_the_page_shows_what_the_shards_hold(tmp_path: Path) -> None:
    page, rows = written(tmp_path)
    text = page.read_text()
    assert not re.search(r'(src|href)="?https?:', text)
    found = re.search(r'id="facts">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    shown = json.loads(found[1])["prepared"]
    seconds = [float(row["seconds"]) for row in rows]  # type: ignore[arg-type]
    tokens = [int(row["tokens"]) for row in rows]  # type: ignore[call-overload]
    assert shown["figures"] == {
        "utterances": 60,
        "hours": pytest.approx(sum(seconds) / 3600, abs=6e-4),
        "left out": 3,
        "speakers": 2,
        "shards": 2,
        "GiB of audio": 0.0,
        "speech tokens": sum(tokens),
        "speech tokens a second": pytest.approx(sum(tokens) / sum(seconds), abs=6e-3),
    }
    for one, values in zip(shown["histograms"], (seconds, tokens), strict=True):
        edges = one["edges"]
        last = len(one["counts"]) - 1
        for place, count in enumerate(one["counts"]):
            low, high = edges[place], edges[place + 1]
            inside = [v for v in values if low <= v and (v < high or place == last)]
            assert len(inside) == count
        assert sum(one["counts"]) == 60
    by_speaker = {
        name: [s for r, s in zip(rows, seconds) if r["spk"] == name] for name in ("s0", TOLD)
    }
    assert {one["speaker"]: (one["utterances"], one["hours"]) for one in shown["speakers"]} == {
        name: (20, pytest.approx(sum(own) / 3600, abs=6e-5)) for name, own in by_speaker.items()
    }
    assert shown["quarantine"] == [
        {"kind": "missing", "count": 2, "first": "p: no such file"},
        {"kind": "silent", "count": 1, "first": "r: silent"},
    ]
    assert shown["asked"]["rows"] == 40 and "path" not in shown["asked"]


def test_without_tokens_or_rows_there_is_a_page_too(tmp_path: Path) -> None:
    page, _ = written(tmp_path, tokens=False)
    assert "Speech tokens" not in page.read_text()
    nothing = summary.gather([])
    shown = summary.of(tmp_path, asked(), nothing, 0, 3)
    assert shown["histograms"] == [] and shown["figures"]["utterances"] == 0


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_a_browser_draws_it(size: str, tmp_path: Path) -> None:
    page, _ = written(tmp_path)
    found = seen(page, size, tmp_path)
    assert found["errors"] == [] and not found["wide"]
    assert len(found["inked"]) == 2 and all(found["inked"])
