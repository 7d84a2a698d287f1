"""From what a model generates to a transcript, and how long it may go on."""

from __future__ import annotations

from collections.abc import Collection

from raysft.evaluate.normalize import plain

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


def transcript(answer: str, lang: str | None, langs: Collection[str] = ()) -> str:
    """The transcript in an asr answer: what follows `LANG<tab>`, where the example has a `lang`.

    A tokenizer may make the tab a space, or change the case of the name; then only a name that is
    one of an example (`langs`, and its own) is taken for one. Without lang, the answer as it is.
    """
    if not lang:
        return answer
    head, tab, rest = answer.partition("\t")
    if tab and (len(head.split()) < 2 or _folded(head) == _folded(lang)):
        return rest
    words = answer.split()
    for name in (lang, *sorted(langs)):
        size = len(name.split())
        if _folded(" ".join(words[:size])) == _folded(name):
            return answer.split(maxsplit=size)[size] if len(words) > size else ""
    return answer


def _folded(text: str) -> str:
    return " ".join(plain(text).casefold().split())
