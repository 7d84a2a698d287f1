"""The connection to Ray: join the cluster this process belongs to, or start one for this process.

Around everything that needs Ray (`launch` and the jobs open it, index, stream and step work inside
it). A process joins a cluster when RAY_ADDRESS names one, which `ray job submit` sees to for its
jobs; otherwise it starts an embedded Ray on this machine and takes it down again, processes and
temporary folder, however the process ends. Costs 4 to 6 s at the start and 1.5 s at the end
(embedded), under 1 s to join.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import shlex
import signal
import socket
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import raysft
from raysft import plugins, preload
from raysft.driver.ray_folder import RayFolder
from raysft.errors import UserError, first_line

log = logging.getLogger(__name__)

# What Ray prints or does by default and a user of ours does not want; whoever sets one of these
# in the environment keeps the value. Ray Train passes RAY_TRAIN_* on to controller and workers.
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Train copies what workers print into its own log: every progress line would appear twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # The controller answers reports and sees the end of workers at this interval (2 s by default).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # The driver looks for nodes about to be taken away itself (`workers.Watch`), once for all.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_EMBEDDED_DEFAULTS = {
    "RAY_preload_python_modules": "raysft.preloaded",  # see `warm`
    # Ray runs workers at nice 15: beside anything else on the machine training would crawl.
    "RAY_worker_niceness": "0",
    # A process that is idle has what it imported: it is kept for the next of its kind.
    "RAY_idle_worker_killing_time_threshold_ms": "120000",
    # A worker that is frozen cannot leave its process group: half a minute for nothing.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",
}

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a submitted job
_PACKAGES = "working_dir_files"  # Ray unpacks working directories in folders of this name


@dataclass(frozen=True)
class Node:
    """A living node: its name (Ray's node name, an address by default), CPUs, GPUs and labels."""

    id: str
    name: str
    address: str
    cpus: float
    gpus: float
    labels: dict[str, str]


@dataclass(frozen=True)
class Session:
    """An open connection. `embedded`: Ray was started by, and ends with, this process."""

    embedded: bool
    address: str

    def nodes(self) -> list[Node]:
        """The living nodes, largest first (by GPUs, CPUs, then name). The list changes with time:
        a cluster that scales with the work may hold none with a GPU before the work arrives.
        """
        import ray

        nodes = [
            Node(
                id=node["NodeID"],
                name=node["NodeName"],
                address=node["NodeManagerAddress"],
                cpus=float(node["Resources"].get("CPU", 0)),
                gpus=float(node["Resources"].get("GPU", 0)),
                labels=dict(node["Labels"]),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
        return sorted(nodes, key=lambda node: (-node.gpus, -node.cpus, node.name))

    def cluster_cpus(self) -> float:
        """CPUs of all living nodes, in use or not."""
        return sum(node.cpus for node in self.nodes())

    def cluster_gpus(self) -> float:
        """GPUs of all living nodes, in use or not."""
        return sum(node.gpus for node in self.nodes())


@contextmanager
def ray_session() -> Iterator[Session]:
    """Connect to Ray for the length of a `with` block.

    Joins the cluster in RAY_ADDRESS (`host:port`, or `auto` on one of its nodes); without one, or
    with `local`, starts an embedded Ray, whatever address files earlier clusters left behind. On
    the way out, by an error or a signal too (SIGTERM ends the process with exit code 143, SIGINT
    raises KeyboardInterrupt), an embedded Ray's processes and folder are gone; after an error
    that is not the user's its folder stays and is named in the log.

    Call it in the main thread. Raises UserError if RAY_ADDRESS is no address of a cluster, if no
    cluster answers there or its token does not match, or if this process already is connected.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    _check_address(address)
    for key, value in _DEFAULTS.items():
        os.environ.setdefault(key, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    import ray
    from ray._private import ray_constants

    # An autoscaler at its most says so several times a second, for as long as tasks wait.
    ray_constants.AUTOSCALER_EVENTS = ray_constants.env_integer("RAY_SCHEDULER_EVENTS", 0)
    if ray.is_initialized():
        raise UserError(
            "this process is already connected to Ray; raysft opens the connection itself: "
            "remove the ray.init() before it"
        )
    received: list[int] = []
    try:
        yield from _embedded(received) if address in ("", "local") else _joined(address, received)
    finally:
        if received:
            # In the middle of ray.get(), Ray turns the handler's exit into one of its own (1).
            raise SystemExit(128 + received[0])


def libraries() -> Callable[[], None]:
    """Import what every start needs, in a thread, while the main thread starts Ray; what is
    returned waits for it, and is to be called before any of it is imported elsewhere.

    Nothing of Ray's, which the main thread imports meanwhile. Two threads cannot import the same:
    transformers puts another module in its own place when it has been imported, and whoever waited
    for it has the first one, in which there is nothing.
    """

    def run() -> None:
        with contextlib.suppress(ImportError):  # the main thread will say so
            for name in ("torch", "transformers", "raysft.models"):
                importlib.import_module(name)

    thread = threading.Thread(target=run, daemon=True, name="libraries")
    thread.start()
    return thread.join


def check_kept(**places: str | Path | None) -> None:
    """Refuse to write where nothing is kept: in a Ray job a relative path lies in Ray's unpacked
    copy of the working directory, which is each node's own, goes with the Ray session, and is
    another one as soon as a file in it has changed.

    places: name of a key (__ for the dot) -> its path; None and URLs are passed over. Raises
    UserError.
    """
    for name, given in places.items():
        if given is None or "://" in str(given):
            continue
        path = Path(given).expanduser().absolute()
        if _PACKAGES not in path.parts:
            continue
        key = name.replace("__", ".")
        raise UserError(
            f"{key}: {given} lies in Ray's own copy of the working directory, where another "
            "submission of this job does not find it; in a Ray job give a folder that all nodes "
            f"see, as an absolute path, e.g. {key}=/shared/{path.name}"
        )


def destination() -> str:
    """What `ray_session` is about to do, for a user who waits meanwhile."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address in ("", "local"):
        return "starting Ray on this machine"
    return f"joining the Ray cluster at {address}"


def _check_address(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address} is the address of a jobs API, which takes jobs: run "
            f"`ray job submit --working-dir . -- python {shlex.join(sys.argv)}`, "
            f"or unset RAY_ADDRESS to run on this machine alone{_upload(Path.cwd())}"
        )
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS={address} is the address of a Ray client server, which raysft does not "
            "use; expected host:port of the cluster, or submit it with `ray job submit`"
        )


def _upload(folder: Path) -> str:
    """What would keep `folder` from being uploaded as a working directory; "" if nothing does."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE as most
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    ignored = get_excludes_from_ignore_files(folder, include_gitignore=True)
    sizes: dict[str, int] = {}
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [f for f in folders if not any(skip(here / f) for skip in ignored)]
        for path in (here / name for name in files):
            if not any(skip(path) for skip in ignored) and path.is_file():
                top = path.relative_to(folder).parts[0]
                sizes[top] = sizes.get(top, 0) + path.stat().st_size
    if sum(sizes.values()) <= most:
        return ""
    largest = max(sizes, key=lambda name: sizes[name])
    total, part, limit = (round(n / 2**20) for n in (sum(sizes.values()), sizes[largest], most))
    return (
        f". It would upload {total:,} MiB from {folder} and Ray takes {limit:,} (else: error 413): "
        f"name {largest} ({part:,} MiB) in a file .rayignore there"
    )


def _embedded(received: list[int]) -> Iterator[Session]:
    import ray

    for key, value in _EMBEDDED_DEFAULTS.items():
        os.environ.setdefault(key, value)
    _set_token()
    _offer_source_to_workers()
    folder = RayFolder()
    keep = False
    # Ray's actors look for "the" cluster of the machine, and give up where there are two: they
    # inherit the address from here. Their temporary files go where they are removed.
    port = _free_port()
    own = f"{ray.util.get_node_ip_address()}:{port}"
    before = os.environ.copy()
    os.environ.update(RAY_GCS_SERVER_PORT=str(port), RAY_ADDRESS=own, TMPDIR=str(folder.path))
    os.environ[preload.MARK] = str(folder.path / "controller")
    try:
        _exit_on_sigterm(received)  # Ray puts a handler of its own in its place, and we again
        # address="local" starts a new Ray where None would look for one, also in the file a
        # cluster leaves behind that was killed. The dashboard stays on: Train asks its state API.
        try:
            ray.init(
                address="local",
                num_cpus=_affinity(),
                _temp_dir=str(folder.ray),
                logging_level=logging.WARNING,
                include_dashboard=True,
            )
        except Exception as error:  # it raises nothing more special
            keep = True
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"Ray could not be started on this machine ({reason}): where it has much else to "
                "do, give the command again when it has less"
            ) from error
        _restore(before, "TMPDIR")
        _exit_on_sigterm(received)
        yield Session(embedded=True, address=own)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        keep = True
        raise
    finally:
        ray.shutdown()
        _restore(before, "RAY_GCS_SERVER_PORT", "RAY_ADDRESS", "TMPDIR", preload.MARK)
        if keep:
            folder.keep()
            log.warning("Ray's own logs of this run are kept in %s", folder.path)
        else:
            folder.remove()


def _joined(address: str, received: list[int]) -> Iterator[Session]:
    import ray
    from ray.exceptions import AuthenticationError

    _require_answer(address)
    brought = _brought()
    try:
        context = ray.init(
            address=address,
            logging_level=logging.WARNING,
            runtime_env={"py_modules": brought} if brought else None,
        )
    except AuthenticationError as error:
        raise UserError(
            f"the cluster at RAY_ADDRESS={address} refuses this process's token; set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token file"
        ) from error
    except (ConnectionError, ValueError) as error:
        raise _no_answer(address, error) from error
    try:
        _exit_on_sigterm(received)
        yield Session(embedded=False, address=context.address_info["gcs_address"])
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ask the port first: Ray itself waits two minutes for a cluster that is gone."""
    if address == "auto":
        return  # Ray finds the address, or says at once that there is none
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"RAY_ADDRESS={address}: expected host:port of the cluster, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise _no_answer(address, error) from error


def _no_answer(address: str, error: Exception) -> UserError:
    return UserError(
        f"no Ray cluster answers at RAY_ADDRESS={address} ({first_line(error)}); "
        "start it, correct the address, or unset RAY_ADDRESS to run on this machine alone"
    )


def _set_token() -> None:
    """Give an embedded Ray a secret of this process, so that no other user of the machine can
    run code in it. Ray would by itself keep one in the home folder, and warn that it does.
    """
    given = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(os.environ.get(key) for key in given):
        # It stays for the life of the process: Ray reads it once.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


def _package() -> Path:
    return Path(raysft.__file__).parent


def _installed() -> bool:
    return _package().parent == Path(sysconfig.get_paths()["purelib"])


def _brought() -> list[str]:
    """What this process brings to a cluster that it joins. A job brings its own working directory;
    a driver started by hand on a node has to bring the package, unless every node has it installed,
    and plugins that are not."""
    if _JOB in os.environ:
        return []
    package = [] if _installed() else [_package()]
    return [str(path) for path in (*package, *plugins.local())]


def _offer_source_to_workers() -> None:
    """Let worker processes import a raysft that is not installed (`python jobs/sft.py` in a
    checkout), and plugins that are not: they inherit the environment, but not this process's
    sys.path.
    """
    known = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    root = str(_package().parent)
    if not _installed() and root not in known:
        known.insert(0, root)
    folders = dict.fromkeys(str(place.parent) for place in plugins.local())
    known += [folder for folder in folders if folder not in known]
    if known:
        os.environ["PYTHONPATH"] = os.pathsep.join(known)


def _restore(before: dict[str, str], *keys: str) -> None:
    for key in keys:
        if key in before:
            os.environ[key] = before[key]
        else:
            os.environ.pop(key, None)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _affinity() -> int | None:
    """The cores this process is confined to; None (Ray counts, and knows containers) if to none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return None if cores == os.cpu_count() else cores


def _exit_on_sigterm(received: list[int]) -> None:
    """End as shells expect (143), through the `finally` blocks. Ray's handler exits with 15."""

    def leave(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
