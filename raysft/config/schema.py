"""The config tree: every key there is, its type, its default and one line of meaning.

`--help` and the README's table are generated from these models. A key that is not here is an
error; a key that is here does something.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from raysft.config import families, strategies
from raysft.config.marks import OneOf, PathKey
from raysft.evaluate.scorers import figure_of

_READ = PathKey(read=True)
_MODEL = PathKey("model", read=True)


class Section(BaseModel):
    """Base of every section: unknown keys are errors, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Run(Section):
    """Where the run lives and what makes it reproducible."""

    name: str = Field("run", description="name of the run; its folder is run.storage_path/run.name")
    storage_path: Annotated[str, PathKey()] = Field(
        "runs",
        description="folder that holds runs; relative paths, here and in every key, begin at the "
        "folder the command runs in",
    )
    seed: NonNegativeInt = Field(0, description="seed of shuffling, initial weights and dropout")


class Source(Section):
    """One entry of data.train or data.eval; a plain path is short for {path: ...}."""

    path: Annotated[str, _READ] = Field(
        description="a file, or a folder for formats that read folders"
    )
    format: str = Field("auto", description="auto, or a source format: ming_jsonl, most_json")
    task: str | None = Field(None, description="overrides the task the data says (asr, tts, ...)")
    weight: PositiveFloat = Field(
        1.0,
        description="times its examples are seen in an epoch (0.5: another half each epoch); "
        "no number of clips or hours: 1 for each source mixes them by their size",
    )
    name: str | None = Field(
        None, description="name in metrics such as wer/NAME; default: the file's name"
    )


class SpeechTokens(Section):
    """The tokenizer that turns audio into discrete units, for causal_lm."""

    method: Literal["kmeans"] = Field("kmeans", description="k-means over stacked feature frames")
    clusters: PositiveInt = Field(100, description="number of units")
    features: Literal["log_mel", "fbank"] = Field("log_mel", description="what is clustered")
    mels: PositiveInt = Field(80, description="mel bins")
    stack: PositiveInt = Field(4, description="frames of 10 ms joined into one unit (4 = 25 Hz)")
    fit_clips: PositiveInt = Field(500, description="clips the centroids are fitted on")
    path: Annotated[str | None, PathKey()] = Field(
        None, description="fitted centroids (safetensors); default: fitted once into the run folder"
    )


class Data(Section):
    """What is trained on, and how it becomes batches."""

    train: list[Source] = Field(default_factory=list, description="sources of training data")
    eval: list[Source] = Field(default_factory=list, description="sources of evaluation data")
    lanes: PositiveInt = Field(
        8, description="virtual data-parallel ranks; a step is one micro-batch of each"
    )
    tokens_per_batch: PositiveInt | Literal["auto"] = Field(
        4096,
        description="budget of a micro-batch in model positions (audio positions included); auto: "
        "the largest that leaves 10% of the device's memory free, found before training",
    )
    mode: Literal["packed", "padded"] = Field(
        "packed", description="packed: sequences share a row; padded: a row each, sorted by length"
    )
    order: Literal["shuffled", "sequential"] = Field("shuffled", description="order of examples")
    mix: dict[str, PositiveFloat] = Field(
        default_factory=dict,
        description="share of each task in the micro-batches of every step (not of examples or "
        "loss), e.g. {asr: 0.5, tts: 0.5}",
    )
    window: PositiveInt = Field(4096, description="examples planned and packed together")
    extend: bool = Field(
        False,
        description="data that has changed since the last start is used from the next epoch on "
        "(else it is refused); append new files rather than changing old ones",
    )
    max_quarantined: float = Field(
        0.05, ge=0, le=1, description="share of unusable examples above which the run fails"
    )
    min_seconds: float = Field(
        0.025, ge=0.025, description="shorter clips are not used (25 ms: one frame of features)"
    )
    max_seconds: PositiveFloat | None = Field(
        None, description="longer clips are not used; default: what fits tokens_per_batch"
    )
    silence_db: float | None = Field(
        -90.0,
        le=0,
        description="clips whose peak is below this (dBFS) are not used; null: silence is",
    )
    read_timeout_s: PositiveFloat = Field(
        60.0, description="seconds after which a clip that cannot be read to its end is given up"
    )
    retry_s: NonNegativeFloat = Field(
        30.0,
        description="seconds for which a file is tried again that is there and cannot be read or "
        "written just now, or a clip that has gone since it was indexed; then the run ends, and "
        "goes on when started again; 0: tried once. At most half of parallel.timeout_s counts",
    )
    index_path: Annotated[str | None, PathKey()] = Field(
        None, description="folder of cached indexes; default: run.storage_path/index"
    )
    prompts: dict[str, str] = Field(
        default_factory=lambda: {
            "asr": "Transcribe the following speech into text.",
            "tts": "Convert the following text into speech.",
        },
        description="instruction by task, for examples that bring none",
    )
    template: Literal["auto", "plain", "chat"] = Field(
        "auto",
        description="chat: the chat template of tokenizer or processor; plain: instruction, input "
        "and answer on lines of their own; auto: chat where there is one",
    )
    speech_tokens: SpeechTokens | None = Field(
        None, description="turns audio into units for causal_lm (none: audio sources need audio_lm)"
    )
    features: Literal["model", "fbank"] = Field(
        "model", description="audio_lm input: the model's own log-mel, or Kaldi fbank"
    )
    unit_noise: float = Field(
        0.0, ge=0, lt=1, description="share of input units replaced at random in training"
    )
    cpus: PositiveInt | None = Field(
        None, description="CPUs for data tasks over all workers; default: what workers leave free"
    )
    prefetch: PositiveInt = Field(8, description="micro-batches a worker holds ready")


