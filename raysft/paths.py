"""One rule for every path a user gives: config keys, `wav_path`, arguments of jobs.

    relative        from the folder the command runs in; `wav_path`: from the folder of its file
    ~, ~name        a home folder
    file:///a%20b   the file /a b
    s3://..., data: refused by name, for these are no files; but data itself, its clips and
                    `checkpoint.path` may lie in a store
    $DIR/x          not expanded (a shell does that): refused by name, unless there is such a file
    a link, then .. the system's meaning: as open() goes there

Knows no config and costs no look at the disk, but for `$` and for `..` in a `wav_path`.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from raysft.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PLAIN = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)*")
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})")


def absolute(given: str, folder: str | None = None) -> str:
    """The absolute path that `given` means; relative ones begin at `folder` (default: here).

    Raises UserError (without the name of a key) where it is none: empty, a URL, a variable.
    """
    if folder is not None and _PLAIN.fullmatch(given):  # nearly every clip's
        return f"{folder}/{given}"
    text = _local(given)
    if not os.path.isabs(text):
        text = _join(folder, text)
    if (found := _VARIABLE.search(given)) and not os.path.lexists(text):
        raise UserError(
            f"{given!r} holds {found[0]}, and variables are not expanded: write the path itself"
        )
    return text


def of_data(given: str, folder: str | None = None) -> str:
    """As `absolute`, of a data file or a clip, which may lie in a store: its URL as it is.

    folder: where relative paths begin; of a store its URL. Raises UserError as `absolute`.
    """
    if folder is not None and _PLAIN.fullmatch(given):  # nearly every clip's
        return f"{folder}/{given}"
    if is_store(given):
        return given
    if folder is not None and is_store(folder) and not given.startswith(("/", "~", "file:")):
        scheme, _, place = folder.partition("://")
        host, _, below = place.partition("/")
        joined = os.path.normpath(f"{below}/{_local(given)}".lstrip("/"))  # of two it keeps both
        return f"{scheme}://{host}/{joined}"
    return absolute(given, folder)


def argument(given: str, name: str) -> Path:
    """The path a command line gives as `name` (RUN, OUT, ...). Raises UserError naming it."""
    try:
        return Path(absolute(given))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def is_store(given: str) -> bool:
    """Whether `given` is the URL of a store: of anything but a file."""
    scheme = _SCHEME.match(given)
    return scheme is not None and scheme[1].lower() not in ("file", "local")


def looks_local(given: str) -> bool:
    """Whether a model's name can only be that of a folder: hub ids are `name` or `owner/name`."""
    return given.startswith((".", "/", "~", "file:")) or given.rstrip("/").count("/") > 1


def model(given: str) -> str:
    """A model's folder, absolute, where it is there or can only be one; else the hub id as it is.

    Raises UserError as `absolute`.
    """
    if looks_local(given) or is_store(given) or _VARIABLE.search(given):
        return absolute(given)
    place = absolute(given)
    return place if os.path.exists(place) else given


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder. Raises UserError where the system does not tell: a
    folder above it may not be entered, a name is too long, links lead in a circle."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        shown = str(path)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        raise UserError(f"{shown} cannot be looked at: {error.strerror}") from None
    return True


def nearest(path: str | Path) -> str:
    """What there is on the way to a path that does not exist, as the end of a message."""
    path = Path(path)
    parent = next((folder for folder in path.parents if os.path.exists(folder)), None)
    if parent is None or not parent.is_dir():
        return ""
    try:
        names = sorted(entry.name for entry in parent.iterdir())
    except OSError:  # may not be read: there is nothing to tell
        return ""
    wanted = path.relative_to(parent).parts[0]
    if near := difflib.get_close_matches(wanted, names, 1, 0.75):
        return f"; did you mean {parent / near[0]}?"
    return f"; {parent} holds {', '.join(names[:8]) or 'nothing'}" + ", ..." * (len(names) > 8)


