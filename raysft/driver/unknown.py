"""Text that a tokenizer does not know: it becomes the unknown token, and is learnt as that.

index -> (here, on the driver: a look at some examples) -> plan. Costs rendering `MOST` examples.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from raysft.data.encode import Encoder
from raysft.data.example import Example
from raysft.data.index.build import Index
from raysft.data.text import Segment
from raysft.errors import BadExample

MOST = 256  # examples that are looked at


def unknown_text(encoder: Encoder, index: Index, most: int = MOST) -> list[str]:
    """Of up to `most` examples from all over the index: how many answers, and how many prompts,
    hold text that the tokenizer does not know; a line for each where some do."""
    tokenizer = encoder.tokenizer
    token = tokenizer.unk_token_id
    # Text that becomes a token which also ends or begins is refused, example by example.
    if token is None or token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return []
    rows = np.unique(np.linspace(0, len(index) - 1, min(most, len(index))).astype(np.int64))
    answers: list[Example] = []
    prompts: list[Example] = []
    looked = 0
    for example in index.examples(rows):
        try:
            rendered = encoder.template.render(example)
        except BadExample:  # its file has changed since: said where it is read
            continue
        looked += 1
        if _holds(rendered.answer, token):
            answers.append(example)
        if _holds(rendered.prompt, token):
            prompts.append(example)
    said = []
    name = f"text that the tokenizer does not know ({tokenizer.unk_token})"
    if answers:
        first = answers[0]
        text = "".join(part for part in first.output if isinstance(part, str)) or first.text or ""
        shown = f"{first.lang}\t{text}" if first.task == "asr" and first.lang else text
        said.append(
            f"{len(answers)} of {looked} answers looked at hold {name}, and it will be learnt as "
            f"that: first {first.id}, {shown[:80]!r}; mend the text, or name another "
            "model.tokenizer"
        )
    if prompts:
        said.append(
            f"{len(prompts)} of {looked} prompts looked at hold {name}: first {prompts[0].id}; "
            "write it otherwise (data.prompts), or name another model.tokenizer"
        )
    return said


def _holds(segments: Iterable[Segment], token: int) -> bool:
    return any(isinstance(part, np.ndarray) and token in part for part in segments)
