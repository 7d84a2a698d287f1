"""Recordings with which clips are varied: which there are, as a run keeps them in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from raysft import patience
from raysft.data.example import Audio, Cell, Within
from raysft.errors import UserError
from raysft.json_types import JsonObject

FILE = "augment.json"
"""In a run's folder: the recordings that its clips are varied with."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A clip to vary others with. samples: that it has, at its own `rate` Hz. size: of the file
    that has to be there for it."""

    audio: Audio
    samples: int
    rate: int
    size: int


@dataclass(frozen=True)
class Pools:
    """Recordings by kind (noise, babble, reverb), in an order that stays.

    asked: `path` of each kind as the config had it when they were listed.
    """

    recordings: Mapping[str, tuple[Recording, ...]] = field(default_factory=dict)
    asked: Mapping[str, str | None] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As JSON."""
        found: JsonObject = {}
        for kind, recordings in self.recordings.items():
            lines = []
            for one in recordings:
                sound = one.audio
                place = {"path": sound.path, "start": sound.start, "stop": sound.stop}
                held = None if sound.held is None else asdict(sound.held)
                about = {"samples": one.samples, "rate": one.rate, "size": one.size}
                lines.append({**place, "channel": sound.channel, "held": held, **about})
            found[kind] = {"path": self.asked[kind], "recordings": lines}
        return json.dumps(found, indent=0).encode("utf-8", "surrogatepass")

    @classmethod
    def load(cls, folder: Path) -> Pools:
        """Those of the run in `folder`; none where it keeps none. Raises UserError."""
        path = folder / FILE

        def read() -> bytes | None:
            return path.read_bytes() if path.is_file() else None

        try:
            content = patience.patiently(read, path)
            found = {} if content is None else json.loads(content)
            recordings = {
                kind: tuple(map(_recording, about["recordings"])) for kind, about in found.items()
            }
            return cls(recordings, {kind: about["path"] for kind, about in found.items()})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None


def _recording(about: JsonObject) -> Recording:
    held = about["held"]
    if held is not None:
        held = Cell(**held) if "row" in held else Within(**held)
    named = {name: about[name] for name in ("path", "start", "stop", "channel")}
    return Recording(Audio(**named, held=held), about["samples"], about["rate"], about["size"])
