"""Who may write into a run's folder: one driver at a time, and the workers it has started.

    owner.json          the newest owner: its number, which only grows, and its token
    owner/N.json        the N-th owner: host, process, since when; an exclusive create, so that of
                        two starts at once one makes it
    owner/N.beat        a count that owner N renews every BEAT_S; `released` once it has ended
    owner/N.group.json  its newest group of workers: its number, who they are, whether they ended

Whether an owner is alive is judged by watching its count change, on the watcher's own clock: the
clocks of two machines are never compared. A process of the same machine is looked up as well, so
that one which was killed is taken over from at once; one that shows no sign of life elsewhere (a
machine that is gone, a driver that is frozen) after LEASE_S.

Whoever writes asks first (`Lease.require`), which reads owner.json at most once in FRESH_S, by
opening it: that sees what other machines wrote, over NFS too. Who takes over from an owner that has
not ended cleanly waits, before it writes anything, until the workers of that one are gone, or
SETTLE_S, within which those that live have asked. What a worker that was frozen all the while
still does is written to files that are no longer there (see `train.metrics`), or asks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.patience import patiently
from raysft.run.storage import write_whole

POINTER, FOLDER = "owner.json", "owner"
BEAT_S = 2.0
LEASE_S = 30.0
FRESH_S = 1.0  # how long an answer counts
SETTLE_S = 3.0  # more than FRESH_S and what a write takes
_RELEASED = b"released".ljust(20) + b"\n"  # as long as a beat
PROC = Path("/proc/self")  # of Linux alone
_HIDDEN = -1
_NOWHERE = uuid.uuid4().hex  # equal to no other process's


def _now() -> float:
    """Seconds that go on while this process, or (where the system counts them) the machine,
    sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True)
class Process:
    """A process, by what tells it from any other of its machine, now and later.

    started: in ticks since the machine's start (without /proc: in milliseconds). boot, space: of
    the machine's start, and of its process ids: numbers of two containers do not compare.
    """

    host: str
    pid: int
    started: int
    boot: str
    space: str

    @classmethod
    def this(cls) -> Process:
        """The one that asks."""
        if not PROC.is_dir():
            return cls(
                socket.gethostname(), os.getpid(), _started(os.getpid()) or 0, "", _machine()
            )
        pid = os.getpid()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            space = os.readlink("/proc/self/ns/pid")
        except OSError:  # some sandboxes have neither: the lease alone decides there
            boot, space = _NOWHERE, _NOWHERE
        return cls(socket.gethostname(), pid, _started(pid) or 0, boot, space)

    def here(self) -> bool:
        """Whether it can be looked up by this process: it is one of the same machine."""
        mine = Process.this()
        return (self.host, self.boot, self.space) == (mine.host, mine.boot, mine.space)

    def gone(self) -> bool:
        """Whether it has ended for certain; of a process of another machine nobody here knows."""
        return self.here() and _started(self.pid) not in (self.started, _HIDDEN)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _started(pid: int) -> int | None:
    """When a process of this machine started; None where there is none, or only its exit code;
    _HIDDEN where the system does not say (hidepid: a process of another user)."""
    if not PROC.is_dir():
        return _started_elsewhere(pid)
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return _HIDDEN
        return None
    fields = text.rpartition(b")")[2].split()  # a name may hold anything
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _started_elsewhere(pid: int) -> int | None:
    """`_started` on systems without /proc."""
    import psutil

    try:
        found = psutil.Process(pid)
        ended = found.status() == psutil.STATUS_ZOMBIE
        return None if ended else round(1000 * found.create_time())
    except psutil.NoSuchProcess:
        return None


def _machine() -> str:
    return f"{uuid.getnode():x}"


class Permit(Protocol):
    """Says whether its holder may still write."""

    def require(self) -> None:
        """Raises UserError where the run is another's by now."""
        ...


class Anyone:
    """For a folder that is nobody else's: a scratch folder, a test's."""

    def require(self) -> None:
        """Never refuses."""


ANYONE = Anyone()


