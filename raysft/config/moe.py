"""The section of the config that says how a mixture of experts computes: `model.moe`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raysft.config.marks import Free
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
