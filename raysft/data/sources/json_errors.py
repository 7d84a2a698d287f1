"""What is wrong with a text that is no JSON, as its writer would say it."""

from __future__ import annotations

import json


def explain(error: json.JSONDecodeError, text: str) -> str:
    """What is wrong with `text`, as a user would say it."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if error.msg == "Extra data" and after[:1] == ",":
        return "a comma follows the object (in JSON lines nothing stands between the lines)"
    trailing = before[-1:] == "," or (after[:1] == "," and after[1:].lstrip()[:1] in ("}", "]"))
    if trailing and after.lstrip(", \t")[:1] in ("}", "]"):
        return f"a comma stands before a closing bracket (at character {error.pos})"
    if after[:1] == "'" or (error.pos and text[error.pos - 1 : error.pos] == "'"):
        return f"it has single quotes, JSON has double ones (at character {error.pos})"
    for word in ("None", "True", "False"):
        if after.startswith(word):
            return f"it has Python's {word}, JSON has {word.lower().replace('none', 'null')}"
    return f"{error.msg} at character {error.pos}"