@dataclass
class Lease:
    """The right to write into a run's folder, of its driver (group 0) or of a group of workers;
    goes to other processes by pickle."""

    folder: Path
    number: int
    token: str
    group: int = 0

    def __post_init__(self) -> None:
        self._fresh = -FRESH_S

    def __reduce__(self) -> tuple[type[Lease], tuple[Path, int, str, int]]:
        return Lease, (self.folder, self.number, self.token, self.group)

    @property
    def name(self) -> str:
        """Names of one folder sort in the order in which they were given out."""
        return f"{self.number:06d}.{self.group:04d}.{self.token[:8]}"

    def lost(self) -> str | None:
        """Why this holder no longer owns the run, or None. Reads up to two small files. Raises
        OSError where they cannot be read."""
        return patiently(self._lost, self.folder / POINTER)

    def _lost(self) -> str | None:
        asked = _now()
        found = json.loads((self.folder / POINTER).read_bytes())
        number = found.get("number", 0)
        newer = number > self.number or (number == self.number and found["token"] != self.token)
        if newer or (self.folder / FOLDER / f"{self.number + 1}.json").exists():
            holder = _Holder.newest(self.folder)
            who = f" ({holder})" if holder is not None else ""
            return f"{self.folder}: another job has taken over this run{who}; this one ends"
        if self.group and _group(self.folder, self.number).get("group", 0) > self.group:
            return f"{self.folder}: other workers have been started for this run; these end"
        self._fresh = asked
        return None

    def require(self) -> None:
        """Raises UserError where the run is another's by now. Mostly a look at the clock."""
        if _now() - self._fresh < FRESH_S:
            return
        taken = self.lost()
        if taken is not None:
            raise UserError(taken)

    def take_over(self, workers: list[Process]) -> None:
        """Begin to write as a group: workers of earlier groups of this owner may no longer.
        Called by one of the workers. Raises UserError where the run is another's by now."""
        self._fresh = -FRESH_S
        self.require()
        self._write_group(workers, ended=False)

    def ended(self, workers: list[Process]) -> None:
        """This group has written its last: who comes next does not wait for it."""
        if self.lost() is None:
            self._write_group(workers, ended=True)

    def _write_group(self, workers: list[Process], ended: bool) -> None:
        content = {"group": self.group, "workers": [asdict(w) for w in workers], "ended": ended}
        path = self.folder / FOLDER / f"{self.number}.group.json"
        write_whole(path, json.dumps(content).encode())

    def beat(self) -> bytes | None:
        """What the driver's last sign of life says; None before its first."""
        return _beat(self.folder, self.number)


def _beat(folder: Path, number: int) -> bytes | None:
    try:
        return (folder / FOLDER / f"{number}.beat").read_bytes()
    except FileNotFoundError:
        return None


def _group(folder: Path, number: int) -> JsonObject:
    try:
        return json.loads((folder / FOLDER / f"{number}.group.json").read_bytes())
    except FileNotFoundError:
        return {}


@dataclass
class _Holder:
    """The newest owner there is. process: None where it has only just made its file."""

    folder: Path
    number: int
    process: Process | None = None
    since: float | None = None

    @classmethod
    def newest(cls, folder: Path) -> _Holder | None:
        """None: nobody ever was, or only one of a version that kept no numbers."""
        numbers = _numbers(folder)
        if not numbers:
            return None
        found = cls(folder, max(numbers))
        found._look()
        return found

    def _look(self) -> None:
        """Read who it is, as soon as it has said so: it makes its file before it fills it."""
        if self.process is not None:
            return
        with contextlib.suppress(FileNotFoundError, ValueError):
            facts = json.loads((self.folder / FOLDER / f"{self.number}.json").read_bytes())
            self.process, self.since = Process(**facts["process"]), facts["since"]

    def __str__(self) -> str:
        if self.process is None or self.since is None:
            return "a start that has just begun"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.process}, since {since}"

    def released(self) -> bool:
        return _beat(self.folder, self.number) == _RELEASED

    def gone(self) -> bool:
        """Whether its driver has ended for certain, cleanly or not."""
        return self.released() or (self.process is not None and self.process.gone())

    def alive(self, for_s: float, say: Callable[[str], None] = lambda text: None) -> bool:
        """Watch it for up to `for_s` seconds: True at its first sign of life; False where it has
        ended, has been taken over, or showed none. Tells, after a moment, that it watches."""
        begun, seen, told = _now(), _beat(self.folder, self.number), False
        while not self.gone() and max(_numbers(self.folder), default=0) == self.number:
            beats = _beat(self.folder, self.number) not in (seen, _RELEASED)
            self._look()  # after the beat, before which it is written
            if beats:
                return True
            waited = _now() - begun
            if waited > for_s:
                return False
            if waited > 1.5 * BEAT_S and not told:
                told = True
                say(
                    f"{self.folder} was held by {self}, which gives no sign of life: this start "
                    f"takes the run over if there is none for {for_s:g} s"
                )
            time.sleep(0.1)
        return False

    def refusal(self) -> str:
        """What a second start is told."""
        stop = f"kill {self.process.pid}" if self.process is not None else "Ctrl-C"
        return (
            f"{self.folder}: this run is under way: {self} holds it and gave a sign of life just "
            f"now; wait for its end, end it there ({stop}), or choose another run.name"
        )


def _numbers(folder: Path) -> list[int]:
    if not (folder / FOLDER).is_dir():
        return []
    names = (path.name.removesuffix(".json") for path in (folder / FOLDER).glob("*.json"))
    return [int(name) for name in names if name.isdecimal()]


def _pointed(folder: Path) -> int:
    """The number in owner.json; 0 without one, or where a version that had no numbers wrote it."""
    try:
        return json.loads((folder / POINTER).read_bytes()).get("number", 0)
    except FileNotFoundError:
        return 0


