"""Where checkpoints lie: whole and durable or not there, in folders and in object stores."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import resource
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from raysft import patience
from raysft.errors import UserError
from raysft.run.catalogue import MARKER, Catalogue, Saved
from raysft.run.storage import Folder, Storage, Store, digest, open_storage
from tests.support.objects import ObjectStore

KINDS = ("folder", "memory", "objects")


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """An empty one of each kind."""
    if request.param == "folder":
        yield Folder(tmp_path / "checkpoints")
    elif request.param == "objects":
        yield Store(f"objects://{tmp_path}/bucket/runs/a")
    else:
        store = Store(f"memory://{uuid.uuid4().hex}/runs/a")
        yield store
        fsspec.filesystem("memory").store.clear()


def test_a_checkpoint_is_there_from_its_marker_on_and_until_that_goes(storage: Storage) -> None:
    catalogue = Catalogue(storage)
    draft = storage.draft("step_5", "token")
    storage.write(f"{draft}/state/shard", b"weights")
    storage.write(f"{draft}/meta.json", b"{}")
    assert catalogue.committed() == []
    storage.publish(draft, "step_5", MARKER, b"sum\n")
    assert [saved.step for saved in catalogue.committed()] == [5]
    assert storage.names() == ["step_5"]
    root = Saved(5, storage).root
    assert storage.files(root) == [MARKER, "meta.json", "state/shard"]
    with storage.open(f"{root}/state/shard") as stream:
        assert stream.read() == b"weights"
    storage.withdraw("step_5", MARKER)
    assert catalogue.committed() == []
    storage.withdraw("step_5", MARKER)  # interrupted and done again
    storage.remove("step_5")
    storage.remove("step_5")
    assert storage.names() == storage.files("step_5") == []


def test_what_an_earlier_save_left_does_not_get_into_the_next_of_that_step(
    storage: Storage,
) -> None:
    storage.write("step_5/state/shard", b"damaged")
    storage.write(f"step_5/{MARKER}", b"old")
    storage.withdraw("step_5", MARKER)
    draft = storage.draft("step_5", "token")
    storage.write(f"{draft}/state/shard", b"sound")
    storage.publish(draft, "step_5", MARKER, b"new")
    root = Saved(5, storage).root
    with storage.open(f"{root}/state/shard") as stream, storage.open(f"{root}/{MARKER}") as marker:
        assert (stream.read(), marker.read()) == (b"sound", b"new")
    assert storage.names() == ["step_5"]


@pytest.mark.parametrize("content", [b"", b"x", os.urandom((1 << 20) + 3)], ids=len)
def test_files_are_overwritten_whole_and_their_digest_is_sha256(
    storage: Storage, content: bytes
) -> None:
    storage.write("step_1/processor/a.json", b"longer than what replaces it")
    storage.write("step_1/processor/a.json", content)
    with storage.open("step_1/processor/a.json") as stream:
        assert digest(stream) == (hashlib.sha256(content).hexdigest(), len(content))
    with pytest.raises(FileNotFoundError):
        storage.open("step_1/nothing")


def test_in_a_store_the_marker_is_written_after_all_else_and_deleted_before_it(
    tmp_path: Path,
) -> None:
    storage = Store(f"objects://{tmp_path}/bucket/a")
    ObjectStore.log.clear()
    draft = storage.draft("step_5", "token")
    for path in ("state/shard", "meta.json"):
        storage.write(f"{draft}/{path}", b"content")
    storage.publish(draft, "step_5", MARKER, b"sum")
    assert ObjectStore.log[-1] == ("put", f"a/{draft}/{MARKER}")
    storage.withdraw("step_5", MARKER)
    storage.remove("step_5")
    deleted = [key for kind, key in ObjectStore.log if kind == "delete"]
    assert deleted[0] == f"a/{draft}/{MARKER}"
    assert set(deleted) >= {f"a/{draft}/state/shard", f"a/{draft}/meta.json"}


def test_saves_of_versions_that_put_a_checkpoint_in_place_are_read_and_go(tmp_path: Path) -> None:
    storage = Store(f"objects://{tmp_path}/bucket/a")
    catalogue = Catalogue(storage)
    meta = b'{"step": 5}'
    storage.write("step_5/meta.json", meta)
    storage.write(f"step_5/{MARKER}", hashlib.sha256(meta).hexdigest().encode())
    assert [saved.meta() for saved in catalogue.committed()] == [{"step": 5}]
    storage.withdraw("step_5", MARKER)
    assert catalogue.committed() == []
    storage.remove("step_5")
    assert storage.names() == []


def test_two_saves_of_one_checkpoint_touch_nothing_of_each_other(storage: Storage) -> None:
    """A writer that another has replaced, and that wakes in the middle of its save."""
    old, new = (storage.draft("step_5", token) for token in ("000001.0001.f", "000002.0001.a"))
    for draft, content in ((old, b"stale"), (new, b"sound")):
        storage.write(f"{draft}/meta.json", content)
    storage.publish(new, "step_5", MARKER, b"sum")
    storage.write(f"{old}/meta.json", b"stale again")
    (saved,) = Catalogue(storage).committed()
    assert saved.read("meta.json") == b"sound"
    if isinstance(storage, Folder):
        with pytest.raises(UserError, match="another job has published this checkpoint"):
            storage.publish(old, "step_5", MARKER, b"sum")
    else:
        storage.publish(old, "step_5", MARKER, b"sum")
    storage.remove(old)
    (saved,) = Catalogue(storage).committed()
    assert (saved.read("meta.json"), saved.read(MARKER)) == (b"sound", b"sum")


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(
    tmp_path: Path,
) -> None:
    storage = Folder(tmp_path)
    storage.write("step_1/meta.json", b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            storage.write("step_1/meta.json", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "step_1" / "meta.json").read_bytes() == b"before"
    assert [path.name for path in (tmp_path / "step_1").iterdir()] == ["meta.json"]


def test_a_marker_that_cannot_be_read_is_an_error_and_not_a_missing_marker(
    tmp_path: Path,
) -> None:
    """Taken for missing, the checkpoint would be deleted as left behind by an interrupted save,
    and the run silently restarted at 0 (as in verl 7952)."""
    (tmp_path / "checkpoints" / "step_5" / MARKER).mkdir(parents=True)  # no file: cannot be read
    catalogue = Catalogue(open_storage(tmp_path, None))
    for call in (catalogue.committed, catalogue.newest, lambda: catalogue.clear(0)):
        with pytest.raises(UserError, match=f"step_5/{MARKER}: cannot be read: Is a directory"):
            call()
    assert (tmp_path / "checkpoints" / "step_5").is_dir()


class FailsAtFirst(ObjectStore):
    """flaky://: the first call of each kind comes to nothing."""

    protocol = "flaky"
    failed: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        kinds = ("ls", "exists", "rm", "find", "pipe_file", "open")
        if name in kinds and name not in FailsAtFirst.failed:
            FailsAtFirst.failed.add(name)

            def fail(*_: Any, **__: Any) -> None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            return fail
        return super().__getattribute__(name)


