"""No kill and no full disk costs a committed checkpoint, or a step: in real processes.

Every life is a process of its own, forked from one that has torch loaded.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raysft.audit import audit
from raysft.config import Config
from raysft.errors import UserError
from raysft.parallel import World
from raysft.run.catalogue import Catalogue, Saved
from raysft.run.lines import read_lines
from raysft.run.storage import open_storage
from raysft.train.checkpoint import load, newest_sound
from raysft.train.loop import train
from tests.properties.test_world_sizes import ledger
from tests.support.worlds import die_at, fork, start, tiny
from tests.unit.train.test_checkpoint import Trained

LAST = 12  # steps of `whole`, the undisturbed run
ENDLESS = 10_000


# -- lives ---------------------------------------------------------------------------------------


def live(config: Config, rank: int = 0, size: int = 1, meeting: str = "") -> None:
    """Train to the last step, alone or as one of a group that meets at a file."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    train(start(config, World.current()))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def whole(home: Path, steps: int = LAST) -> Path:
    """An undisturbed run."""
    life = fork(live, tiny(home, f"whole_{steps}", train__max_steps=steps, checkpoint__every=0))
    life.join()
    assert life.exitcode == 0
    return home / "runs" / f"whole_{steps}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Path:
    return whole(home)


def sound(run: Path, place: str | None = None) -> list[int]:
    """Steps of the committed checkpoints, each of which is read to its last byte."""
    committed = Catalogue(open_storage(run, place)).committed()
    assert [saved.damage() for saved in committed] == [None] * len(committed)
    return [saved.step for saved in committed]


def listed(run: Path, place: str) -> list[int]:
    """Steps of the committed checkpoints."""
    return [saved.step for saved in Catalogue(open_storage(run, place)).committed()]


def same(run: Path, other: Path) -> None:
    """The same batches and, to the bit, the same losses; and the audit agrees."""
    assert ledger(run) == ledger(other)
    ours, theirs = (
        [
            (line["step"], line["loss"], line["grad_norm"])
            for line in read_lines(r / "metrics.jsonl")
        ]
        for r in (run, other)
    )
    assert ours == theirs
    report = audit(run)
    assert report.clean, report.findings


def starts(run: Path) -> list[int]:
    """The steps after which starts went on (0: the beginning), in order."""
    events = read_lines(run / "events.jsonl")
    return [line["step"] for line in events if line["event"] in ("started", "continued")]


# -- kills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_while_every_step_is_saved(kills: int, home: Path) -> None:
    name = f"killed_{kills}"
    run, chance = home / "runs" / name, random.Random(kills)
    newest, resumed, startup = 0, 0, 0.5
    for number in range(4 * kills):
        if number >= kills and resumed > kills / 2 and newest > kills / 4:
            break  # else more of the kills have to come late enough
        known, begun = len(starts(run)), time.monotonic()
        life = fork(live, tiny(home, name, train__max_steps=ENDLESS))
        if number % 4 == 3:  # while it starts: restores, cuts back
            time.sleep(chance.uniform(0.5, 1.0) * startup)
        else:
            while len(starts(run)) == known and life.is_alive():
                time.sleep(0.01)
            startup = time.monotonic() - begun
            time.sleep(chance.uniform(0.0, 1.0) * startup)
        life.kill()
        life.join()
        assert life.exitcode == -signal.SIGKILL
        steps = sound(run)
        assert max(steps, default=0) >= newest, "a committed checkpoint is gone"
        assert len(steps) <= 3  # checkpoint.keep, and one that was about to go
        for step in starts(run)[known:]:
            assert step == newest
            resumed += bool(step)
        newest = max(steps, default=0)
    assert resumed > kills / 2 and newest > kills / 4, "the kills came too early"
    life = fork(live, tiny(home, name, train__max_steps=newest + 2))
    life.join()
    assert life.exitcode == 0
    assert starts(run)[-1] == newest
    assert sound(run) == [newest + 1, newest + 2]
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {f"step_{newest + 1}", f"step_{newest + 2}"}
    same(run, whole(home, newest + 2))


EXTRAS = {"config.yaml": b"run: {}", "processor/tokenizer.json": b"{}"}


def save_and_die(folder: Path, operation: int) -> None:
    """Go on from the newest sound checkpoint, whose weights are all its step, and save the next
    one; die on the way."""
    ours = Trained(open_storage(folder, None), keep=2, extras=EXTRAS)
    ours.step()
    found, _ = newest_sound(ours.catalogue, World.current())
    step = 0
    if found is not None:
        load(found, ours.strategy)
        step = found.step
    weights = torch.cat([weight.flatten() for weight in ours.module.parameters()])
    if step:
        assert (weights == step).all()
    die_at(operation)
    ours.catalogue.clear(step)
    with torch.no_grad():
        for weight in ours.module.parameters():
            weight.fill_(step + 1)
    ours.saver.start(step + 1, ours.strategy, {})
    ours.saver.wait()