def refuse_held(folder: Path) -> None:
    """Raises UserError where another start holds the run in `folder` and shows a sign of life.
    Writes nothing; takes a moment where there is a holder, at most two beats."""
    holder = _Holder.newest(folder)
    if holder is not None and not holder.gone() and holder.alive(2 * BEAT_S):
        raise UserError(holder.refusal())


class Ownership:
    """A run's folder held by this process, its driver; beats until it is released."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self._stop = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="owner")

    @classmethod
    def take(
        cls,
        folder: Path,
        say: Callable[[str], None] = lambda text: None,
        lease_s: float = LEASE_S,
    ) -> Ownership:
        """Own the run in `folder`, which is made where it is not there.

        say: told what is waited for. lease_s: how long a holder that may be alive is watched for a
        sign of life. Raises UserError where there is one, saying who it is.
        """
        while True:
            holder = _Holder.newest(folder)
            if holder is not None and not holder.gone() and holder.alive(lease_s, say):
                raise UserError(holder.refusal())
            if holder is not None and max(_numbers(folder)) != holder.number:
                continue  # another start was faster: look at that one
            owned = cls._claim(folder)
            if owned is not None:
                break
        owned._thread.start()
        try:
            if holder is not None:
                owned._settle(holder, say)
                owned._clear()
        except BaseException:
            owned.release()
            raise
        return owned

    @classmethod
    def _claim(cls, folder: Path) -> Ownership | None:
        """Be the next owner; None where another start was faster."""
        number = 1 + max(_pointed(folder), *_numbers(folder), 0)
        path = folder / FOLDER / f"{number}.json"
        lease = Lease(folder, number, uuid.uuid4().hex)
        facts = {"process": asdict(Process.this()), "since": time.time(), "token": lease.token}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "x") as out:
                out.write(json.dumps(facts))
                out.flush()
                os.fsync(out.fileno())
        except FileExistsError:
            return None
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        if max(_numbers(folder)) > number:  # it looked long ago, and all of that is cleared away
            path.unlink()
            return None
        owned = cls(lease)
        owned._write_beat(0)
        owned._point()
        return owned

    def _settle(self, before: _Holder, say: Callable[[str], None]) -> None:
        """Until no worker of the owners before can write any more: of the last one, and of one
        before it, where the last one ended while it waited here itself."""
        mine, begun, told = Process.this(), _now(), False
        numbers = sorted(_numbers(self.lease.folder))
        groups = [_group(self.lease.folder, n) for n in numbers if n < self.lease.number]
        workers = [w for group in groups if not group.get("ended", True) for w in group["workers"]]
        left = [worker for facts in workers if (worker := Process(**facts)) != mine]
        while left := [worker for worker in left if not worker.gone()]:
            if _now() - begun > SETTLE_S:
                return
            if not told:
                told = True
                say(f"waiting for the workers of {before} to end")
            time.sleep(0.05)

    def _clear(self) -> None:
        """Delete what older owners than the last one left, and whose workers that one had."""
        last = self.lease.number - 1
        for old in (self.lease.folder / FOLDER).iterdir():
            first = old.name.partition(".")[0]
            if old.name == f"{last}.group.json" or (first.isdecimal() and int(first) < last):
                with contextlib.suppress(OSError):  # the next start clears it away
                    old.unlink()

    def require(self) -> None:
        """Raises UserError where another start has taken the run over."""
        if self._lost is not None:
            raise UserError(self._lost)
        self.lease.require()

    def release(self) -> None:
        """The run is nobody's: the next start need not wait. Does nothing the second time."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        try:
            if self.lease.lost() is None:
                self._overwrite(_RELEASED)
        except OSError:
            pass  # the folder is away or gone: the next start waits, if there is one

    def __enter__(self) -> Ownership:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    @property
    def _beat_file(self) -> Path:
        return self.lease.folder / FOLDER / f"{self.lease.number}.beat"

    def _write_beat(self, count: int) -> None:
        self._overwrite(b"%020d\n" % count)

    def _overwrite(self, content: bytes) -> None:
        # In place: who opens it anew sees it, on any machine; a name that changes its file may not.
        # Not emptied first: on a full disk it could not be written again.
        handle = os.open(self._beat_file, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(handle, content, 0)
        finally:
            os.close(handle)

    def _point(self) -> None:
        content = {"token": self.lease.token, "number": self.lease.number, "since": time.time()}
        write_whole(self.lease.folder / POINTER, json.dumps(content).encode())

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_S):
            count += 1
            try:
                lost = self.lease.lost()
                if lost is not None:
                    self._lost = lost
                    return
                pointer = json.loads((self.lease.folder / POINTER).read_bytes())
                if pointer.get("token") != self.lease.token:
                    self._point()  # a start that was frozen while it was taken over wrote its own
                self._write_beat(count)
            except (OSError, ValueError):
                continue  # the storage is away for a moment; whoever watches waits that long
