"""Tokenizers and feature extractors whose class comes with the model (`trust_remote_code`).

The driver makes them and sends them to data tasks and workers, perhaps on other machines. There the
module of the class, which transformers keeps in a folder of its own, is not known to Python: plain
pickling fails. So they travel as what `save_pretrained` writes, their code included, and are loaded
from that. All others are pickled.

Costs one loading a process, where somebody asks for the thing itself: data tasks do not.
"""

from __future__ import annotations

import io
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_REMOTE = "transformers_modules."  # what transformers puts before the names of such modules


def is_remote(thing: object) -> bool:
    """Whether its class comes from a model's folder or repository."""
    return type(thing).__module__.startswith(_REMOTE)


def packed(thing: Any, auto: str) -> bytes:
    """`thing` as bytes for `unpacked`, in any process.

    auto: the class of transformers that loads it, such as AutoTokenizer.
    """
    if not is_remote(thing):
        return pickle.dumps(thing)
    if type(thing)._auto_class is None:  # from the hub: its code would be left out
        type(thing).register_for_auto_class(auto)
    archive = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(archive, "w") as files:
        thing.save_pretrained(scratch)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                files.writestr(str(path.relative_to(scratch)), path.read_bytes())
    return pickle.dumps(_Archive(auto, archive.getvalue()))


def unpacked(content: bytes) -> Any:
    """The inverse of `packed`."""
    found = pickle.loads(content)  # noqa: S301 (our own bytes)
    return found.load() if isinstance(found, _Archive) else found


class _Archive:
    """Files of `save_pretrained`, code included."""

    def __init__(self, auto: str, content: bytes) -> None:
        self._auto, self._content = auto, content

    def load(self) -> Any:
        import transformers

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "raysft_code"  # in the name of the module: always the same
            with zipfile.ZipFile(io.BytesIO(self._content)) as files:
                files.extractall(folder)
            with one_at_a_time():
                return getattr(transformers, self._auto).from_pretrained(
                    folder, trust_remote_code=True
                )


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """While code is copied to where transformers keeps it: processes of a machine share that, and
    one would read what another has written half."""
    from filelock import FileLock
    from transformers.dynamic_module_utils import init_hf_modules
    from transformers.utils import HF_MODULES_CACHE

    init_hf_modules()
    with FileLock(Path(HF_MODULES_CACHE) / "raysft.lock"):
        yield
