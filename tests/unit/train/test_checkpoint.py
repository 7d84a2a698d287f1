"""Checkpoints come back to the bit; what is damaged is skipped, with the reason, or refused."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raysft.config.schema import Config, Optim
from raysft.errors import UserError
from raysft.parallel import World
from raysft.parallel.ddp import Ddp
from raysft.run.catalogue import MARKER, Catalogue, best_step
from raysft.run.storage import Folder, Storage, Store, open_storage
from raysft.train.checkpoint import Saver, load, load_weights, newest_sound
from tests.support import objects  # noqa: F401 - makes objects:// known

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
torch.set_num_threads(1)
ONE = World.current()


class Trained:
    """A small model, an optimizer that has moments, and saves of them at will."""

    def __init__(self, storage: Storage, seed: int = 0, **settings: Any) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        self.strategy = Ddp(Config(optim=Optim(lr=0.1)), self.module, ONE)
        self.storage, self.catalogue = storage, Catalogue(storage)
        self.saver = Saver(self.catalogue, ONE, settings.pop("keep", 9), **settings)

    def step(self) -> None:
        self.module(torch.randn(4, 6)).square().sum().backward()
        self.strategy.step(1.0)

    def save(self, *steps: int, **meta: Any) -> None:
        for step in steps:
            self.step()
            self.saver.start(step, self.strategy, meta)
            self.saver.wait()

    def state(self) -> list[torch.Tensor]:
        """All numbers there are, copied."""
        moments = [
            value for state in self.strategy.optimizer.state.values() for value in state.values()
        ]
        return [tensor.detach().clone() for tensor in (*self.module.parameters(), *moments)]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path, None)


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- saving and loading --------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["{}/here", "memory://somewhere/a", "objects://{}/bucket/a"])
def test_model_and_optimizer_come_back_to_the_bit_from_every_kind_of_place(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    monkeypatch.setattr(os, "sync", lambda: synced.append(True))
    storage = open_storage(tmp_path, place.format(tmp_path))
    ours = Trained(storage, extras={"processor/a.json": b"{}"})
    ours.save(1, 2, note="second")
    found, skipped = newest_sound(ours.catalogue, ONE)
    assert found is not None and (found.step, skipped) == (2, [])
    theirs = Trained(storage, seed=1)
    theirs.step()
    assert not same(ours.state(), theirs.state())
    assert load(found, theirs.strategy)["note"] == "second"
    assert same(ours.state(), theirs.state())
    weights = Trained(storage, seed=2)
    load_weights(found, weights.strategy)
    assert same(list(weights.module.parameters()), list(ours.module.parameters()))
    assert not synced, "a save into a store must not wait for all disks of the machine"
    files = found.meta()["files"]
    assert set(files) == {"state/__0_0.distcp", "state/.metadata", "processor/a.json"}
    [_, last] = ours.saver.finished()
    assert last.bytes == sum(size for _, size in files.values())


class Slow(Folder):
    """Writes only while `go` is set."""

    go = threading.Event()

    def write(self, path: str, content: bytes) -> None:
        assert self.go.wait(20)
        super().write(path, content)


def test_what_is_saved_is_the_state_at_the_call_while_training_goes_on(tmp_path: Path) -> None:
    storage = Slow(tmp_path)
    ours = Trained(storage)
    storage.go.clear()
    ours.step()
    before = ours.state()
    ours.saver.start(1, ours.strategy, {})
    for _ in range(3):
        ours.step()
    assert ours.saver.finished() == [] and not same(before, ours.state())
    storage.go.set()
    ours.saver.wait()
    found, _ = newest_sound(ours.catalogue, ONE)
    assert found is not None
    load(found, ours.strategy)
    assert same(before, ours.state())


def test_a_save_in_flight_is_waited_for_by_the_next_which_is_told_and_timed(
    tmp_path: Path,
) -> None:
    storage = Slow(tmp_path)
    ours = Trained(storage)
    storage.go.clear()
    ours.step()
    ours.saver.start(1, ours.strategy, {})
    beats: list[list[str]] = []

    def waiting() -> None:
        beats.append(storage.names())
        threading.Timer(0.3, storage.go.set).start()

    ours.saver.wait(waiting)
    assert beats and "step_1" not in beats[0]
    assert "step_1" in storage.names(), "published before the next begins"
    storage.go.clear()
    ours.saver.start(2, ours.strategy, {})
    [first] = ours.saver.finished()  # told while the next is in flight
    assert (first.step, ours.saver.finished()) == (1, [])
    assert 0.25 < first.stalled <= first.seconds + 1.1
    storage.go.set()
    ours.saver.wait()
    [second] = ours.saver.finished()
    assert second.step == 2


# -- what goes, and when -------------------------------------------------------------------------


def steps(storage: Storage) -> list[int]:
    return [saved.step for saved in Catalogue(storage).committed()]


def test_the_last_ones_are_kept_and_the_best_however_old(storage: Storage) -> None:
    values = {1: {"wer/dev": 0.5}, 2: {"wer/dev": 0.2}, 3: {"cer/dev": 0.1}, 4: {"wer/dev": 0.2}}
    ours = Trained(storage, keep=2, spare=lambda steps: {best_step(values, "wer/dev", "min")})
    ours.save(1, 2, 3, 4, 5)
    assert steps(storage) == [2, 4, 5]
    assert sorted(storage.names()) == ["step_2", "step_4", "step_5"], "and nothing of the others"
    values[5] = {"wer/dev": 0.1}
    ours.saver.prune()
    assert steps(storage) == [4, 5]
    assert best_step(values, "wer/dev", "max") == 1
    assert best_step(values, "bleu/dev", "max") is None


class Recorded(Folder):
    """Notes what happens, in order."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.log: list[tuple[str, str]] = []

    def publish(self, draft: str, name: str, marker: str, content: bytes) -> None:
        self.log.append(("publish", name))
        super().publish(draft, name, marker, content)
        self.log.append(("published", name))

    def withdraw(self, name: str, marker: str) -> None:
        self.log.append(("withdraw", name))
        super().withdraw(name, marker)

    def remove(self, name: str) -> None:
        self.log.append(("remove", name))
        super().remove(name)


