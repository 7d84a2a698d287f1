"""Where checkpoints lie: whole and durable or not there, in folders and in object stores."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import resource
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import fsspec
import pytest

from raysft.errors import UserError
from raysft.train.catalogue import MARKER, Catalogue, Saved
from raysft.train.storage import Folder, Storage, Store, digest, open_storage


class ObjectStore(fsspec.AbstractFileSystem):
    """objects:///FOLDER/bucket/KEY: what S3 offers, on a local folder that processes share.

    An object appears whole when its upload ends; there are no folders, no renames (torch's of
    .metadata becomes a copy and a deletion), no appending.
    """

    protocol = "objects"
    log: ClassVar[list[tuple[str, str]]] = []  # what this process changed: put or delete, and key

    def _place(self, path: str) -> tuple[Path, str]:
        bucket, _, key = self._strip_protocol(path).partition("/bucket/")
        return Path(f"{bucket}/bucket"), key

    def _object(self, path: str) -> Path:
        bucket, key = self._place(path)
        return bucket / quote(key, safe="")

    def _put(self, path: str, content: bytes) -> None:
        bucket, key = self._place(path)
        bucket.mkdir(parents=True, exist_ok=True)
        upload = bucket.parent / uuid.uuid4().hex
        upload.write_bytes(content)
        os.replace(upload, self._object(path))
        self.log.append(("put", key))

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        if mode == "rb":
            return io.BytesIO(self._object(path).read_bytes())
        assert mode == "wb", f"an object store cannot open with {mode}"
        return _Upload(self, path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        bucket, key = self._place(path)
        top, found = f"{key.rstrip('/')}/", {}
        for item in bucket.iterdir() if bucket.is_dir() else ():
            name = unquote(item.name)
            if name.startswith(top):
                first, deeper, _ = name[len(top) :].partition("/")
                kind = "directory" if deeper else "file"
                found[first] = {"name": f"{bucket}/{top}{first}", "type": kind, "size": 0}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else [item["name"] for item in found.values()]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path).rstrip("/")
        if self._object(path).is_file():
            return {"name": path, "type": "file", "size": self._object(path).stat().st_size}
        self.ls(path)
        return {"name": path, "type": "directory", "size": 0}

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        self._put(path2, self._object(path1).read_bytes())

    def rm_file(self, path: str) -> None:
        self._object(path).unlink(missing_ok=True)
        self.log.append(("delete", self._place(path)[1]))


class _Upload(io.BytesIO):
    def __init__(self, store: ObjectStore, path: str) -> None:
        super().__init__()
        self._store, self._path = store, path

    def close(self) -> None:
        if not self.closed:
            self._store._put(self._path, self.getvalue())
        super().close()


fsspec.register_implementation("objects", ObjectStore, clobber=True)

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
        store._fs.store.clear()


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
