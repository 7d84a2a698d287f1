"""The config of the model at model.path, or of model.config: what the encoder is made by."""

from __future__ import annotations

from raysft.config.schema import Model
from raysft.errors import UserError, first_line
from raysft.families.flow_decoder.config import FlowDecoderConfig


def config_of(model: Model) -> FlowDecoderConfig:
    """Raises UserError naming the key of model.config that is wrong, or the folder."""
    if model.config is not None:
        known = set(FlowDecoderConfig.__dataclass_fields__) | {"model_type"}
        for key in sorted(model.config.keys() - known):
            raise UserError(f"model.config.{key}: unknown key for a flow decoder")
    try:
        if model.config is None:
            return FlowDecoderConfig.from_pretrained(model.path, **model.hub)
        rest = {key: value for key, value in model.config.items() if key != "model_type"}
        return FlowDecoderConfig(**rest)
    except (OSError, ValueError, TypeError) as error:
        where = "model.config." if model.config is not None else f"model.path {model.path}: "
        raise UserError(f"{where}{first_line(error)}") from None
