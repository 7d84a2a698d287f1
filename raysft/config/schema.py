"""The config tree: every key there is, its type, its default and one line of meaning.

`--help` and docs/config.md are made from these models (reference.py). A key that is not here is an
error; a key that is here does something, and its type says what a run that goes on may change
(marks.py); an entry of a list follows the rule of its list.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from raysft.config import families, strategies
from raysft.config.augment import Augment
from raysft.config.checkpoint import Checkpoint
from raysft.config.evaluation import Evaluate
from raysft.config.judging import Judging
from raysft.config.logs import Log
from raysft.config.marks import Base, Corpus, Fixed, Free, OneOf, PathKey, Weights
from raysft.config.moe import Moe
from raysft.config.patches import Patches
from raysft.config.prepare import Prepare
from raysft.config.section import Section
from raysft.config.speaking import Speak
from raysft.config.speech_tokens import SpeechTokens
from raysft.config.sweep import Sweep
from raysft.config.training import Optim, Peft, Train
from raysft.json_types import JsonObject

_READ = PathKey(read=True)
_DATA = PathKey("data", read=True)
_MODEL = PathKey("model", read=True)


class Run(Section):
    """Where the run lives and what makes it reproducible."""

    name: Free[str] = Field(
        "run", description="name of the run; its folder is run.storage_path/run.name"
    )
    storage_path: Free[Annotated[str, PathKey()]] = Field(
        "runs",
        description="folder that holds runs; relative paths, here and in every key, begin at the "
        "folder the command runs in",
    )
    seed: Fixed[NonNegativeInt] = Field(
        0, description="seed of shuffling, initial weights and dropout"
    )


class Source(Section):
    """One entry of data.train or data.eval; a plain path is short for {path: ...}."""

    path: Annotated[str, _DATA] = Field(
        description="a file, or a folder for formats that read folders; or its URL in a store "
        "(s3://, gs://, hf://, https://)"
    )
    format: str = Field("auto", description="auto, or a source format: messages, ming_jsonl, ...")
    task: str | None = Field(None, description="overrides the task the data says (asr, tts, ...)")
    weight: PositiveFloat = Field(
        1.0,
        description="times its examples are seen in an epoch (0.5: another half each epoch); "
        "no number of clips or hours: 1 for each source mixes them by their size",
    )
    max_examples: PositiveInt | None = Field(
        None, description="of its examples seen in an epoch at most: another part in each"
    )
    max_hours: PositiveFloat | None = Field(
        None, description="of its audio heard in an epoch, about, at most: another part in each"
    )
    name: str | None = Field(
        None, description="name in metrics such as wer/NAME; default: the file's name"
    )
    root: Annotated[str | None, _DATA] = Field(
        None,
        description="folder (or its URL) where relative paths of clips begin; default: as the "
        "format has it, mostly the data file's folder",
    )
    tars: str | None = Field(
        None,
        description="nemo: tar archives with the clips of a manifest, beside it or as a path; "
        "audio_{0..127}.tar means 128 of them",
    )
    columns: (
        dict[Literal["audio", "text", "id", "speaker", "language", "start", "stop", "latents"], str]
        | None
    ) = Field(
        None,
        description="table, parquet: which column holds what, as {audio: path, text: sentence}; "
        "parquet: latents instead of audio, for model.patches.column",
    )
    subset: str | None = Field(
        None, description="gigaspeech: whose segments are taken: XL, L, M, S, XS, DEV or TEST"
    )
    document_start: NonNegativeInt | None = Field(
        None,
        description="token_ids: the id that begins a document, where a row packs several (USDM: 1)",
    )
    judging: Judging | None = Field(
        None, description="drama: rubrics, wordings and dimensions that are asked about"
    )
    commands: bool = Field(
        False,
        description="kaldi: run the commands in wav.scp that end in |; they run as you, on the "
        "node that lists the source, and their output is kept beside the index",
    )


class Temperature(Section):
    """Sizes of sources, tasks or languages made more alike; a plain number is its T."""

    T: Corpus[float] = Field(
        ge=1,
        description="1: by size; from about 100 on: all alike. A source (task, language) of n "
        "examples has a share as n^(1/T) is, the largest being seen as often as its weight says",
    )
    by: Corpus[Literal["source", "task", "lang"]] = Field(
        "source", description="what examples are counted by"
    )


class Data(Section):
    """What is trained on, and how it becomes batches."""

    train: Corpus[list[Source]] = Field(
        default_factory=list, description="sources of training data"
    )
    eval: Free[list[Source]] = Field(default_factory=list, description="sources of evaluation data")
    lanes: Fixed[PositiveInt] = Field(
        8, description="virtual data-parallel ranks; a step is one micro-batch of each"
    )
    tokens_per_batch: Fixed[PositiveInt | Literal["auto"]] = Field(
        4096,
        description="budget of a micro-batch in model positions (audio positions included); auto: "
        "the largest that leaves 10% of the device's memory free, found before training",
    )
    audio_per_batch: Fixed[PositiveFloat | None] = Field(
        None,
        description="audio_lm: seconds of audio that the encoder computes for a micro-batch at "
        "most, beside tokens_per_batch; a clip counts with what it is padded to (Voxtral: each "
        "started 30 s); default: no limit",
    )
    mode: Fixed[Literal["packed", "padded"]] = Field(
        "packed", description="packed: sequences share a row; padded: a row each, sorted by length"
    )
    order: Fixed[Literal["shuffled", "sequential"]] = Field(
        "shuffled", description="order of examples"
    )
    mix: Corpus[dict[str, PositiveFloat]] = Field(
        default_factory=dict,
        description="share of each task, or source by its name, in the micro-batches of every step "
        "(not of examples or loss), e.g. {asr: 0.5, tts: 0.5}",
    )
    temperature: Corpus[Temperature | None] = Field(
        None,
        description="sizes of sources (tasks, languages) made more alike: 5, or {T: 5, by: lang}",
    )
    window: Fixed[PositiveInt] = Field(4096, description="examples planned and packed together")
    extend: Free[bool] = Field(
        False,
        description="data that has changed since the last start is used from the next epoch on "
        "(else it is refused); append new files rather than changing old ones",
    )
    max_quarantined: Free[float] = Field(
        0.05, ge=0, le=1, description="share of unusable examples above which the run fails"
    )
    min_seconds: Fixed[float] = Field(
        0.025, ge=0.025, description="shorter clips are not used (25 ms: one frame of features)"
    )
    max_seconds: Fixed[PositiveFloat | None] = Field(
        None, description="longer clips are not used; default: what fits tokens_per_batch"
    )
    silence_db: Fixed[float | None] = Field(
        -90.0,
        le=0,
        description="clips whose peak is below this (dBFS) are not used; null: silence is",
    )
    read_timeout_s: Free[PositiveFloat] = Field(
        60.0, description="seconds after which a clip that cannot be read to its end is given up"
    )
    retry_s: Free[NonNegativeFloat] = Field(
        30.0,
        description="seconds for which a file is tried again that is there and cannot be read or "
        "written just now, or a clip that has gone since it was indexed; then the run ends, and "
        "goes on when started again; 0: tried once. At most half of parallel.timeout_s counts",
    )
    index_path: Free[Annotated[str | None, PathKey()]] = Field(
        None, description="folder of cached indexes; default: run.storage_path/index"
    )
    prompts: Fixed[dict[str, str]] = Field(
        default_factory=lambda: {
            "asr": "Transcribe the following speech into text.",
            "tts": "Convert the following text into speech.",
        },
        description="instruction by task, for examples that bring none",
    )
    template: Fixed[Literal["auto", "plain", "chat", "step"]] = Field(
        "auto",
        description="chat: the chat template of tokenizer or processor; plain: instruction, input "
        "and answer on lines of their own; auto: chat where there is one; step: Step-Audio's, with "
        "its tokens <|BOT|> and <|EOT|>",
    )
    supervise: Fixed[Literal["all", "last"]] = Field(
        "all",
        description="turns of the assistant that are learnt in a conversation: all of them, or the "
        "last; a message's own `loss: true` or `false` goes first",
    )
    language: Fixed[str | None] = Field(
        None,
        description="seq2seq: the language spoken in examples that name none, such as en or "
        "german; default: that of the model's generation config, if any",
    )
    speech_tokens: Fixed[SpeechTokens | None] = Field(
        None, description="turns audio into units for causal_lm (none: audio sources need audio_lm)"
    )
    features: Fixed[Literal["model", "fbank"]] = Field(
        "model", description="audio_lm input: the model's own log-mel, or Kaldi fbank"
    )
    unit_noise: Fixed[float] = Field(
        0.0, ge=0, lt=1, description="share of input units replaced at random in training"
    )
    augment: Fixed[Augment | None] = Field(
        None,
        description="how clips that the model hears are varied in training; default: not at all",
    )
    cpus: Free[PositiveInt | None] = Field(
        None,
        description="CPUs for data tasks over all workers; default: what workers leave free, or 8 "
        "a GPU where nodes for them come when asked for",
    )
    nodes: Free[dict[str, str]] = Field(
        default_factory=dict,
        description="labels of the nodes that read training data (of `ray start --labels`), such "
        "as {pool: data}; none: beside trainers with GPUs those without one, else any",
    )
    prefetch: Free[PositiveInt] = Field(8, description="micro-batches a worker holds ready")

    @property
    def budget(self) -> int:
        """tokens_per_batch as a number: `auto` is found before anything is planned or read."""
        return cast(int, self.tokens_per_batch)


class Model(Section):
    """Which model: `path` (weights), or `config` (random weights)."""

    path: Base[Annotated[str | None, _MODEL]] = Field(
        None,
        description="a folder with weights and tokenizer, or (where there is no such folder) a hub "
        "id: name or owner/name",
    )
    revision: Free[str | None] = Field(  # the base itself is held against: see `run.identity`
        None,
        description="of a hub id: branch, tag or commit; default: the newest. A run stays with the "
        "commit it began with",
    )
    config: Weights[JsonObject | None] = Field(
        None,
        description="a transformers config with its model_type: random weights, for small models",
    )
    family: Weights[Annotated[str, OneOf(families.choices)]] = Field(
        families.AUTO, description=f"auto: by the model type ({families.by_type()})"
    )
    tokenizer: Weights[Annotated[str | None, _MODEL]] = Field(
        None, description="folder or hub id; default model.path; `bytes`: a built-in byte tokenizer"
    )
    feature_extractor: Weights[JsonObject] = Field(
        default_factory=dict, description="audio_lm from config: settings of its feature extractor"
    )
    speech_units: Weights[NonNegativeInt] = Field(
        0, description="unit tokens to use for sources that bring units (causal_lm); added if new"
    )
    unit_token: Weights[str] = Field(
        "<|unit{}|>",
        description="name of a unit token, its number for {}; a checkpoint that has such tokens "
        "([Hu{}], <audio_{}>) keeps its rows for them",
    )
    extra_tokens: Weights[list[str]] = Field(
        default_factory=list,
        description="tokens the tokenizer is given before the units, in this order, where it lacks "
        "them (causal_lm), such as [<|continue|>, <|correspond|>]",
    )
    unit_markers: Weights[list[str] | None] = Field(
        None,
        description="tokens before and after every run of units (causal_lm), such as "
        "[<|begin_of_audio|>, <|end_of_audio|>]; added if new",
    )
    trust_remote_code: Weights[bool] = Field(
        False, description="run Python code that ships with the model"
    )
    moe: Weights[Moe | None] = Field(
        None,
        description="how the experts of a mixture compute; left out: as transformers does",
    )
    patches: Weights[Patches | None] = Field(
        None, description="patch_lm: patches of speech, and the heads that speak them"
    )

    @field_validator("unit_token")
    @classmethod
    def _numbered(cls, value: str) -> str:
        if value.count("{}") != 1 or value.count("{") != 1 or value.count("}") != 1:
            raise ValueError("a token's name with {} once, for its number, such as [Hu{}]")
        if len(value) < 4:
            raise ValueError("a name around {}, such as [Hu{}]: numbers alone are in every text")
        return value

    @field_validator("unit_markers")
    @classmethod
    def _two(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (len(set(value)) != 2 or not all(map(str.strip, value))):
            raise ValueError("two tokens that differ, the one before units and the one after")
        return value

    @property
    def hub(self) -> JsonObject:
        """What every `from_pretrained` of `path` is told beside it."""
        revision = {"revision": self.revision} if self.revision else {}
        return {"trust_remote_code": self.trust_remote_code, **revision}


class Parallel(Section):
    """How workers share the work."""

    strategy: Free[Annotated[str, OneOf(strategies.choices)]] = Field(
        "ddp",
        description="ddp: replicas; fsdp: FSDP2 shards; zero1, zero2, zero3: DeepSpeed; ep: shares "
        "the experts of a mixture",
    )
    replicate: Free[Literal["auto"] | PositiveInt] = Field(
        "auto",
        description="fsdp: copies of the model; each is sharded over workers / replicate (HSDP); "
        "auto: one on each node, where the GPUs of a node have room for it, else one",
    )
    ep_size: Free[PositiveInt | None] = Field(
        None,
        description="ep: workers that hold all experts of a mixture between them; divides the "
        "workers and the experts; default: as many of a node's as do",
    )
    gradients: Free[Literal["auto", "whole", "sharded"]] = Field(
        "auto",
        description="fsdp, ep: what a worker holds of a gradient between the turns of a step; "
        "whole: all of it, reduced once; sharded: its share, reduced in each turn; auto: whole up "
        "to 4 GiB",
    )
    offload: Free[Literal["none", "optimizer", "parameters"]] = Field(
        "none",
        description="what lies in host memory between uses; optimizer: its state (zero1 to zero3); "
        "parameters: that and the parameters (fsdp, zero3)",
    )
    deepspeed: Free[Annotated[str | None, _READ]] = Field(
        None, description="zero1 to zero3: a DeepSpeed JSON of your own, joined to what raysft sets"
    )
    memory_gb: Free[PositiveFloat | None] = Field(
        None,
        description="memory a worker may use, for data.tokens_per_batch: auto; default: the GPU's "
        "(on CPU it has to be given)",
    )
    workers: Free[int | list[int]] = Field(
        1, description="training workers, at most data.lanes; [min, max]: as many as have room"
    )
    device: Free[Literal["auto", "cpu", "cuda"]] = Field(
        "auto", description="auto: cuda where there is one"
    )
    cpus_per_worker: Free[PositiveFloat | None] = Field(
        None,
        description="CPUs reserved for a worker; default: a share that leaves room for data tasks",
    )
    threads: Free[PositiveInt | None] = Field(
        None,
        description="torch threads of a worker on CPU, which decide the last bits of its sums; "
        "default: as the run began (with as many workers), else the cluster's cores / its workers",
    )
    max_failures: Free[int] = Field(
        3,
        ge=-1,
        description="failures survived since the last new checkpoint; -1: any number",
    )
    backoff_s: Free[NonNegativeFloat] = Field(
        2.0,
        description="pause before the second restart without a new checkpoint; doubles, at most 60",
    )
    timeout_s: Free[PositiveFloat] = Field(
        300, description="seconds without progress after which a worker counts as hung"
    )

    @field_validator("workers", mode="plain")
    @classmethod
    def _one_or_two(cls, value: Any) -> int | list[int]:
        numbers = value if isinstance(value, list) else [value]
        whole = all(type(number) is int and number > 0 for number in numbers)
        if not whole or len(numbers) != (2 if isinstance(value, list) else 1):
            raise ValueError("a whole number of at least 1, or two of them as [min, max]")
        if numbers != sorted(numbers):
            raise ValueError("[min, max] with min no larger than max")
        return value

    @property
    def min_workers(self) -> int:
        """The fewest workers to train with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers to train with."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the run lasts."""
        return self.min_workers != self.max_workers