def test_an_older_one_goes_only_after_the_newer_one_is_durable_and_in_place(
    tmp_path: Path,
) -> None:
    """KempnerForge 102: `latest` moved before the data was durable, and the older one pruned."""
    storage = Recorded(tmp_path)
    Trained(storage, keep=1, settle=lambda: storage.log.append(("settle", ""))).save(1, 2)
    assert storage.log == [
        ("settle", ""),
        ("publish", "step_1"),
        ("published", "step_1"),
        ("settle", ""),
        ("publish", "step_2"),
        ("published", "step_2"),
        ("withdraw", "step_1"),
        ("remove", "step_1"),
    ]


def test_what_a_save_writes_is_hashed_on_the_way_and_not_read_again(tmp_path: Path) -> None:
    ours = Trained(Folder(tmp_path))
    more = {"large": torch.randn(4 << 20)}
    ours.saver.start(1, ours.strategy, {}, more)
    ours.saver.wait()  # what torch imports at its first save is read
    before = bytes_read()
    ours.saver.start(2, ours.strategy, {}, more)
    ours.saver.wait()
    read = bytes_read() - before
    (saved,) = [found for found in ours.catalogue.committed() if found.step == 2]
    files = saved.meta()["files"]
    assert {"state/.metadata", "state/__0_0.distcp"} <= files.keys()
    for name, (digest, size) in files.items():
        content = (tmp_path / "step_2" / name).read_bytes()
        assert [hashlib.sha256(content).hexdigest(), len(content)] == [digest, size]
    assert sum(size for _, size in files.values()) > 16 << 20
    assert read < 2 << 20


def bytes_read() -> int:
    """By this process so far, from the page cache too."""
    (line,) = [x for x in Path("/proc/self/io").read_text().splitlines() if x.startswith("rchar")]
    return int(line.split()[1])


class Failing(Folder):
    """Its n-th write from now on fails, as on a full disk."""

    left = -1

    def write(self, path: str, content: bytes) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device", path)
        super().write(path, content)


@pytest.mark.parametrize("write", [1, 2, 3])
def test_a_save_that_fails_is_told_and_leaves_the_one_before_and_nothing_of_itself(
    write: int, tmp_path: Path
) -> None:
    """verl 7952: the asynchronous save never wrote its tracker, and nobody was told."""
    storage = Failing(tmp_path)
    ours = Trained(storage, keep=1, extras={"config.yaml": b"run: {}"})
    ours.save(1)
    storage.left = write  # config.yaml, meta.json, marker
    ours.step()
    ours.saver.start(2, ours.strategy, {})
    said = f"{tmp_path}/step_2: the checkpoint cannot be written: No space left on device"
    deadline = time.monotonic() + 20
    with pytest.raises(UserError, match=said):
        while time.monotonic() < deadline:
            ours.saver.finished()
    assert storage.names() == ["step_1"]
    found, skipped = newest_sound(ours.catalogue, ONE)
    assert found is not None and (found.step, skipped) == (1, [])
    ours.save(3)
    assert storage.names() == ["step_3"]


