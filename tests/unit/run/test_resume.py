"""A run goes on from its newest sound checkpoint exactly, and says what it skipped and why."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoFeatureExtractor, AutoTokenizer

from raysft.audit import audit
from raysft.config.schema import Model
from raysft.data.plan.plan import Cursor
from raysft.errors import UserError
from raysft.run import plans
from raysft.run.catalogue import MARKER, Catalogue
from raysft.run.lines import read_lines
from raysft.run.storage import Store, open_storage
from raysft.train.checkpoint import newest_sound
from raysft.train.loop import train
from tests.properties.test_world_sizes import ledger
from tests.support.models import AUDIO
from tests.support.objects import ObjectStore
from tests.support.worlds import start, tiny
from tests.unit.train.test_checkpoint import DIFFERS, ONE, cut, flip, steps

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a corpus and `runs/whole`, 12 steps without a disturbance."""
    folder = tmp_path_factory.mktemp("home")
    train(start(tiny(folder, "whole"), ONE))
    return folder


def losses(run: Path) -> list[float]:
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    return [line["loss"] for line in lines]


def interrupted(home: Path, name: str, at: int, **changes: Any) -> Path:
    """A run that was killed, as far as its files go, in step at + 1."""

    class Killed(Exception):
        pass

    def progress(line: dict[str, Any]) -> None:
        if "loss" in line and line["step"] > at:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            raise Killed

    job = start(tiny(home, name, **changes), ONE, progress)
    with pytest.raises(Killed):
        train(job)
    return job.folder


def test_a_run_whose_newest_is_damaged_goes_on_from_the_one_before_and_says_so(
    home: Path,
) -> None:
    run = interrupted(home, "damaged", at=7)
    flip(run / "checkpoints" / "step_7" / "state" / "__0_0.distcp")
    told: list[dict[str, Any]] = []
    train(start(tiny(home, "damaged"), ONE, told.append))
    events = [line for line in read_lines(run / "events.jsonl") if line["event"] != "saved"]
    assert [line["event"] for line in events] == ["started", "skipped", "continued", "finished"]
    assert events[1]["reason"] == (f"{run}/checkpoints/step_7: state/__0_0.distcp {DIFFERS}")
    assert (events[2]["step"], events[2]["steps_again"]) == (6, 2)
    assert events[1] in told, "the user is told too"
    assert ledger(run) == ledger(home / "runs" / "whole")
    assert losses(run) == losses(home / "runs" / "whole")
    assert audit(run).clean


def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(home: Path) -> None:
    """It neither starts at 0 (verl 7952) nor forgets what it has recorded."""
    run = interrupted(home, "all_damaged", at=7)
    job = start(tiny(home, "all_damaged"), ONE)
    for folder in (run / "checkpoints").glob("step_*"):
        cut(folder / "state" / "__0_0.distcp")
    before = (run / "metrics.jsonl").read_bytes(), ledger(run)
    with pytest.raises(UserError, match="no checkpoint of this run can be read"):
        train(job)
    assert ((run / "metrics.jsonl").read_bytes(), ledger(run)) == before


def test_a_checkpoint_carries_config_processor_cursor_and_versions(home: Path) -> None:
    run = home / "runs" / "whole"
    saved, _ = newest_sound(Catalogue(open_storage(run, None)), ONE)
    assert saved is not None and saved.step == 12
    folder = Path(saved.where)
    assert (folder / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    assert "versions:\n  raysft:" in (folder / "config.yaml").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder / "processor")
    assert tokenizer.decode(tokenizer("zero one")["input_ids"]) == "zero one"
    meta = saved.meta()
    planned = list(zip(range(12), plans.load(run).steps(plans.load(run).start())))[-1][1]
    assert meta["cursor"] == planned.after.to_json() == Cursor.from_json(meta["cursor"]).to_json()
    assert (meta["step"], meta["world_size"]) == (12, 1)
    carried = {"config.yaml", "state/__0_0.distcp", "state/.metadata"}
    assert carried < set(meta["files"]), "and each has its checksum"
    assert {f"processor/{p.name}" for p in (folder / "processor").iterdir()} < set(meta["files"])


