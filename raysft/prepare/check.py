"""Everything of a preparation that can be found wrong without Ray."""

from __future__ import annotations

from raysft import patience
from raysft.config.schema import Config
from raysft.data import sources
from raysft.errors import UserError
from raysft.prepare import shard


def check(config: Config) -> None:
    """Raises UserError naming the key at fault."""
    patience.allow(config.patience_s)
    if not config.data.train:
        raise UserError("data.train: empty: name what is to be prepared")
    shard.check(config.prepare)
    sources.resolve_all(config.data.train, "train")
