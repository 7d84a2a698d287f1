"""When two texts are the same: what WER and CER see of a reference and of an answer.

`plain` is always done, for it only undoes what no reader sees: another Unicode form of the same
characters, characters without width, the shape of an apostrophe, wide, narrow and joined forms.
What the config names comes after it. `words` and `characters` are what errors are counted in.

Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces between words. Their
characters (with the marks that sit on them) are words of their own, run by run, so that a Latin
name in a Chinese sentence is one word still; spaces beside them mean nothing.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from raysft.errors import UserError

# Default_Ignorable_Code_Point of Unicode: soft hyphen, zero width spaces and joiners, byte order
# mark, marks of writing direction, variation selectors, fillers.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# ’ ‘ ʼ ʻ ′ ＇ ` ´ and Hebrew's geresh.
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼʻ′＇`´׳", "'"))
# Shapes of one character: <wide>, <narrow>, Arabic's <initial> to <isolated>, and spaces and
# hyphens that do not break; with tags of no meaning, Latin and Armenian ligatures and the
# radicals that look like Chinese characters.
_SHAPES = ("<wide>", "<narrow>", "<initial>", "<medial>", "<final>", "<isolated>", "<noBreak>")
_SHAPED = re.compile("[\ufb00-\ufb06\ufb13-\ufb17\u2e9f\u2ef3\u2f00-\u2fd5]")
# The vowel am of Thai and Lao written as its two parts, a tone between them or before them: Unicode
# takes it apart in its compatibility forms only, and leaves the tone where it is.
_AM = {
    re.compile("\u0e4d([\u0e48-\u0e4b]?)\u0e32"): "\\1\u0e33",
    re.compile("\u0ecd([\u0ec8-\u0ecb]?)\u0eb2"): "\\1\u0eb3",
}

_UNSPACED = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"  # Chinese
    "\u3040-\u30ff\u31f0-\u31ff\U0001aff0-\U0001b16f\u3100-\u312f\u31a0-\u31bf"  # kana, bopomofo
    "\u0e00-\u0e7f\u0e80-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u19e0-\u19ff"  # Burmese, Khmer
)
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_BESIDE = re.compile(rf"(?<=[{_UNSPACED}])\s+|\s+(?=[{_UNSPACED}])")


def plain(text: str) -> str:
    """`text` in the one form that all forms of it which look the same have."""
    if text.isascii():
        return text.replace("`", "'")
    text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    text = unicodedata.normalize("NFC", "".join(map(_shapeless, text)))
    for parts, vowel in _AM.items():
        text = parts.sub(vowel, text)
    return text.translate(_APOSTROPHES)


@cache
def _shapeless(character: str) -> str:
    tag = unicodedata.decomposition(character).partition(" ")[0]
    if tag in _SHAPES or _SHAPED.match(character):
        return unicodedata.normalize("NFKC", character)
    return character


def normalize(text: str, steps: Sequence[str], spelling: str | None = None) -> str:
    """`plain`, and then of these what `steps` name, in this order:

    whisper_english, whisper_basic: Whisper's normalisers, as transformers has them; spelling: a
        JSON file of {spelling: spelling to compare} for the English one.
    lower.
    numbers: decimal digits of every script as 0 to 9, without commas between thousands; English
        number words as digits, as Whisper reads them ("twenty one" 21, "one oh one" 101).
    punctuation: every Unicode P* and S* character but the apostrophe inside a word becomes a space.
    whitespace: runs of it become one space, ends are trimmed; beside characters of scripts without
        spaces it goes.
    """
    text = plain(text)
    if "whisper_english" in steps:
        text = _whisper_english(spelling)(text)
    if "whisper_basic" in steps:
        text = _whisper_basic()(text)
    if "lower" in steps:
        text = text.lower()
    if "numbers" in steps:
        text = _numbers(text, "punctuation" in steps)
    if "punctuation" in steps:
        text = "".join(
            " " if unicodedata.category(c)[0] in "PS" and not _inner_apostrophe(text, i) else c
            for i, c in enumerate(text)
        )
    if "whitespace" in steps:
        text = _BESIDE.sub("", " ".join(text.split()))
    return unicodedata.normalize("NFC", text)  # what stood between a letter and a mark is gone


def words(text: str) -> list[str]:
    """What WER counts: words between spaces, and single characters of scripts without spaces."""
    found: list[str] = []
    for word in text.split():
        if _CHARACTER.search(word) is None:
            found.append(word)
            continue
        joined = False  # whether the next mark or letter belongs to what is there
        single = False
        for character in word:
            if joined and unicodedata.category(character)[0] == "M":
                found[-1] += character
                continue
            own = _CHARACTER.match(character) is not None
            if joined and not own and not single:
                found[-1] += character
            else:
                found.append(character)
            joined, single = True, own
    return found


def _inner_apostrophe(text: str, i: int) -> bool:
    inside = 0 < i < len(text) - 1
    return text[i] == "'" and inside and text[i - 1].isalnum() and text[i + 1].isalnum()


def _numbers(text: str, punctuation: bool) -> str:
    """punctuation: what is not part of a number is taken away, so that it parts none."""
    text = "".join(str(unicodedata.decimal(c, c)) for c in text)
    text = re.sub(r"(?<=\d)[,\u066c](?=\d{3}(?!\d))", "", text)
    if punctuation:
        kept = "".join(
            " " if unicodedata.category(c)[0] in "PS" and c not in ".%$¢€£'-" else c for c in text
        )
        text = re.sub(r"\.(?!\d)", " ", kept)
    return _english_numbers()(text)


@cache
def _english_numbers() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishNumberNormalizer

    number = EnglishNumberNormalizer()  # it knows words in lower case only

    def apart(word: str) -> str:
        parts = word.lower().split("-")
        return " ".join(parts) if number.words.issuperset(parts) else word

    return lambda text: number(" ".join(map(apart, text.split())))


@cache
def _whisper_basic() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()


@cache
def _whisper_english(spelling: str | None) -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer(read_spelling(spelling) if spelling is not None else {})


def read_spelling(path: str) -> dict[str, str]:
    """The file of evaluate.spelling. Raises UserError where it is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"evaluate.spelling: {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(word, str) for word in found.values()):
        raise UserError(
            f"evaluate.spelling: {path} has to be one JSON object of words, such as "
            '{"colour": "color"} (the normalizer.json of a Whisper model is one)'
        )
    return found
