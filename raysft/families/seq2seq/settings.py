"""What a model of seq2seq says of itself, beside its weights."""

from __future__ import annotations

from raysft.config.schema import Model
from raysft.data.encode.families import model_family
from raysft.errors import UserError, first_line
from raysft.families.seq2seq.types import Config
from raysft.json_types import JsonObject


def model_config(model: Model) -> Config:
    """The transformers config of a model of this family. Raises UserError where there is none."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        if model.path is not None:
            config = AutoConfig.from_pretrained(model.path, **model.hub)
        else:
            settings = dict(model.config or {})
            config = AutoConfig.for_model(settings.pop("model_type", ""), **settings)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        where = "model.config" if model.path is None else f"model.path: {model.path}"
        raise UserError(f"{where}: {first_line(error)}") from None
    model_family(model).check_type(config.model_type)
    return config


def generation_settings(model: Model) -> JsonObject:
    """What the model's generation config holds; {} where it has none."""
    from transformers import GenerationConfig

    if model.path is None:
        return {}
    try:
        return GenerationConfig.from_pretrained(model.path, **model.hub).to_dict()
    except OSError:  # a checkpoint need not have one
        return {}
