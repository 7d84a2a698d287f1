"""Conversations as the field writes them down, and what is wrong with some."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from raysft.config.schema import Data, Model, Source
from raysft.data.encode import make_encoder
from raysft.data.example import Audio, Example, Turn, Units
from raysft.data.sources import messages, resolve, scan
from raysft.errors import BadExample, UserError
from tests.support.models import AUDIO, CAUSAL

TOLD = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<audio>What is said in <audio>?"},
    {"role": "assistant", "content": "Two words."},
]


def parsed(record: dict[str, object], task: str | None = None) -> Example:
    return messages.FORMAT.parse(json.dumps(record).encode(), Path("/data/talk.jsonl"), 7, task)


def turns(record: dict[str, object]) -> list[tuple[object, ...]]:
    """role, content with clips as paths in brackets, learnt."""
    return [
        (
            turn.role,
            tuple([part.path] if isinstance(part, Audio) else part for part in turn.content),
            turn.learnt,
        )
        for turn in parsed(record).turns
    ]


SAME = [
    ("system", ("Be brief.",), None),
    ("user", (["/data/a.wav"], "What is said in ", ["/b/c.wav"], "?"), None),
    ("assistant", ("Two words.",), None),
]
SHARE = [
    {"from": "human", "value": "<audio>What is said in <audio>?"},
    {"from": "gpt", "value": "Two words."},
]
PARTS = [
    {"type": "audio", "audio": "a.wav"},
    {"type": "text", "text": "What is said in "},
    {"type": "audio", "audio_url": "/b/c.wav"},
    {"type": "text", "text": "?"},
]
CLIPS = ["a.wav", "/b/c.wav"]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TOLD, "audios": CLIPS},
        {"messages": TOLD, "audio": CLIPS},
        {"messages": TOLD, "audios": [{"path": "a.wav"}, {"url": "file:///b/c.wav"}]},
        {"messages": [TOLD[0], {"role": "user", "content": PARTS}, TOLD[2]]},
        {"conversations": SHARE, "system": "Be brief.", "audios": CLIPS},
        {
            "conversation": [{"human": TOLD[1]["content"], "assistant": "Two words."}],
            "system": "Be brief.",
            "audios": CLIPS,
        },
        {
            "query": TOLD[1]["content"],
            "response": "Two words.",
            "system": "Be brief.",
            "audios": CLIPS,
        },
        {
            "instruction": TOLD[1]["content"],
            "input": "",
            "output": "Two words.",
            "system": "Be brief.",
            "audios": CLIPS,
        },
    ],
    ids=["messages", "audio", "objects", "parts", "sharegpt", "conversation", "query", "alpaca"],
)
def test_every_way_of_writing_it_down_is_the_same_conversation(record: dict[str, object]) -> None:
    assert turns(record) == SAME
    found = parsed(record)
    assert (found.task, found.text, found.id) == ("chat", "Two words.", "talk:7")
    assert [clip.path for clip in found.audio()] == ["/data/a.wav", "/b/c.wav"]


def test_history_goes_before_the_last_question() -> None:
    record = {
        "instruction": "And now?",
        "input": "Say.",
        "output": "Now.",
        "history": [["One?", "1"], ["Two?", "2"]],
    }
    assert [(role, *content) for role, content, _ in turns(record)] == [
        ("user", "One?"),
        ("assistant", "1"),
        ("user", "Two?"),
        ("assistant", "2"),
        ("user", "And now?\nSay."),
        ("assistant", "Now."),
    ]


def test_sound_may_be_in_the_record_itself() -> None:
    sound = base64.b64encode(b"RIFF....").decode()
    asked = [
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{sound}"}},
        {"type": "text", "text": "?"},
    ]
    record = {"messages": [{"role": "user", "content": asked}, TOLD[2]]}
    clips = parsed(record).audio()
    assert [clip.bytes for clip in clips] == [b"RIFF....", b"RIFF...."]
    assert len({clip.path for clip in clips}) == 2, "each is called something else"


@pytest.mark.parametrize("name", ["loss", "weight", "train", "loss_scale"])
def test_a_message_says_whether_it_is_learnt(name: str) -> None:
    said = [
        {"role": "user", "content": "a", name: 0},
        {"role": "assistant", "content": "b", name: 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", name: True},
        {"role": "assistant", "content": "e", name: False},
    ]
    assert [turn[2] for turn in turns({"messages": said})] == [None, False, None, True, False]
    assert parsed({"messages": said}).text == "d", "the last that is learnt"


def test_roles_of_tools_and_what_they_say_are_kept() -> None:
    calls = [{"type": "function", "function": {"name": "ring", "arguments": "{}"}}]
    said = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "b", "tool_call_id": "1"},
        {"role": "tool_call", "content": '{"name": "ring"}'},
        {"role": "observation", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    found = parsed({"messages": said, "tools": json.dumps([{"type": "function"}])})
    assert [turn.role for turn in found.turns] == [
        *("user", "assistant", "tool", "assistant", "tool", "assistant")
    ]
    assert json.loads(found.turns[1].calls) == calls
    assert json.loads(found.tools) == [{"type": "function"}]
    assert found.turns[3] == Turn("assistant", ('{"name": "ring"}',))


@pytest.mark.parametrize(
    "record, said",
    [
        ({"messages": TOLD, "audios": ["a.wav"]}, "has 2 <audio> tags and 1 clips in 'audios'"),
        ({"messages": TOLD}, "has 2 <audio> tags and 0 clips in 'audios'"),
        ({"messages": TOLD, "audios": ["a", "b", "c"]}, "has 2 <audio> tags and 3 clips"),
        ({"messages": TOLD, "audios": ["a", 3]}, r"audios\[1\] is a number, expected the path"),
        ({"messages": TOLD, "audios": ["a", ""]}, r"audios\[1\] is an empty text"),
        ({"messages": TOLD, "audios": ["a", "data:audio/wav;base64,###"]}, "is no base64"),
        ({"messages": TOLD, "audios": CLIPS, "audio": "a"}, "both 'audios' and 'audio'"),
        ({"messages": TOLD, "audios": CLIPS, "images": ["x.png"]}, "names pictures"),
        ({"messages": TOLD, "audios": CLIPS, "completion": "No."}, "would not be learnt"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
        ({"messages": "hello"}, "field 'messages' is a text, expected a list"),
        ({"messages": ["hello"]}, "field 'messages' holds a text, expected messages"),
        ({"messages": []}, "expected one of messages, .*, found none of them"),
        ({"messages": TOLD, "conversations": SHARE}, "found messages and conversations"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "message 1 has 'narrator'; roles"),
        ({"messages": [{"content": "a"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user"}]}, "message 1 has 0 contents"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content is an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "type 'image'"),
        ({"messages": [{"role": "user", "content": "<image>?"}]}, "holds <image>, a place for"),
        ({"messages": [{"role": "user", "content": "a", "loss": True}]}, "only the assistant's"),
        ({"messages": [{"role": "assistant", "content": "a", "loss": 0.5}]}, "loss is 0.5"),
        ({"messages": [{"role": "assistant", "content": "a", "thinking": "b"}]}, "'thinking' is"),
        ({"messages": TOLD, "audios": CLIPS, "tools": "[{"}, "tools: no JSON"),
        ({"messages": TOLD, "audios": CLIPS, "tools": {"a": 1}}, "tools: expected a list"),
        ({"messages": TOLD, "audios": CLIPS, "response": "No."}, "'response' beside 'messages'"),
        ({"query": "a", "response": "b", "output": "c"}, "'output' beside 'query'"),
        ({"conversation": [{"human": "a", "assistant": "b", "history": "c"}]}, "'history' is text"),
        ({"query": "a", "response": "b", "history": ["c"]}, "expected a list of"),
    ],
)
def test_what_is_wrong_is_named(record: dict[str, object], said: str) -> None:
    with pytest.raises(BadExample, match=said):
        parsed(record)


def test_records_of_other_formats_stay_theirs(tmp_path: Path) -> None:
    """Whatever of a conversation stands beside what they are."""
    asked = [{"role": "user", "content": "a"}]
    for record, form in (
        ({"task_type": "asr", "wav_path": "a.wav", "text": "x", "messages": asked}, "ming_jsonl"),
        ({"instruction": "a", "input": "b", "output": "c", "messages": asked}, "most_json"),
        ({"instruction": "a", "input": "<audio>", "output": "c"}, "most_json"),
        ({"instruction": "a", "input": "<audio>", "output": "c", "audios": ["a"]}, "messages"),
        ({"query": "a", "response": "b"}, "messages"),
        ({"conversations": asked}, "messages"),
    ):
        (tmp_path / "x.json").write_text(json.dumps(record))
        assert resolve(Source(path=str(tmp_path / "x.json")), "train").format == form, record


@pytest.mark.parametrize("shape", ["lines", "list", "data"])
def test_the_format_is_known_by_its_content_and_faults_name_their_line(
    tmp_path: Path, shape: str
) -> None:
    records = [{"messages": TOLD, "audios": CLIPS}, {"messages": TOLD, "audios": CLIPS[:1]}]
    file = tmp_path / "talk.json"
    whole = {"lines": None, "list": records, "data": {"data": records}}[shape]
    lines = "\n".join(map(json.dumps, records))
    file.write_text(lines if whole is None else json.dumps(whole, indent=1))
    source = resolve(Source(path=str(file)), "train")
    assert source.format == "messages"
    good, bad = scan(source, source.files[0])
    assert good.example is not None and good.example.turns[1].content[0] == Audio(
        str(tmp_path / "a.wav")
    )
    assert bad.error == (
        "talk.json item 2: has 2 <audio> tags and 1 clips in 'audios': write one tag where each "
        "clip is heard"
    )


def test_units_in_a_text_are_units() -> None:
    asked = {"role": "user", "content": "Say it: [Hu3][Hu12] [Hu0]<audio>[Hu1]now"}
    told = [asked, {"role": "assistant", "content": "[Hu7][Hu2]"}]
    found = parsed({"messages": told, "audios": ["a.wav"]})
    clip = Audio("/data/a.wav")
    assert found.turns[0].content == ("Say it: ", Units((3, 12, 0)), clip, Units((1,)), "now")
    assert found.turns[1].content == (Units((7, 2)),)
    assert found.text is None
    with pytest.raises(BadExample, match=r"'message 1' holds a malformed unit near '\[Hu7'"):
        parsed({"messages": [{"role": "user", "content": "a [Hu7"}, told[1]]})


def test_units_of_conversations_are_their_tokens_and_are_learnt(tmp_path: Path) -> None:
    told = [
        {"role": "user", "content": "Again: [Hu3][Hu1]"},
        {"role": "assistant", "content": "[Hu2]"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "well [Hu0] yes"},
    ]
    encoder = make_encoder(
        Model(tokenizer="bytes", speech_units=4, config=CAUSAL["config"]), Data(), "x"
    )
    example = parsed({"messages": told})
    item = encoder.encode(example, [])
    units = [t for t in item.input_ids.tolist() if t >= 259]
    assert [unit - 259 for unit in units] == [3, 1, 2, 0]
    learnt = item.input_ids[item.labels != -100]
    assert [t - 259 for t in learnt.tolist() if t >= 259] == [2, 0]
    assert encoder.measure(example, []) == len(item.input_ids)
    assert "well " in encoder.tokenizer.decode(learnt)
    with pytest.raises(UserError, match="audio_lm reads audio, no speech units"):
        make_encoder(Model(**AUDIO), Data(), "x").encode(example, [])
