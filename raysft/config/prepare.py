"""The section `prepare`: what the job of that name makes of data.train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from raysft.config.marks import Free, PathKey
from raysft.config.section import Section


class Prepare(Section):
    """Shards of data.train, by the job prepare; a run takes no notice of it."""

    path: Free[Annotated[str | None, PathKey()]] = Field(
        None, description="folder the shards and their data.list are written to"
    )
    rows: Free[PositiveInt] = Field(1000, description="utterances a shard")
    mib: Free[PositiveFloat | None] = Field(
        None,
        description="MiB of audio a shard at most, counted as 16-bit samples at 16 kHz; default: "
        "prepare.rows alone",
    )
    audio: Free[Literal["keep", "flac", "opus", "none"]] = Field(
        "keep",
        description="audio_data: the clip's file as it is (keep; parts of recordings as flac), "
        "written anew as flac or opus, or left out (none)",
    )
    rate: Free[PositiveInt | None] = Field(
        None, description="Hz of audio that is written anew; default: the clip's own"
    )
    workers: Free[PositiveInt | None] = Field(
        None, description="shards made at a time; default: one a CPU, or one a GPU with a model"
    )
