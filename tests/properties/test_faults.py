"""A run of which one call of the system fails, wherever that is: it ends like the run that nothing
happened to, or it stops with a line and does so once it is started again.

By default a sample of sites in runs of 12 steps; every site, one at a time, in runs of 60 with
`make test-all`.
"""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faults import AGAIN, DONE, SAID, Fault, Lab, Result, compiled

FUNCTIONS = (
    *("open", "create", "stat", "fstat", "read", "listdir", "write", "fsync"),
    *("rename", "unlink", "mkdir", "rmdir", "truncate"),
)
FOR_EVER = 1 << 40
MISSED = "never called"

pytestmark = pytest.mark.timeout(3600)  # a function has up to sixty sites, of a run each

# Of every stage a run goes through, and every function: what fails by default.
SAMPLE = (
    ("stat data/clip3.mp3", errno.EIO),
    ("open data/clip1.flac", errno.ESTALE),
    ("read data/clip2.ogg", errno.EIO),
    ("fstat data/clip0.wav", errno.ENOENT),
    ("read data/train.jsonl", errno.EIO),
    ("open index/#/offset.npy", errno.ENOENT),
    ("write index/.#.#/meta.json", errno.ENOSPC),
    ("create runs/run/.config.yaml.#.tmp", errno.ENOSPC),
    ("read runs/run/plan.json", errno.EIO),
    ("write runs/run/ledger/lane_1_from_1.jsonl", errno.ENOSPC),
    ("fstat runs/run/metrics.jsonl", errno.ESTALE),
    ("mkdir runs/run/predictions", errno.ENOSPC),
    ("write runs/run/checkpoints/.step_4.#.0001.#.#/state/__0_0.distcp", errno.ENOSPC),
    ("fsync runs/run/checkpoints/.step_6.#.0001.#.#/state/__0_0.distcp", errno.EIO),
    ("rename runs/run/checkpoints/step_8", errno.EIO),
    ("unlink runs/run/checkpoints/step_4/COMMITTED", errno.EIO),
)


