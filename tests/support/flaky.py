"""A store whose reads fail now and then, by a share: files of this machine behind fsspec's protocol
`flaky`."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Flaky(LocalFileSystem):
    """share: of requests that fail. failed: how many did."""

    protocol = "flaky"
    cachable = False
    share: ClassVar[float] = 0.0
    failed: ClassVar[int] = 0
    _rng: ClassVar[random.Random] = random.Random(0)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:  # type: ignore[override]
        return LocalFileSystem._strip_protocol(str(path).removeprefix("flaky://"))

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        """Bytes, or an error."""
        self._fail(path)
        return super().cat_file(path, *args, **kwargs)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Of a file, or an error."""
        self._fail(path)
        return super().info(path, **kwargs)

    @classmethod
    def _fail(cls, path: str) -> None:
        if cls._rng.random() < cls.share:
            cls.failed += 1
            raise ConnectionResetError(f"{path}: the store hung up")


def register() -> None:
    """Make the protocol known in this process."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
