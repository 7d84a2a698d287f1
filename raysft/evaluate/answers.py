"""Answers: what they are held against, how long they may go on, what of them is a transcript."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from raysft.scorers.normalize import plain

MOST_NEW_TOKENS = 4096  # that the default limit allows, however long a reference is


def limit_for(references: Collection[int], most: int | None) -> int:
    """Tokens that answers to a batch may have.

    references: tokens of each right answer. most: evaluate.max_new_tokens; None: half as many again
    as the longest has, and 16, so that a wrong answer shows how wrong it is.
    """
    if most is not None:
        return most
    longest = max(references, default=0)
    return min(longest + longest // 2 + 16, MOST_NEW_TOKENS)


def keeps_tab(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tab is one still after encoding and decoding; some tokenizers make it a space."""
    ids = tokenizer.encode("a\tb", add_special_tokens=False)
    return "\t" in tokenizer.decode(ids, skip_special_tokens=True)


def transcript(
    answer: str, lang: str | None, langs: Collection[str] = (), spaced: bool = False
) -> str:
    """The transcript in an asr answer: what follows `LANG<tab>`, where the example has a `lang`.

    langs: names that examples have. spaced: the tokenizer makes a tab a space (see `keeps_tab`).
    Before a space the example's own name is taken off, in any case of its letters, and that of
    another only if `spaced`: else "no", "it" or "is" is a word of an answer without a name.
    Without lang, the answer as it is.
    """
    if not lang:
        return answer
    head, tab, rest = answer.partition("\t")
    others = sorted(langs, key=lambda name: (-len(name.split()), name))  # "en US" before "en"
    if tab and (len(head.split()) < 2 or _folded(head) in map(_folded, (lang, *others))):
        return rest
    words = answer.split()
    for name in (lang, *(others if spaced else ())):
        size = len(name.split())
        if _folded(" ".join(words[:size])) == _folded(name):
            return answer.split(maxsplit=size)[size] if len(words) > size else ""
    return answer


def _folded(text: str) -> str:
    return " ".join(plain(text).casefold().split())
