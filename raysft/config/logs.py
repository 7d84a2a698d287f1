"""The section `log`: what a run tells while it trains, and whom."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, field_validator

from raysft.config.marks import Free
from raysft.config.section import Section

SQLITE = "sqlite:///"  # a tracking_uri that is a file


class Wandb(Section):
    """A run at Weights & Biases. Its key is WANDB_API_KEY's, or that of `wandb login`."""

    project: Free[str] = Field("raysft", min_length=1, description="its project")
    entity: Free[str | None] = Field(
        None, description="team or user that the project is of; default: the key's own"
    )
    mode: Free[Literal["online", "offline"]] = Field(
        "online",
        description="offline: nothing is sent, files go to wandb/ in the run's folder, for "
        "`wandb sync`",
    )
    tags: Free[list[str]] = Field(default_factory=list, description="tags of the run")


class Mlflow(Section):
    """A run at MLflow. Passwords and tokens are the environment's: MLFLOW_TRACKING_TOKEN, ..."""

    tracking_uri: Free[str | None] = Field(
        None,
        description="http://HOST:5000, or sqlite:///FOLDER/mlflow.db for a file; default: "
        "MLFLOW_TRACKING_URI",
    )
    experiment: Free[str] = Field("raysft", min_length=1, description="its experiment")

    @field_validator("tracking_uri")
    @classmethod
    def _plain(cls, value: str | None) -> str | None:
        """Without a password, which would lie in every run's folder; a file's is absolute, for
        workers may have another working directory."""
        if value is None:
            return None
        if "://" not in value:
            raise ValueError("a URL: http://HOST:5000, or sqlite:///FOLDER/mlflow.db for a file")
        if not value.startswith(SQLITE):
            if urlsplit(value).username is not None:
                raise ValueError(
                    "a URL without name and password: set MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD"
                )
            return value
        return SQLITE + str(Path(value.removeprefix(SQLITE)).expanduser().absolute())


class Log(Section):
    """What is reported while training."""

    every: Free[PositiveInt] = Field(10, description="steps between lines of metrics.jsonl")
    tensorboard: Free[bool] = Field(
        True,
        description="write TensorBoard files into the run folder: curves, and of each evaluation "
        "answers with their clips",
    )
    wandb: Free[Wandb | None] = Field(
        None,
        description="also to Weights & Biases, e.g. {project: mine} (pip install 'raysft[wandb]')",
    )
    mlflow: Free[Mlflow | None] = Field(
        None,
        description="also to MLflow, e.g. {tracking_uri: http://HOST:5000} (pip install "
        "'raysft[mlflow]')",
    )
    group: Free[str | None] = Field(
        None,
        description="what runs have in common: W&B's group, MLflow's parent run; default: of a "
        "trial its sweep's name",
    )
    dead_experts: Free[PositiveInt | None] = Field(
        500,
        description="of a mixture: steps without a token after which an expert is warned of; null: "
        "never",
    )
