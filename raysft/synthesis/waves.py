"""Waves into files: one each, named as what was said is called."""

from __future__ import annotations

import re
from pathlib import Path

import soundfile

from raysft import paths
from raysft.errors import UserError
from raysft.synthesis.run import Utterance


class Out:
    """A folder of wave files, or one file."""

    def __init__(self, given: str, words: int) -> None:
        """given: a folder, or a name that ends in .wav, of the one of `words` that is said. Raises
        UserError where there is no room for it."""
        self._place = paths.argument(given, "--out")
        self._alone = self._place.suffix.lower() == ".wav"
        if self._alone and words != 1:
            raise UserError(f"--out: {given} is one file for {words} texts: name a folder")
        folder = self._place.parent if self._alone else self._place
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: {folder} cannot be made: {error.strerror or error}") from None
        self._names: set[str] = set()

    def write(self, one: Utterance) -> Path:
        """Write 16-bit samples; returns the file."""
        place = self._place if self._alone and not self._names else self._place_of(one.id)
        self._names.add(place.name)
        soundfile.write(place, one.wave, one.rate, subtype="PCM_16")
        return place

    def _place_of(self, name: str) -> Path:
        plain = re.sub(r"[^-.\w]+", "_", name)[:100].strip(".") or "said"
        folder = self._place.parent if self._alone else self._place
        number, found = 1, f"{plain}.wav"
        while found in self._names:
            number += 1
            found = f"{plain}_{number}.wav"
        return folder / found
