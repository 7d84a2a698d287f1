"""Who gets which part of the cluster, and the environment of the processes that get it.

Light: the driver needs it before the libraries that a group of workers is made with.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import ray

from raysft import preload
from raysft.config import Config
from raysft.driver.growing import Autoscaler
from raysft.driver.readers import CPUS_A_GPU, Readers
from raysft.errors import UserError

ALLOC, OLD_ALLOC = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # its name until torch 2.9
# cuBLAS sums in one order where it has buffers of its own for each stream.
CUBLAS_WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
GPU_THREADS = 8  # at most, for what a worker's host does: padding, copies, chores
ROOM_WITHIN_S = 10.0
LEAST = 0.01  # of a CPU, that a worker is given


@dataclass(frozen=True)
class Shares:
    """Who gets which part of the cluster: training workers, and data tasks.

    threads: of a worker, for all that its CPU does. room: cores that a worker may use. readers:
    nodes that data tasks are kept to. apart: CPUs of a worker that evaluates beside training.
    """

    gpu: bool
    per_worker: dict[str, float]
    threads: int
    room: int
    data_cpus: float
    readers: Readers = field(default_factory=Readers)
    apart: float = 0.0

    @classmethod
    def of(cls, config: Config) -> Shares:
        """Divide the cluster's CPUs as the config says, or so that both sides can work."""
        total = ray.cluster_resources()
        cpus, gpus = total.get("CPU", 1.0), total.get("GPU", 0.0)
        workers, device = config.parallel.max_workers, config.parallel.device
        gpu = device == "cuda" or (device == "auto" and gpus >= 1)
        if gpu and not gpus:
            raise UserError(
                "parallel.device: cuda, but no node of the cluster has a GPU; start it where there "
                "is one (`nvidia-smi` lists those of a machine), or set parallel.device=cpu"
            )
        if gpu and gpus < config.parallel.min_workers:
            raise UserError(
                f"parallel.workers: {config.parallel.min_workers} workers need a GPU each and the "
                f"cluster has {gpus:g}; use at most that many, or parallel.device=cpu"
            )
        apart = config.evaluate.apart
        if gpu and apart and gpus < workers + apart and not Autoscaler.now().grows:
            raise UserError(
                f"evaluate.beside: {workers} workers that train (parallel.workers) and {apart} "
                "that evaluate meanwhile (evaluate.workers) need a GPU each, and the cluster has "
                f"{gpus:g}; use fewer, or evaluate.beside=false"
            )
        # On CPU machines training is the larger part of the work: data tasks get a quarter.
        free = cpus - workers - apart if gpu else cpus / 4
        readers = Readers.of(config, gpu)
        if (readers.labels or readers.apart) and not config.data.cpus:
            free = sum(readers.cpus().values())
            if not free:
                raise UserError(
                    f"data.nodes: no node of the cluster has the labels {readers.labels} and a "
                    "CPU; name those of one (`ray start --labels`), or set data.cpus to wait for "
                    "such nodes"
                )
            if readers.grows:
                free = max(free, CPUS_A_GPU * workers if gpu else cpus / 4)
        data_cpus = float(config.data.cpus or max(1.0, free))
        each = config.parallel.cpus_per_worker
        if each is None:
            whole = gpu or config.parallel.elastic  # Ray counts elastic workers in whole CPUs
            each = 1.0 if whole else max(LEAST, min(1.0, (cpus - data_cpus) / (workers + apart)))
        per_worker = {"CPU": each, **({"GPU": 1.0} if gpu else {})}
        room = max(1, int((cpus - data_cpus) / workers))
        own = room
        if gpu and readers.apart:  # workers have the cores beside their GPUs to themselves
            own = max(2, min(GPU_THREADS, int((cpus - sum(readers.cpus().values())) / gpus)))
        elif gpu:
            # Data tasks may have most cores; what the host does there comes in bursts.
            own = max(2, min(GPU_THREADS, int(cpus / gpus / 4)))
        beside = _beside(config, each, cpus) if apart else 0.0
        threads = config.parallel.threads or own
        return cls(gpu, per_worker, threads, room, data_cpus, readers, beside)

    def beside(self) -> Shares:
        """Of a group that evaluates while the one of these shares trains."""
        return replace(self, per_worker={**self.per_worker, "CPU": self.apart})


def _beside(config: Config, each: float, cpus: float) -> float:
    """CPUs of a worker that evaluates beside training: as many as one that trains, `each`, or what
    those leave of the cluster's."""
    workers, apart = config.parallel.max_workers, config.evaluate.apart
    left = (cpus - workers * each) / apart
    if left >= LEAST or Autoscaler.now().grows:
        return min(each, max(LEAST, left))
    raise UserError(
        f"evaluate.beside: {workers} workers that train (parallel.workers) with {each:g} CPUs each "
        f"(parallel.cpus_per_worker) leave none of the cluster's {cpus:g} to {apart} that "
        "evaluate meanwhile (evaluate.workers); use fewer, give them less, or set "
        "evaluate.beside=false"
    )


def train_environment(config: Config) -> dict[str, str]:
    """What Ray Train reads from the environment, for whatever the user has not set there."""
    parallel = config.parallel
    return {
        # Ray's own watch over workers sees one that is frozen; `Watchdog` one whose thread is.
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(parallel.timeout_s),
        # How long to wait for room for all workers. An elastic run asks for as many as there seems
        # to be room for, a moment after a node was lost for too many: soon it has to count again.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(ROOM_WITHIN_S) if parallel.elastic else "300",
    }


def worker_environment(config: Config, shares: Shares) -> dict[str, str]:
    """Environment of a worker, where libraries read it before our code runs. What the user has set
    stays.

    A group on gloo (every run has some) would connect each worker with each, of a thousand a
    million times: connected is who speaks to whom. On a CPU: OpenMP threads wait for each other by
    spinning, millions of turns long: as soon as anything else wants a core, a step takes several
    times as long. A short spin, then sleep, costs next to nothing on an idle machine. On a GPU:
    torch's memory grows in place, where blocks of many sizes would lie beside each other half
    empty; and Ray would give what the host does one thread.
    """
    settings = {"TORCH_GLOO_LAZY_INIT": "1", **preload.WORKER}
    if not shares.gpu:
        settings["GOMP_SPINCOUNT"] = "10000"
    else:
        settings["OMP_NUM_THREADS"] = str(shares.threads)
        if OLD_ALLOC not in os.environ:
            settings[ALLOC] = "expandable_segments:True"
        if config.train.deterministic:
            settings |= CUBLAS_WORKSPACE
    return {k: os.environ.get(k, v) for k, v in settings.items()}
