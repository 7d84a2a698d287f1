"""Folders of Kaldi and ESPnet: wav.scp and text, with segments and utt2spk where they are there.

    wav.scp   rec1 /corpus/rec1.wav          segments  utt1 rec1 1.50 3.50   (an end of -1: its end)
    text      utt1 hello                     utt2spk   utt1 spk1

Relative paths begin at `root`; without it at the folder itself, or, where its first clip is not
there, at the folder the command runs in, as Kaldi's own do. A wav.scp entry that is a command
(ending in `|`) is refused, or run once where the entry allows it (`commands: true`).
"""

from __future__ import annotations

import hashlib
import os
import subprocess  # the commands that a user's wav.scp holds, where the config allows them
from collections.abc import Iterator, Sequence
from pathlib import Path

from raysft import paths, stores
from raysft.config.schema import Source
from raysft.data.sources.base import Split, clip_path, folder_of
from raysft.data.sources.layout import Layout, below, fault, here, listed
from raysft.data.sources.lines import lines, table
from raysft.errors import BadExample, UserError
from raysft.json_types import Json, JsonObject

_ALSO = ("segments", "utt2spk", "utt2lang", "wav.scp")


class Kaldi(Layout):
    """The format `kaldi`."""

    name = "kaldi"
    options = ("root", "commands")
    from_here = True
    describe = "a Kaldi or ESPnet folder with wav.scp and text (segments, utt2spk)"

    def sniff(self, path: Path) -> bool:
        """Whether it is a folder with a wav.scp, or that file."""
        return stores.is_file(path / "wav.scp") if stores.is_dir(path) else path.name == "wav.scp"

    def files(self, path: Path, split: Split) -> list[Path]:
        """The texts: what else there is is looked up by them."""
        folder = path if stores.is_dir(path) else path.parent
        text = folder / "text"
        if not stores.is_file(text):
            raise UserError(
                f"{folder} has a wav.scp and no text: expected `text`, an id and what is "
                "said a line"
            )
        return [text]

    def beside(self, file: Path, given: Source) -> Sequence[Path] | None:
        """The other tables, and the first clip where it lies in the folder (see `_base`)."""
        found = [one for name in _ALSO if stores.is_file(one := file.parent / name)]
        first = _first(file.parent / "wav.scp") if file.parent / "wav.scp" in found else None
        return [*found, first] if first is not None and stores.is_file(first) else found

    def records(self, file: Path, given: Source, keep: Path | None = None) -> Iterator[JsonObject]:
        """An utterance of `text` each."""
        folder = file.parent
        clips = table(folder / "wav.scp")
        base = _base(folder, clips, given)
        segments = table(folder / "segments") if stores.is_file(folder / "segments") else None
        speakers = table(folder / "utt2spk") if stores.is_file(folder / "utt2spk") else {}
        languages = table(folder / "utt2lang") if stores.is_file(folder / "utt2lang") else {}
        silent = dict.fromkeys(clips if segments is None else segments)
        for number, line in lines(file):
            name, _, text = line.strip().replace("\t", " ").partition(" ")
            try:
                silent.pop(name, None)
                start: float | None = None
                stop: float | None = None
                recording = name
                if segments is not None:
                    if name not in segments:
                        raise BadExample("has no line in segments")
                    recording, start, stop = _segment(segments[name])
                if recording not in clips:
                    raise BadExample(f"has no line in wav.scp ({recording})")
                path = _clip(clips[recording], given, base, keep)
            except BadExample as error:
                yield fault(name, f"{name} {error}", f"{file}:{number}")
                continue
            clip: dict[str, Json] = {"path": below(path, folder_of(file))}
            if start is not None:
                clip |= {"start": start, "stop": stop}
            more = {"speaker": speakers.get(name), "at": f"{file.name}:{number}"}
            yield listed(name, text.strip(), [clip], **more, language=languages.get(name))
        for name in silent:
            yield fault(name, f"{name} has no line in text", str(file))


def _first(scp: Path) -> Path | None:
    """The first clip, where it is a path of this system."""
    line = next((line.strip() for _, line in lines(scp)), "")
    if line.endswith("|") or stores.is_remote(line) or stores.is_remote(scp):
        return None
    return scp.parent / line.replace("\t", " ").partition(" ")[2].strip()


def _clip(value: str, given: Source, base: str, keep: Path | None) -> str:
    if not value.endswith("|"):
        return _path(value, base)
    if not given.commands:
        raise BadExample(
            f"is a command in wav.scp ({value[:60]}), and commands are not run unless the entry "
            "has commands: true"
        )
    if keep is None:
        raise BadExample("is a command in wav.scp, which is run when the index is made")
    return _output(value.removesuffix("|").strip(), keep)


def _base(folder: Path, clips: dict[str, str], given: Source) -> str:
    """Where relative paths begin."""
    if given.root is not None:
        return given.root
    first = next((path for path in clips.values() if not path.endswith("|")), None)
    if first is None or os.path.isabs(first) or paths.is_store(first) or stores.is_remote(folder):
        return folder_of(folder / "text")
    return str(folder.absolute()) if (folder / first).exists() else here()


def _path(value: str, base: str) -> str:
    head, _, offset = value.rpartition(":")
    if head.endswith(".ark") and offset.isdigit():
        raise BadExample(f"is in an archive of Kaldi's ({value}): write its clips as files")
    return clip_path(value, Path(base) / "wav.scp", base)


def _segment(value: str) -> tuple[str, float, float | None]:
    fields = value.split()
    try:
        recording, start, stop = fields[0], float(fields[1]), float(fields[2])
    except (IndexError, ValueError):
        raise BadExample(
            f"has a line in segments that is none ({value[:60]}): expected UTT REC START END"
        ) from None
    if len(fields) > 3:
        raise BadExample(f"names a channel in segments ({value[:60]}): give each its own clip")
    return recording, start, None if stop == -1 else stop


def _output(command: str, keep: Path) -> str:
    """The file that holds what a command writes. Raises BadExample where it fails."""
    place = keep / f"{hashlib.sha256(command.encode()).hexdigest()[:32]}.audio"
    if not place.exists():
        keep.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        with temporary.open("wb") as stream:
            done = subprocess.run(["/bin/sh", "-c", command], stdout=stream, stderr=subprocess.PIPE)
        if done.returncode:
            temporary.unlink()
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
            why = " ".join(said) or f"exit status {done.returncode}"
            raise BadExample(f"has a command that fails ({command[:60]}): {why}")
        os.replace(temporary, place)
    return str(place)


FORMAT = Kaldi()
