"""The stream carries through Ray what a reader in this process reads: all of it, once, in order."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from raysft.config.schema import Data, Model, Source
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import MicroBatch, Quarantined
from raysft.data.index.build import Index, build_index
from raysft.data.plan.plan import Plan
from raysft.data.read.reader import Reader, Work
from raysft.driver.session import ray_session
from raysft.errors import UserError
from tests.cluster.conftest import wait_until
from tests.support.batches import differences
from tests.support.models import AUDIO

CLIPS, LANES, BUDGET = 60, 4, 500


@dataclass
class Slow:
    """An encoder that takes `delay` seconds more an example, so that a test can interfere."""

    encoder: Encoder
    delay: float

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.encoder, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Slow, (self.encoder, self.delay)

    def encode(self, *args: Any, **settings: Any) -> Any:
        time.sleep(self.delay)
        return self.encoder.encode(*args, **settings)


@dataclass
class Corpus:
    """An index with one clip damaged since, and how to read it with and without Ray."""

    index: Index
    encoder: Encoder

    def works(self, steps: int, lanes: range = range(LANES)) -> list[Work]:
        """Those of the first steps in `lanes`."""
        data = Data(lanes=LANES, tokens_per_batch=BUDGET, window=20)
        plan = Plan.of(self.index, data, 0)
        planned = itertools.islice(plan.steps(plan.start()), steps)
        return [
            Work(step.epoch, step.step, lane, step.lanes[lane])
            for step in planned
            for lane in lanes
            if len(step.lanes[lane])
        ]

    def expected(self, works: list[Work]) -> list[MicroBatch]:
        """Read in this process."""
        return list(Reader(self.index, self.encoder, BUDGET, 0).read(iter(works)))

    def stream(
        self, works: Iterable[Work], delay: float = 0.0, patience_s: float = 30.0
    ) -> Iterator[MicroBatch]:
        """Read through Ray on 2 CPUs."""
        import ray

        from raysft.data.read.stream import RayReader, ReaderSpec

        encoder = ray.put(Slow(self.encoder, delay))
        spec = ReaderSpec((self.index.place,), encoder, BUDGET, 0, patience_s)
        return RayReader(spec, self.index.seconds, 2).read(iter(works))


@pytest.fixture(scope="module")
def corpus(make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    manifest = make_clips(CLIPS, kinds=(("wav", 16000, 1), ("flac", 22050, 2)))
    encoder = make_encoder(Model(**AUDIO), Data(), manifest.parent)
    folder = tmp_path_factory.mktemp("index")
    index = build_index([Source(path=str(manifest))], "train", encoder, folder)
    (manifest.parent / "clip0008.wav").write_bytes(b"damaged")
    return Corpus(index, encoder)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of some 6 and 12 examples: a stream of many."""
    from raysft.data.read import stream

    monkeypatch.setattr(stream, "CHUNK", 6)
    monkeypatch.setattr(stream, "LARGE", 12)


def assert_same(found: list[MicroBatch], expected: list[MicroBatch]) -> None:
    """Equal in number, order and every field, to the bit."""
    assert [(b.step, b.lane) for b in found] == [(b.step, b.lane) for b in expected]
    for one, other in zip(found, expected, strict=True):
        assert differences(one, other) == [], (one.step, one.lane)


