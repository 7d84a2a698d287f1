"""The section of the config that says how a mixture of experts computes: `model.moe`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat

from raysft.config.marks import Fixed, Free, Weights
from raysft.config.modality import Modality
from raysft.config.section import Section

Backend = Literal["torch", "grouped_gemm", "sonicmoe", "loop"]
Experts = Literal["auto", "torch", "grouped_gemm", "sonicmoe", "loop"]


class Moe(Section):
    """How the experts of a mixture compute; left out: as transformers does."""

    experts: Free[Experts] = Field(  # of a step's last bits, as parallel.threads
        "auto",
        description="what multiplies by experts; torch: grouped_mm; grouped_gemm, sonicmoe: the "
        "packages of that name (GPU); loop: one after the other; auto: the fastest of them on this "
        "run's shapes, tried once",
    )
    modality: Weights[Modality | None] = Field(
        None,
        description="kinds of tokens, such as text and audio, and the experts that each may go "
        "to; default: as the checkpoint was trained, else any expert",
    )
    balance: Fixed[NonNegativeFloat] = Field(
        0.0,
        description="weight of a loss that makes experts be used alike, those of each kind for "
        "themselves; added for each layer",
    )
    balance_over: Fixed[Literal["batch", "sequence"]] = Field(
        "batch",
        description="tokens among which experts are to be used alike; batch: of a kind, in a "
        "micro-batch; sequence: of a sequence, whatever their kind (DeepSeek-V2, MoST)",
    )
    z_loss: Fixed[NonNegativeFloat] = Field(
        0.0, description="weight of the routers' z-loss (ST-MoE), which keeps their scores small"
    )