class Model(Section):
    """Which model: `path` (weights), or `config` (random weights)."""

    path: Annotated[str | None, _MODEL] = Field(
        None,
        description="a folder with weights and tokenizer, or (where there is no such folder) a hub "
        "id: name or owner/name",
    )
    revision: str | None = Field(
        None,
        description="of a hub id: branch, tag or commit; default: the newest. A run stays with the "
        "commit it began with",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="a transformers config with its model_type: random weights, for small models",
    )
    family: Annotated[str, OneOf(families.choices)] = Field(
        families.AUTO, description=f"auto: by the model type ({families.by_type()})"
    )
    tokenizer: Annotated[str | None, _MODEL] = Field(
        None, description="folder or hub id; default model.path; `bytes`: a built-in byte tokenizer"
    )
    feature_extractor: dict[str, Any] = Field(
        default_factory=dict, description="audio_lm from config: settings of its feature extractor"
    )
    speech_units: NonNegativeInt = Field(
        0, description="unit tokens to use for sources that bring units (causal_lm); added if new"
    )
    unit_token: str = Field(
        "<|unit{}|>",
        description="name of a unit token, its number for {}; a checkpoint that has such tokens "
        "([Hu{}], <audio_{}>) keeps its rows for them",
    )
    trust_remote_code: bool = Field(False, description="run Python code that ships with the model")

    @field_validator("unit_token")
    @classmethod
    def _numbered(cls, value: str) -> str:
        if value.count("{}") != 1 or value.count("{") != 1 or value.count("}") != 1:
            raise ValueError("a token's name with {} once, for its number, such as [Hu{}]")
        if len(value) < 4:
            raise ValueError("a name around {}, such as [Hu{}]: numbers alone are in every text")
        return value

    @property
    def hub(self) -> dict[str, Any]:
        """What every `from_pretrained` of `path` is told beside it."""
        revision = {"revision": self.revision} if self.revision else {}
        return {"trust_remote_code": self.trust_remote_code, **revision}