def reading() -> list[psutil.Process]:
    """Processes that run a data task now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(word.startswith("ray::read_micro_batches") for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_data_that_is_away_for_a_moment_is_waited_for_and_else_ends_the_stream_in_a_line(
    corpus: Corpus, session: None, short_chunks: None
) -> None:
    works = corpus.works(6)
    expected = corpus.expected(works)
    folder = Path(corpus.index.files[0].path).parent
    away = folder.with_name("away")
    stream = corpus.stream(works, delay=0.05)
    found = [next(stream)]
    folder.rename(away)
    back = threading.Timer(2.0, away.rename, (folder,))
    back.start()
    found += stream
    assert_same(found, expected)
    back.join()
    stream = corpus.stream(works, delay=0.05, patience_s=0.5)
    next(stream)
    folder.rename(away)
    try:
        with pytest.raises(UserError, match=r"its storage does not give it on .*\(data\.retry_s\)"):
            list(stream)
    finally:
        away.rename(folder)


def test_shared_memory_carries_a_micro_batch_unchanged(corpus: Corpus, session: None) -> None:
    import ray

    empty = MicroBatch.join(1, 2, 3, [], quarantined=[Quarantined("a", "b", "c", "d")])
    batches = [*corpus.expected(corpus.works(2)), empty]
    assert_same([ray.get(ray.put(batch)) for batch in batches], batches)


def test_a_stream_of_many_chunks_carries_what_a_reader_reads_in_order(
    session: None, short_chunks: None, corpus: Corpus
) -> None:
    works = corpus.works(20)
    expected = corpus.expected(works)
    assert any(batch.quarantined for batch in expected)
    assert_same(list(corpus.stream(works)), expected)


def test_chunks_of_their_usual_length_carry_the_same(session: None, corpus: Corpus) -> None:
    works = corpus.works(20)
    assert_same(list(corpus.stream(works)), corpus.expected(works))


def test_two_workers_streams_carry_together_what_one_stream_does(
    session: None, short_chunks: None, corpus: Corpus
) -> None:
    shares = [corpus.works(10, range(rank, LANES, 2)) for rank in range(2)]
    found: list[list[MicroBatch]] = [[], []]
    threads = [
        threading.Thread(target=lambda rank=rank: found[rank].extend(corpus.stream(shares[rank])))
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for share, batches in zip(shares, found, strict=True):
        assert_same(batches, corpus.expected(share))
    together = sorted([*found[0], *found[1]], key=lambda batch: (batch.step, batch.lane))
    assert_same(together, corpus.expected(corpus.works(10)))


def test_killing_a_data_task_changes_nothing(
    session: None, short_chunks: None, corpus: Corpus
) -> None:
    works = corpus.works(12)
    found, killed = [], 0
    for batch in corpus.stream(works, delay=0.01):
        found.append(batch)
        if killed < 2 and len(found) >= 5 * (killed + 1) and (victims := reading()):
            victims[0].kill()
            killed += 1
    assert killed == 2
    assert_same(found, corpus.expected(works))


def test_closing_a_stream_early_leaves_no_task_running(
    session: None, short_chunks: None, corpus: Corpus
) -> None:
    import ray

    works = corpus.works(40)
    stream = corpus.stream(works, delay=0.05)
    first = list(itertools.islice(stream, 5))
    assert reading()
    stream.close()
    assert wait_until(lambda: not reading(), 30)
    cpus = ray.cluster_resources()["CPU"]
    assert wait_until(lambda: ray.available_resources().get("CPU") == cpus, 30)
    assert_same(first, corpus.expected(works[:5]))


@pytest.mark.parametrize("small", [True, False])
def test_a_stream_reads_ahead_as_many_bytes_as_it_may(
    small: bool, session: None, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raysft.data.read import stream

    works = corpus.works(60)
    sizes = [batch.nbytes for batch in corpus.expected(works)]
    limit = 12 * max(sizes)  # of both CPUs; a chunk is at most an eighth of it
    monkeypatch.setattr(stream, "CHUNK", 6)
    if small:
        monkeypatch.setattr(stream, "AHEAD", limit // 2)
    asked = 0

    def counted() -> Iterator[Work]:
        nonlocal asked
        for work in works:
            asked += 1
            yield work

    ahead = []
    for taken, _ in enumerate(corpus.stream(counted()), 1):
        time.sleep(0.02)  # a consumer that is slower than what it consumes
        ahead.append(sum(sizes[taken:asked]))
    assert asked == len(works) == len(ahead)
    if small:  # and what was cut next, but not begun
        assert limit / 2 < max(ahead) <= limit * 9 / 8 + 2 * max(sizes)
    else:
        assert max(ahead) > 3 * limit


def test_a_stream_costs_no_actor_of_the_cluster_anything(
    session: None, short_chunks: None, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.actor
    import ray.util

    called = []
    call = ray.actor.ActorMethod._remote

    def counted(method: Any, *args: Any, **settings: Any) -> Any:
        called.append(method._method_name)
        return call(method, *args, **settings)

    monkeypatch.setattr(ray.actor.ActorMethod, "_remote", counted)
    works = corpus.works(20)
    assert len(list(corpus.stream(iter(works)))) == len(works)
    assert called == []
    assert ray.util.list_named_actors(all_namespaces=True) == []


def test_data_changed_since_it_was_indexed_is_the_users_mistake(
    session: None, make_clips: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = make_clips(4, seed=1)
    encoder = make_encoder(Model(**AUDIO), Data(), tmp_path)
    index = build_index([Source(path=str(manifest))], "train", encoder, tmp_path)
    manifest.write_text(manifest.read_text().replace("clip", "clop"))
    with pytest.raises(UserError, match="has changed since it was indexed") as raised:
        list(Corpus(index, encoder).stream([Work(0, 1, 0, np.arange(4))]))
    assert "\n" not in str(raised.value)
