"""audit --deep: batches read again are those trained on, and what was changed is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from raysft.audit import audit, main
from raysft.config import Config
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.support.models import AUDIO
from tests.support.worlds import start, tiny
from tests.unit.train.test_checkpoint import ONE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ALL = 1000


def clips_of(corpus: Path) -> list[Path]:
    return [corpus.parent / json.loads(line)["wav_path"] for line in corpus.open()]


def states(run: Path) -> dict[Path, tuple[int, int]]:
    found = {path: path.stat() for path in run.rglob("*")}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in found.items()}


@pytest.fixture
def spoken(tmp_path: Path, make_clips: Callable[..., Path]) -> tuple[Path, list[Path]]:
    """A run of 6 steps on clips, one of which is NaN and quarantined; and the clips."""
    corpus = make_clips(24)
    clips = clips_of(corpus)
    samples, rate = soundfile.read(clips[3], dtype="float32")
    soundfile.write(clips[3], samples * np.nan, rate, subtype="FLOAT")
    tree: dict[str, Any] = {
        "run": {"name": "spoken", "storage_path": str(tmp_path / "runs"), "seed": 1},
        "data": {"train": [{"path": str(corpus)}], "lanes": 2, "tokens_per_batch": 400},
        "model": AUDIO,
        "train": {"max_steps": 6},
        "log": {"tensorboard": False},
    }
    tree["data"]["max_quarantined"] = 0.2
    job = start(Config.model_validate(tree), ONE)
    train(job)
    return job.folder, clips


def test_every_batch_comes_out_as_it_was_with_what_was_drawn_and_what_was_quarantined(
    spoken: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    run, _ = spoken
    before = states(run)
    report = audit(run, sample=ALL)
    assert (report.findings, report.notes) == ([], [])
    lines = [line for path in (run / "ledger").iterdir() for line in read_lines(path)]
    assert len(lines) == 12
    assert report.reread == sum(bool(line["ids"] + line["quarantined"]) for line in lines)
    assert len(report.quarantined) == 1
    assert report.summary().endswith(f"0 repeated, {report.reread} batches read again")
    assert states(run) == before  # nothing was written
    noisy = start(tiny(tmp_path, "noisy", data__unit_noise=0.3, checkpoint__every=0), ONE)
    train(noisy)
    assert audit(noisy.folder, sample=ALL).findings == []
    assert audit(noisy.folder, sample=3).reread == 3


def test_a_clip_that_is_not_the_one_trained_on_is_found(spoken: tuple[Path, list[Path]]) -> None:
    run, clips = spoken
    samples, rate = soundfile.read(clips[5], dtype="float32")
    soundfile.write(clips[5], samples[::-1], rate)
    assert audit(run).clean
    said = audit(run, sample=ALL).findings
    assert said
    assert all(
        "read again: its features are not those trained on: a clip was" in text for text in said
    )
    soundfile.write(clips[5], samples * np.nan, rate, subtype="FLOAT")
    said = audit(run, sample=ALL).findings
    assert any(
        "was trained on, cannot be used now" in text and str(clips[5]) in text for text in said
    )


def test_features_of_another_version_of_what_decodes_are_no_fault_and_said(
    spoken: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, clips = spoken
    config = (run / "config.yaml").read_text()
    (line,) = [line for line in config.splitlines() if line.strip().startswith("soxr:")]
    (run / "config.yaml").write_text(config.replace(line, "  soxr: 0.0.1"))
    assert audit(run, sample=ALL).notes == []  # as long as nothing differs
    samples, rate = soundfile.read(clips[5], dtype="float32")
    soundfile.write(clips[5], samples * np.float32(1 - 2**-20), rate)
    main([str(run), "--deep", "--sample", str(ALL)])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("note: step ")
    assert "not bit for bit those trained on" in said[0]
    assert "soxr" in said[0] and "was 0.0.1" in said[0]
    assert said[-1].startswith("audit: clean")


def test_token_ids_that_are_not_those_trained_on_are_found(tmp_path: Path) -> None:
    job = start(tiny(tmp_path, checkpoint__every=0), ONE)
    train(job)
    template = job.folder / "chat_template.jinja"
    template.write_text("x" + template.read_text())
    said = audit(job.folder, sample=2).findings
    assert len(said) == 2
    assert all(text.endswith("its token ids or labels are not those trained on") for text in said)
