"""The models of a preparation: what makes speech tokens, and who speaks.

`Tools.of` says what is asked for; `run` has fitted and gathered what has to be there before the
first shard; `tokenizer` and `speaker` are called in the processes that hear.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raysft.config import listeners
from raysft.config.listeners import SPEAKERS, TOKENS
from raysft.config.prepare import Speakers, UnitsOfModels
from raysft.config.schema import Config, Model
from raysft.config.speech_tokens import SpeechTokens
from raysft.data.clips import speech_tokens
from raysft.data.clips.audio import Limits
from raysft.data.clips.speech_tokens import SpeechTokenizer
from raysft.data.clips.stalled import ClipReader
from raysft.data.index.build import Index
from raysft.errors import BadExample, UserError
from raysft.json_types import JsonObject
from raysft.prepare import shard
from raysft.prepare.listener import Fitted, Listener, Tokens
from raysft.prepare.shard import Tokenizer
from raysft.run import identity

Progress = Callable[[JsonObject], None]


class Plain:
    """A speech tokenizer of data.speech_tokens."""

    def __init__(self, own: SpeechTokenizer) -> None:
        self.own, self.sample_rate = own, own.sample_rate

    def tokens(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> int32 [tokens]."""
        return self.own.encode(clip)


@dataclass(frozen=True)
class Tools:
    """plain: data.speech_tokens; models: prepare.speech_tokens; each None where there is none.
    folder: of the preparation."""

    plain: SpeechTokens | None
    models: UnitsOfModels | None
    speakers: Speakers | None
    folder: Path

    @classmethod
    def of(cls, config: Config, folder: Path) -> Tools:
        """What a config asks for."""
        settings = config.prepare
        return cls(config.data.speech_tokens, settings.speech_tokens, settings.speakers, folder)

    def facts(self) -> JsonObject:
        """What decides what is made, beside the section `prepare`."""
        return {
            "speech_tokens": None if self.plain is None else self.plain.model_dump(mode="json"),
            "models": [_identity(one) for one in (self.models, self.speakers) if one is not None],
        }

    def fit_plain(self, config: Config, progress: Progress) -> None:
        """Fit data.speech_tokens, where that is not done yet."""
        if self.plain is not None and not speech_tokens.location(self.plain, self.folder).exists():
            from raysft.driver.preflight import clips_of

            progress({"doing": f"fitting {self.plain.clusters} clusters of speech tokens"})
            clips = clips_of(config)
            speech_tokens.fit_or_load(self.plain, self.folder, clips, config.run.seed)

    def unfitted(self) -> bool:
        """Whether the method of prepare.speech_tokens has to be fitted first."""
        method = self._method()
        if method is None or self.models is None:
            return False
        return not method.is_fitted(self.models, self.folder)

    def fit(self, config: Config, index: Index) -> None:
        """Fit it, on clips of the index drawn with run.seed."""
        method = self._method()
        assert method is not None and self.models is not None
        rng = np.random.default_rng(config.run.seed)
        count = min(self.models.fit_clips, len(index))
        rows = np.sort(rng.choice(len(index), count, replace=False))
        clips = _clips(index, rows, method.rate(self.models), Limits.of(config.data))
        method.fit(self.models, self.folder, clips, config.run.seed)

    def _method(self) -> type[Fitted] | None:
        if self.models is None:
            return None
        found = listeners.load(TOKENS, self.models.method)
        return found if issubclass(found, Fitted) else None

    def tokenizer(self) -> Tokenizer | None:
        """In the process that makes shards. Raises UserError."""
        if self.models is not None:
            made = listeners.load(TOKENS, self.models.method)(self.models, self.folder)
            return Tokens(made, self.models)
        if self.plain is not None:
            return Plain(speech_tokens.load(self.plain, self.folder))
        return None

    def speaker(self) -> Listener:
        """In the process that hears who speaks. Raises UserError."""
        assert self.speakers is not None
        return listeners.load(SPEAKERS, self.speakers.method)(self.speakers, self.folder)


def _clips(index: Index, rows: np.ndarray, rate: int, limits: Limits) -> Iterator[np.ndarray]:
    """Those that can be heard."""
    reader = ClipReader(limits)
    for example in index.examples(rows):
        try:
            clip, _ = shard.spoken(example)
            yield shard.samples(reader, clip, rate, limits)
        except BadExample:
            continue  # named when its shard is made


def _identity(settings: UnitsOfModels | Speakers) -> JsonObject:
    """Which weights a section's models have: a preparation that goes on needs the same."""
    found: JsonObject = {}
    if settings.model is not None:
        model = Model(path=settings.model, revision=settings.revision)
        commit = identity.commit_of(model)  # of a hub id: what its newest is now
        base = {"revision": commit} if commit else identity.of(model)
        found["model"] = dict(base) if base else None
    files = [settings.path]
    if isinstance(settings, UnitsOfModels):  # what is fitted says itself what it is of
        files = [settings.path] if str(settings.path).endswith(".npy") else []
        files += [path for one in settings.streams for path in (one.path, one.centroids)]
    for path in filter(None, files):
        try:
            with open(path, "rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"prepare: {path} cannot be read: {error.strerror or error}") from None
    return found
