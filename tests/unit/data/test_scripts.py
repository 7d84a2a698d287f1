"""Scripts: dialogs of speech, clones and edits, to the id and the label."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from raysft.config.schema import Data, Model, Source
from raysft.data import scripts, sources
from raysft.data.encode import make_encoder
from raysft.data.example import ASSISTANT, Example, Turn, Units
from raysft.errors import BadExample, UserError
from raysft.families.causal_lm.encode import CausalLMEncoder
from tests.support import dialogs

HEAD = (
    "Below is a conversation between the user and the agent. Each turn includes the user's speech "
    "and its corresponding transcript, along with the agent's response text and the corresponding "
    "speech."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@functools.cache
def known(tokenizer: str | Path, folder: Path) -> CausalLMEncoder:
    """One for all tests: to make it costs more than they do."""
    return encoder(tokenizer, folder)


def encoder(tokenizer: str | Path, folder: Path, **data: Any) -> CausalLMEncoder:
    made = make_encoder(Model(**dialogs.model(tokenizer)), Data(**data), folder)
    assert isinstance(made, CausalLMEncoder)
    return made


def dialog(user: str, agent: str, heard: tuple[int, ...] = (3, 1), said: tuple[int, ...] = (0,)):
    turns = (Turn("user", (Units(heard), user)), Turn(ASSISTANT, (agent, Units(said))))
    return Example("x", "dialog", (), (), turns=turns, script="dialog")


def names(units: tuple[int, ...]) -> str:
    return "".join(f"<|unit{unit}|>" for unit in units)


def plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


CASES = [
    ("Hello there", "hello a", (3, 1), (0, 11, 0)),
    ("hello.", "Hello. And hello!", (0,), (0,)),
    ("a", "two\nlines hello", (5,) * 7, (2, 2)),
    ("one\n\n two hello", "### Agent\nhello", (1, 2), (3,)),
    ("<|unit", "|correspond|> hello é漢", (1, 2), (3,)),
]


@pytest.mark.parametrize(("user", "agent", "heard", "said"), CASES)
def test_a_dialog_has_the_ids_of_its_text_as_mistral_has_them(
    folder: Path, user: str, agent: str, heard: tuple[int, ...], said: tuple[int, ...]
) -> None:
    """The whole text by transformers in one go; what is learnt, by the lengths of its stretches,
    each of which its tokenizer reads for itself."""
    made = known(dialogs.mistral(folder), folder)
    found = made.encode(dialog(user, agent, heard, said), [])
    own = made.tokenizer
    user, agent = " ".join(user.lower().split()), agent.lower()
    stretches = [
        f"{HEAD}\n\n### User\n{names(heard)}<|correspond|>",
        f"{user}\n### Agent\n{agent}<|correspond|>{names(said)}\n</s>",
    ]
    assert found.input_ids.tolist() == [own.bos_token_id, *plain(own, "".join(stretches))]
    # A newline is one byte here, so a text's ids are those before it, and what follows it is read
    # without the bar that begins a stretch.
    bar, newline = own.convert_tokens_to_ids(["▁", "<0x0A>"])
    behind = plain(own, f"\n{agent}")
    assert behind[:2] == [bar, newline]
    learnt: list[int] = [*plain(own, user), newline]
    learnt += [*behind[2:], *plain(own, f"<|correspond|>{names(said)}"), bar]
    kept = found.labels[found.labels != -100].tolist()
    assert kept == [*learnt, own.eos_token_id]
    given = len(plain(own, stretches[0])) + 1
    assert (found.labels[:given] == -100).all()
    ask = plain(own, "\n### Agent\n")[2:]
    at = given + len(plain(own, user)) + 1
    assert found.input_ids[at : at + len(ask)].tolist() == ask
    assert (found.labels[at : at + len(ask)] == -100).all()
    assert found.labels[-2] == -100 and found.input_ids[-2] == newline


@pytest.mark.parametrize(("user", "agent", "heard", "said"), CASES)
@pytest.mark.parametrize("kind", ["bytes", "qwen"])
def test_a_dialog_is_piece_by_piece_where_a_tokenizer_joins_newlines(
    folder: Path,
    kind: str,
    user: str,
    agent: str,
    heard: tuple[int, ...],
    said: tuple[int, ...],
) -> None:
    made = known(dialogs.qwen(folder) if kind == "qwen" else kind, folder)
    found = made.encode(dialog(user, agent, heard, said), [])
    own = made.tokenizer
    user, agent = " ".join(user.lower().split()), agent.lower()
    pieces = [
        (f"{HEAD}\n\n### User\n{names(heard)}<|correspond|>", False),
        (user, True),
        ("\n", True),
        ("### Agent\n", False),
        (f"{agent}<|correspond|>{names(said)}", True),
        ("\n", True),
    ]
    ids = [] if own.bos_token_id is None else [own.bos_token_id]
    labels = [-100] * len(ids)
    for text, learnt in pieces:
        new = plain(own, text)
        ids += new
        labels += new if learnt else [-100] * len(new)
    assert found.input_ids.tolist() == [*ids, own.eos_token_id]
    assert found.labels.tolist() == [*labels, own.eos_token_id]


@pytest.mark.parametrize(
    ("user", "agent", "reason"),
    [
        ("a <|correspond|> b", "c", r"the user's text contains <\|correspond\|>"),
        ("a", "<|correspond|>", r"the agent's text contains <\|correspond\|>"),
        ("a", "b <|unit3|>", r"the agent's text contains <\|unit3\|>"),
        ("a </s> b", "c", "the user's text contains </s>"),
        ("", "c", "the user's text is empty"),
        ("a", " \n ", "the agent's text is empty"),
    ],
)
def test_what_would_steer_and_what_is_empty_is_named(
    folder: Path, user: str, agent: str, reason: str
) -> None:
    made = known(dialogs.mistral(folder), folder)
    with pytest.raises(BadExample, match=reason):
        made.measure(dialog(user, agent), [])


def test_each_step_is_asked_with_what_was_learnt_before_it(folder: Path) -> None:
    for tokenizer in (dialogs.mistral(folder), dialogs.qwen(folder), "bytes"):
        made = known(tokenizer, folder)
        whole = dialog("hello.", "so.\nhello.", (3, 1), (7, 2))
        user, agent = whole.turns
        ids, labels = (list(made.encode(whole, []).input_ids), made.encode(whole, []).labels)
        partial = [
            (Turn("user", user.content[:1]),),
            (user,),
            (user, Turn(ASSISTANT, agent.content[:1])),
        ]
        lengths = []
        for turns in partial:
            asked = Example("x", "dialog", (), (), turns=turns, script="dialog")
            found = made.prompt(asked, [])
            assert list(found.input_ids) == ids[: len(found.input_ids)]
            assert (found.labels == -100).all()
            lengths.append(len(found.input_ids))
        first, second, third = lengths
        assert (labels[:first] == -100).all() and labels[first] != -100
        assert labels[second - 1] == -100 and labels[second] != -100
        # What stops each step is learnt, and stands where the step has ended.
        stops = scripts.dialog_stops(made.template.tools())
        learnt = np.flatnonzero(labels[:second] != -100)
        assert ids[learnt[-1]] == stops[0] and ids[third - 1] == stops[1]
        assert ids[third + 2] == stops[2] and labels[third + 2] == stops[2]
        assert list(made.prompt(whole, []).input_ids) == ids[:first]


def test_the_head_is_the_users_to_word(folder: Path) -> None:
    made = encoder("bytes", folder, prompts={"dialog": "They talk."})
    text = made.tokenizer.decode(made.encode(dialog("a", "b"), []).input_ids)
    assert text.removeprefix("<|bos|>").startswith("They talk.\n\n### User\n<|unit3|>")


def test_a_dialog_needs_its_tokens(folder: Path) -> None:
    section = dialogs.model("bytes", extra_tokens=[])
    without = make_encoder(Model(**section), Data(), folder)
    with pytest.raises(UserError, match=r"model\.extra_tokens: .* no token <\|correspond\|>"):
        without.measure(dialog("a", "b"), [])
    silent = make_encoder(Model(**{**section, "speech_units": 0}), Data(), folder)
    with pytest.raises(UserError, match="needs a model that reads and writes units"):
        silent.measure(dialog("a", "b"), [])


# -- sources -------------------------------------------------------------------------------------


def read(path: Path, **entry: Any) -> list[Any]:
    source = sources.resolve(Source(path=str(path), **entry), "train")
    return [item for file in source.files for item in sources.scan(source, file)]


def pair(item: Any) -> tuple[Any, ...]:
    user, agent = item.example.turns
    return (*user.content, *agent.content)


def test_each_turn_is_answered_by_the_next(tmp_path: Path) -> None:
    turns = dialogs.turns(4)
    twice = [*turns[:2], {**turns[2], "speaker": "b"}]
    nameless = [{k: v for k, v in turn.items() if k != "speaker"} for turn in turns[:3]]
    lines = [
        {"id": "d", "turns": turns},
        {"id": "t", "turns": twice},
        {"id": "one", "turns": turns[:1]},
        {"turns": nameless},
        {"id": "q", "user_text": "Hi.", "user_units": "3 17", "agent_text": "Ho", "agent_wav": "a"},
        {"id": "bad", "turns": [turns[0], {"speaker": "b", "text": "x"}]},
        {"id": "cut", "turns": [{**turns[0], "offset": 1.5}, turns[1]]},
        {"id": "p", "user_text": "a", "user_units": "1", "agent_text": "b", "agent_wav": "a"}
        | {"agent_offset": 0.5},
    ]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read(path)
    assert [item.id for item in found] == [
        *("d.0", "d.1", "d.2", "t", "one", "talk:4.0", "talk:4.1", "q", "bad", "cut", "p")
    ]
    heard = [(Units(tuple(turn["units"])), turn["text"]) for turn in turns]
    for number in range(3):
        (units, text), answer = heard[number], heard[number + 1][::-1]
        assert pair(found[number]) == (units, text, *answer)
        assert found[number].example.task == "dialog"
    assert found[3].kind == "one speaker twice"
    assert "speaker b has two turns in a row (2 and 3) (talk.jsonl:2)" in found[3].error
    assert "nobody answers" in found[4].error
    asked, text, said, clip = pair(found[7])
    assert (asked, text, said) == (Units((3, 17)), "Hi.", "Ho")
    assert clip.path == str(tmp_path / "a")
    assert "neither units" in found[8].error
    for item in found[9:]:
        assert "field 'offset' says which part of a clip is meant" in item.error


def test_a_list_of_dialogs_is_not_taken_for_lines_of_them(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"id": "d", "turns": dialogs.turns(2)}]))
    with pytest.raises(UserError, match="is in no format that is known"):
        read(path)


def test_dailytalk_is_read_as_it_lies(tmp_path: Path) -> None:
    data = tmp_path / "data" / "12"
    data.mkdir(parents=True)
    rows = ["1_1_d12|x|He said it.|y", "0_0_d12|x|Who?|y", "2_0_d12|x|Oh!|y"]
    rows += ["0_0_d13|x|A|y", "1_0_d13|x|B|y", "0_0_d14|x|A|y", "2_1_d14|x|B|y"]
    (tmp_path / "metadata.txt").write_text("\n".join(rows))
    (data / "1_1_d12_unit.txt").write_text("4 4 9\n")
    found = read(tmp_path)
    assert [item.id for item in found] == ["d12.0", "d12.1", "d13", "d14"]
    clip, text, said, units = pair(found[0])
    assert (text, said, units) == ("Who?", "He said it.", Units((4, 4, 9)))
    assert clip.path == str(data / "0_0_d12.wav")
    assert pair(found[1])[1:3] == ("He said it.", "Oh!")
    assert found[2].kind == "one speaker twice" and "turns are missing" in found[3].error


# -- Step-Audio-EditX ----------------------------------------------------------------------------


def step(folder: Path, **data: Any) -> CausalLMEncoder:
    own = {"unit_token": "<audio_{}>", "extra_tokens": ["<|BOT|>", "<|EOT|>"]}
    section = Model(**dialogs.model(dialogs.mistral(folder), **own))
    made = make_encoder(section, Data(template="step", **data), folder)
    assert isinstance(made, CausalLMEncoder)
    return made


def test_clones_and_edits_are_steps_conversations(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "voices.jsonl"
    clone = {"id": "c", "text": "To be said. ", "speech_token": [3, 4], "spk": "anna"}
    clone |= {"prompt_text": "Heard {tokens}.", "prompt_speech_token": [1, 2]}
    edit = {"id": "e", "instruction": "Happier.", "speech_token": "5 6"}
    edit |= {"prompt_speech_token": [7], "text": "a note"}
    path.write_text(f"{json.dumps(clone)}\n{json.dumps(edit)}\n")
    made = step(folder, prompts={"edit": "You edit."})
    own = made.tokenizer
    texts = [
        (
            "<s><|BOT|>system\nGenerate audio with the following timbre, prosody and speaking "
            "style\n\n[speaker_start]\nspeaker name: anna\nspeaker prompt text: \nHeard {tokens}."
            "\nspeaker audio tokens: \n<audio_1><audio_2>\n[speaker_end]\n<|EOT|><|BOT|>human\n"
            "To be said.<|EOT|><|BOT|>assistant\n",
            "<audio_3><audio_4><|EOT|>",
        ),
        (
            "<s><|BOT|>system\nYou edit.<|EOT|><|BOT|>human\nHappier.\n<audio_7><|EOT|>"
            "<|BOT|>assistant\n",
            "<audio_5><audio_6><|EOT|>",
        ),
    ]
    found = read(path)
    assert [item.example.task for item in found] == ["clone", "edit"]
    for item, (asked, answer) in zip(found, texts, strict=True):
        sequence = made.encode(item.example, [])
        given, learnt = plain(own, asked), plain(own, answer)
        assert sequence.input_ids.tolist() == [*given, *learnt]
        assert sequence.labels.tolist() == [-100] * len(given) + learnt
        assert made.prompt(item.example, []).input_ids.tolist() == given
        assert made.measure(item.example, []) == len(given) + len(learnt)
    assert made.end_id == own.convert_tokens_to_ids("<|EOT|>")


def test_what_a_voice_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "voices.jsonl"
    good = {"text": "a", "speech_token": [3], "prompt_text": "b", "prompt_speech_token": [1]}
    lines = [
        ({**good, "text": " "}, "has an empty text"),
        ({**good, "prompt_text": "<|EOT|>"}, r"contains <\|EOT\|>"),
        ({**good, "prompt_speech_token": []}, "has neither prompt_speech_token nor prompt_wav"),
        ({**good, "speech_token": [1.5]}, "expected whole numbers"),
        ({**good, "speech_token": [99]}, "unit 99, but there are 12"),
        ({**good, "history": ["x"]}, "'history'"),
    ]
    path.write_text("\n".join(json.dumps(line) for line, _ in lines))
    made = step(folder)
    for item, (_, reason) in zip(read(path), lines, strict=True):
        with pytest.raises(BadExample, match=reason):
            if item.example is None:
                raise BadExample(item.error)
            made.measure(item.example, [])
    bare = step(folder, prompts={"clone": "As {speaker} speaks"})
    (item,) = read(_one(tmp_path / "one.jsonl", good))
    with pytest.raises(UserError, match=r"data\.prompts\.clone: has no place \{tokens\}"):
        bare.measure(item.example, [])
    with pytest.raises(UserError, match=r"data\.template: step, but .* no <\|BOT\|>"):
        encoder("bytes", folder, template="step")


def _one(path: Path, line: dict[str, Any]) -> Path:
    path.write_text(json.dumps(line))
    return path
