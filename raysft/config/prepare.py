"""The section `prepare`: what the job of that name makes of data.train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from raysft.config import listeners
from raysft.config.marks import Free, OneOf, PathKey
from raysft.config.section import Section


class TokenStream(Section):
    """An ONNX model that makes tokens, or frames of which the nearest centroid is one."""

    path: Annotated[str, PathKey(read=True)] = Field(description="the model's file")
    features: Literal["whisper_mel128", "fbank80", "wave"] = Field(
        "wave",
        description="what it reads at 16 kHz: Whisper's log-mel of 128 bins [1, 128, frames], "
        "Kaldi's fbank of 80 [1, frames, 80], or samples [1, samples]; and its length where it has "
        "a second input",
    )
    chunk_s: PositiveFloat | None = Field(
        None, description="seconds it reads at a time; default: the whole clip"
    )
    rate: PositiveFloat | None = Field(
        None, description="tokens a second, held against what comes; default: not held"
    )
    codes: PositiveInt = Field(
        description="how many tokens there are: 0 .. codes - 1; those of the next stream follow"
    )
    centroids: Annotated[str | None, PathKey(read=True)] = Field(
        None, description="of a model that makes frames: their centroids [codes, values] (.npy)"
    )


class UnitsOfModels(Section):
    """Speech tokens by a model, made once, with the shards."""

    method: Free[Annotated[str, OneOf(listeners.tokens)]] = Field(
        "kmeans", description=listeners.about(listeners.TOKENS)
    )
    model: Free[Annotated[str | None, PathKey("model")]] = Field(
        None, description="kmeans, codec: folder or hub id of the model"
    )
    revision: Free[str | None] = Field(
        None, description="of a hub id: branch, tag or commit; default: the newest"
    )
    layer: Free[NonNegativeInt | None] = Field(
        None,
        description="kmeans: hidden_states[layer] of transformers: what the layer of that number "
        "makes, counted from 1",
    )
    stack: Free[PositiveInt] = Field(
        1, description="kmeans: frames joined into one token (2 of a 50 Hz model: 25 Hz)"
    )
    clusters: Free[PositiveInt] = Field(500, description="kmeans: number of tokens")
    fit_clips: Free[PositiveInt] = Field(
        500, description="kmeans: clips the centroids are fitted on, drawn by run.seed"
    )
    path: Free[Annotated[str | None, PathKey()]] = Field(
        None,
        description="kmeans: fitted centroids (.safetensors of a preparation, or .npy "
        "[clusters, stack x hidden]); default: fitted once into prepare.path",
    )
    codebooks: Free[PositiveInt | None] = Field(
        None, description="codec: the first so many codebooks; default: all"
    )
    pattern: Free[Literal["first", "interleave", "flatten"] | list[PositiveInt] | None] = Field(
        None,
        description="codec: how codebooks become one sequence, the ids of each behind those of the "
        "one before: interleave: frame by frame (default), flatten: codebook by codebook, first: "
        "the first alone. onnx: how many of each stream in turn, such as [2, 3]; default: one "
        "stream after the other",
    )
    streams: Free[list[TokenStream]] = Field(
        default_factory=list, description="onnx: the models, in order"
    )
    dedup: Free[bool] = Field(False, description="write a run of the same token once")
    peak: Free[PositiveFloat | None] = Field(
        None, description="scale a clip to this peak before it is heard (Step: 0.999)"
    )
    trim_db: Free[PositiveFloat | None] = Field(
        None,
        description="cut silence off both ends, so far below the loudest frame, before a clip is "
        "heard, and keep 0.05 s in front and 0.22 s behind (Step: 20); the shard's clip is whole",
    )


class Speakers(Section):
    """Embeddings of who speaks."""

    method: Free[Annotated[str, OneOf(listeners.speakers)]] = Field(
        "onnx", description=listeners.about(listeners.SPEAKERS)
    )
    path: Free[Annotated[str | None, PathKey(read=True)]] = Field(
        None, description="onnx: the model's file"
    )
    model: Free[Annotated[str | None, PathKey("model")]] = Field(
        None, description="xvector: folder or hub id of the model"
    )
    revision: Free[str | None] = Field(
        None, description="of a hub id: branch, tag or commit; default: the newest"
    )


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
    speech_tokens: Free[UnitsOfModels | None] = Field(
        None,
        description="tokens by a model, into the column speech_token; data.speech_tokens (k-means "
        "over mel frames) where a run can make them itself",
    )
    speakers: Free[Speakers | None] = Field(
        None, description="embeddings of utterances and speakers; default: none"
    )
    workers: Free[PositiveInt | None] = Field(
        None, description="shards made at a time; default: one a CPU, or one a share of a GPU"
    )
    gpus: Free[PositiveFloat] = Field(
        0.25,
        le=1,
        description="of a GPU for each of these, where there are GPUs and a model is heard with",
    )