def _local(given: str) -> str:
    """`given` as a path of this system, absolute or not."""
    if not given.strip():
        raise UserError("is empty, expected a path")
    if "\0" in given:
        raise UserError(f"{given!r} holds a NUL character, which no path does")
    if given[:5].lower() == "file:" and not os.path.lexists(given):
        return _of_url(given)
    if given[:5].lower() == "data:" and "," in given:
        raise UserError(f"{given[:40]!r} holds the bytes themselves (a data: URI), not a path")
    if scheme := _SCHEME.match(given):
        raise UserError(
            f"{given!r} is a URL ({scheme[1]}://), and only files are read here: mount the store, "
            "or copy what it names to a folder that all nodes see"
        )
    if given.startswith("~"):
        home = os.path.expanduser(given)
        if home == given and given.partition("/")[0] == "~":
            raise UserError(f"{given!r}: this user has no home folder; set HOME, or write it out")
        return home  # of nobody: a name that begins with ~, as for the shell
    return given


def _of_url(given: str) -> str:
    url = urlsplit(given)
    path = unquote(url.path)
    # A path may hold what a URL would call a query or a fragment.
    path += f"?{unquote(url.query)}" * bool(url.query) + f"#{unquote(url.fragment)}" * bool(
        url.fragment
    )
    if url.netloc not in ("", "localhost"):
        raise UserError(
            f"{given!r} names the machine {url.netloc!r}: of file URLs, file:///PATH is read"
        )
    if not path.startswith("/"):
        raise UserError(f"{given!r} is no whole file URL: write file:///PATH")
    return path


def _join(folder: str | None, text: str) -> str:
    """`folder` and a relative path; leading `..` leave the real folder, not the name of a link."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    ups = next((n for n, part in enumerate(parts) if part != ".."), len(parts))
    if ups:
        base = _real(folder) if folder is not None else os.getcwd()
        for _ in range(ups):
            base = os.path.dirname(base)
    else:
        base = folder if folder is not None else os.getcwd()
    return os.path.join(base, *parts[ups:])


@functools.lru_cache(maxsize=1024)
def _real(folder: str) -> str:
    """Once a folder: a manifest of a million lines asks a million times."""
    return os.path.realpath(folder)


def same(old: str, new: str) -> bool:
    """Whether the path written into a run then, and the one given now, mean the same thing.

    They do where they are one place, or where it moved: the old one is gone and the new one has
    its name, or both are there with equal contents (names, sizes, and the ends of every file). A
    relative `old` is of a run from before paths were made absolute: the same words mean the same.
    """
    if old == new:
        return True
    if is_store(old) or is_store(new) or not os.path.isabs(new):
        return False
    if not old.startswith(("/", "~", "file:")):
        parts = Path(os.path.normpath(old)).parts
        while parts and parts[0] == "..":
            parts = parts[1:]
        return Path(new).parts[-len(parts) :] == parts if parts else False
    old = absolute(old)
    if not os.path.exists(old):
        return Path(old).name == Path(new).name
    if not os.path.exists(new):
        return False
    return os.path.samefile(old, new) or _contents(old) == _contents(new)


def check_new_folder(what: str, target: Path) -> None:
    """Raises UserError where `target` is anything but an empty folder, or nothing yet.

    what: is to be written there, for the message."""
    if target.is_dir():
        if any(target.iterdir()):
            raise UserError(f"{what}: {target} is not empty; give a new folder")
    elif target.exists():
        raise UserError(f"{what}: {target} is a file; give a new folder")


def _contents(top: str) -> list[tuple[str, int, bytes]]:
    """(name, bytes, sha256 of the first and last MiB) of a file, or of every file in a folder."""
    place = Path(top)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    found = []
    for file in files:
        size = file.stat().st_size
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read(1 << 20))
        found.append((str(file.relative_to(place)), size, digest.digest()))
    return found