def test_a_store_that_fails_for_a_moment_is_asked_again(tmp_path: Path) -> None:
    fsspec.register_implementation("flaky", FailsAtFirst, clobber=True)
    storage = Store(f"flaky://{tmp_path}/bucket/runs/a")
    patience.allow(2.0)
    draft = storage.draft("step_5", "token")
    storage.publish(draft, "step_5", MARKER, b"sum\n")
    assert storage.names() == ["step_5"] and storage.files(draft) == [MARKER]
    assert storage.open(f"{draft}/{MARKER}").read() == b"sum\n"
    storage.withdraw("step_5", MARKER)
    storage.remove("step_5")
    assert storage.names() == []
    assert FailsAtFirst.failed == {"ls", "exists", "rm", "find", "pipe_file", "open"}


def test_a_rename_that_was_done_although_it_failed_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS, where the answer is lost."""
    real, storage = os.replace, Folder(tmp_path)
    draft = storage.draft("step_5", "token")
    storage.write(f"{draft}/state", b"weights")
    lost: list[object] = []

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        if target == tmp_path / "step_5" and not lost:
            lost.append(target)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", replace)
    storage.publish(draft, "step_5", MARKER, b"sum\n")
    assert lost and storage.files("step_5") == [MARKER, "state"]


def test_checkpoint_path_is_a_folder_or_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place, folder in (
        (None, tmp_path / "run" / "checkpoints"),
        (f"{tmp_path}/other", tmp_path / "other" / "run"),
        (f"file://{tmp_path}/other", tmp_path / "other" / "run"),  # fsspec's would not be durable
        ("~/other", tmp_path / "home" / "other" / "run"),
        ("other", tmp_path / "other" / "run"),  # wherever a worker's own folder is
    ):
        found = open_storage(tmp_path / "run", place)
        assert isinstance(found, Folder) and found.root == folder
    found = open_storage(tmp_path / "run", f"objects://{tmp_path}/bucket/a/")
    assert isinstance(found, Store)
    assert found.where("step_3") == f"objects://{tmp_path}/bucket/a/run/step_3"


def test_a_url_of_no_known_store_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint.path: nowhere://a/.*expected a folder or"):
        open_storage(tmp_path, "nowhere://a")
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(UserError, match=r"checkpoint.path: s3://a/.*s3fs"):
            open_storage(tmp_path, "s3://a")
