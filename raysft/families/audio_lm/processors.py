"""The processor of a model, for its audio alone.

transformers' own loading brings the parts for images and video too, which need packages that
speech does not (torchvision). Here a processor is made of its feature extractor and its tokenizer;
what it lacks is None.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

from raysft.config.schema import Model
from raysft.errors import UserError, first_line
from raysft.families.audio_lm.protocols import Extractor, Processor
from raysft.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HEARING = ("feature_extractor", "audio_processor")  # names of the part that reads audio


class Hearing:
    """A processor that hears, and what it is made of: picklable without its tokenizer.

    extractor: the feature extractor. settings: what else its class was given.
    """

    def __init__(self, name: str, extractor: Extractor, settings: JsonObject) -> None:
        """name: the processor's class, "module:class"."""
        self.name, self.extractor, self.settings = name, extractor, settings

    @classmethod
    def load(cls, name: str, model: Model) -> tuple[Hearing, str | None]:
        """That of model.path (with model.config: of model.tokenizer), and its chat template.

        Raises UserError where there is none, or where it reads no audio.
        """
        from transformers import AutoFeatureExtractor

        where = model.path or model.tokenizer
        key = "model.path" if model.path else "model.tokenizer"
        kind = resolve_name(name)
        if where is None or where == "bytes":
            raise UserError(
                f"model.tokenizer: {where!r} has no {kind.__name__}, which makes the features of "
                "this model: give a folder or hub id that holds one, or set model.path"
            )
        hub = model.hub if model.path else {}
        try:
            settings, _ = kind.get_processor_dict(where, **hub)
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: its processor cannot be read: {first_line(error)}") from None
        try:
            extractor = AutoFeatureExtractor.from_pretrained(where, **hub)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"{key}: {where!r} has no feature extractor, so nothing there reads audio: "
                f"{first_line(error)}"
            ) from None
        template = settings.pop("chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        return cls(name, extractor, settings), template

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> Processor:
        """The processor with `tokenizer`. Raises UserError for a tokenizer that has no tokens for
        audio."""
        plain = resolve_name(self.name)

        class Audio(plain):  # type: ignore[misc, valid-type]  # of whichever class
            def check_argument_for_proper_class(self, name: str, given: object) -> object:
                if given is not None:
                    return super().check_argument_for_proper_class(name, given)
                return None

        parts: dict[str, object] = dict.fromkeys(plain.get_attributes())
        for name in parts:
            if "tokenizer" in name:
                parts[name] = tokenizer
            elif name in HEARING:
                parts[name] = self.extractor
        try:
            return Audio.from_args_and_dict(list(parts.values()), self.settings)
        except AttributeError as error:
            raise UserError(
                f"model.tokenizer: it does not belong to a {plain.__name__}: {error}"
            ) from None