def test_killed_at_every_change_that_a_save_and_its_pruning_make(tmp_path: Path) -> None:
    """ "step N is there" and "step N - 2 goes" are each one change; between any two of them there
    is a whole checkpoint, and never one less than before."""
    newest = 0
    for _ in range(3):
        life = fork(save_and_die, tmp_path, ENDLESS)
        life.join()
        newest += 1
        assert life.exitcode == 0 and max(sound(tmp_path)) == newest
    advanced: list[bool] = []
    for operation in itertools.count(1):
        life = fork(save_and_die, tmp_path, operation)
        life.join()
        steps = sound(tmp_path)
        assert len(steps) >= 2 and max(steps) in (newest, newest + 1)
        advanced.append(max(steps) > newest)
        newest = max(steps)
        if life.exitcode == 0:
            break
        assert life.exitcode == -signal.SIGKILL
    assert 20 < len(advanced) < 200
    before = advanced.index(True)  # the rename: all kills before it lose the save, none after it
    assert advanced == [False] * before + [True] * (len(advanced) - before)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {f"step_{newest}", f"step_{newest - 1}"}


def test_two_workers_on_an_object_store_are_killed_and_go_on(home: Path) -> None:
    """ray 33369: every rank must save its shard; ray 41700: partial shards are merged into the
    next upload."""
    url, chance = f"objects://{home}/bucket/runs/two", random.Random(0)
    run, newest = home / "runs" / "two", 0
    for last in (ENDLESS, ENDLESS, ENDLESS, None):
        steps = last or newest + 2
        config = tiny(home, "two", train__max_steps=steps, checkpoint__path=url)
        meeting = str(home / f"meeting_{newest}_{time.monotonic_ns()}")
        group = [fork(live, config, rank, 2, meeting) for rank in range(2)]
        if last:
            deadline = time.monotonic() + 60
            # Only listed: what is listed may be pruned while it is read.
            while max(listed(run, url), default=0) < newest + 3 and time.monotonic() < deadline:
                time.sleep(chance.uniform(0.01, 0.1))
            for worker in group:
                worker.kill()
        for worker in group:
            worker.join()
        assert [worker.exitcode for worker in group] == [-signal.SIGKILL if last else 0] * 2
        assert max(sound(run, url)) >= newest + 2
        newest = max(sound(run, url))
    for step in sound(run, url):
        files = Saved(step, open_storage(run, url)).meta()["files"]
        assert {"state/__0_0.distcp", "state/__1_0.distcp"} < set(files)
    assert ledger(run) == ledger(whole(home, newest))
    assert audit(run).clean


# -- the order of things -------------------------------------------------------------------------


