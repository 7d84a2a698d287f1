"""Everything of a preparation that can be found wrong without Ray."""

from __future__ import annotations

from pathlib import Path

from raysft import hub, patience
from raysft.config import listeners
from raysft.config.listeners import SPEAKERS, TOKENS
from raysft.config.prepare import Prepare, Speakers, UnitsOfModels
from raysft.config.schema import Config
from raysft.data import sources
from raysft.errors import UserError
from raysft.prepare import shard


def check(config: Config) -> None:
    """Raises UserError naming the key at fault."""
    patience.allow(config.patience_s)
    if not config.data.train:
        raise UserError("data.train: empty: name what is to be prepared")
    settings = config.prepare
    shard.check(settings)
    if settings.speech_tokens is not None and config.data.speech_tokens is not None:
        raise UserError(
            f"{TOKENS} contradicts data.speech_tokens: a shard has one column of tokens; remove one"
        )
    for section, asked in ((TOKENS, settings.speech_tokens), (SPEAKERS, settings.speakers)):
        if asked is not None:
            _check_models(section, asked)
    _check_pattern(settings)
    sources.resolve_all(config.data.train, "train")


def _check_models(section: str, asked: UnitsOfModels | Speakers) -> None:
    """Keys that go with the method, models that can be had, files that are there."""
    listeners.check(section, asked)
    if asked.model is not None:
        hub.check(asked.model, f"{section}.model", asked.revision)
    files: dict[str, str | None] = {}
    if isinstance(asked, Speakers):
        files["path"] = asked.path
    else:
        if str(asked.path).endswith(".npy"):
            files["path"] = asked.path
        for number, stream in enumerate(asked.streams):
            files[f"streams.{number}.path"] = stream.path
            files[f"streams.{number}.centroids"] = stream.centroids
    for key, path in files.items():
        if path is not None and not Path(path).is_file():
            raise UserError(f"{section}.{key}: {path} does not exist, or is no file")


def _check_pattern(settings: Prepare) -> None:
    asked = settings.speech_tokens
    if asked is None:
        return
    if asked.streams:
        from raysft.prepare.tokens import onnx

        onnx.check(asked)
    elif isinstance(asked.pattern, list):
        raise UserError(
            f"{TOKENS}.pattern: {asked.pattern}: numbers are for streams of method onnx; a codec's "
            "is first, interleave or flatten"
        )
