"""Mean and standard deviation of a codec's latents, for `model.patches.codec`:

    python -m raysft.families.patch_lm.spread CODEC SOURCE [CLIPS]

CODEC: folder or hub id. SOURCE: a manifest or folder that data.train could name; its first CLIPS
(default 200) clips are encoded, in their order, so that the same source gives the same figures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from raysft import paths
from raysft.config.patches import Codec
from raysft.config.schema import Source
from raysft.data import sources
from raysft.data.clips.audio import load
from raysft.errors import BadExample, UserError
from raysft.families.patch_lm.codecs import CodecLatents

CLIPS = 200


def spread(latents: CodecLatents, clips: Iterable[np.ndarray]) -> tuple[float, float]:
    """Mean and standard deviation over all values of all clips, float32 [samples] each. Raises
    UserError where they have none, or only one value."""
    count, total, squares = 0, 0.0, 0.0
    for clip in clips:
        found = latents(clip).astype(np.float64)
        count += found.size
        total += float(found.sum())
        squares += float(np.square(found).sum())
    mean = total / count if count else 0.0
    variance = squares / count - mean**2 if count else 0.0
    if variance <= 0:
        raise UserError(f"the latents of these clips ({count} values) do not vary: give more clips")
    return mean, variance**0.5


def clips_of(source: str, rate: int) -> Iterator[np.ndarray]:
    """The clips of a source that can be read, in order: float32 [samples] at `rate` Hz."""
    found = sources.resolve(Source(path=paths.absolute(source)), "train", "SOURCE")
    for file in found.files:
        for item in sources.scan(found, file):
            for clip in item.example.audio() if item.example else ():
                try:
                    yield load(clip, rate)
                except BadExample:
                    continue  # training names it


def main(argv: list[str]) -> None:
    """Prints the lines of a config."""
    if len(argv) not in (2, 3) or (len(argv) == 3 and not argv[2].isdecimal()):
        raise UserError("usage: python -m raysft.families.patch_lm.spread CODEC SOURCE [CLIPS]")
    latents = CodecLatents(Codec(path=paths.model(argv[0])))
    most = int(argv[2]) if len(argv) == 3 else CLIPS
    mean, std = spread(latents, islice(clips_of(argv[1], latents.rate), most))
    print(f"codec: {{path: {argv[0]}, mean: {mean:.6g}, std: {std:.6g}}}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
