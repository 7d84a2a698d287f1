"""cluster/local.sh: three nodes, a token, jobs on both workers, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raysft.audit import audit
from raysft.run.lines import read_lines
from tests.cluster.conftest import PYTHON, ROOT, alive, wait_until, without_ray_settings

pytestmark = pytest.mark.timeout(580)
SCRIPT = str(ROOT / "cluster" / "local.sh")
RAY = str(Path(PYTHON).with_name("ray"))


def holders(folder: Path) -> list[psutil.Process]:
    """Processes with an open file in `folder`."""
    found = []
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            links = [os.readlink(d) for d in descriptors.iterdir()]
            if any(link.startswith(f"{folder}/") for link in links):
                found.append(psutil.Process(int(descriptors.parent.name)))
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


class Cluster:
    """local.sh with ports and a folder of this test. bare: a folder on the path, see BARE; None:
    raysft is installed, as it is here."""

    def __init__(self, temp: Path, bare: Path | None = None) -> None:
        self.environ = {
            **without_ray_settings(),
            **({"PYTHONPATH": str(bare)} if bare is not None else {}),
            "TMPDIR": str(temp),
            "RAYSFT_PORT_BASE": "26000",
            "RAYSFT_DASHBOARD_PORT": "25999",
            "RAYSFT_NODE_CPUS": "2",
        }
        self.folder = temp / f"raysft-{os.getuid()}"

    def run(self, *command: str, timeout: float = 360) -> subprocess.CompletedProcess[str]:
        """Run `command` with the exports of `start`."""
        return subprocess.run(
            command, env=self.environ, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )

    def start(self) -> None:
        """Start it, and take over what it tells the user to export."""
        done = self.run(SCRIPT, "start")
        assert done.returncode == 0, done.stderr
        exports = dict(re.findall(r"^export (\w+)=(.*)$", done.stdout, re.M))
        assert set(exports) == {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"}
        self.environ.update(exports)


# As where raysft is not installed: whatever makes it so in this environment is taken back.
BARE = """
import sys
sys.path[:] = [path for path in sys.path if path != {root!r}]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
sys.path_hooks[:] = [f for f in sys.path_hooks if "editable" not in getattr(f, "__module__", "")]
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    temp = Path("/tmp") / f"lc{os.getpid()}"
    temp.mkdir()
    bare = tmp_path_factory.mktemp("bare")
    (bare / "sitecustomize.py").write_text(BARE.format(root=str(ROOT)))
    cluster = Cluster(temp, bare)
    try:
        cluster.start()
        yield cluster
    finally:
        stopped = cluster.run(SCRIPT, "stop")
        assert stopped.returncode == 0, stopped.stderr
        assert not alive(holders(cluster.folder))
        temp.rmdir()  # fails unless it is empty


def submit(
    cluster: Cluster, folder: Path, *options: str, steps: int, every: int = 500
) -> tuple[int, str]:
    """Submit the recipe of the spoken digits; runs go to `folder`. every: steps a checkpoint."""
    done = cluster.run(
        *(RAY, "job", "submit", "--working-dir", ".", *options),
        *(
            "--",
            PYTHON,
            "jobs/sft.py",
            "examples/spoken_digits/asr.yaml",
            f"train.max_steps={steps}",
        ),
        *(f"run.storage_path={folder}", "parallel.workers=2", "log.every=1", "data.eval=[]"),
        *("evaluate.every=0", f"checkpoint.every={every}"),
    )
    return done.returncode, done.stdout + done.stderr


def test_three_nodes_listen_on_loopback_only_and_the_token_is_private(cluster: Cluster) -> None:
    assert cluster.run(SCRIPT, "status").returncode == 0
    assert stat.S_IMODE((cluster.folder / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.folder.stat().st_mode) == 0o700
    raylets = [p for p in holders(cluster.folder) if p.name() == "raylet"]
    assert len(raylets) == 3
    listening = {
        c.laddr.ip
        for p in holders(cluster.folder)
        for c in p.net_connections()
        if c.status == psutil.CONN_LISTEN and p.name() in ("raylet", "gcs_server")
    }
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_second_start_is_refused_and_harms_nothing(cluster: Cluster) -> None:
    again = cluster.run(SCRIPT, "start")
    assert again.returncode == 1
    assert "already running" in again.stderr
    assert cluster.run(SCRIPT, "status").returncode == 0


def test_its_exports_are_said_whenever_asked(cluster: Cluster) -> None:
    done = cluster.run(SCRIPT, "exports")
    assert done.returncode == 0, done.stderr
    exports = dict(re.findall(r"^export (\w+)=(.*)$", done.stdout, re.M))
    assert exports == {name: cluster.environ[name] for name in exports} and len(exports) == 3
    (storage,) = re.findall(r"run\.storage_path=(\S+)", done.stdout)
    assert Path(storage).is_absolute()


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["none", "another"])
def test_a_submission_without_the_token_is_refused(
    cluster: Cluster, tmp_path: Path, token: str | None
) -> None:
    environ = {k: v for k, v in cluster.environ.items() if not k.startswith("RAY_AUTH")}
    environ["HOME"] = str(tmp_path)  # where Ray looks for one else
    if token is not None:
        (tmp_path / "token").write_text(token)
        environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    else:
        environ["RAY_AUTH_MODE"] = "disabled"
    trace = tmp_path / "ran"
    command = (RAY, "job", "submit", "--", "touch", str(trace))
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode != 0
    assert not trace.exists()
    assert cluster.run(*command).returncode == 0 and trace.exists()  # with it