def logged(config: Config, rank: int, meeting: str, log: Path) -> None:
    """`live`, with every change of names and every fsync noted: [time, what, path, second path].
    Making shards durable takes worker 1 a while."""
    with open(log, "w") as out:

        def watched(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                paths = [
                    os.readlink(f"/proc/self/fd/{arg}") if isinstance(arg, int) else os.fspath(arg)
                    for arg in args
                ]
                if what == "fsync" and rank == 1 and paths[0].endswith(".distcp"):
                    time.sleep(0.2)
                done = real(*args, **kwargs)
                out.write(json.dumps([time.monotonic(), what, *paths]) + "\n")
                out.flush()
                return done

            return call

        for what in ("fsync", "replace", "rename", "unlink"):
            setattr(os, what, watched(what, getattr(os, what)))
        live(config, rank, 2, meeting)


def test_the_marker_comes_after_all_shards_and_the_ledger_are_durable_and_older_ones_go_last(
    home: Path,
) -> None:
    """KempnerForge 102: `latest` moved before the data was durable, and the older one pruned."""
    config = tiny(home, "ordered", train__max_steps=5, checkpoint__keep=1)
    root = home / "runs" / "ordered" / "checkpoints"
    logs = [home / f"log_{rank}" for rank in range(2)]
    group = [fork(logged, config, rank, str(home / "meet"), logs[rank]) for rank in range(2)]
    for worker in group:
        worker.join()
    assert [worker.exitcode for worker in group] == [0, 0]
    ranks = [[tuple(json.loads(line)) for line in log.read_text().splitlines()] for log in logs]

    def times(rank: int, what: str, *parts: str) -> list[float]:
        """When it was done to paths that hold these parts; \\0 stands at the end of each."""
        return [
            line[0]
            for line in ranks[rank]
            if line[1] == what and all(part in "\0".join((*line[2:], "")) for part in parts)
        ]

    for step in range(1, 6):
        draft = f"/.step_{step}."
        [published] = times(0, "replace", draft, f"\0{root}/step_{step}\0")
        for rank in range(2):
            [shard] = times(rank, "fsync", draft, f"/__{rank}_0.distcp\0")
            [settled] = times(rank, "fsync", f"lane_{rank}_from_1.jsonl")[step - 1 : step]
            assert settled < shard < published
            if step < 5:  # one save at a time
                assert published < times(rank, "fsync", f"/.step_{step + 1}.")[0]
        [marked] = times(0, "fsync", draft, "/.COMMITTED.")
        [meant] = times(0, "fsync", draft, "/.meta.json.")
        shards = [times(rank, "fsync", draft, ".distcp\0")[0] for rank in range(2)]
        assert max(shards) < meant < marked < published
        [named] = times(0, "rename", draft, "/state/.metadata\0")
        for folder, last in (("/state\0", named), (f"{root}{draft}", marked)):
            assert last < times(0, "fsync", draft, folder)[-1] < published, "names are durable"
        if step > 1:
            [gone] = times(0, "unlink", f"{root}/step_{step - 1}/COMMITTED\0")
            durable = [when for when in times(0, "fsync", f"{root}\0") if published < when < gone]
            assert durable
    same(home / "runs" / "ordered", two_workers(home, 5))


def two_workers(home: Path, steps: int) -> Path:
    """An undisturbed run with two of them."""
    config = tiny(home, "pair", train__max_steps=steps, checkpoint__every=0)
    group = [fork(live, config, rank, 2, str(home / "meet_pair")) for rank in range(2)]
    for worker in group:
        worker.join()
    assert [worker.exitcode for worker in group] == [0, 0]
    return home / "runs" / "pair"


# -- the disk is full ----------------------------------------------------------------------------

NO_RIGHT = 77
_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000  # of <sched.h>


def mount_small_disk(folder: Path, size: str) -> None:
    """A disk of its own for this process, which needs no rights where user namespaces are on.
    Ends the process with NO_RIGHT where they are not."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER | _NEW_MOUNTS):
        os._exit(NO_RIGHT)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        os._exit(NO_RIGHT)


def live_on_little(config: Config, said: Path) -> int:
    """A life in a process of its own: 0, or 3 with what it ended with in the file `said`."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        live(config)
        code = 0
    except UserError as error:
        said.write_text(str(error))
        code = 3
    except OSError as error:  # as `launch` puts it
        assert error.errno == errno.ENOSPC
        said.write_text(f"{error.filename or config.run.storage_path}: {error.strerror}")
        code = 3
    finally:
        if code == 1:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def fill_and_train(home: Path, disk: Path, times: int) -> None:
    """The disk of a run fills up at some moment of a save or of a step, again and again."""
    mount_small_disk(disk, "24m")
    said, chance = home / "said", random.Random(5)
    os.environ["HOME"] = str(home)
    settings = {"run__storage_path": str(disk), "data__index_path": str(home / "index")}
    settings["data__retry_s"] = 0.2  # nobody makes room meanwhile
    run = disk / "filled"
    config = tiny(home, "filled", train__max_steps=3, **settings)
    assert live_on_little(config, said) == 0
    newest, wheres = 3, set()
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "step_3").rglob("*"))
    for number in range(times):
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        # keep=2: a third one needs room; then what a step appends, by the page.
        left = chance.randrange(size) if number % 3 else chance.randrange(4) * 4096
        with open(disk / "filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, free - left)
        config = tiny(home, "filled", train__max_steps=newest + 3, **settings)
        assert live_on_little(config, said) == 3
        text = said.read_text()
        assert str(disk) in text and "No space left on device" in text and "\n" not in text, text
        wheres.add(text.split(": ")[0].replace(str(disk), ""))
        steps = sound(run)
        assert newest in steps and max(steps) <= newest + 1
        drafts = [path.name for path in (run / "checkpoints").iterdir() if path.name[0] == "."]
        assert not drafts, "nothing half-written stays"
        (disk / "filler").unlink()
        newest = max(steps)
        config = tiny(home, "filled", train__max_steps=newest + 2, **settings)
        assert live_on_little(config, said) == 0
        newest += 2
    assert len(wheres) > 1, wheres
    same(run, whole_here(home, newest))


def whole_here(home: Path, steps: int) -> Path:
    config = tiny(home, f"whole_{steps}", train__max_steps=steps, checkpoint__every=0)
    assert live_on_little(config, home / "said") == 0
    return home / "runs" / f"whole_{steps}"


@pytest.mark.parametrize("times", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_the_disk_fills_up_while_every_step_is_saved_and_there_is_room_again(
    times: int, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    life = fork(fill_and_train, tmp_path, disk, times)
    life.join()
    if life.exitcode == NO_RIGHT:
        pytest.skip("a small disk needs user namespaces, or the right to mount one")
    assert life.exitcode == 0
