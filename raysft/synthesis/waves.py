"""Waves into files: one each, named as what was said is called; latents that stay such as .npy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import soundfile

from raysft import paths
from raysft.errors import UserError
from raysft.synthesis.run import Utterance


class Out:
    """A folder of wave files, or one file."""

    def __init__(self, given: str, words: int) -> None:
        """given: a folder, or a name that ends in .wav (latents: .npy), of the one of `words` that
        is said. Raises
        UserError where there is no room for it."""
        self._place = paths.argument(given, "--out")
        self._alone = self._place.suffix.lower() in (".wav", ".npy")
        if self._alone and words != 1:
            raise UserError(f"--out: {given} is one file for {words} texts: name a folder")
        folder = self._place.parent if self._alone else self._place
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: {folder} cannot be made: {error.strerror or error}") from None
        self._names: set[str] = set()

    def write(self, one: Utterance) -> Path:
        """Write 16-bit samples, or float32 latents; returns the file. Raises UserError where --out
        names a file of the other kind."""
        ending = ".wav" if one.latents is None else ".npy"
        if self._alone and self._place.suffix.lower() != ending:
            raise UserError(f"--out: {self._place.name}: what is said is written as *{ending}")
        place = self._place if self._alone and not self._names else self._place_of(one.id, ending)
        self._names.add(place.name)
        if one.latents is None:
            soundfile.write(place, one.wave, int(one.rate), subtype="PCM_16")
        else:
            np.save(place, one.latents)
        return place

    def _place_of(self, name: str, ending: str) -> Path:
        plain = re.sub(r"[^-.\w]+", "_", name)[:100].strip(".") or "said"
        folder = self._place.parent if self._alone else self._place
        number, found = 1, f"{plain}{ending}"
        while found in self._names:
            number += 1
            found = f"{plain}_{number}{ending}"
        return folder / found
