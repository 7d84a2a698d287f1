"""raysft: supervised fine-tuning of speech+text models on Ray.

`from raysft import load_config, prepare, train, sweep, evaluate, export, report, dry_run,
transcribe, synthesize, clone` (see `raysft.library`); each is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from raysft import environment as environment  # first of all: before libraries look for a home

if TYPE_CHECKING:
    from raysft.library import clone as clone
    from raysft.library import dry_run as dry_run
    from raysft.library import evaluate as evaluate
    from raysft.library import export as export
    from raysft.library import load_config as load_config
    from raysft.library import modality_routing as modality_routing
    from raysft.library import prepare as prepare
    from raysft.library import report as report
    from raysft.library import sweep as sweep
    from raysft.library import synthesize as synthesize
    from raysft.library import train as train
    from raysft.library import transcribe as transcribe

__version__ = "0.1.0"

_OFFERED = ("clone", "dry_run", "export", "load_config", "modality_routing", "synthesize")
_PACKAGES = (
    "evaluate",
    "report",
    "prepare",
    "sweep",
    "train",
    "transcribe",
)  # of ours, which can be called: see `raysft.offered`


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"raysft.{name}")
    if name in _OFFERED:
        return getattr(import_module("raysft.library"), name)
    raise AttributeError(f"module 'raysft' has no attribute {name!r}")
