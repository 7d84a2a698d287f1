"""Storage that fails for a moment: try again for a while, say once what is waited for, then end.

Stands under everything that reads or writes files. How long is `data.retry_s`, set once in each
process by `allow`. What is tried again is decided by the error's number:

    EISDIR, ELOOP, ENAMETOOLONG   the path itself is wrong: never
    ENOENT, ENOTDIR               of what is known to be there (the index has read it): yes, its
                                  mount may be gone; of what may be absent: an answer, not an error
    all others                    EIO, ESTALE, EACCES, ETIMEDOUT, ENOSPC, EMFILE, ...: yes

What is tried has to be safe to do twice: a read, a whole file written beside and renamed, an append
whose half is cut away first. An fsync alone is not: where it failed, the system may have forgotten
what it was to write, and would say yes the second time. Costs nothing where nothing fails.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from raysft.errors import UserError

log = logging.getLogger(__name__)

SECONDS = 30.0
"""Default of data.retry_s."""

_FIRST, _LONGEST = 0.05, 2.0  # seconds between two tries: doubled each time
_OF_THE_PATH = frozenset({errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
_SPENT = "raysft_waited"  # on an error for which it was waited already

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_allowed = SECONDS
_lock = threading.Lock()
_waiting = 0


def allow(seconds: float) -> None:
    """From now on this process waits so long for each file; 0: it tries once."""
    global _allowed
    _allowed = seconds


def allowed() -> float:
    """Seconds this process waits for a file."""
    return _allowed


def missing(error: OSError) -> bool:
    """Whether it says that there is no such file."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR)


def momentary(error: OSError) -> bool:
    """Whether the storage may be at fault: it may pass."""
    return error.errno not in _OF_THE_PATH


def failing(error: OSError) -> bool:
    """As `momentary`, of a file that may be absent: that it is missing will not pass."""
    return momentary(error) and not missing(error)


def patiently(
    call: Callable[[], _Result],
    place: str | os.PathLike[str],
    passing: Callable[[OSError], bool] = failing,
) -> _Result:
    """call(), again with growing pauses while it raises an OSError that may pass.

    place: what is waited for, for the line that says so. passing: which errors may pass. Raises the
    last error, and at once one that does not pass or that was waited for already, further down.
    """
    try:
        return call()
    except OSError as error:
        if not _allowed or not passing(error) or hasattr(error, _SPENT):
            raise
        begun = time.monotonic()
        with _Waiting(place, error):
            return _again(call, passing, begun)


def known(call: Callable[[], _Result], place: str | os.PathLike[str], lost: str = "") -> _Result:
    """As `patiently`, of what is known to be there: its absence is its storage's fault too.

    lost: what to do where the file is lost for good. Raises UserError, naming file and host.
    """
    try:
        return patiently(call, place, momentary)
    except OSError as error:
        raise away(place, error, lost) from error


def patient(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """`function`, safe to be done twice, done as `patiently` does: what it is waiting for is the
    file that its error names."""

    @wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        return patiently(lambda: function(*args, **kwargs), "")

    return call


def away(place: str | os.PathLike[str], error: OSError, lost: str = "") -> UserError:
    """That something which is there, or was, cannot be read, in a line."""
    tried = f", tried for {_allowed:g} s (data.retry_s)" if _allowed else " (data.retry_s=0)"
    return UserError(
        f"{place!s}: its storage does not give it on {socket.gethostname()}: "
        f"{error.strerror or error}{tried}: see that it is mounted and answers there, then start "
        f"again: nothing was left out{lost}"
    )


def _again(
    call: Callable[[], _Result], passing: Callable[[OSError], bool], begun: float
) -> _Result:
    pause = _FIRST
    while True:
        left = begun + _allowed - time.monotonic()
        time.sleep(max(0.0, min(pause, left)))
        pause = min(2 * pause, _LONGEST)
        try:
            return call()
        except OSError as error:
            if not passing(error) or hasattr(error, _SPENT):
                raise
            if left <= pause / 2:  # that was the last try
                setattr(error, _SPENT, True)
                raise


class _Waiting:
    """Says that it waits, and for what, where nobody in this process waits yet."""

    def __init__(self, place: str | os.PathLike[str], error: OSError) -> None:
        what = str(place) or error.filename or "the run's folder"
        self._what = f"{what} ({error.strerror or error}) on {socket.gethostname()}"

    def __enter__(self) -> None:
        global _waiting
        with _lock:
            _waiting += 1
            first = _waiting == 1
        if first:
            log.warning("waiting up to %g s (data.retry_s) for %s", _allowed, self._what)

    def __exit__(self, *about: object) -> None:
        global _waiting
        with _lock:
            _waiting -= 1


os.register_at_fork(after_in_child=lambda: globals().update(_waiting=0, _lock=threading.Lock()))
