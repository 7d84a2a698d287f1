"""Texts that look the same make no error; others make those that jiwer counts."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import jiwer
import pytest

from raysft.errors import UserError
from raysft.scorers.error_rates import error_rates
from raysft.scorers.normalize import normalize, read_spelling, words

STEPS = ["lower", "punctuation", "whitespace"]
NONE = {"wer": 0.0, "cer": 0.0}

SAME = {
    "decomposed": (
        "crème brûlée, việt nam",
        unicodedata.normalize("NFD", "crème brûlée, việt nam"),
    ),
    "hangul in letters": ("안녕하세요 여러분", unicodedata.normalize("NFD", "안녕하세요 여러분")),
    "zero width space": ("hello\u200b world", "hello world"),
    "byte order mark": ("\ufeffhello world", "hello world"),
    "writing direction": ("\u200fمرحبا \u2067بكم\u2069", "مرحبا بكم"),
    "zero width non-joiner": ("می\u200cخواهم", "میخواهم"),
    "soft hyphen": ("co\u00adoperate now", "cooperate now"),
    "variation selector": ("hello ❤\ufe0f", "hello"),
    "tag characters": ("hello\U000e0067\U000e007f", "hello"),
    "curly apostrophe": ("it’s fine", "it's fine"),
    "letter apostrophe": ("Hawaiʻi, п’ять", "Hawai'i, пʼять"),
    "accents as apostrophes": ("it´s fine", "it`s fine"),
    "geresh": ("צ׳ק צה״ל", "צ'ק צה\"ל"),
    "full width": ("ＡＢＣ　１２３！", "abc 123"),
    "half width kana": ("ｶﾞﾗｽ", "ガラス"),
    "arabic shapes": ("ﻣﺮﺣﺒﺎ", "مرحبا"),
    "ligature": ("eﬀicient ﬁnish", "efficient finish"),
    "non-breaking": ("hello\u00a0world non\u2011stop", "hello world non-stop"),
    "chinese punctuation": ("你好，世界。", "你好世界"),
    "chinese spaces": ("你 好 世界", "你好世界"),
    "name in chinese": ("我用 iPhone 打电话", "我用iphone打电话"),
    "japanese": ("今日は、いい天気！", "今日は いい天気"),
    "thai spaces": ("สวัสดี ครับ", "สวัสดีครับ"),
    "thai am": ("กำลังทำน้ำ", "ก\u0e4d\u0e32ลังท\u0e4d\u0e32น\u0e49\u0e4d\u0e32"),
    "thai am under a tone": ("น้ำ", "น\u0e4d\u0e49\u0e32"),
    "lao am": ("ຄຳ ນ້ຳ", "ຄ\u0ecd\u0eb2ນ\u0ec9\u0ecd\u0eb2"),
    "khmer word marks": ("ភាសា\u200bខ្មែរ", "ភាសាខ្មែរ"),
    "tab and newline": ("one\ttwo\nthree", "one two three"),
}


@pytest.mark.parametrize("name", SAME)
def test_texts_that_look_the_same_have_no_errors(name: str) -> None:
    reference, hypothesis = SAME[name]
    assert error_rates([reference], [hypothesis], STEPS) == NONE
    assert error_rates([hypothesis], [reference], STEPS) == NONE


@pytest.mark.parametrize("text", ["กำลังทำน้ำ", "ຄຳ ນ້ຳ"])
def test_the_vowel_am_is_one_character_of_cer(text: str) -> None:
    without = text[:-1]
    assert error_rates([text], [without], [])["cer"] == pytest.approx(jiwer.cer(text, without))


def test_without_any_step_only_what_no_reader_sees_is_undone() -> None:
    assert error_rates(["\ufeffcafe\u0301’s"], ["café's"], []) == NONE
    assert error_rates(["One two"], ["one two"], []) == {"wer": 0.5, "cer": 1 / 7}
    assert error_rates(["one, two"], ["one two"], ["lower"])["wer"] == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello big world", ["hello", "big", "world"]),
        ("我用iPhone打电话", ["我", "用", "iPhone", "打", "电", "话"]),
        ("ガラスのコップ", list("ガラスのコップ")),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),  # marks stay with their letter
        ("ภาษา2ไทย", ["ภ", "า", "ษ", "า", "2", "ไ", "ท", "ย"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("ខ្មែរ", ["ខ្", "មែ", "រ"]),
        ("ພາສາລາວ", list("ພາສາລາວ")),
        ("안녕하세요 여러분", ["안녕하세요", "여러분"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("tiếng Việt", ["tiếng", "Việt"]),
        ("𠮷野家", ["𠮷", "野", "家"]),
    ],
)
def test_words_are_characters_where_a_language_has_no_spaces(
    text: str, expected: list[str]
) -> None:
    assert words(text) == expected


def test_errors_are_those_that_jiwer_counts() -> None:
    references = ["The cat sat, on the mat.", "it's five o'clock", "我喜欢喝茶", "a b c d"]
    hypotheses = ["the cat sit on mat", "its five oclock now", "我喜 欢和茶叶", ""]
    rates = error_rates(references, hypotheses, STEPS)
    plain = ["the cat sat on the mat", "it's five o'clock", "我喜欢喝茶", "a b c d"]
    said = ["the cat sit on mat", "its five oclock now", "我喜欢和茶叶", ""]
    spaced = [["我 喜 欢 喝 茶" if "我" in t else t for t in plain]]
    spaced += [["我 喜 欢 和 茶 叶" if "我" in t else t for t in said]]
    assert rates == {"wer": jiwer.wer(*spaced), "cer": jiwer.cer(plain, said)}


def test_references_that_are_empty_count_what_was_heard_all_the_same() -> None:
    mixed = error_rates(["one two", "...", ""], ["one two", "three", "four five"], STEPS)
    assert mixed == {"wer": 3 / 2, "cer": (5 + 9) / 7}
    # Nothing but silence: words, and characters, that were heard in a clip.
    assert error_rates(["...", "♪", "—"], ["", "!", ""], STEPS) == NONE
    assert error_rates(["...", "♪"], ["oh", "oh no no"], STEPS) == {"wer": 2.0, "cer": 5.0}
    assert error_rates([" "], ["\u200b"], []) == NONE
    with pytest.raises(ValueError, match="no references"):
        error_rates([], [], STEPS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("twenty one apples, please", "21 apples please"),
        ("Twenty-One apples", "21 apples"),
        ("one million, two hundred", "1,000,200"),
        ("room one oh one", "room 101"),
        ("the first and the second", "the 1st and the 2nd"),
        ("३ किताबें", "3 किताबें"),
        ("٤٢ كتاب", "42 كتاب"),
        ("๒๐ คน", "20 คน"),
    ],
)
def test_numbers_in_words_and_in_figures_are_the_same_where_that_is_asked_for(
    one: str, other: str
) -> None:
    assert error_rates([one], [other], [*STEPS, "numbers"]) == NONE
    assert error_rates([one], [other], STEPS) != NONE


def test_whispers_normalizers_are_transformers_own(tmp_path: Path) -> None:
    from transformers.models.whisper import english_normalizer as theirs

    texts = [
        "Mr. O'Brien can't pay $20 million [laughs] (well, hmm) in the 1960s.",
        "The colour's grey; twenty-one per cent of it wasn’t!",
        "Ça va très bien, Ünal?",
    ]
    mapping = {"colour": "color", "grey": "gray"}
    (tmp_path / "spelling.json").write_text(json.dumps(mapping))
    english, basic = theirs.EnglishTextNormalizer(mapping), theirs.BasicTextNormalizer()
    for text in texts:
        plain = text.replace("’", "'")
        spelling = str(tmp_path / "spelling.json")
        assert normalize(text, ["whisper_english"], spelling) == english(plain)
        assert normalize(text, ["whisper_basic"]) == basic(plain)
    pair = (["The colour is grey, I can't see 21"], ["the color's gray i cannot see twenty one"])
    rates = error_rates(*pair, ["whisper_english"], str(tmp_path / "spelling.json"))
    assert rates["wer"] == jiwer.wer(*([english(text) for text in side] for side in pair))
    assert error_rates(*pair, ["whisper_english"])["wer"] > rates["wer"]


def test_a_spelling_file_that_is_none_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.spelling: .*none\.json cannot be read"):
        read_spelling(str(tmp_path / "none.json"))
    for content in ("[1]", '{"a": 1}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"evaluate\.spelling: .*has to be one JSON object"):
            read_spelling(str(tmp_path / "bad.json"))