@pytest.mark.slow
def test_raysft_comes_with_the_working_directory_and_is_nowhere_else(cluster: Cluster) -> None:
    look = (PYTHON, "-c", "import raysft; print('from', raysft.__file__)")
    # -P: without the folder that the cluster was started in, which is the source's here.
    without = cluster.run(RAY, "job", "submit", "--", PYTHON, "-P", *look[1:])
    assert without.returncode != 0 and "No module named 'raysft'" in without.stdout
    done = cluster.run(RAY, "job", "submit", "--working-dir", ".", "--", *look)
    assert re.search(r"from \S+/working_dir_files/\S+/raysft/__init__.py", done.stdout)


@pytest.mark.slow
def test_a_job_spreads_its_workers_over_both_nodes_and_shows_its_progress(
    cluster: Cluster, tmp_path: Path
) -> None:
    code, said = submit(cluster, tmp_path, steps=5)
    assert code == 0, said
    assert "2 worker(s) started on node(s) node1, node2" in said
    assert len(re.findall(r"step 5/5  loss", said)) == 1, "each line is printed once"
    run = tmp_path / "spoken_digits_asr"
    assert [line["world_size"] for line in read_lines(run / "metrics.jsonl")] == [2] * 5
    assert (run / "checkpoints" / "step_5" / "COMMITTED").is_file()


def test_a_run_that_the_next_submission_would_not_find_is_refused(cluster: Cluster) -> None:
    code, said = submit(cluster, Path("runs"), steps=5)
    assert code != 0
    # `ray job submit` shows the end of a failed job's log a second time.
    (line,) = {line for line in said.splitlines() if line.startswith("error: ")}
    assert line.startswith("error: run.storage_path: /")
    assert "/runs lies in Ray's own copy of the working directory" in line
    assert "Traceback" not in said


@pytest.mark.slow
def test_stopping_a_job_leaves_no_worker_of_it(cluster: Cluster, tmp_path: Path) -> None:
    code, said = submit(cluster, tmp_path, "--no-wait", "--submission-id", "long", steps=10_000)
    assert code == 0, said
    logs = lambda: cluster.run(RAY, "job", "logs", "long").stdout  # noqa: E731
    assert wait_until(lambda: "/10000  loss" in logs(), 120), logs()

    def workers() -> list[psutil.Process]:
        busy = ("sft.py", "RayTrainWorker", "TrainController", "PlacementGroupCleaner")
        found = []
        for process in alive(holders(cluster.folder)):
            with contextlib.suppress(psutil.Error):  # it ends while it is looked at
                if any(name in " ".join(process.cmdline()) for name in busy):
                    found.append(process)
        return found

    assert workers()
    assert cluster.run(RAY, "job", "stop", "long").returncode == 0
    assert wait_until(lambda: not workers(), 30), workers()


@pytest.mark.slow
def test_the_same_submission_goes_on_after_the_head_was_lost(
    cluster: Cluster, tmp_path: Path
) -> None:
    """What a RayJob does: another cluster, and the command again."""
    code, said = submit(cluster, tmp_path, "--no-wait", steps=60, every=5)
    assert code == 0, said
    run = tmp_path / "spoken_digits_asr"
    assert wait_until(lambda: (run / "checkpoints/step_10/COMMITTED").is_file(), 180)
    assert cluster.run(SCRIPT, "lose", "0").returncode == 0
    assert cluster.run(SCRIPT, "stop").returncode == 0
    before = {line["step"] for line in read_lines(run / "metrics.jsonl")}
    assert before and max(before) < 60
    cluster.start()
    code, said = submit(cluster, tmp_path, steps=60, every=5)
    assert code == 0, said
    resumed = [e for e in read_lines(run / "events.jsonl") if e["event"] == "continued"]
    assert [event["step"] >= 10 for event in resumed] == [True]
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, 61))
    assert audit(run).clean


@pytest.mark.slow
def test_it_starts_again_after_a_stop(cluster: Cluster) -> None:
    assert cluster.run(SCRIPT, "stop").returncode == 0
    assert cluster.run(SCRIPT, "status").returncode == 1
    assert cluster.run(SCRIPT, "exports").returncode == 1
    cluster.start()
    assert cluster.run(SCRIPT, "status").returncode == 0
