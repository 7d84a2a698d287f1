"""No code that a checkpoint's files may hold is run when they are read."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata

from raysft.errors import UserError
from raysft.run.storage import Storage, open_storage
from raysft.train import shards

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.fixture(params=["folder", "store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """A place with a checkpoint of WEIGHTS in `step_1/state`."""
    place = None if request.param == "folder" else f"memory://{tmp_path.name}"
    found = open_storage(tmp_path, place)
    save(found, {"model": WEIGHTS, "more": {}})
    yield found
    found.remove("step_1")


def save(storage: Storage, state: dict[str, Any]) -> None:
    root = storage.where("step_1/state")
    local = "://" not in root
    writer = dcp.FileSystemWriter(root) if local else shards_writer(root)
    dcp.save(state, storage_writer=writer, no_dist=True)


def shards_writer(root: str) -> dcp.StorageWriter:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    return FsspecWriter(root, sync_files=False)


def put(storage: Storage, content: bytes) -> None:
    storage.write(f"step_1/state/{shards.LIST}", content)


def empty() -> dict[str, Any]:
    return {"model": {name: torch.empty_like(value) for name, value in WEIGHTS.items()}}


def refused(storage: Storage, because: str) -> None:
    with pytest.raises(UserError, match=because) as told:
        shards.fill(storage, "step_1/state", empty(), alone=True)
    assert "step_1/state" in str(told.value) and "\n" not in str(told.value)


def test_the_list_that_is_read_is_the_one_torch_would_read(storage: Storage) -> None:
    with storage.open(f"step_1/state/{shards.LIST}") as stream:
        content = stream.read()
    ours = shards.read_list(io.BytesIO(content), "here")
    theirs = pickle.loads(content)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data
    assert set(shards.tensors(storage, "step_1/state")) == {"model.w", "model.b"}
    state = empty()
    shards.fill(storage, "step_1/state", state, alone=True)
    assert all(torch.equal(state["model"][name], value) for name, value in WEIGHTS.items())


def test_code_in_the_list_of_shards_does_not_run(storage: Storage, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    whole = metadata.Metadata({}, {}, {}, Evil(proof))  # type: ignore[arg-type]
    for content in (Evil(proof), whole, [Evil(proof)]):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            put(storage, pickle.dumps(content, protocol))
            refused(storage, r"names (posix\.mkdir|copy_?reg\._reconstructor), which")
            with pytest.raises(UserError):
                shards.tensors(storage, "step_1/state")
    assert not proof.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\neval\n(V1\ntR.",
        b"ctorch\nload\n(V/etc/passwd\ntR.",
        b"ctorch.serialization\nload\n.",
        b"ctorch\nos.system\n.",
        b"\x80\x04\x8c\x05torch\x8c\tos.system\x93.",
        b"\x80\x04\x8c\x07pathlib\x8c\x0cPosixPath.os\x93.",
        b"cnumpy\nfromfile\n(V/etc/passwd\ntR.",
    ],
)
def test_every_name_outside_the_list_is_refused_by_name(code: bytes) -> None:
    name = rb"(eval|load|system|PosixPath\.os|fromfile)"
    with pytest.raises(UserError, match=rf"here: names .*{name.decode()}, which"):
        shards.read_list(io.BytesIO(code), "here")


def test_what_a_list_writes_upon_a_class_stays_in_that_read() -> None:
    """BUILD sets attributes, of classes too: those of torch, and of the next read, stay."""
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    spoilt = name + b"(N}V__init__\nVspoilt\nstb."
    before = metadata.Metadata.__init__
    with pytest.raises(UserError, match="not the list"):
        shards.read_list(io.BytesIO(spoilt), "here")
    assert metadata.Metadata.__init__ is before
    assert shards._Kept(1).made == (1,)


@pytest.mark.parametrize("content", [b"", b"\x80", b"N.", b"}.", b"\x80\x04]."])
def test_what_is_no_list_of_shards_is_said_in_a_line(content: bytes) -> None:
    with pytest.raises(UserError, match="here: is not the list of a checkpoint's shards"):
        shards.read_list(io.BytesIO(content), "here")


def test_a_weight_that_is_no_tensor_is_not_unpickled(storage: Storage, tmp_path: Path) -> None:
    """torch's planner calls torch.load(weights_only=False) for entries that say they are bytes."""
    proof = tmp_path / "ran"
    storage.remove("step_1")
    save(storage, {"model": {"w": Evil(proof), "b": WEIGHTS["b"]}})
    refused(storage, r"model\.w is no tensor there")
    assert not proof.exists()


def test_a_shard_that_hides_code_behind_a_tensors_name_is_not_unpickled(
    storage: Storage, tmp_path: Path
) -> None:
    proof = tmp_path / "ran"
    (shard,) = [name for name in storage.files("step_1/state") if name.endswith(".distcp")]
    buffer = io.BytesIO()
    torch.save(Evil(proof), buffer)
    with storage.open(f"step_1/state/{shards.LIST}") as stream:
        found = pickle.load(stream)
    for place in found.storage_data.values():
        place.offset, place.length = 0, len(buffer.getvalue())
    storage.write(f"step_1/state/{shard}", buffer.getvalue())
    put(storage, pickle.dumps(found))
    refused(storage, "something else than tensors")
    assert not proof.exists()


def test_a_list_cannot_name_files_elsewhere(storage: Storage) -> None:
    with storage.open(f"step_1/state/{shards.LIST}") as stream:
        found = pickle.load(stream)
    for path in ("../../secret", "/etc/passwd", "a/b", "..", ""):
        for place in found.storage_data.values():
            place.relative_path = path
        put(storage, pickle.dumps(found))
        refused(storage, "is not the list")


def test_an_index_whose_columns_hide_objects_is_not_unpickled(tmp_path: Path) -> None:
    from raysft.data.index import part
    from raysft.data.index.table import _COLUMNS, Index

    proof = tmp_path / "ran"
    meta = {"version": part.VERSION, "hash": "", "tasks": [], "sources": [], "files": []}
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "encoder": ""}))
    for name in _COLUMNS:
        np.save(tmp_path / f"{name}.npy", np.array([Evil(proof)], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"pickle|Python objects"):
        Index.load(tmp_path)
    assert not proof.exists()
