"""Failures: which of them starting again can mend, and what their user is told.

The rule of `certain`. Batches are a pure function of data, config and seed, so what went wrong in
the code or the data goes wrong again: wrong indices, values, types, missing keys or modules. What
the outside did is tried again: a process, node or connection that died, time-outs, files that
cannot be read just now, a machine out of memory. In between stands RuntimeError, as torch raises it
for wrong shapes and for a broken device alike, and an accelerator out of memory (the same batch
needs the same memory, but a process that has run for long may also have cut it into pieces): tried
again, and certain when it comes again at the same place without a new checkpoint in between
(`repeats`).

Knows nothing of Ray but how it wraps what a task raised, and what it says of dead workers.
Used on the driver, in workers, in tasks.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Literal

from raysft.errors import BadExample, UserError

# What is wrong in the code or the data. OSErrors are not, though some are ValueErrors too.
_CERTAIN = (
    UserError,
    BadExample,
    LookupError,  # IndexError, KeyError
    ValueError,
    TypeError,
    ArithmeticError,
    AttributeError,
    NameError,
    ImportError,  # ModuleNotFoundError
    SyntaxError,
    AssertionError,
    NotImplementedError,
    RecursionError,
)

# How another worker's end shows in this one, in words of gloo, NCCL and c10d.
_PEER = re.compile(
    r"[Cc]onnection (was )?(closed|reset|refused)|Broken pipe|NCCL|[Gg]loo|c10d|TCPStore|"
    r"[Pp]rocess ?[Gg]roup|[Cc]ollective|[Tt]imed out|[Tt]imeout|failed to recv|connectFullMesh"
)
_PEER_KINDS = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}
# What Ray says of a worker, and gloo and NCCL of another one, for which there is no type of error.
_SIGNS = {
    "low memory": ("running low on memory",),
    "died": ("worker process has died",),
    "lost connection": ("Connection closed by peer", "Connection reset by peer"),
}
_OUT_OF_MEMORY = re.compile(r"(CUDA|HIP|XPU|MPS).*out of memory|can't allocate memory", re.I)
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<where>\S+)', re.M)
_STANDARD = str(Path(traceback.__file__).parent)
_OURS = str(Path(__file__).parent)


def root(error: BaseException) -> BaseException:
    """What was raised in a task of Ray; any other error is itself."""
    while type(error).__module__.startswith("ray."):
        # client_exc: what an object sent to a worker raised there, when it was unpacked.
        cause = getattr(error, "cause", None) or getattr(error, "client_exc", None)
        if not isinstance(cause, BaseException) or cause is error:
            break
        error = cause
    return error


def certain(error: BaseException) -> bool:
    """Whether starting again would end the same way: see the rule above."""
    error = root(error)
    if isinstance(error, OSError) or from_peer(error):
        return False
    return isinstance(error, _CERTAIN)


def repeats(error: BaseException) -> str | None:
    """Names this failure where it is certain as soon as it comes again; None: it never is."""
    found = root(error)
    if certain(found) or from_peer(found) or not isinstance(found, RuntimeError):
        return None
    return f"{type(found).__name__} in {place(error)}"


def from_peer(error: BaseException) -> bool:
    """Whether this only follows from another worker's end: a collective that broke."""
    error = root(error)
    if _PEER_KINDS & {kind.__name__ for kind in type(error).__mro__}:
        return True
    # Where Ray takes a group down while one of it still works: ValueError.
    return isinstance(error, RuntimeError | ValueError) and bool(_PEER.search(str(error)))


def shows(error: BaseException, sign: Literal["low memory", "died", "lost connection"]) -> bool:
    """Whether a library's message says that this happened to a worker."""
    return any(words in str(error) for words in _SIGNS[sign])


def told(error: BaseException) -> str:
    """A failure in a line: the message of what its user can mend; of anything else the type, the
    message, and where it was raised."""
    found = root(error)
    if isinstance(found, UserError):
        return str(found)
    text = _message(found)
    said = f"{type(found).__name__}: {text}" if text else type(found).__name__
    where = place(error)
    said += f" ({where})" if where else ""
    if _OUT_OF_MEMORY.search(str(found)):
        said += (
            "; a step takes more memory than the device has left: lower data.tokens_per_batch, or "
            "set train.gradient_checkpointing=true"
        )
    return said


def place(error: BaseException) -> str:
    """Where `error` was raised: the innermost line that is not an installed library's, in raysft
    or in the user's own code; "" where that is not known."""
    frames = [
        (f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(error.__traceback__)
    ]
    if root(error) is not error:  # raised elsewhere: the traceback came as text
        frames += [(m["file"], int(m["line"]), m["where"]) for m in _FRAME.finditer(str(error))]
    ours = [frame for frame in frames if not _of_a_library(frame[0])]
    if not ours:
        return ""
    file, line, where = ours[-1]
    return f"{_short(file)}, line {line}, in {where}"


def full(error: BaseException) -> str:
    """The whole traceback, as text."""
    return "".join(traceback.format_exception(error))


def _message(error: BaseException) -> str:
    """The first line that says something; KeyError's is its key."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text[:300]


def _of_a_library(file: str) -> bool:
    if file.startswith(_OURS):
        return False
    return not Path(file).is_absolute() or file.startswith(_STANDARD) or "site-packages" in file


def _short(file: str) -> str:
    """raysft/train/loop.py wherever it is installed; other files as they are."""
    parts = Path(file).parts
    return str(Path(*parts[parts.index("raysft") :])) if "raysft" in parts[:-1] else file
