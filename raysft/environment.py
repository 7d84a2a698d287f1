"""A home and a name for processes that have none, as containers often do.

Kubernetes and OpenShift run a container as a user id that /etc/passwd does not know, with HOME
unset, missing or not writable; torch asks for the user's name when it is imported, and it, Triton,
DeepSpeed, matplotlib and the Hugging Face libraries keep caches in the home folder. `settle`
answers them through the environment, before any of them is imported, in every process that imports
raysft: what the user has set stays. Without a home that can be written, caches go to a folder in
the temporary one that nobody else can enter.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from raysft import remarks

# Asked in this order by getpass.getuser(), before the password file.
_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


def settle(environ: MutableMapping[str, str] | None = None) -> str | None:
    """Set what is missing in `environ` (os.environ); returns a line for the user where caches go
    elsewhere than home, else None."""
    environ = os.environ if environ is None else environ
    for key, value in remarks.ENVIRONMENT.items():
        environ.setdefault(key, value)
    known = _account()
    if known is None and not any(environ.get(name) for name in _NAMES):
        environ["USER"] = f"uid{os.getuid()}"
    home = environ.get("HOME") or (known.pw_dir if known is not None else "")
    if home and os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK):
        return None
    place = _private_folder()
    if place is None:
        return None  # nor is there a temporary folder: whoever needs one says so
    settings: dict[str, Path] = {
        "TRITON_HOME": place,
        "TORCH_EXTENSIONS_DIR": place / "torch_extensions",
        "MPLCONFIGDIR": place / "matplotlib",
        "HF_MODULES_CACHE": place / "huggingface" / "modules",
    }
    kept = Path(environ.get("XDG_CACHE_HOME") or Path(home or "/nowhere") / ".cache")
    if not (kept / "huggingface").is_dir():  # else models are there, to be read
        settings["HF_HOME"] = place / "huggingface"
    for key, folder in settings.items():
        environ.setdefault(key, str(folder))
    if not home:
        environ["HOME"] = str(place)
    what = f"HOME={home} cannot be written" if home else "HOME is not set"
    return (
        f"{what}: caches of libraries go to {place}; set HOME, or HF_HOME for models from the hub, "
        "to a folder that stays"
    )


def _account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None


def _private_folder() -> Path | None:
    """The same one for all processes of this user; a new one where someone else has made that."""
    try:
        folder = Path(tempfile.gettempdir()) / f"raysft-home-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            found = folder.lstat()
            ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
            if not ours or stat.S_IMODE(found.st_mode) & 0o077:
                folder = Path(tempfile.mkdtemp(prefix="raysft-home-"))
        return folder
    except OSError:
        return None


REMARK = settle()
remarks.before_imports()
