"""One corpus as files, archives, Parquet, shards and objects: the same ledger, the same losses."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raysft import patience
from raysft.config.prepare import Prepare
from raysft.config.schema import Data, Model, Source
from raysft.data.clips.audio import Limits
from raysft.data.encode import make_encoder
from raysft.data.index.build import build_index
from raysft.data.read.reader import Reader, Work
from raysft.data.sources.shards import LIST
from raysft.errors import UserError
from raysft.prepare import plan, shard
from tests.support import buckets, flaky, in_process
from tests.support.batches import differences
from tests.support.layouts import LAYOUTS, corpus
from tests.support.models import AUDIO

US = corpus(24)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with buckets.store() as url:
        yield url


@pytest.fixture(autouse=True)
def patient() -> Iterator[None]:
    before = patience.allowed()
    yield
    patience.allow(before)
    flaky.Flaky.share = 0.0


def as_shards(top: Path, rows: int = 10) -> Path:
    """The corpus as jobs/prepare.py writes it, without Ray."""
    source = Source(path=str(LAYOUTS["nemo"].write(top / "raw", US)))
    limits = Limits()
    index = build_index([source], "train", plan.Lengths(limits), top / "lengths", workers=1)
    settings = Prepare(path="x", rows=rows)
    (top / "shards").mkdir()
    paths = []
    for number, (start, stop) in enumerate(plan.cuts(index, settings)):
        examples = [(one, "x") for one in index.examples(np.arange(start, stop))]
        paths.append(top / "shards" / f"{number:06d}.parquet")
        shard.write(paths[-1], shard.make(examples, settings, limits).columns)
    (top / LIST).write_text("".join(f"{path}\n" for path in paths))
    return top / LIST


def trained(folder: Path, path: str) -> tuple[list[float], list[list[str]]]:
    """Losses, and ids by line of the ledger, of a run of a few steps."""
    data = {"train": [{"path": path, "name": "corpus"}], "tokens_per_batch": 300}
    run = in_process.run(folder, data=data, model=AUDIO, train={"max_steps": 5})
    assert not (run / "quarantine.jsonl").read_text()
    return in_process.losses(run), in_process.ledger(run)


def test_a_corpus_trains_alike_as_files_archives_parquet_shards_and_objects(
    bucket: str, tmp_path: Path
) -> None:
    files = LAYOUTS["nemo"].write(tmp_path / "data" / "nemo", US)
    wanted = trained(tmp_path / "files", str(files))
    assert len(wanted[0]) == 5
    assert len({name for ids in wanted[1] for name in ids}) == len(US)
    for name in ("webdataset", "wenet_shards", "parquet", "arrow", "shar", "kaldi_segments"):
        path = LAYOUTS[name].write(tmp_path / "data" / name, US)
        assert trained(tmp_path / name, str(path)) == wanted, name
    shards = as_shards(tmp_path / "prepared")
    assert trained(tmp_path / "shards", str(shards)) == wanted
    buckets.upload(tmp_path / "data" / "nemo", tmp_path)
    buckets.upload(tmp_path / "prepared" / "shards", tmp_path)
    assert trained(tmp_path / "objects", f"{bucket}/data/nemo/{files.name}") == wanted
    lines = (tmp_path / "prepared" / LIST).read_text().replace(str(tmp_path), bucket)
    listed = tmp_path / "remote.list"
    listed.write_text(lines)
    assert trained(tmp_path / "remote", str(listed)) == wanted


# --- stores that fail


def read(path: str, folder: Path) -> Reader:
    encoder = make_encoder(Model(**AUDIO), Data(), folder)
    index = build_index(
        [Source(path=path, name="x")], "train", encoder, folder / "index", workers=1
    )
    assert not index.rejected
    return Reader(index, encoder, int(index.tokens.sum()), 0)


def batch(reader: Reader):  # type: ignore[no-untyped-def]
    (found,) = reader.read_chunk([Work(0, 1, 0, np.arange(len(reader.index)))])
    return found


@pytest.mark.parametrize("name", ["nemo", "webdataset", "kaldi_segments"])
def test_reads_that_fail_now_and_then_lose_nothing(tmp_path: Path, name: str) -> None:
    flaky.register()
    path = LAYOUTS[name].write(tmp_path / "data", US)
    wanted = batch(read(str(path), tmp_path / "here"))
    before = flaky.Flaky.failed
    flaky.Flaky.share = 0.1
    found = batch(read(f"flaky://{path}", tmp_path / "there"))
    assert flaky.Flaky.failed - before > 3
    assert not found.quarantined
    assert differences(found, wanted) == []


def test_a_store_that_is_down_is_waited_for_then_the_run_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flaky.register()
    path = LAYOUTS["nemo"].write(tmp_path / "data", US)
    wanted = batch(read(str(path), tmp_path / "here"))
    reader = read(f"flaky://{path}", tmp_path / "there")
    patience.allow(30)
    flaky.Flaky.share = 1.0
    threading.Timer(1.0, lambda: setattr(flaky.Flaky, "share", 0.0)).start()
    begun = time.monotonic()
    found = batch(reader)
    assert time.monotonic() - begun > 0.9
    assert differences(found, wanted) == []
    assert "waiting up to 30 s (data.retry_s) for flaky://" in caplog.text
    patience.allow(0.5)
    flaky.Flaky.share = 1.0
    with pytest.raises(UserError, match=r"its storage does not give it.*hung up.*tried for 0.5 s"):
        batch(reader)
