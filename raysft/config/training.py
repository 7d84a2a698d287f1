"""The sections of the config that say what trains, and how: `optim`, `train`, `peft`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from raysft.config import losses as token_losses
from raysft.config.marks import Fixed, Free, Length, OneOf, PathKey, Stepwise, Weights
from raysft.config.objectives import Dpo, Grpo, Objective
from raysft.config.section import Section

Precision = Literal["auto", "fp32", "bf16", "fp16"]


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

    optimizer: Fixed[Literal["adamw", "adamw8bit"]] = Field(
        "adamw", description="adamw: torch's, fused; adamw8bit: its state in 8 bits (torchao)"
    )
    lr: Stepwise[PositiveFloat] = Field(1e-5, description="peak learning rate")
    betas: Stepwise[list[float]] = Field(
        [0.9, 0.95], min_length=2, max_length=2, description="AdamW betas"
    )
    eps: Stepwise[PositiveFloat] = Field(1e-8, description="AdamW epsilon")
    weight_decay: Stepwise[float] = Field(
        0.0, ge=0, description="on matrices; norms and biases have none"
    )
    groups: Stepwise[list[OptimGroup]] = Field(
        default_factory=list, description="parameters with a rate or decay of their own"
    )
    schedule: Fixed[Literal["constant", "linear", "cosine", "wsd"]] = Field(
        "constant", description="after warm-up; wsd: constant, then linear decay at the end"
    )
    warmup: Fixed[float] = Field(
        0, ge=0, description="warm-up: steps if >= 1, else a share of all steps"
    )
    decay: Fixed[float] = Field(
        0.1, ge=0, description="wsd: the decay at the end: steps if >= 1, else a share of all steps"
    )
    reschedule: Free[bool] = Field(
        False,
        description="where train.max_steps or train.epochs of a run have changed, and with them "
        "the rates of steps it has done: go on with the new rates from here (else refused)",
    )
    clip: Stepwise[float] = Field(1.0, ge=0, description="maximal gradient norm; 0: no clipping")
    max_skipped: Free[NonNegativeInt] = Field(
        20,
        description="steps in a row whose gradient may be NaN or infinite; they change no weights; "
        "one more ends the run",
    )


class Train(Section):
    """How long, and in which precision."""

    max_steps: Length[PositiveInt | None] = Field(
        None, description="optimizer steps (default: train.epochs)"
    )
    epochs: Length[PositiveInt | None] = Field(
        None, description="passes over the data (default 1); beside max_steps: what ends first"
    )
    objective: Fixed[Objective] = Field(
        "sft",
        description="what a step learns; sft: right answers; grpo: of sampled answers those that "
        "earn more than others to the same prompt; dpo: the chosen of two answers",
    )
    grpo: Grpo = Field(default_factory=Grpo)
    dpo: Dpo = Field(default_factory=Dpo)
    task_weights: Stepwise[dict[str, PositiveFloat]] = Field(
        default_factory=dict,
        description="weight of a task's tokens in the loss, e.g. {asr: 1.0, tts: 0.5}; default 1",
    )
    losses: Fixed[dict[Annotated[str, OneOf(token_losses.choices)], PositiveFloat]] = Field(
        default_factory=dict,
        description="losses of every token beside its cross-entropy, with their weights, e.g. "
        "{z_loss: 0.0001}",
    )
    precision: Fixed[Precision] = Field(
        "auto",
        description="bf16, fp16: products in half precision over fp32 master weights; fp16 scales "
        "the loss; auto: bf16 on GPUs that have it, else fp32, as the run began",
    )
    tf32: Fixed[bool] = Field(
        False,
        description="fp32 on GPUs: products in TF32, which is faster and keeps 10 bits of fraction",
    )
    gradient_checkpointing: Fixed[bool] = Field(
        False, description="recompute activations in the backward pass"
    )
    compile: Fixed[bool] = Field(False, description="torch.compile on every block of the model")
    static_shapes: Free[bool | None] = Field(  # of a step's last bits, as parallel.threads
        None,
        description="packed rows filled up to data.tokens_per_batch, so that memory and compiled "
        "code see one shape; default: on GPUs, and with train.compile, unless data.audio_per_batch "
        "may end a row before",
    )
    deterministic: Free[bool | None] = Field(  # of a step's last bits, as parallel.threads
        None,
        description="the same bits each time; an operation that cannot ends the run; default: true "
        "on CPUs (there with a warning instead), false on GPUs, where it is slower",
    )
    freeze: Fixed[list[str]] = Field(
        default_factory=list, description="parameters that stay as they are: name patterns (a.b.*)"
    )

    @property
    def referenced(self) -> bool:
        """Whether what trains is held to what it was as the run began, and so kept twice."""
        return self.objective == "dpo" or (self.objective == "grpo" and self.grpo.beta > 0)


class Peft(Section):
    """What is trained instead of all weights, through the peft library."""

    method: Weights[Literal["none", "lora", "qlora", "adalora", "ia3", "prefix", "prompt"]] = Field(
        "none", description="none: all weights; qlora: lora over a base in 4 bits (NF4)"
    )
    r: Weights[PositiveInt] = Field(16, description="rank (adalora: the mean rank it ends with)")
    alpha: Fixed[PositiveFloat] = Field(32, description="scale of the update: alpha / r")
    dropout: Stepwise[float] = Field(0.0, ge=0, lt=1, description="dropout before an adapter")
    rslora: Fixed[bool] = Field(False, description="scale by alpha / sqrt(r)")
    dora: Weights[bool] = Field(False, description="train magnitude and direction apart (DoRA)")
    target_modules: Weights[str | list[str]] = Field(
        "all-linear",
        description="layers with adapters: names, one regular expression, or all-linear (those of "
        "the language model; ia3: its keys, values and feed-forward)",
    )
    experts: Weights[bool] = Field(
        False, description="adapters on the experts of a mixture as well, which are no layers"
    )
    exclude_modules: Weights[list[str]] = Field(
        default_factory=list, description="layers that get no adapter, by name"
    )
    modules_to_save: Weights[list[str]] = Field(
        default_factory=list,
        description="modules that train whole beside the adapters, e.g. [multi_modal_projector]",
    )
    init_r: Weights[PositiveInt | None] = Field(
        None, description="adalora: the rank it starts with; default: 1.5 r"
    )
    tinit: Fixed[float] = Field(
        0.1, ge=0, description="adalora: ranks begin to fall; steps if >= 1, else a share of all"
    )
    tfinal: Fixed[float] = Field(
        0.3, ge=0, description="adalora: last steps, of fixed ranks; steps if >= 1, else a share"
    )
    every: Fixed[PositiveInt] = Field(10, description="adalora: steps between changes of rank")
    virtual_tokens: Weights[PositiveInt] = Field(
        20, description="prefix, prompt: positions that train"
    )
    path: Fixed[Annotated[str | None, PathKey("model", read=True)]] = Field(
        None, description="an adapter to begin with, in peft's layout; its settings have to be ours"
    )
