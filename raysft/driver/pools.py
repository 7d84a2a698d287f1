"""The recordings with which a run varies its clips: listed once, before it starts, and kept.

Runs on the driver, before anything is indexed; voices of the training data itself are drawn from
its index. Costs a header of each recording, once; then a look at each file at every start.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from raysft import paths, patience, stores
from raysft.config import Config
from raysft.config.augment import Augment
from raysft.config.schema import Source
from raysft.data import sources
from raysft.data.clips.audio import ANY, Limits, probe
from raysft.data.clips.recordings import FILE, Pools, Recording
from raysft.data.clips.states import at_once, state_of
from raysft.data.example import Audio
from raysft.data.index.build import Index
from raysft.errors import BadExample, UserError
from raysft.run.ownership import Permit
from raysft.run.storage import write_whole
from raysft.transcribe.asked import SUFFIXES

KINDS = ("reverb", "babble", "noise")
VOICES = 1000  # of the training data, from which babble is made

Say = Callable[[str], None]


def check(config: Config) -> None:
    """Whether what data.augment names is there, without looking into it. Raises UserError."""
    settings = config.data.augment
    for kind, path in _places(settings) if settings is not None else []:
        if path is None or stores.is_remote(path):
            continue
        place = Path(paths.absolute(path))
        if not patience.patiently(partial(paths.exists, place), place):
            raise UserError(
                f"data.augment.{kind}.path: {place} does not exist{paths.nearest(place)}"
            )


def listed(config: Config, folder: Path, cache: Path, say: Say) -> Pools | None:
    """The recordings that data.augment names; those of the run in `folder`, where it has them.

    cache: folder of what is indexed. None where there is no data.augment. Voices of the training
    data come later (`voices`). Raises UserError: nothing there, no audio, a recording that cannot
    be read, or that is not as it was.
    """
    settings = config.data.augment
    if settings is None:
        return None
    kept, limits = Pools.load(folder), Limits.of(config.data)
    found: dict[str, tuple[Recording, ...]] = {}
    asked: dict[str, str | None] = {}
    for kind, path in _places(settings):
        if kind in kept.recordings:
            there = _moved(kept.recordings[kind], kept.asked[kind], path)
            found[kind] = _unchanged(kind, there, limits)
        elif path is not None:
            found[kind] = _measured(kind, _below(kind, path, cache), limits)
        else:
            continue
        asked[kind] = path
        say(_told(kind, found[kind]))
    return Pools(found, asked)


def require(config: Config, folder: Path) -> None:
    """Raises UserError where the run in `folder`, which has been trained, kept no recordings that
    it varies clips with: from others it would go on otherwise."""
    settings = config.data.augment
    kept = Pools.load(folder).recordings
    for kind, _ in _places(settings) if settings is not None else []:
        if kind not in kept:
            raise UserError(
                f"{folder / FILE}: does not list the recordings of data.augment.{kind}, which the "
                "run has been trained with: put it back as it was, or start anew with its weights "
                "(checkpoint.resume=weights_only)"
            )


def voices(config: Config, pools: Pools, index: Index, say: Say) -> Pools:
    """`pools`, with voices of the training data where babble is to be made of these: up to `VOICES`
    of its clips, any as likely as any other. Raises UserError where there is none."""
    settings = config.data.augment
    babble = settings.babble if settings is not None else None
    if babble is None or babble.path is not None or "babble" in pools.asked:
        return pools
    heard = np.flatnonzero(index.seconds > 0)
    rng = np.random.default_rng(config.run.seed)
    rows = np.sort(rng.permutation(heard)[:VOICES])
    clips = [example.audio()[0] for example in index.examples(rows)]
    files = sorted({clip.sound for clip in clips if clip.stored is not None}, key=_place)
    if not files:
        raise UserError(
            "data.augment.babble: data.train has no clips in files or archives to make it of; set "
            "data.augment.babble.path to a folder of recordings"
        )
    found = _measured("babble", files, Limits.of(config.data))
    say(_told("babble", found))
    return Pools({**pools.recordings, "babble": found}, {**pools.asked, "babble": None})


def keep(pools: Pools, folder: Path, permit: Permit) -> None:
    """Write them into the run's folder. Raises UserError where it cannot be written."""
    path, content = folder / FILE, pools.to_bytes()
    permit.require()
    try:
        if not path.is_file() or path.read_bytes() != content:
            patience.patiently(lambda: write_whole(path, content), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _told(kind: str, recordings: tuple[Recording, ...]) -> str:
    minutes = sum(one.samples / one.rate for one in recordings) / 60
    return f"data.augment.{kind}: {len(recordings):,} recordings, {minutes:,.1f} minutes"


def _places(settings: Augment) -> list[tuple[str, str | None]]:
    """Kinds that take recordings, and where those are."""
    found = [(kind, getattr(settings, kind)) for kind in KINDS]
    places = [(kind, about.path) for kind, about in found if about is not None]
    return [(kind, path) for kind, path in places if path is not None or kind == "babble"]


def _below(kind: str, path: str, cache: Path) -> list[Audio]:
    """All clips of a folder, or of data; of rooms the first channel."""
    key = f"data.augment.{kind}"
    place = stores.at(paths.of_data(path))
    found: set[Audio] = set()
    if stores.is_remote(place):
        pass  # data that lists its clips
    elif place.is_dir():
        files = patience.known(lambda: list(place.rglob("*")), place)
        found = {Audio(str(file)) for file in files if _is_clip(file, place)}
    elif place.suffix.lower() in SUFFIXES and place.is_file():
        found = {Audio(str(place))}
    if not found:
        source = sources.resolve(Source(path=path), "train", key)
        for file in source.files:
            for item in sources.scan(source, file, keep=cache / "commands"):
                clips = item.example.audio() if item.example is not None else []
                found |= {clip.sound for clip in clips if clip.stored is not None}
    if not found:
        raise UserError(f"{key}.path: {place} names no recordings in files or archives")
    if kind == "reverb":
        found = {replace(clip, channel=clip.channel or 0) for clip in found}
    return sorted(found, key=_place)


def _is_clip(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() in SUFFIXES


def _place(clip: Audio) -> tuple[str, str, float, float, int]:
    """By which recordings are sorted."""
    stop = float("inf") if clip.stop is None else clip.stop
    channel = -1 if clip.channel is None else clip.channel
    return clip.path, repr(clip.held), clip.start, stop, channel


def _measured(kind: str, clips: list[Audio], limits: Limits) -> tuple[Recording, ...]:
    """Their lengths. Raises UserError naming the first that cannot be read."""
    asked = at_once(lambda clip: probe(clip, ANY), clips, limits)
    found, broken = [], []
    for clip in clips:
        about = asked[clip]
        if isinstance(about, BadExample):
            broken.append(str(about))
        else:
            found.append(Recording(clip, about.samples, about.rate, about.size))
    if broken:
        raise UserError(
            f"data.augment.{kind}.path: {len(broken):,} of {len(clips):,} recordings cannot be "
            f"used; the first: {broken[0]}: repair it, or take it away"
        )
    return tuple(found)


def _moved(
    recordings: tuple[Recording, ...], old: str | None, new: str | None
) -> tuple[Recording, ...]:
    """Those of a run whose `path` was `old` and is `new`: the same thing in another place."""
    if old is None or new is None or old == new:
        return recordings
    places = ((old, new), (os.path.dirname(old), os.path.dirname(new)))

    def there(file: str) -> str:
        found = (b + file[len(a) :] for a, b in places if file == a or file.startswith(f"{a}/"))
        return next(found, file)

    def moved(clip: Audio) -> Audio:
        if clip.held is None:
            return replace(clip, path=there(clip.path))
        return replace(clip, held=replace(clip.held, file=there(clip.held.file)))

    return tuple(replace(one, audio=moved(one.audio)) for one in recordings)


def _unchanged(
    kind: str, recordings: tuple[Recording, ...], limits: Limits
) -> tuple[Recording, ...]:
    """Those of a run that goes on. Raises UserError where one is not as it was."""
    files = [one.audio.stored or one.audio.path for one in recordings]
    now = at_once(state_of, sorted(set(files)), limits)
    for file, one in zip(files, recordings, strict=True):
        state = now[file]
        if isinstance(state, BadExample):
            continue  # nothing is known of it: reading it will tell
        if state is None or state[0] != one.size:
            what = "is gone" if state is None else f"has {state[0]:,} bytes, had {one.size:,}"
            raise UserError(
                f"data.augment.{kind}.path: {file} {what}: a run draws from the "
                "recordings that it began with: put it back as it was, or begin another run"
            )
    return recordings