class Config(Section):
    """The whole tree."""

    plugins: Free[list[str]] = Field(
        default_factory=list,
        description="modules that add formats, families, strategies, losses or scorers of your "
        "own: [my_module]; found where Python looks, and in the folder the command runs in",
    )
    run: Run = Field(default_factory=Run)
    data: Data = Field(default_factory=Data)
    model: Model = Field(default_factory=Model)
    peft: Peft = Field(default_factory=Peft)
    parallel: Parallel = Field(default_factory=Parallel)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    speak: Speak = Field(default_factory=Speak)
    log: Log = Field(default_factory=Log)
    sweep: Sweep = Field(default_factory=Sweep)
    prepare: Prepare = Field(default_factory=Prepare)
    stages: Free[list[JsonObject]] = Field(
        default_factory=list,
        description="trainings that one command runs in order: of each its name, and the keys in "
        "which it differs from the rest of the file; stages.NAME.key=value sets one",
    )
    only: Free[list[str] | None] = Field(
        None, description="names of stages: those of them that are run; default: all"
    )

    @field_validator("only", mode="before")
    @classmethod
    def _one_name(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def patience_s(self) -> float:
        """Seconds to wait for a file. A worker that waits makes no progress: it must not count as
        hung, nor must those that wait for it."""
        return min(self.data.retry_s, self.parallel.timeout_s / 2)
