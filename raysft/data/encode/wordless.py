"""What stands in an encoder for a tokenizer and a template, where its model reads no text."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from raysft.data.example import Example
from raysft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from raysft.data.text import Rendered, Segment


class Wordless:
    """A template that says nothing: see `base.Renders`."""

    source = ""
    remark = ""
    end_id = -1

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Raises UserError: there is none."""
        return _none()

    def render(self, example: Example) -> Rendered:
        """Raises UserError: nothing is said."""
        return _none()

    def prompt(self, example: Example) -> list[Segment]:
        """Raises UserError: nothing is asked."""
        return _none()

    def answer_of(self, generated: str) -> str:
        """The text itself."""
        return generated


def _none() -> NoReturn:
    raise UserError("model: it reads and writes no text, and has no tokenizer")
