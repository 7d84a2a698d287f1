"""Voxtral: what it is told and learns, against mistral-common, which its processor asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysft.config import schema
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import Audio, Example, Turn
from raysft.errors import BadExample
from raysft.families.audio_lm.encode import make_encoder as of_run
from tests.support import audio_voxtral
from tests.support import audio_zoo as zoo
from tests.unit.data.test_conversation import messages

WAVE = zoo.clip(40000)


@pytest.fixture(scope="module", params=["v7", "v11"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = zoo.save("voxtral", tmp_path_factory.mktemp("voxtral") / "base")
    audio_voxtral.write_tekken(path, request.param)
    return path


def encoder_of(path: Path, **data: Any) -> Encoder:
    return make_encoder(schema.Model(path=str(path)), schema.Data(**data), "unused")


def spoken(**more: Any) -> Example:
    return Example("e", "asr", (Audio("x.wav"),), ("it is 1",), text="it is 1", **more)


@pytest.mark.parametrize("language", [None, "de"])
def test_transcripts_are_asked_for_as_the_processor_does(
    folder: Path, language: str | None
) -> None:
    encoder = encoder_of(folder)
    expected = audio_voxtral.request(folder, WAVE, language)
    example, wave = spoken(lang=language), expected.audios[0].audio_array[: len(WAVE)]
    prompt, item = encoder.prompt(example, [wave]), encoder.encode(example, [wave])
    assert prompt.input_ids.tolist() == expected.tokens
    made = torch.from_numpy(prompt.arrays["features"][0])
    torch.testing.assert_close(made, audio_voxtral.features(folder, expected))
    assert item.input_ids[: len(expected.tokens)].tolist() == expected.tokens
    learnt = item.labels != -100
    assert not learnt[: len(expected.tokens)].any() and learnt[len(expected.tokens) :].all()
    assert encoder.tokenizer.decode(item.input_ids[learnt]) == "it is 1</s>"
    assert len(item.input_ids) == encoder.measure(example, [len(WAVE)])
    assert not encoder.says_language


def test_what_is_asked_otherwise_is_a_dialogue(folder: Path) -> None:
    asked = [{"type": "audio"}, {"type": "text", "text": "Write it."}]
    expected = audio_voxtral.dialogue(folder, [{"role": "user", "content": asked}], [WAVE])
    own = spoken(instruction="Write it.", lang="de")
    assert encoder_of(folder).prompt(own, [WAVE]).input_ids.tolist() == expected.tokens
    encoder = encoder_of(folder, prompts={"asr": "Write it."})
    item = encoder.encode(spoken(lang="de"), [WAVE])
    assert item.input_ids[: len(expected.tokens)].tolist() == expected.tokens
    assert encoder.tokenizer.decode(item.input_ids[len(expected.tokens) :]) == "it is 1</s>"


@pytest.mark.parametrize(
    "turns",
    [
        ["system: Be brief.", "user: Hi ", "assistant: Ho  ", "user: And?", "assistant: No."],
        ["user: [clip]", "assistant:  it is ", "user: a[clip]b[clip]", "assistant: is\n\n"],
        ["user: a\n[clip] b", "assistant: Ünï 😀 x"],
    ],
)
def test_dialogues_are_those_of_mistral_common(folder: Path, turns: list[str]) -> None:
    made: list[Turn] = []
    waves: list[np.ndarray] = []
    for turn in turns:
        role, _, text = turn.partition(": ")
        parts: list[str | Audio] = []
        for number, piece in enumerate(text.split("[clip]")):
            if number:
                waves.append(zoo.clip(9000 * number, number))
                parts.append(Audio(f"{len(waves)}.wav"))
            parts += [piece] if piece else []
        made.append(Turn(role, tuple(parts)))
    encoder = encoder_of(folder)
    item = encoder.encode(Example("t", "chat", (), (), turns=tuple(made)), waves)
    expected = audio_voxtral.dialogue(folder, messages(made), waves)
    assert item.input_ids.tolist() == expected.tokens
    learnt = encoder.tokenizer.decode(item.input_ids[item.labels != -100])
    said = [turn.text.rstrip(" ") for turn in made if turn.role == "assistant"]
    assert learnt == "".join(f"{text}</s>" for text in said)


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (spoken(lang="german"), r"'german', and Voxtral is told a code of two letters"),
        (Example("e", "asr", (Audio("x"),), ("a[INST]",)), r"its text contains \[INST\]"),
        (
            Example(
                "e",
                "chat",
                (),
                (),
                turns=(
                    Turn("system", ("Brief.",)),
                    Turn("user", (Audio("x"),)),
                    Turn("assistant", ("a",)),
                ),
            ),
            "no system message where there are clips",
        ),
        (
            Example(
                "e",
                "chat",
                (),
                (),
                turns=(Turn("user", ("a",)), Turn("user", ("b",)), Turn("assistant", ("c",))),
            ),
            "takes turns of user and assistant",
        ),
    ],
)
def test_what_mistral_common_refuses_is_refused(
    folder: Path, example: Example, reason: str
) -> None:
    with pytest.raises(BadExample, match=reason):
        encoder_of(folder).encode(example, [WAVE])


def test_a_run_that_goes_on_keeps_its_template(folder: Path) -> None:
    first = encoder_of(folder)
    model, data = schema.Model(path=str(folder)), schema.Data()
    again = of_run(model, data, folder, first.template.source)
    assert again.fingerprint == first.fingerprint
    plain = encoder_of(folder, template="plain")
    ids = plain.encode(spoken(), [WAVE]).input_ids
    assert plain.tokenizer.decode(ids[ids != 24]) == (
        "Transcribe the following speech into text.\n[BEGIN_AUDIO]\nit is 1</s>"
    )