class Parallel(Section):
    """How workers share the work."""

    strategy: Annotated[str, OneOf(strategies.choices)] = Field(
        "ddp",
        description="ddp: replicas; fsdp: FSDP2 shards; zero1, zero2, zero3: DeepSpeed; ep: shares "
        "the experts of a mixture",
    )
    replicate: PositiveInt = Field(
        1, description="fsdp: copies of the model; each is sharded over workers / replicate (HSDP)"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="what lies in host memory between uses; optimizer: its state (zero1 to zero3); "
        "parameters: that and the parameters (fsdp, zero3)",
    )
    deepspeed: Annotated[str | None, _READ] = Field(
        None, description="zero1 to zero3: a DeepSpeed JSON of your own, joined to what raysft sets"
    )
    memory_gb: PositiveFloat | None = Field(
        None,
        description="memory a worker may use, for data.tokens_per_batch: auto; default: the GPU's "
        "(on CPU it has to be given)",
    )
    workers: int | list[int] = Field(
        1, description="training workers, at most data.lanes; [min, max]: as many as have room"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where there is one"
    )
    cpus_per_worker: PositiveFloat | None = Field(
        None,
        description="CPUs reserved for a worker; default: a share that leaves room for data tasks",
    )
    threads: PositiveInt | None = Field(
        None,
        description="torch threads of a worker on CPU, which decide the last bits of its sums; "
        "default: as the run began (with as many workers), else the cluster's cores / its workers",
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description="failures survived since the last new checkpoint; -1: any number",
    )
    backoff_s: NonNegativeFloat = Field(
        2.0,
        description="pause before the second restart without a new checkpoint; doubles, at most 60",
    )
    timeout_s: PositiveFloat = Field(
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


class OptimGroup(Section):
    """Parameters with a learning rate or weight decay of their own."""

    match: list[str] = Field(
        min_length=1, description="name patterns (*audio_tower*); the first group that matches wins"
    )
    lr: PositiveFloat | None = Field(None, description="their peak rate; default: optim.lr")
    weight_decay: float | None = Field(
        None, ge=0, description="their weight decay; default: optim.weight_decay"
    )


class Optim(Section):
    """AdamW and its schedule."""

    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw: torch's, fused; adamw8bit: its state in 8 bits (torchao)"
    )
    lr: PositiveFloat = Field(1e-5, description="peak learning rate")
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2, description="AdamW betas")
    eps: PositiveFloat = Field(1e-8, description="AdamW epsilon")
    weight_decay: float = Field(0.0, ge=0, description="on matrices; norms and biases have none")
    groups: list[OptimGroup] = Field(
        default_factory=list, description="parameters with a rate or decay of their own"
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "constant", description="after warm-up; wsd: constant, then linear decay at the end"
    )
    warmup: float = Field(0, ge=0, description="warm-up: steps if >= 1, else a share of all steps")
    decay: float = Field(
        0.1, ge=0, description="wsd: the decay at the end: steps if >= 1, else a share of all steps"
    )
    reschedule: bool = Field(
        False,
        description="where train.max_steps or train.epochs of a run have changed, and with them "
        "the rates of steps it has done: go on with the new rates from here (else refused)",
    )
    clip: float = Field(1.0, ge=0, description="maximal gradient norm; 0: no clipping")
    max_skipped: NonNegativeInt = Field(
        20,
        description="steps in a row whose gradient may be NaN or infinite; they change no weights; "
        "one more ends the run",
    )


class Train(Section):
    """How long, and in which precision."""

    max_steps: PositiveInt | None = Field(
        None, description="optimizer steps (default: train.epochs)"
    )
    epochs: PositiveInt | None = Field(
        None, description="passes over the data (default 1); beside max_steps: what ends first"
    )
    task_weights: dict[str, PositiveFloat] = Field(
        default_factory=dict,
        description="weight of a task's tokens in the loss, e.g. {asr: 1.0, tts: 0.5}; default 1",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="bf16, fp16: products in half precision over fp32 master weights; fp16 scales "
        "the loss",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass"
    )
    compile: bool = Field(False, description="torch.compile on every block of the model")
    deterministic: bool | None = Field(
        None,
        description="the same bits each time; an operation that cannot ends the run; default: true "
        "on CPUs (there with a warning instead), false on GPUs, where it is slower",
    )
    freeze: list[str] = Field(
        default_factory=list, description="parameters that stay as they are: name patterns (a.b.*)"
    )