# Of a start that goes on from the checkpoint of step 4.
RESUMED = (
    ("open runs/run/config.yaml", errno.ESTALE),
    ("open runs/run/checkpoints/step_4/COMMITTED", errno.EIO),
    ("read runs/run/checkpoints/step_4/meta.json", errno.EIO),
    ("read runs/run/checkpoints/step_4/state/__0_0.distcp", errno.ESTALE),
    ("open runs/run/checkpoints/step_4/state/.metadata", errno.ESTALE),
    ("listdir runs/run/checkpoints", errno.EACCES),
    ("listdir runs/run/ledger", errno.EACCES),
    ("read index/parts/#.npz", errno.EIO),
    ("stat data/clip5.flac", errno.ESTALE),
    ("create runs/run/ledger/.lane_0_from_1.jsonl.tmp", errno.ENOSPC),
    ("rename runs/run/metrics.jsonl", errno.EIO),
    ("fsync runs/run/ledger/lane_1_from_5.jsonl", errno.EIO),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = compiled(tmp_path_factory.mktemp("library"))
    if found is None:
        pytest.skip("no C compiler: calls of C libraries cannot be made to fail")
    return found


@pytest.fixture(scope="module")
def lab(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Short runs."""
    yield from _lab(library, tmp_path_factory.mktemp("short") / "lab", 12)


@pytest.fixture(scope="module")
def long_lab(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield from _lab(library, tmp_path_factory.mktemp("long") / "lab", 60)


def _lab(library: Path, folder: Path, steps: int) -> Iterator[Lab]:
    lab = Lab(library, folder, steps)
    yield lab
    lab.close()


def undisturbed(lab: Lab, workers: int = 1) -> Result:
    name = f"undisturbed{workers}"
    if not (lab.folder / name).exists():
        life = lab.live(name, workers=workers)
        assert life.code == DONE, life.said
    return lab.result(name)


def problems(
    lab: Lab,
    name: str,
    *faults: Fault,
    workers: int = 1,
    rank: int = 0,
    starts: int = 1,
    kill_at: int = 0,
) -> list[str]:
    """What is wrong with a run some of whose calls fail; starts: in how many of its starts they
    may. The last start is without faults. kill_at: the step at which a start before these, without
    faults, was killed."""
    found, failed = [], []
    if kill_at:
        life = lab.live(name, workers=workers, kill_at=kill_at)
        assert life.code == -signal.SIGKILL, life.said
    for number in range(starts + 1):
        left = [fault for fault in faults if fault.site not in failed] if number < starts else []
        life = lab.live(name, *left, workers=workers, rank=rank)
        failed += life.failed
        if life.code == DONE:
            break
        said = [line for line in life.said.splitlines() if line.startswith("error: ")]
        if life.code not in (SAID, AGAIN) or not said or "Traceback" in life.said:
            found.append(f"ended with {life.code}: {life.said[-2000:]}")
    else:
        return [*found, f"does not go on: {life.said[-2000:]}"]
    missed = [fault.site for fault in faults if fault.site not in failed]
    # Of two workers the one may find in the cache what the other has just measured.
    if missed and (workers == 1 or not failed):
        found.append(f"{MISSED}: {missed}")
    result, calm = lab.result(name), undisturbed(lab, workers)
    found += [
        f"{field} differs: {getattr(result, field)} instead of {getattr(calm, field)}"[:2000]
        for field in vars(calm)
        if getattr(result, field) != getattr(calm, field)
    ]
    return found


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_in_which_calls_fail_ends_as_if_none_had(lab: Lab, workers: int) -> None:
    faults = [Fault(site, error=number) for site, number in SAMPLE]
    rank = workers - 1
    if rank:  # which writes less
        faults = [f for f in faults if re.search(r"data/clip|lane_1|offset|plan\.json", f.site)]
    name = f"sample{workers}"
    assert problems(lab, name, *faults, workers=workers, rank=rank, starts=3) == []


@pytest.mark.slow
def test_a_start_in_which_calls_fail_goes_on_as_if_none_had(lab: Lab) -> None:
    faults = [Fault(site, error=number) for site, number in RESUMED]
    assert problems(lab, "resumed", *faults, starts=3, kill_at=5) == []


@pytest.mark.parametrize(
    ("site", "number"),
    [
        ("open data/clip3.mp3", errno.ENOENT),
        ("write runs/run/ledger/lane_0_from_1.jsonl", errno.ENOSPC),
    ],
)
def test_a_run_whose_storage_stays_away_stops_with_a_line_and_goes_on_when_it_is_back(
    lab: Lab, site: str, number: int
) -> None:
    fault = Fault(site, nth=3, times=FOR_EVER, error=number, halved=number == errno.ENOSPC)
    name = f"away{number}"
    life = lab.live(name, fault, retry_s=0.3)
    assert life.code in (SAID, AGAIN), life.said
    *_, said = life.said.splitlines()
    assert said.startswith("error: ")
    assert site.split("/")[-1] in said or "No space left" in said
    assert len(life.failed) >= 3  # it was tried again
    assert problems(lab, name, starts=0) == []


def error_of(site: str) -> int:
    """What such a call would say in life."""
    function, path = site.split(" ", 1)
    if function in ("create", "write", "mkdir"):
        return errno.ENOSPC
    if function in ("open", "stat") and path.startswith(("data/clip", "index/#/")):
        return errno.ENOENT
    return errno.ESTALE if function in ("open", "stat", "fstat") else errno.EIO


def classes(lab: Lab, kill_at: int) -> dict[str, tuple[str, int]]:
    """{site with its numbers as N: (one of those, the middle one of its calls)}."""
    found: dict[str, tuple[str, int]] = {}
    for site, calls in lab.sites(kill_at=kill_at).items():
        found.setdefault(re.sub(r"\d+", "N", site), (site, (calls + 1) // 2))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [0, 35])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_whichever_call_fails_a_run_ends_as_if_none_had(
    long_lab: Lab, function: str, kill_at: int
) -> None:
    """In its first start, or in one that goes on after a kill.

    How often some calls are made depends on the clock (of data files younger than two seconds
    nothing is cached; a beat comes or does not): where one was not made so often, the first is
    taken, and a few sites may not be met at all.
    """
    found, never = {}, []
    for place, (site, nth) in enumerate(classes(long_lab, kill_at).values()):
        if site.split(" ")[0] != function:
            continue
        for number in sorted({nth, 1}, reverse=True):
            name = f"{function}{kill_at}_{place}_{number}"
            fault = Fault(site, number, error=error_of(site))
            wrong = problems(long_lab, name, fault, kill_at=kill_at)
            if not any(text.startswith(MISSED) for text in wrong):
                break
        else:
            never.append(site)
            wrong = [text for text in wrong if not text.startswith(MISSED)]
        if wrong:
            found[site, number] = wrong
    assert found == {}
    assert len(never) <= 2, never


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_workers_whichever_call_of_one_fails_the_run_ends_as_if_none_had(
    long_lab: Lab, rank: int
) -> None:
    found = {}
    sites = long_lab.sites(workers=2, rank=rank)
    for place, (site, number) in enumerate(SAMPLE):
        site = site.replace("step_4", "step_20").replace("step_6", "step_30")
        site = site.replace("step_8", "step_40").replace("lane_1", f"lane_{rank}")
        if site not in sites:
            continue
        wrong = problems(
            *(long_lab, f"two{rank}_{place}", Fault(site, error=number)), workers=2, rank=rank
        )
        if wrong:
            found[site] = wrong
    assert found == {}
