"""The examples that speak: digit strings that no clip of training says are understood."""

from __future__ import annotations

import json
from pathlib import Path

import jiwer
import pytest

from raysft.run.lines import read_lines
from tests.support import jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
EXAMPLES = jobs.ROOT / "examples" / "spoken_digits"
MOST = 0.25  # of the words wrong


def done(job: str, *words: object) -> str:
    found = jobs.call(job, *words)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def asr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What listens: the run of the demo."""
    folder = tmp_path_factory.mktemp("asr")
    done("sft", EXAMPLES / "asr.yaml", f"run.storage_path={folder}", "run.name=asr")
    return folder / "asr"


def test_patches_are_understood(asr: Path, tmp_path: Path) -> None:
    # All that are held out: the 40 that are heard by default say little to a few percent.
    words = (f"run.storage_path={tmp_path}", "run.name=patch", f"evaluate.asr={asr}")
    done("sft", EXAMPLES / "tts_patch.yaml", *words, "evaluate.speak_examples=100")
    last = read_lines(tmp_path / "patch" / "eval.jsonl")[-1]
    assert last["spoken/tts"] == 100 and last["wer_bound/tts"] < 0.1
    assert last["wer/tts"] <= MOST


def test_units_and_their_decoder_are_understood(asr: Path, tmp_path: Path) -> None:
    words = (f"run.storage_path={tmp_path}", "run.name=flow")
    done("sft", EXAMPLES / "tts_flow.yaml", *words)
    run, said = tmp_path / "flow", tmp_path / "said"
    lines = (EXAMPLES / "test.jsonl").read_text().splitlines()
    texts = {row["id"]: row["text"] for row in map(json.loads, lines)}
    done(
        "synthesize", run / "llm", EXAMPLES / "test.jsonl", "--decoder", run / "flow", "--out", said
    )
    heard = done("transcribe", asr, *sorted(said.glob("*.wav")), "--json").splitlines()
    pairs = [(texts[Path(row["path"]).stem], row["text"]) for row in map(json.loads, heard)]
    assert len(pairs) == len(texts) == 100
    assert jiwer.wer(*map(list, zip(*pairs, strict=True))) <= MOST
