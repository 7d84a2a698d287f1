"""What all benchmarks share: their options, and results with the machine they were measured on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "torch", "ray", "transformers", "lhotse", "soundfile")


def arguments(description: str) -> argparse.Namespace:
    """--quick and --out, from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds, for tests")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and PNG")
    return parser.parse_args()


def run_group(
    script: str, arguments: list[str], workers: int, environment: dict[str, str] | None = None
) -> Any:
    """`script --worker *arguments OUT` in so many processes, which find each other by RANK,
    WORLD_SIZE and RENDEZVOUS; what rank 0 has written to OUT, as JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        processes = [
            subprocess.Popen(
                [sys.executable, script, "--worker", *arguments, str(out)],
                cwd=scratch,
                env={
                    **os.environ,
                    **(environment or {}),
                    "RANK": str(rank),
                    "WORLD_SIZE": str(workers),
                    "RENDEZVOUS": f"{scratch}/store",
                },
                stdout=subprocess.DEVNULL,
            )
            for rank in range(workers)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"{' '.join(arguments)}, {workers} workers: exit codes {codes}")
        return json.loads(out.read_text())


def machine() -> dict[str, Any]:
    """CPU, cores, memory and versions: what a reader needs to judge a number."""
    info = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: installed[name] for name in PACKAGES if name in installed},
    }


def write(
    name: str, payload: dict[str, Any], figure: Figure, *, quick: bool = False, out: Path = RESULTS
) -> Path:
    """Write NAME.json (payload and machine) and NAME.png; a quick run's have `_quick` in the name,
    so that they never replace real results. Returns the JSON's path."""
    out.mkdir(parents=True, exist_ok=True)
    stem = out / (f"{name}_quick" if quick else name)
    document = {"benchmark": name, "quick": quick, "machine": machine(), **payload}
    path = stem.with_suffix(".json")
    path.write_text(json.dumps(document, indent=2) + "\n")
    figure.savefig(stem.with_suffix(".png"), dpi=120, bbox_inches="tight")
    return path
