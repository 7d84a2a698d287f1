"""The packages that a run works with: what its config.yaml records."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "raysft",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "ray",
    "numpy",
    "soundfile",
    "soxr",
)


def versions() -> dict[str, str]:
    """The packages here, by name: PACKAGES."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