def test_a_start_that_no_longer_owns_the_run_publishes_nothing(storage: Storage) -> None:
    class Taken:
        by: str | None = None

        def require(self) -> None:
            if self.by is not None:
                raise UserError(self.by)

    permit = Taken()
    ours = Trained(storage, keep=1, permit=permit)
    ours.save(1)
    permit.by = "another job has taken over this run"
    with pytest.raises(UserError, match=r"step_2: .* another job has taken over this run"):
        ours.save(2)
    assert storage.names() == ["step_1"]


def test_shards_of_an_earlier_save_are_not_merged_into_the_next_of_that_step(
    tmp_path: Path,
) -> None:
    """ray 41700. In a store both lie in one place: here one of three workers, found damaged."""
    storage = Store(f"objects://{tmp_path}/bucket/a")
    Trained(storage).save(1)
    for name, content in (
        ("__2_0.distcp", b"damaged"),
        ("__2_0.distcp.sums", json.dumps([["__2_0.distcp", "0" * 64, 7]]).encode()),
        ("__2_0.distcp.f00.sums", json.dumps([["__2_0.distcp", "0" * 64, 7]]).encode()),
    ):
        storage.write(f"step_2/state/{name}", content)
    ours = Trained(storage)
    ours.save(2)
    found, skipped = newest_sound(ours.catalogue, ONE)
    assert found is not None and (found.step, skipped) == (2, [])
    assert "state/__2_0.distcp" not in found.meta()["files"]


def test_what_interrupted_saves_and_deletions_left_is_cleared_away(storage: Storage) -> None:
    ours = Trained(storage)
    ours.save(1, 2, 3, 4)
    storage.withdraw("step_1", MARKER)  # killed before it was removed
    storage.write(".step_5.token/state/__0_0.distcp", b"half")  # killed before it was published
    assert isinstance(storage, Folder)
    (storage.root / "notes.txt").write_text("the user's")
    ours.catalogue.clear(keep_to=3)
    assert sorted(storage.names()) == ["notes.txt", "step_2", "step_3", "step_4"]
    assert steps(storage) == [2, 3], "a later one, skipped as damaged, is kept without its marker"


# -- damage --------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


Damage = Callable[[Path], None]
DIFFERS = "is not as it was written (checksum differs)"
GONE = "cannot be read: No such file or directory"
DAMAGES = [
    ("state/__0_0.distcp", flip, DIFFERS),
    ("state/__0_0.distcp", cut, DIFFERS),
    ("state/__0_0.distcp", grow, DIFFERS),
    ("state/__0_0.distcp", Path.unlink, GONE),
    ("state/.metadata", flip, DIFFERS),
    ("state/.metadata", Path.unlink, GONE),
    ("config.yaml", flip, DIFFERS),
    ("meta.json", flip, DIFFERS),
    ("meta.json", empty, DIFFERS),
    ("meta.json", Path.unlink, GONE),
    (MARKER, flip, "meta.json " + DIFFERS),
    (MARKER, empty, "meta.json " + DIFFERS),
    (MARKER, Path.unlink, "has no commit marker"),
]


@pytest.mark.parametrize(
    ("file", "damage", "said"), DAMAGES, ids=[f"{f}-{d.__name__}" for f, d, _ in DAMAGES]
)
def test_a_damaged_checkpoint_is_skipped_with_the_reason_and_the_one_before_is_used(
    file: str, damage: Damage, said: str, storage: Storage
) -> None:
    ours = Trained(storage, extras={"config.yaml": b"run: {}"})
    ours.save(1, 2, 3)
    damage(Path(storage.where("step_3")) / file)
    found, skipped = newest_sound(ours.catalogue, ONE)
    assert found is not None and found.step == 2
    [reason] = skipped
    assert reason.startswith(f"{storage.where('step_3')}: ") and said in reason
    assert "\n" not in reason


def test_when_all_are_damaged_nothing_starts_from_the_beginning(storage: Storage) -> None:
    ours = Trained(storage)
    ours.save(1, 2)
    flip(Path(storage.where("step_1")) / "state" / "__0_0.distcp")
    cut(Path(storage.where("step_2")) / "meta.json")
    with pytest.raises(UserError) as error:
        newest_sound(ours.catalogue, ONE)
    text = str(error.value)
    assert "no checkpoint of this run can be read" in text and "delete them all" in text
    assert f"{storage.where('step_1')}: state/__0_0.distcp" in text
    assert f"{storage.where('step_2')}: meta.json" in text
