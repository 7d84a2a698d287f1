"""The folder of an embedded Ray: nobody else's to look into, and gone however its process ends.

    raysft-XXXXXXXX/         of this user alone; temporary files of Ray's processes
    raysft-XXXXXXXX/alive    locked while its process lives
    raysft-XXXXXXXX/r/       Ray's: it opens all it makes to every user of the machine

A process that ends by itself removes it. Where that is killed, a shell that waits for its end does,
a process of 1 MB; where both are (a machine that goes down), the next start on this machine: a
folder whose `alive` nobody holds a lock on is nobody's any more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO

# Ray puts sockets under its folder, and a socket's path has at most 107 bytes: what is left for
# the parent folder after "/raysft-XXXXXXXX/r/session_<time>_<pid>/sockets/plasma_store".
LONGEST_PARENT = 24
_PREFIX = "raysft-"
_ALIVE = "alive"
# Reads until the process that holds the other end is gone. What still ends may write meanwhile.
_WATCH = 'cat >/dev/null; for i in 1 2 3 4 5 6 7 8 9 10; do rm -rf -- "$1"; sleep 1; done'


class RayFolder:
    """Makes the folder; removes what earlier ones left. Raises OSError where it cannot be made."""

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        if len(os.fsencode(parent)) > LONGEST_PARENT:
            parent = "/tmp"  # noqa: S108
        sweep(Path(parent))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self.ray = self.path / "r"
        self._lock = _locked(self.path)
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "sh", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C is not for it
        )

    def remove(self) -> None:
        """Delete it. A process of Ray's may write its last line while this runs."""
        self._release()
        shutil.rmtree(self.path, ignore_errors=True)

    def keep(self) -> None:
        """Leave it to the user, for what Ray's logs say."""
        (self.path / _ALIVE).unlink()  # before the lock: no start may take it for one left behind
        self._release()

    def _release(self) -> None:
        self._watch.kill()
        self._watch.communicate()
        self._lock.close()


def sweep(parent: Path) -> None:
    """Remove folders below `parent` whose processes are gone."""
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            with open(path / _ALIVE, "rb") as alive:
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # none of ours, in use, or gone meanwhile


def _locked(folder: Path) -> IO[bytes]:
    """`alive`, which is there only once it is locked."""
    draft = folder / f".{_ALIVE}"
    stream = open(draft, "wb")  # noqa: SIM115 - for as long as the process lives
    fcntl.flock(stream, fcntl.LOCK_EX)
    os.replace(draft, folder / _ALIVE)
    return stream