def test_a_checkpoint_of_an_audio_model_carries_its_feature_extractor(
    make_clips: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = [{"path": str(make_clips(6))}]
    config = tiny(tmp_path, data__train=corpus, data__tokens_per_batch=400, train__max_steps=1)
    config.model = Model.model_validate(AUDIO)
    job = start(config, ONE)
    train(job)
    folder = job.folder / "checkpoints" / "step_1" / "processor"
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert (extractor.feature_size, extractor.chunk_length) == (80, 3)
    assert AutoTokenizer.from_pretrained(folder)("zero")["input_ids"]


def test_a_run_in_an_object_store_is_interrupted_and_continued_exactly(home: Path) -> None:
    url = f"objects://{home}/bucket/runs/a"
    ObjectStore.log.clear()
    run = interrupted(home, "stored", at=7, checkpoint__path=url, checkpoint__every=3)
    storage = Store(f"{url}/stored")  # of the run's name
    storage.write("step_9/state/__0_0.distcp", b"half an upload")
    train(start(tiny(home, "stored", checkpoint__path=url, checkpoint__every=3), ONE))
    assert not (run / "checkpoints").exists()
    assert steps(storage) == [9, 12] and sorted(storage.names()) == ["step_12", "step_9"]
    assert all(saved.damage() is None for saved in Catalogue(storage).committed())
    skipped = [e["reason"] for e in read_lines(run / "events.jsonl") if e["event"] == "skipped"]
    assert [reason.split(": ")[0] for reason in skipped] == [f"{url}/stored/step_9"]
    puts = [key for kind, key in ObjectStore.log if kind == "put" and "/step_12/" in key]
    assert puts[-1].endswith(MARKER)
    assert losses(run) == losses(home / "runs" / "whole")
    assert audit(run).clean


def test_half_a_line_at_the_end_of_events_does_not_spoil_the_next(home: Path) -> None:
    run = interrupted(home, "half", at=3)
    before = read_lines(run / "events.jsonl")
    with open(run / "events.jsonl", "a") as out:
        out.write('{"time": 17')
    train(start(tiny(home, "half"), ONE))
    events = read_lines(run / "events.jsonl")
    assert events[: len(before)] == before
    assert [e["event"] for e in events[len(before) :] if e["event"] != "saved"] == [
        "continued",
        "finished",
    ]


def test_whatever_a_crash_leaves_at_the_end_of_its_files_a_run_goes_on(home: Path) -> None:
    name = "torn"
    run = interrupted(home, name, at=3)
    files = [*(run / "ledger").iterdir(), *run.glob("*.jsonl")]
    assert len(files) >= 5
    cut_off = '{"epoch": 0, "step": 4, "lane": 0, "ids": ["訓'.encode()[:-1]
    for path, torn in zip(files, itertools.cycle([cut_off, b"\0" * 512, b"\xff\n"])):
        with open(path, "ab") as out:
            out.write(torn)
    train(start(tiny(home, name), ONE))
    assert losses(run) == losses(home / "runs" / "whole")
    assert audit(run).clean
    said = [e["reason"] for e in read_lines(run / "events.jsonl") if e["event"] == "warning"]
    assert len(said) == len(files) - 1  # all but events.jsonl, which is not cut back
    assert all("damaged, and left out: line" in text for text in said)


@pytest.mark.parametrize("asked_for", [True, False])
def test_only_time_in_which_someone_wanted_the_run_is_lost(
    home: Path, monkeypatch: pytest.MonkeyPatch, asked_for: bool
) -> None:
    run = interrupted(home, f"idle_{asked_for}", at=6)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)  # an hour later
    job = start(tiny(home, f"idle_{asked_for}"), ONE)
    if asked_for:  # by a new submission; else it was Ray that took an hour to start it again
        job.submitted = time.time()
    train(job)
    (again,) = [e for e in read_lines(run / "events.jsonl") if e["event"] == "continued"]
    assert (0 < again["lost_s"] < 600) if asked_for else again["lost_s"] > 3600
    assert read_lines(run / "metrics.jsonl")[-1]["lost_s"] == again["lost_s"]
