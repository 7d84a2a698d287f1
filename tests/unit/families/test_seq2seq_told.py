"""What models of seq2seq are told beside Whisper, and what they refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raysft.config.schema import Data, Model
from raysft.data.encode import make_encoder
from raysft.data.example import ASSISTANT, Example, Turn
from raysft.errors import BadExample, UserError
from raysft.export import export
from raysft.models import build
from tests.support import seq2seq as zoo
from tests.support.seq2seq_cases import KINDS, PADDED, RATE, TOLD, Case, cases, example, model, wave


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """case(kind): made once."""
    return cases(tmp_path_factory)


@pytest.mark.parametrize("kind", TOLD)
def test_a_text_longer_than_the_decoder_is_quarantined(
    kind: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    encoder = make_encoder(model(kind, tmp_path), PADDED, tmp_path)
    assert case(kind).ours.verdict.learned == 64
    encoder.limit(64)
    room = 64 - len(encoder.template.prefix("asr", "en")) - 1
    for samples in (RATE, 2 * RATE):
        encoder.measure(example("x" * room), [samples])
        with pytest.raises(BadExample, match="takes 65 positions, and the model has learned 64"):
            encoder.measure(example("x" * (room + 1)), [samples])


@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.parametrize(
    ("lang", "said"),
    [
        ("xx", r"its language 'xx' is unknown to the tokenizer, which has"),
        ("spanish", r"its language 'spanish' is unknown to the tokenizer"),
        (None, r"it names no language: give it a lang, or set data\.language"),
    ],
)
def test_a_language_that_is_not_known_is_said(
    kind: str, lang: str | None, said: str, case: Callable[[str], Case]
) -> None:
    with pytest.raises(BadExample, match=said):
        case(kind).encoder.measure(example(lang=lang), [RATE])


@pytest.mark.parametrize("kind", TOLD)
def test_examples_without_a_language_take_that_of_the_config(kind: str, tmp_path: Path) -> None:
    data = Data(mode="padded", language="German")
    encoder = make_encoder(model(kind, tmp_path), data, tmp_path)
    ids = encoder.template.prefix("asr", None)
    assert encoder.tokenizer.convert_ids_to_tokens(ids).count("<|de|>") == 2
    assert encoder.fingerprint != make_encoder(model(kind, tmp_path), PADDED, tmp_path).fingerprint
    with pytest.raises(UserError, match=r"data\.language: language 'klingon' is unknown"):
        make_encoder(model(kind, tmp_path), Data(mode="padded", language="klingon"), tmp_path)


def test_a_canary_translates_into_english(case: Callable[[str], Case]) -> None:
    encoder = case("canary").encoder
    ids = encoder.template.prefix("st", "french")
    assert encoder.tokenizer.convert_ids_to_tokens(ids)[3:5] == ["<|fr|>", "<|en|>"]
    with pytest.raises(BadExample, match="is spoken in English, and translations are those into"):
        encoder.measure(example(task="st"), [RATE])


def test_a_canary_is_asked_by_its_own_template(tmp_path: Path, case: Callable[[str], Case]) -> None:
    own = shutil.copytree(case("canary").exported, tmp_path / "own")
    template = own / "chat_template.jinja"
    written = template.read_text(encoding="utf-8")
    template.write_text(written.replace("<|emo:undefined|>", ""), encoding="utf-8")
    encoder = make_encoder(Model(path=str(own)), PADDED, tmp_path)
    usual = case("canary").encoder.template.prefix("asr", "de")
    asked = encoder.template.prefix("asr", "de")
    assert asked == [*usual[:2], *usual[3:]]
    out = export(build(Model(path=str(own)), PADDED, encoder, 0), tmp_path / "out")
    assert "emo" not in (out / "chat_template.jinja").read_text(encoding="utf-8")
    template.write_text(written.replace("<|noitn|>", "no"), encoding="utf-8")
    with pytest.raises(UserError, match=r"'n' is no control token: name the tokenizer of a canary"):
        make_encoder(Model(path=str(own)), PADDED, tmp_path)


def test_a_speech_to_text_is_told_nothing(tmp_path: Path, case: Callable[[str], Case]) -> None:
    encoder = case("speech_to_text").encoder
    for task in ("asr", "st"):
        ids = encoder.template.prefix(task, "xx")
        assert encoder.tokenizer.convert_ids_to_tokens(ids) == ["</s>"]
    several = zoo.tokenizer("speech_to_text")
    several.add_tokens(["<lang:de>"], special_tokens=True)
    several.save_pretrained(tmp_path / "several")
    section = model("speech_to_text", tmp_path)
    section = section.model_copy(update={"tokenizer": str(tmp_path / "several")})
    with pytest.raises(UserError, match=r"it has <lang:de>: a speech_to_text that is told its lan"):
        make_encoder(section, PADDED, tmp_path)


def test_a_clip_without_features_is_said(case: Callable[[str], Case]) -> None:
    """Speech2Text divides by how much they vary."""
    encoder = case("speech_to_text").encoder
    with pytest.raises(BadExample, match=r"its clip has no features: .*\(silence\)") as why:
        encoder.encode(example(), [np.zeros(RATE, np.float32)])
    assert why.value.kind == "silent"


@pytest.mark.parametrize("kind", ["moonshine", "cohere_asr"])
def test_what_cannot_translate_says_so(kind: str, case: Callable[[str], Case]) -> None:
    with pytest.raises(UserError, match=rf"model: {kind} .*on task 'st'"):
        case(kind).encoder.measure(example(task="st"), [RATE])


def test_a_moonshine_is_told_no_language(tmp_path: Path, case: Callable[[str], Case]) -> None:
    section = model("moonshine", tmp_path)
    with pytest.raises(UserError, match=r"data\.language: moonshine is not told which language"):
        make_encoder(section, Data(mode="padded", language="en"), tmp_path)
    template = case("moonshine").encoder.template
    assert template.prefix("asr", "xx") == template.prefix("asr", None)


@pytest.mark.parametrize("kind", TOLD)
def test_a_tokenizer_without_the_tokens_is_refused(kind: str, tmp_path: Path) -> None:
    section = model(kind, tmp_path).model_copy(update={"tokenizer": "bytes"})
    with pytest.raises(UserError, match=r"model\.tokenizer: it has no token of a language"):
        make_encoder(section, PADDED, tmp_path)
    lacking = zoo.tokenizer("moonshine")
    lacking.add_tokens(["<|en|>"], special_tokens=True)
    lacking.save_pretrained(tmp_path / "lacking")
    section = model(kind, tmp_path).model_copy(update={"tokenizer": str(tmp_path / "lacking")})
    with pytest.raises(UserError, match=rf"model\.tokenizer: .* of a {kind} model"):
        make_encoder(section, PADDED, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_of_the_extractor_that_is_none_is_refused(kind: str, tmp_path: Path) -> None:
    for settings, said in (
        ({"hops": 1}, r"model\.feature_extractor\.hops: no such setting: it takes "),
        (
            {"do_normalize": True} if kind == "moonshine" else {"feature_size": 80},
            rf"but a {kind} reads (16|False): leave it out",
        ),
    ):
        section = model(kind, tmp_path).model_copy(update={"feature_extractor": settings})
        with pytest.raises(UserError, match=said):
            make_encoder(section, PADDED, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_another_order_is_refused(
    kind: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    other = zoo.tokenizer(kind)
    other.add_special_tokens({"bos_token": "<|other|>"})
    other.save_pretrained(tmp_path / "other")
    section = Model(path=str(case(kind).exported), tokenizer=str(tmp_path / "other"))
    if kind == "moonshine":
        with pytest.raises(UserError, match=r"model\.tokenizer: <\|other\|> has id \d+ there, but"):
            make_encoder(section, PADDED, tmp_path)
    else:  # whose bos_token begins nothing
        make_encoder(section, PADDED, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_and_its_answer_are_a_clip_and_its_text(
    kind: str, case: Callable[[str], Case]
) -> None:
    encoder, short = case(kind).encoder, example("zero")
    turns = (Turn("user", short.input), Turn(ASSISTANT, short.output))
    talk = Example("e", "asr", (), (), lang="en", text="zero", turns=turns)
    assert encoder.measure(talk, [RATE]) == encoder.measure(short, [RATE])
    left, right = (encoder.encode(one, [wave(RATE)]) for one in (talk, short))
    assert left.input_ids.tolist() == right.input_ids.tolist()
    assert left.labels.tolist() == right.labels.tolist()
    asked = Turn("user", (*short.input, "What is said?"))
    with pytest.raises(BadExample, match="text beside its clip, which seq2seq cannot be given"):
        encoder.measure(Example("e", "asr", (), (), turns=(asked, turns[1]), lang="en"), [RATE])
    for wrong in ((*turns, *turns), (Turn("system", ("Listen.",)), *turns), turns[:1]):
        with pytest.raises(UserError, match="of conversations those of one question"):
            encoder.measure(Example("e", "asr", (), (), turns=wrong, lang="en"), [RATE, RATE])
