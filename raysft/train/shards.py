"""Reading the tensors of a checkpoint, and nothing else: no code that its files may hold runs.

torch writes the list of shards (`.metadata`) as a pickle, and whatever is no tensor as another. A
checkpoint may be somebody else's, checksums and all. So the list is read with stand-ins for the ten
names that torch's own holds: they keep what they are given and do nothing. From what they kept the
list is built, field by field; any other name, and any entry that is no tensor, is refused. Tensors
are read by torch's reader of weights alone.
"""

from __future__ import annotations

import pickle
from pathlib import PurePosixPath
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from raysft.errors import UserError
from raysft.parallel.strategy import State
from raysft.parallel.world import host_group
from raysft.patience import patiently
from raysft.run.storage import Folder, Storage

LIST = ".metadata"
_TORCH = "torch.distributed.checkpoint"
_NAMES = {
    *((f"{_TORCH}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((f"{_TORCH}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    *((f"{_TORCH}.metadata", name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    (f"{_TORCH}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


def tensors(storage: Storage, root: str) -> dict[str, TensorStorageMetadata]:
    """Name -> what is known of it, of all tensors that the shards below `root` hold.

    Raises UserError where their list is not one of ours.
    """
    found = _reader(storage, root).read_metadata().state_dict_metadata
    return {k: v for k, v in found.items() if isinstance(v, TensorStorageMetadata)}


def fill(storage: Storage, root: str, state: State, alone: bool) -> None:
    """Fill the tensors of `state` in place from the shards below `root`.

    alone: in this process only; else a collective. Raises UserError where there is something else
    than tensors.
    """
    reader, where = _reader(storage, root), storage.where(root)
    reader.read_metadata()  # torch passes over what is raised there
    try:
        group = None if alone else host_group()
        dcp.load(
            *(state,),
            storage_reader=reader,
            planner=_Planner(where),
            process_group=group,
            no_dist=alone,
        )
    except CheckpointException as error:
        raised = [wrapped[0] for _, wrapped in sorted(error.failures.items())]
        for found in raised:
            if isinstance(found, UserError):
                raise UserError(str(found)) from error
            if isinstance(found, pickle.UnpicklingError):  # of the reader of weights alone
                raise UserError(f"{where}: its shards hold something else than tensors") from error
        raise


def read_list(stream: IO[bytes], where: str) -> Metadata:
    """The list of shards that is in `stream`. Raises UserError, which names `where`."""
    try:
        return _metadata(_Unpickler(stream).load())
    except _ForeignError as error:
        raise UserError(
            f"{where}: names {error}, which the list of a checkpoint's shards has no use for; "
            "nothing of it was run. Take this checkpoint from nobody's hands but raysft's"
        ) from None
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError):
        raise UserError(f"{where}: is not the list of a checkpoint's shards, or damaged") from None


class _ForeignError(Exception):
    """A name that is not one of _NAMES."""


class _Kept:
    """Stands in for a class of torch's: keeps what it is made of (`made`) and its state."""

    state: Any

    def __init__(self, *made: Any) -> None:
        self.made = made

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _NAMES:
            return type(name, (_Kept,), {})  # of this read alone: a pickle may write on it
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise _ForeignError(f"{module}.{name}")


def _metadata(kept: object) -> Metadata:
    state = _state(kept, "Metadata")
    found = {str(name): _entry(entry) for name, entry in state["state_dict_metadata"].items()}
    return Metadata(
        found,
        {str(name): _path(path) for name, path in state["planner_data"].items()},
        {_index(index): _place(place) for index, place in state["storage_data"].items()},
        StorageMeta(),
        str(state.get("version")),
    )


def _entry(kept: object) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(kept).__name__ == "BytesStorageMetadata":  # an empty section of a state
        return BytesStorageMetadata()
    state = _state(kept, "TensorStorageMetadata")
    properties = state["properties"]
    dtype = _known(properties, "TensorProperties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(dtype)
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in state["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype),
        _size(state["size"]),
        [ChunkStorageMetadata(_size(c["offsets"]), _size(c["sizes"])) for c in chunks],
    )


def _index(kept: object) -> MetadataIndex:
    state = _state(kept, "MetadataIndex")
    offset, index = state.get("offset"), state.get("index")
    return MetadataIndex(
        str(state["fqn"]),
        None if offset is None else _size(offset),
        None if index is None else int(index),
    )


def _place(kept: object) -> _StorageInfo:
    state = _state(kept, "_StorageInfo")
    path = str(state["relative_path"])
    beside = path not in ("", "..") and PurePosixPath(path).name == path
    if not beside or state.get("transform_descriptors"):
        raise ValueError(path)  # of a file elsewhere, or packed in a way that is not ours
    return _StorageInfo(path, int(state["offset"]), int(state["length"]))


def _path(found: Any) -> tuple[str | int, ...]:
    path = tuple(found)
    if not all(isinstance(part, (str, int)) for part in path):
        raise TypeError(path)
    return path


def _size(kept: object) -> torch.Size:
    (numbers,) = _known(kept, "Size").made
    return torch.Size(int(number) for number in numbers)


def _state(kept: object, name: str) -> dict[str, Any]:
    state = _known(kept, name).state
    if not isinstance(state, dict):
        raise TypeError(state)
    return state


def _known(kept: object, name: str) -> _Kept:
    if not isinstance(kept, _Kept) or type(kept).__name__ != name:
        raise TypeError(kept)
    return kept


class _Reads:
    """Joined to a torch reader: its list of shards is read by `read_list`, and once."""

    found: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """As torch's, and never `pickle.load`."""
        if self.found is None:
            path = self._get_metadata_path()  # type: ignore[attr-defined]

            def read() -> Metadata:
                with self.fs.create_stream(path, "rb") as stream:  # type: ignore[attr-defined]
                    return read_list(stream, str(path))

            self.found = patiently(read, path)
        return self.found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As torch's, which fills the same tensors again where it failed."""
        read = super().read_data  # type: ignore[misc]
        return patiently(lambda: read(plan, planner), self.path)  # type: ignore[attr-defined]


class _FolderReader(_Reads, dcp.FileSystemReader):
    pass


class _StoreReader(_Reads, FsspecReader):
    pass


class _Planner(DefaultLoadPlanner):
    """Takes tensors only: torch would unpickle all else."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def load_bytes(self, read_item: ReadItem, value: object) -> None:
        """Refused."""
        name = read_item.dest_index.fqn
        raise UserError(f"{self.where}: {name} is no tensor there; nothing else is read")


def _reader(storage: Storage, root: str) -> dcp.StorageReader:
    where = storage.where(root)
    return _FolderReader(where) if isinstance(storage, Folder) else _StoreReader(where)
