"""A run's folder has one owner: who it is, who is told so, and who takes over when."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from raysft.errors import UserError
from raysft.run import ownership
from raysft.run.ownership import FOLDER, POINTER, Lease, Ownership, Process, refuse_held
from tests.support.worlds import fork

LEASE_S = 3 * ownership.BEAT_S  # more than two beats of a busy machine


def hold(folder: Path, number: int, seconds: float) -> None:
    """Own the run while `owned_NUMBER` is there; leave what was said, and when it was owned."""
    said: list[str] = []
    (folder.parent / f"begun_{number}").touch()
    try:
        with Ownership.take(folder, said.append, LEASE_S) as owner:
            note(folder.parent / f"owned_{number}", [owner.lease.number, *said])
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.02)
                owner.require()
    except UserError as error:
        note(folder.parent / f"refused_{number}", [str(error)])


def note(path: Path, content: list[object]) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(content))
    path.with_suffix(".tmp").rename(path)


def answer(folder: Path, number: int, seconds: float = 60.0) -> tuple[str, list[str]]:
    """What became of a start: owned or refused, and what it said."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for kind in ("refused", "owned"):
            if (folder / f"{kind}_{number}").exists():
                return kind, json.loads((folder / f"{kind}_{number}").read_text())
        time.sleep(0.02)
    raise AssertionError(f"no answer from start {number}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def held(run: Path, number: int, seconds: float = 60.0) -> BaseProcess:
    """A process that owns the run."""
    process = fork(hold, run, number, seconds)
    assert answer(run.parent, number)[0] == "owned"
    return process


@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_of_starts_at_the_same_time_one_owns_the_run_and_the_others_say_who(
    times: int, run: Path
) -> None:
    for number in range(times):
        starts = [fork(hold, run, 4 * number + i, 60.0) for i in range(4)]
        answers = [answer(run.parent, 4 * number + i) for i in range(4)]
        (owner,) = [i for i, (kind, _) in enumerate(answers) if kind == "owned"]
        for kind, (text, *_) in answers:
            if kind == "refused":
                assert f"process {starts[owner].pid} on {Process.this().host}, since 2" in text
                assert "gave a sign of life just now; wait for its end, end it there" in text
        with pytest.raises(UserError, match="this run is under way"):
            refuse_held(run)
        for process in starts:
            process.kill()
            process.join()


def test_a_clean_end_releases_at_once_and_numbers_only_grow(run: Path) -> None:
    for number in (1, 2, 3):
        begun = time.monotonic()
        with Ownership.take(run) as owner:
            assert owner.lease.number == number
        assert time.monotonic() - begun < ownership.BEAT_S
        refuse_held(run)
    names = {path.name.partition(".")[0] for path in (run / FOLDER).iterdir()}
    assert names == {"2", "3"}, "what nobody needs is cleared away"
    (run / FOLDER / "2.json").unlink()
    (run / FOLDER / "3.json").unlink()
    with Ownership.take(run) as owner:
        assert owner.lease.number == 4, "a folder that was emptied"


def test_who_was_killed_on_this_machine_is_taken_over_from_at_once(run: Path) -> None:
    first = held(run, 1)
    first.kill()
    first.join()
    begun = time.monotonic()
    with Ownership.take(run) as owner:
        assert time.monotonic() - begun < ownership.BEAT_S
        assert owner.lease.number == 2


def test_who_shows_no_sign_of_life_is_taken_over_from_after_the_lease_and_writes_no_more(
    run: Path,
) -> None:
    first = held(run, 1)
    os.kill(first.pid or 0, signal.SIGSTOP)
    said: list[str] = []
    begun = time.monotonic()
    with Ownership.take(run, said.append, LEASE_S) as owner:
        assert LEASE_S <= time.monotonic() - begun < LEASE_S + 2 * ownership.BEAT_S
        assert said == [
            f"{run} was held by process {first.pid} on {Process.this().host}, since "
            f"{said[0].partition('since ')[2][:19]}, which gives no sign of life: this start takes "
            f"the run over if there is none for {LEASE_S:g} s"
        ]
        os.kill(first.pid or 0, signal.SIGCONT)
        _, (text, *_) = answer_of_refused(run.parent, 1)
        assert "another job has taken over this run (process" in text
        owner.require()
    first.join()


def answer_of_refused(folder: Path, number: int) -> tuple[str, list[str]]:
    (folder / f"owned_{number}").unlink()
    return answer(folder, number)


def test_a_lease_goes_to_workers_and_ends_with_the_next_owner_or_group(run: Path) -> None:
    first = Ownership.take(run)
    lease = pickle.loads(pickle.dumps(replace(first.lease, group=1)))
    lease.take_over([Process.this()])
    second = replace(first.lease, group=2)
    assert lease.lost() is None and second.lost() is None
    second.take_over([Process.this()])
    assert "other workers have been started for this run" in (lease.lost() or "")
    with pytest.raises(UserError, match="other workers have been started"):
        lease.take_over([Process.this()])
    assert second.lost() is None and lease.name < second.name
    first.release()
    assert second.lost() is None, "nobody else has begun"
    with Ownership.take(run) as owner:
        assert "another job has taken over this run" in (second.lost() or "")
        assert second.name < replace(owner.lease, group=1).name
        with pytest.raises(UserError, match="another job has taken over"):
            second.take_over([Process.this()])


def test_an_answer_counts_for_a_second_and_no_longer(run: Path) -> None:
    owner = Ownership.take(run)
    lease = replace(owner.lease, group=1)
    lease.require()
    owner.release()
    with Ownership.take(run):
        time.sleep(ownership.FRESH_S)
        with pytest.raises(UserError, match="another job has taken over"):
            lease.require()


def works(run: Path, lease: Lease, seconds: float) -> None:
    """A worker that writes on and on, as long as it may."""
    lease.take_over([Process.this()])
    (run / "begun").touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lease.require()
        (run / "written").write_text(repr(time.clock_gettime(time.CLOCK_MONOTONIC)))
        time.sleep(0.001)


@pytest.mark.parametrize("frozen", [False, True])
def test_who_takes_over_waits_until_orphans_write_no_more(frozen: bool, run: Path) -> None:
    first = Ownership.take(run)
    orphan = fork(works, run, replace(first.lease, group=1), 60.0)
    while not (run / "written").exists():
        time.sleep(0.02)
    if frozen:
        os.kill(orphan.pid or 0, signal.SIGSTOP)
    first.release()  # as a driver does that died, but for the wait
    said: list[str] = []
    with Ownership.take(run, said.append):
        owned = time.clock_gettime(time.CLOCK_MONOTONIC)
        assert said == [f"waiting for the workers of {said[0].partition(' of ')[2][:-7]} to end"]
        if frozen:
            os.kill(orphan.pid or 0, signal.SIGCONT)
        orphan.join()
        assert orphan.exitcode == 1, "it was told"
        assert float((run / "written").read_text()) < owned


def test_who_takes_over_from_one_that_was_waiting_itself_waits_for_the_first_ones_orphans(
    run: Path,
) -> None:
    first = Ownership.take(run)
    orphan = fork(works, run, replace(first.lease, group=1), 60.0)
    while not (run / "written").exists():
        time.sleep(0.02)
    os.kill(orphan.pid or 0, signal.SIGSTOP)
    first.release()
    second = fork(hold, run, 2, 60.0)
    while json.loads((run / POINTER).read_bytes())["number"] == 1:
        time.sleep(0.02)
    second.kill()  # in the middle of its wait
    second.join()
    begun = time.monotonic()
    with Ownership.take(run) as owner:
        assert time.monotonic() - begun >= ownership.SETTLE_S
        assert owner.lease.number == 3
        owned = time.clock_gettime(time.CLOCK_MONOTONIC)
        os.kill(orphan.pid or 0, signal.SIGCONT)
        orphan.join()
        assert orphan.exitcode == 1, "it was told"
        assert float((run / "written").read_text()) < owned
    begun = time.monotonic()
    with Ownership.take(run):
        assert time.monotonic() - begun < ownership.SETTLE_S, "they are known to be gone"


def test_a_start_that_was_frozen_while_it_took_over_does_not_shut_the_owner_out(run: Path) -> None:
    with Ownership.take(run), Ownership.take(run.with_name("other")) as stale:
        pass
    with Ownership.take(run) as owner:
        late = {"number": 1, "token": stale.lease.token, "since": 0.0}
        (run / POINTER).write_text(json.dumps(late))
        assert owner.lease.lost() is None
        time.sleep(1.5 * ownership.BEAT_S)
        owner.require()
        assert json.loads((run / POINTER).read_bytes())["token"] == owner.lease.token


def test_who_is_refused_by_one_that_was_just_beginning_is_told_who_it_is(run: Path) -> None:
    """An owner makes its file, fills it, and beats; the second start looks in between."""
    (run / FOLDER).mkdir(parents=True)
    (run / FOLDER / "1.json").touch()
    second = fork(hold, run, 2, 60.0)
    while not (run.parent / "begun_2").exists():  # the process may take longer than a lease
        time.sleep(0.02)
    time.sleep(0.5)
    facts = {"process": asdict(Process.this()), "since": time.time(), "token": "0" * 32}
    (run / FOLDER / "1.json").write_text(json.dumps(facts))
    (run / FOLDER / "1.beat").write_bytes(b"%020d\n" % 0)
    kind, (text,) = answer(run.parent, 2)
    assert kind == "refused" and f"{Process.this()}, since " in text
    second.join()


def test_a_run_of_a_version_without_numbers_is_taken_over(run: Path) -> None:
    run.mkdir()
    (run / POINTER).write_text(json.dumps({"token": "f" * 32, "since": 1.0}))
    with Ownership.take(run) as owner:
        assert owner.lease.number == 1 and owner.lease.lost() is None


def test_a_process_is_told_from_a_later_one_of_its_number(run: Path) -> None:
    mine = Process.this()
    assert not mine.gone()
    assert replace(mine, started=mine.started - 1).gone()
    assert not replace(mine, boot="of another machine", pid=2**22 + 1).gone(), "nobody knows"
    assert replace(mine, pid=2**22 + 1).gone()


def test_a_process_is_known_where_the_system_has_no_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "PROC", tmp_path / "absent")
    me = Process.this()
    assert me == Process.this() and not me.gone()
    assert replace(me, started=me.started - 1000).gone()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = ownership._started(child.pid)
        other = replace(me, pid=child.pid, started=started or 0)
        assert started and not other.gone()
        child.kill()
    assert other.gone()
    assert not replace(other, space="another machine").gone(), "of which nobody here knows"
