"""Examples that no template tells: token ids as they are, and documents that are learnt whole.

Stands beside `text.Template.render`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raysft.data.example import Token, Tokens, Units
from raysft.data.segments import Rendered, Segment, cut
from raysft.errors import BadExample, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def given(tokens: Tokens, known: int) -> Rendered:
    """Ids as they are; known: tokens that the tokenizer has. Raises BadExample for one beyond."""
    if (highest := max(tokens.ids)) >= known:
        raise BadExample(
            f"has the id {highest}, and the tokenizer has {known} tokens: are these another "
            "model's, or are model.extra_tokens or model.speech_units missing?",
            "unknown token",
        )
    return cut(list(tokens.ids), np.array(tokens.learnt), [], None)


def document(
    parts: Sequence[str | Units | Token],
    ends: tuple[int | None, int],
    tokenizer: Tokenizer,
    encode: Callable[[str], list[int]],
    control: re.Pattern[str],
) -> Rendered:
    """All of it learnt, its texts tokenized one by one. ends: the ids it begins (None: with none)
    and ends with. control: what no text may hold.

    Raises BadExample for such a text, UserError for a token that the tokenizer does not have.
    """
    segments: list[Segment] = []
    ids = [] if ends[0] is None else [ends[0]]
    for part in parts:
        if isinstance(part, Units):
            segments += [np.array(ids, np.int32)] * bool(ids) + [part]
            ids = []
        elif isinstance(part, Token):
            found = tokenizer.token_to_id(part.name)
            if found is None:
                raise UserError(
                    f"model.extra_tokens: the tokenizer has no token {part.name}: add it there"
                )
            ids.append(found)
        elif match := control.search(part):
            raise BadExample(
                f"its text contains {match[0]}, a token that steers the model", "bad text"
            )
        else:
            ids += encode(part)
    segments.append(np.array([*ids, ends[1]], np.int32))
    return Rendered(segments, [True] * len(segments))
