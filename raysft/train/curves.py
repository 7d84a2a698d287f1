"""A run's curves for TensorBoard, written as patiently as its other files.

The package writes in a thread of its own, which an error of the storage would end; whoever adds a
value then gets that error.
"""

from __future__ import annotations

import os
from pathlib import Path

from tensorboard.compat.tensorflow_stub.io import gfile
from torch.utils.tensorboard import SummaryWriter

from raysft import patience


class _Files(gfile.LocalFileSystem):
    """Files of this machine: what is appended is there whole, once."""

    def append(self, filename: str, file_content: bytes | str, binary_mode: bool = False) -> None:
        """Called for some records at a time."""
        before: int | None = None

        def put() -> None:
            nonlocal before
            if before is None:
                before = os.stat(filename).st_size
            else:
                os.truncate(filename, before)  # half of it may be there
            gfile.LocalFileSystem.append(self, filename, file_content, binary_mode)

        patience.patiently(put, filename)

    def write(self, filename: str, file_content: bytes | str, binary_mode: bool = False) -> None:
        """Called for the first record of a file."""
        write = gfile.LocalFileSystem.write
        patience.patiently(lambda: write(self, filename, file_content, binary_mode), filename)


def curves(folder: Path, step: int) -> SummaryWriter:
    """A writer of curves into `folder`, from the step after `step` on."""
    gfile.register_filesystem("", _Files())
    purge = step + 1 if step else None
    return patience.patiently(lambda: SummaryWriter(str(folder), purge_step=purge), folder)
