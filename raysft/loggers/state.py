"""What runs are called where they are logged, so that another start goes on there.

loggers.json in a run's folder: its own ids. .loggers/ beside runs: ids that they share.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from raysft.run.storage import write_whole

NAME = "loggers.json"
SHARED = ".loggers"  # a folder beside runs, of what they share
WAIT_S = 60.0  # for another run to make one
_lock = threading.Lock()  # loggers have threads of their own


def kept_id(folder: Path, place: str, new: Callable[[], str]) -> str:
    """The id that the run in `folder` has at `place`; where it has none, `new` makes it."""
    path = folder / NAME

    def ids() -> dict[str, str]:
        return json.loads(path.read_bytes()) if path.is_file() else {}

    if (found := ids().get(place)) is None:
        found = new()  # which may take its time
        with _lock:
            write_whole(path, json.dumps({**ids(), place: found}, indent=1).encode())
    return found


def shared_id(folder: Path, place: str, new: Callable[[], str]) -> str:
    """The id that runs in `folder` share at `place`: made by the first that asks, whichever process
    on whichever machine that is. Raises TimeoutError where that one has not done so within a
    minute."""
    path = folder / SHARED / hashlib.sha256(place.encode()).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    claim = path.with_suffix(".claim")
    until = time.monotonic() + WAIT_S
    while not path.is_file():
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            if time.monotonic() > until:
                claim.unlink(missing_ok=True)  # whoever asks next tries again
                raise TimeoutError(f"{claim}: another run has not made what they share") from None
            time.sleep(0.2)
            continue
        try:
            write_whole(path, new().encode())
        except BaseException:
            claim.unlink(missing_ok=True)
            raise
    return path.read_text()
