"""The session joins the cluster it is told of, or starts one and leaves nothing of it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import (
    ROOT,
    alive,
    safe_cmdline,
    wait_until,
    without_ray_settings,
)

Spawn = Callable[..., "subprocess.Popen[str]"]

SHOW = """
from pathlib import Path
import ray
from raysft.driver.session import ray_session

@ray.remote
def imports():
    import raysft
    return raysft.__file__

with ray_session() as session:
    print(session.embedded, session.cluster_cpus(), len(session.nodes()), ray.get(imports.remote()))
    folder = Path(ray._private.worker._global_node.get_temp_dir_path())
    print(oct(folder.parent.stat().st_mode & 0o777))
"""

BUSY = """
import time
import ray
from raysft.driver.session import ray_session

@ray.remote
def busy():
    while True:
        time.sleep(0.01)

with ray_session():
    running = [busy.options(num_cpus=0.1).remote() for _ in range(2)]
    ray.wait(running, timeout=2)
    print("busy", flush=True)
    ray.get(running)
"""

FAIL = """
from raysft.driver.session import ray_session
with ray_session():
    raise RuntimeError("a defect")
"""

REFUSED = """
from raysft.errors import UserError
from raysft.driver.session import ray_session
try:
    with ray_session():
        print("connected")
except UserError as error:
    print("UserError:", error)
"""


@pytest.fixture
def temp() -> Iterator[Path]:
    """A folder for temporary files, with a path short enough to be used."""
    found = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))
    yield found
    shutil.rmtree(found)


def test_an_embedded_session_runs_tasks_that_import_raysft_and_leaves_no_folder(
    spawn: Spawn, temp: Path
) -> None:
    """Ray opens all it makes to every user: its folder lies in one that is its user's alone."""
    process = spawn(SHOW, TMPDIR=str(temp))
    out, err = process.communicate(timeout=120)
    assert list(temp.glob("raysft-*")) == []
    assert process.returncode == 0, err
    embedded, cpus, nodes, module, mode = out.split()
    assert mode == "0o700"
    assert (embedded, nodes) == ("True", "1")
    assert float(cpus) >= 1
    assert module.endswith("raysft/__init__.py")
    assert err == "", "a session prints nothing of its own"


def test_a_stale_address_file_and_a_long_temporary_folder_do_no_harm(
    spawn: Spawn, tmp_path: Path
) -> None:
    temp = tmp_path / ("long" * 20)
    (temp / "ray").mkdir(parents=True)
    (temp / "ray" / "ray_current_cluster").write_text("127.0.0.1:6")
    process = spawn(SHOW, TMPDIR=str(temp))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("True")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, None, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_session_that_is_killed_leaves_no_process_and_no_folder(
    spawn: Spawn, temp: Path, number: signal.Signals, code: int | None
) -> None:
    process = spawn(BUSY, TMPDIR=str(temp))
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n", process.communicate()[1]
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in p.name() for p in family)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert code is None or process.returncode == code
    # Nobody ends the agents of a raylet that was killed: they find out themselves.
    patience = 120 if number == signal.SIGKILL else 10
    assert wait_until(lambda: not alive(family), patience), alive(family)
    assert list(temp.glob("raysft-*")) == []


def test_a_defect_keeps_its_traceback_and_names_the_kept_logs(spawn: Spawn) -> None:
    process = spawn(FAIL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "RuntimeError: a defect" in err
    folder = Path(err.split("kept in ")[1].split()[0])
    assert folder.is_dir()
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8265", "ray job submit"),
        ("ray://127.0.0.1:10001", "Ray client"),
        ("127.0.0.1:9", "no Ray cluster answers"),
        ("nonsense", "expected host:port"),
    ],
)
def test_an_address_that_cannot_work_is_one_readable_line(
    spawn: Spawn, address: str, said: str
) -> None:
    process = spawn(REFUSED, RAY_ADDRESS=address)
    out, _ = process.communicate(timeout=60)
    assert out.startswith("UserError:")
    assert out.count("\n") == 1
    assert said in out
    assert address in out


@pytest.mark.slow
def test_a_run_begins_in_processes_that_were_started_while_it_was_prepared(
    tmp_path: Path,
) -> None:
    """Controller and worker: else each is started, and imports torch, when the one before has."""
    words = ["examples/spoken_digits/asr.yaml", f"run.storage_path={tmp_path}"]
    words += ["train.max_steps=1", "evaluate.at_end=false"]
    with subprocess.Popen(
        [sys.executable, "-u", "jobs/sft.py", *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=without_ray_settings(),
    ) as process:
        assert process.stdout is not None
        ahead: set[int] = set()
        actors: dict[str, int] = {}
        for line in process.stdout:
            children = psutil.Process(process.pid).children(recursive=True)
            if line.startswith("planning batches"):
                ahead = {child.pid for child in children}
            if line.startswith("building the model"):
                actors = {"".join(safe_cmdline(child))[:14]: child.pid for child in children}
    assert process.returncode == 0
    assert actors["ray::TrainCont"] in ahead
    assert actors["ray::RayTrainW"] in ahead
