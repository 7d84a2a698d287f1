"""Which base a run stands upon: what its config.yaml says of `model.path`, beside the path.

    base:
      revision: ...   of a hub id: the commit, which names its content; the run is pinned to it
      weights: ...    of a local folder: a digest of its safetensors
      config: ...     of a local folder: a digest of its config.json

A run goes on, and its adapter is merged and exported, on that base and on no other. Every worker
looks at what it has at the path itself: machines may hold other copies.

The digest takes name, type and shape of every tensor, and its bytes: all of them up to 4 MiB, of
larger tensors 64 pieces of 64 KiB, evenly spaced from the first byte to the last. So 7 B parameters
are read in about a second and 70 B in ten, whoever trained upon them; a change of a few values
inside a large matrix can escape it. How weights are cut into files does not matter.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from raysft import hub
from raysft.config.schema import Model
from raysft.errors import UserError
from raysft.json_types import Json
from raysft.patience import momentary, patiently

WHOLE, PIECES, PIECE = 4 * 2**20, 64, 64 * 2**10
# Keys of a config.json that say how it was written, not what is computed.
_NOISE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "architectures")
_THREADS = 8  # storage over a network answers many at once


def of(model: Model) -> dict[str, str] | None:
    """The identity of the base at `model.path`; None of random weights (`model.config`).

    Of a hub id, model.revision has to be resolved already: see `commit_of`. Raises UserError where
    the weights cannot be read.
    """
    if model.path is None:
        return None
    folder = Path(model.path)
    if not folder.is_dir():
        return {"revision": model.revision} if model.revision else None
    files = _weights(folder)
    stats = [path.stat() for path in (*files, folder / "config.json") if path.exists()]
    if not files or not (folder / "config.json").is_file():
        return None  # loading says what is missing
    seen = tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats)
    return dict(_of_folder(folder, tuple(files), seen))


def commit_of(model: Model) -> str | None:
    """The commit that `model.revision` (or the main branch) of a hub id is now; None of a folder.

    Asks the hub, or, without a network, its cache on this machine. Raises UserError where neither
    knows it.
    """
    if model.path is None or Path(model.path).is_dir():
        return None
    hub.check(model.path, "model.path", model.revision)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    at = f" at model.revision {model.revision}" if model.revision else ""
    try:
        found = hf_hub_download(model.path, "config.json", revision=model.revision)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.path: no model at {model.path!r}{at}: {reason}") from None
    return Path(found).parent.name


def differs(recorded: dict[str, str] | None, now: dict[str, str] | None) -> str | None:
    """What differs, in words; None where nothing does, or one of the two is not known."""
    if recorded is None or now is None:
        return None
    words = {"weights": "other weights", "config": "another config.json"}
    for key, what in words.items():
        if key in recorded and key in now and recorded[key] != now[key]:
            return f"{what} (digest {now[key][:12]}, was {recorded[key][:12]})"
    old, new = recorded.get("revision"), now.get("revision")
    return f"revision {new} (was {old})" if old and new and old != new else None


def refuse_other(
    where: str, model: Model, recorded: dict[str, str] | None, remedy: str
) -> dict[str, str] | None:
    """Raises UserError where `model.path` is not the base that was recorded; returns what it is.

    where: whose record it is, for the message.
    """
    now = of(model)
    if (difference := differs(recorded, now)) is not None:
        raise UserError(
            f"{where}: its base is another now: model.path {model.path} has {difference}; {remedy}"
        )
    return now


class _Tensor(NamedTuple):
    path: Path
    name: str
    kind: str
    start: int  # in the file
    size: int


@lru_cache(maxsize=8)
def _of_folder(
    folder: Path, files: tuple[Path, ...], _seen: tuple[object, ...]
) -> tuple[tuple[str, str], ...]:
    """Read once a process, while size, time and inode of the files stay."""

    def read() -> tuple[list[bytes], Json]:
        tensors = sorted((t for path in files for t in _tensors(path)), key=lambda t: t.name)
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = list(pool.map(_digest, tensors))
        return digests, json.loads((folder / "config.json").read_text(encoding="utf-8"))

    try:
        digests, config = patiently(read, folder, momentary)
    except OSError as error:
        raise UserError(f"model.path {folder}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # of struct and JSON too
        raise UserError(f"model.path {folder}: its weights cannot be read: {error}") from None
    whole = hashlib.sha256(b"".join(digests)).hexdigest()
    return (("weights", whole), ("config", _of_config(config)))


def _weights(folder: Path) -> list[Path]:
    """The safetensors that transformers loads, in its order of preference."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.is_file():
        return [one]
    if not index.is_file():
        return []
    try:
        content = patiently(partial(index.read_text, encoding="utf-8"), index)
        names = set(json.loads(content)["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"model.path: {index} cannot be read: {error}") from None
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise UserError(f"model.path {folder}: {missing[0]} is missing, which {index.name} names")
    return sorted(folder / name for name in names)


def _tensors(path: Path) -> Iterator[_Tensor]:
    """What a safetensors file holds, by its header."""
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
        except struct.error:
            raise ValueError(f"{path.name} is no safetensors file") from None
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is no safetensors file, or cut off")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = f"{entry['dtype']}{entry['shape']}"
            yield _Tensor(path, name, kind, 8 + length + begin, end - begin)


def _digest(tensor: _Tensor) -> bytes:
    found = hashlib.sha256(f"{tensor.name}\n{tensor.kind}\n".encode())
    places = [(0, tensor.size)]
    if tensor.size > WHOLE:
        last = tensor.size - PIECE
        places = [(last * i // (PIECES - 1), PIECE) for i in range(PIECES)]
    with tensor.path.open("rb") as file:
        for offset, size in places:
            file.seek(tensor.start + offset)
            content = file.read(size)
            if len(content) != size:
                raise ValueError(f"{tensor.path.name} is cut off")
            found.update(content)
    return found.digest()


def _of_config(config: Json) -> str:
    """Without what only says how it was written, at any depth."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in _NOISE}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()
