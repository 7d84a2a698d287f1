"""The models of a preparation: what makes speech tokens, and who speaks.

`Tools.of` says what is asked for; `ready` fits and gathers what has to be there before the first
shard; `tokenizer` is called where shards are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raysft.config.schema import Config, SpeechTokens
from raysft.data.clips import speech_tokens
from raysft.data.clips.speech_tokens import SpeechTokenizer
from raysft.data.index.build import Index
from raysft.json_types import JsonObject
from raysft.prepare.shard import Tokenizer

Progress = Callable[[JsonObject], None]


class OneByOne:
    """A speech tokenizer of data.speech_tokens, a clip at a time."""

    def __init__(self, own: SpeechTokenizer) -> None:
        self.own = own
        self.sample_rate = own.sample_rate

    def tokens(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """int32 [tokens] of each clip."""
        return [self.own.encode(clip) for clip in clips]


@dataclass(frozen=True)
class Tools:
    """units: data.speech_tokens, or None. folder: of the preparation."""

    units: SpeechTokens | None
    folder: Path

    @classmethod
    def of(cls, config: Config, folder: Path) -> Tools:
        """What a config asks for."""
        return cls(config.data.speech_tokens, folder)

    def facts(self) -> JsonObject:
        """What decides what is made."""
        return {"speech_tokens": None if self.units is None else self.units.model_dump(mode="json")}

    def ready(self, config: Config, index: Index, progress: Progress) -> Tools:
        """Fit what is not there yet."""
        if self.units is not None and not speech_tokens.location(self.units, self.folder).exists():
            from raysft.driver.preflight import clips_of

            progress({"doing": f"fitting {self.units.clusters} clusters of speech tokens"})
            clips = clips_of(config)
            speech_tokens.fit_or_load(self.units, self.folder, clips, config.run.seed)
        return self

    def tokenizer(self) -> Tokenizer | None:
        """In the process that makes shards."""
        if self.units is None:
            return None
        return OneByOne(speech_tokens.load(self.units, self.folder))

    def embedded(self, number: int) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
        """Embeddings of the utterances of a shard: of each, and of its speaker."""
        return None

    def gpus(self) -> float:
        """Of a GPU, for each maker."""
        return 0.0
