"""The section `sweep`: which keys vary, how points are chosen, and which trials end early."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from raysft.config.marks import Free
from raysft.config.section import Section
from raysft.json_types import JsonObject


class Sweep(Section):
    """What a sweep tries; a single run takes no notice of it."""

    space: Free[JsonObject] = Field(
        default_factory=dict,
        description="what each key of the config is tried with: {peft.r: [8, 16, 32], optim.lr: "
        "{loguniform: [1e-5, 1e-3]}}. A list is a choice; others are {choice: [...]}, {grid: "
        "[...]} (each value, with everything else), {uniform: [low, high]}, {loguniform: [low, "
        "high]}, {randint: [low, high]} (both included)",
    )
    metric: Free[str] = Field(
        "wer",
        description="what trials are ranked by: a figure of the evaluation (wer/dev), or its kind "
        "(wer): that of the first source, or task, that has it",
    )
    mode: Free[Literal["min", "max"] | None] = Field(
        None, description="which value is the best; default: what the metric's scorer says"
    )
    searcher: Free[Literal["auto", "grid", "random", "optuna"]] = Field(
        "auto",
        description="how points are chosen: grid: every one; random; optuna: by those before "
        "(TPE; pip install 'raysft[optuna]'); auto: grid where all keys have lists, else random",
    )
    trials: Free[PositiveInt | None] = Field(
        None,
        description="points tried (with `grid:` keys: of each of their combinations); a grid has "
        "as many as it has",
    )
    seeds: Free[PositiveInt] = Field(
        1, description="trials of a point, each with another run.seed; ranked by their mean"
    )
    max_concurrent: Free[PositiveInt | None] = Field(
        None, description="trials at a time, at most; default: as many as the cluster has room for"
    )
    scheduler: Free[Literal["none", "asha", "pbt"]] = Field(
        "none",
        description="asha: ends trials that are behind the others at the same step; pbt: those go "
        "on from a better one's checkpoint, with its values changed a little",
    )
    grace: Free[PositiveInt | None] = Field(
        None,
        description="asha: the step before which no trial is ended; default: evaluate.every",
    )
    reduction: Free[int] = Field(
        3, ge=2, description="asha: one of so many trials goes on from a rung to the next"
    )
    interval: Free[PositiveInt | None] = Field(
        None,
        description="pbt: steps between two comparisons of all trials, a multiple of "
        "evaluate.every; default: evaluate.every",
    )
    quantile: Free[float] = Field(
        0.25,
        gt=0,
        le=0.5,
        description="pbt: the share of trials, the worst, that go on from one of as many best",
    )
    retries: Free[NonNegativeInt] = Field(
        1, description="times that a trial that failed is tried again, from its checkpoint"
    )
