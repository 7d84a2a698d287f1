"""objects://: an object store that processes of this machine share. Importing this makes it known.

`worlds` imports it, so that every process it forks knows it.
"""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import fsspec


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
