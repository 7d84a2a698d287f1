"""What somebody has beside raysft: modules that the config names, and rows of installed packages.

`plugins: [my_module]` imports my_module, which gives what it has to `register`: of
`raysft.data.sources`, `raysft.config.families`, `raysft.config.strategies`, `raysft.config.losses`,
`raysft.config.rewards` or `raysft.scorers`. A package that is installed may name rows of these
tables as entry points (GROUPS) instead; they are there whatever the config says.

Every process that reads a config, measures or reads data, or trains calls `load` before it asks a
table: the driver with the names of the config, all others with what `loaded` was there. It costs
nothing a second time, and some 50 ms the first, for the entry points.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from raysft.errors import UserError, first_line

GROUPS = {
    "raysft.formats": "raysft.data.sources",
    "raysft.families": "raysft.config.families",
    "raysft.strategies": "raysft.config.strategies",
    "raysft.losses": "raysft.config.losses",
    "raysft.rewards": "raysft.config.rewards",
    "raysft.scorers": "raysft.scorers",
}
"""Group of entry points -> the module whose `register` takes what each names: a row."""

_loaded: dict[str, None] = {}  # names, in their order


def load(names: Sequence[str] = (), beside: Path | None = None) -> None:
    """Import the modules of these dotted names, and the rows of all entry points, once a process.

    Modules are found where Python finds them, and in the folder the command runs in. beside: the
    folder of the config file, where a user may have meant them to be found. Raises UserError for
    what cannot be imported, or registers a name that is taken.
    """
    _installed_rows()
    for name in names:
        if name not in _loaded:
            _import(name, beside)
            _loaded[name] = None


def loaded() -> tuple[str, ...]:
    """The names that this process has loaded: what others are to load for it."""
    return tuple(_loaded)


def local() -> list[Path]:
    """The packages (folders) and modules (files) loaded here that are not installed, so that other
    machines may not have them."""
    tops = dict.fromkeys(name.partition(".")[0] for name in _loaded)
    places = [_place(sys.modules[top]) for top in tops if top in sys.modules]
    return [place for place in places if place is not None and not _is_installed(place)]


def _place(module: ModuleType) -> Path | None:
    """Where a package or module lies; None: nowhere, or in several folders."""
    folders = list(getattr(module, "__path__", []))
    if folders:
        return Path(folders[0]).absolute() if len(folders) == 1 else None
    return Path(module.__file__).absolute() if module.__file__ else None


def _is_installed(place: Path) -> bool:
    where = sysconfig.get_paths()
    return any(
        place.is_relative_to(where[name]) for name in ("purelib", "platlib", "stdlib", "platstdlib")
    )


def _import(name: str, beside: Path | None) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(
            f"plugins: {name!r} is not the name of a module; write it as Python imports it, e.g. "
            "my_module or my_package.my_module"
        )
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()  # for a file that has just been written
    try:
        importlib.import_module(name)
    except UserError as error:
        raise UserError(f"plugins: {name}: {error}") from error
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _broken(f"plugins: {name}", error) from error
        raise UserError(
            f"plugins: there is no module {error.name}; modules are looked for where Python does, "
            f"and in the folder the command runs in{_hint(error.name, here, beside)}"
        ) from error
    except Exception as error:
        raise _broken(f"plugins: {name}", error) from error


def _hint(name: str, here: str, beside: Path | None) -> str:
    """Where the module is, if it lies beside the config; else what to do."""
    if beside is not None and os.path.abspath(beside) != here:
        folder = Path(os.path.abspath(beside))
        place = folder.joinpath(*name.split("."))
        for there in (place.with_name(f"{place.name}.py"), place):
            if there.exists():
                return f", but {there} is there: run it in {folder}, or set PYTHONPATH={folder}"
    return f" ({here}); run it where the module is, install it, or name its folder in PYTHONPATH"


def _broken(who: str, error: Exception) -> UserError:
    """A plugin's own mistake, with its place."""
    if isinstance(error, SyntaxError):
        at = f" ({error.filename}, line {error.lineno})"
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _outside(frame)]
        at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    said = error.msg if isinstance(error, SyntaxError) else first_line(error)
    return UserError(f"{who} cannot be imported: {type(error).__name__}: {said}{at}")


def _outside(frame: traceback.FrameSummary) -> bool:
    own = frame.filename == __file__ or frame.filename == importlib.__file__
    return not own and not frame.filename.startswith("<")


@functools.cache
def _installed_rows() -> None:
    """Register what installed packages name as entry points, in the order of their names."""
    found = entry_points()
    for group, table in GROUPS.items():
        for point in sorted(found.select(group=group), key=lambda point: (point.name, point.value)):
            _register(point, table)


def _register(point: EntryPoint, table: str) -> None:
    package = f" of {point.dist.name}" if point.dist is not None else ""
    who = f"plugins: entry point {point.name} ({point.group}){package}"
    try:
        importlib.import_module(table).register(point.load())
    except UserError as error:
        raise UserError(f"{who}: {error}") from error
    except Exception as error:
        raise _broken(who, error) from error