class Peft(Section):
    """What is trained instead of all weights, through the peft library."""

    method: Literal["none", "lora", "qlora", "adalora", "ia3", "prefix", "prompt"] = Field(
        "none", description="none: all weights; qlora: lora over a base in 4 bits (NF4)"
    )
    r: PositiveInt = Field(16, description="rank (adalora: the mean rank it ends with)")
    alpha: PositiveFloat = Field(32, description="scale of the update: alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before an adapter")
    rslora: bool = Field(False, description="scale by alpha / sqrt(r)")
    dora: bool = Field(False, description="train magnitude and direction apart (DoRA)")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="layers with adapters: names, one regular expression, or all-linear (those of "
        "the language model; ia3: its keys, values and feed-forward)",
    )
    exclude_modules: list[str] = Field(
        default_factory=list, description="layers that get no adapter, by name"
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="modules that train whole beside the adapters, e.g. [multi_modal_projector]",
    )
    init_r: PositiveInt | None = Field(
        None, description="adalora: the rank it starts with; default: 1.5 r"
    )
    tinit: float = Field(
        0.1, ge=0, description="adalora: ranks begin to fall; steps if >= 1, else a share of all"
    )
    tfinal: float = Field(
        0.3, ge=0, description="adalora: last steps, of fixed ranks; steps if >= 1, else a share"
    )
    every: PositiveInt = Field(10, description="adalora: steps between changes of rank")
    virtual_tokens: PositiveInt = Field(20, description="prefix, prompt: positions that train")
    path: Annotated[str | None, _MODEL] = Field(
        None, description="an adapter to begin with, in peft's layout; its settings have to be ours"
    )


class Checkpoint(Section):
    """When state is saved, and what a start does with it."""

    every: NonNegativeInt = Field(500, description="steps between checkpoints; 0: only at the end")
    keep: PositiveInt = Field(2, description="checkpoints kept: the last ones")
    best: str | None = Field(
        None, description="evaluation metric (wer/dev) whose best checkpoint is kept as well"
    )
    best_mode: Literal["min", "max"] = Field(
        "min",
        description="min: the lowest value is the best; left out: what the metric's scorer says",
    )
    path: Annotated[str | None, PathKey("store")] = Field(
        None,
        description="folder or URL (s3://...) below which checkpoints go, in a folder of the run's "
        "name; relative: below run.storage_path; default: the run's folder",
    )
    resume: Literal["auto", "weights_only", "never"] = Field(
        "auto",
        description="of a run that is there already: auto continues it; weights_only begins anew "
        "with its weights; never refuses",
    )
    grace_s: PositiveFloat = Field(
        30.0, description="seconds to save in on Ctrl-C, SIGTERM or a notice of pre-emption"
    )

    @model_validator(mode="after")
    def _mode_of_metric(self) -> Self:
        if self.best is not None and "best_mode" not in self.model_fields_set:
            self.best_mode = figure_of(self.best).better
        return self


class Evaluate(Section):
    """Evaluation on data.eval."""

    every: NonNegativeInt = Field(0, description="steps between evaluations; 0: never")
    at_end: bool = Field(True, description="evaluate after the last step")
    tokens_per_batch: PositiveInt = Field(8192, description="budget of an evaluation batch")
    max_examples: PositiveInt | None = Field(
        None, description="examples of each source used while training (all at the end)"
    )
    max_new_tokens: PositiveInt | None = Field(
        None,
        description="longest answer generated; default: half as long again as the longest "
        "transcript of the batch",
    )
    generate: bool = Field(
        True, description="generate asr answers for WER and CER, not only the loss"
    )
    normalize: list[
        Literal["lower", "punctuation", "whitespace", "numbers", "whisper_basic", "whisper_english"]
    ] = Field(
        default_factory=lambda: ["lower", "punctuation", "whitespace"],
        description="what is made equal in both texts before WER and CER: case, punctuation, "
        "spaces; numbers: digits of any script, and English number words; or one of Whisper's "
        "normalisers, alone",
    )
    spelling: Annotated[str | None, _READ] = Field(
        None,
        description="whisper_english: a JSON file {british: american, ...} of spellings made equal",
    )


class Log(Section):
    """What is reported while training."""

    every: PositiveInt = Field(10, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(True, description="write TensorBoard files into the run folder")


class Config(Section):
    """The whole tree."""

    run: Run = Field(default_factory=Run)
    data: Data = Field(default_factory=Data)
    model: Model = Field(default_factory=Model)
    peft: Peft = Field(default_factory=Peft)
    parallel: Parallel = Field(default_factory=Parallel)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    log: Log = Field(default_factory=Log)

    @property
    def patience_s(self) -> float:
        """Seconds to wait for a file. A worker that waits makes no progress: it must not count as
        hung, nor must those that wait for it."""
        return min(self.data.retry_s, self.parallel.timeout_s / 2)
