"""Pairs of answers as the field writes them down, what is wrong with some, and how they encode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysft.config.schema import Data, Model
from raysft.data.clips.audio import load as load_clip
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import Audio, Example
from raysft.data.pairs import REJECTED, apart
from raysft.data.quarantine import kind
from raysft.data.sources import messages
from raysft.errors import BadExample
from tests.support.models import AUDIO, CAUSAL

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "<audio>Is it?"}
PLAIN = {"role": "user", "content": "Is it?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
CLIP: dict[str, Any] = {"audios": ["a.wav"]}
SHARE = {"from": "human", "value": "<audio>Is it?"}


def parsed(record: dict[str, Any]) -> Example:
    return messages.FORMAT.parse(json.dumps(record).encode(), Path("/data/talk.jsonl"), 7)


def said(example: Example | None) -> list[tuple[str, str]]:
    assert example is not None
    return [
        (
            turn.role,
            "".join(f"[{p.path}]" if isinstance(p, Audio) else str(p) for p in turn.content),
        )
        for turn in example.turns
    ]


HEARD = ("user", "[/data/a.wav]Is it?")
ASKED = ("user", "Is it?")
BRIEF = ("system", "Be brief.")


@pytest.mark.parametrize(
    ("record", "before"),
    [
        ({"messages": [ASK], "chosen": "Yes.", "rejected": "No.", **CLIP}, [HEARD]),
        ({"messages": [SYSTEM, PLAIN], "chosen": YES, "rejected": NO}, [BRIEF, ASKED]),
        ({"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}, [ASKED]),
        ({"prompt": [SYSTEM, ASK], "chosen": [YES], "rejected": [NO], **CLIP}, [BRIEF, HEARD]),
        ({"prompt": "Is it?", "system": "Be brief.", "chosen": [YES], "rejected": "No."}, 2),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO], **CLIP}, [HEARD]),
        (
            # As UltraFeedback has them: the prompt and the chosen conversation once more.
            {
                "prompt": "Is it?",
                "messages": [PLAIN, YES],
                "chosen": [PLAIN, YES],
                "rejected": [PLAIN, NO],
                "score_chosen": 8.5,
                "score_rejected": 7.0,
            },
            [ASKED],
        ),
        ({"messages": [ASK, YES], "rejected_response": "No.", **CLIP}, [HEARD]),
        (
            {"messages": [SYSTEM, ASK, YES], "rejected_messages": [SYSTEM, ASK, NO], **CLIP},
            [BRIEF, HEARD],
        ),
        (
            {
                "conversations": [SHARE],
                "chosen": {"from": "gpt", "value": "Yes."},
                "rejected": {"from": "gpt", "value": "No."},
                **CLIP,
            },
            [HEARD],
        ),
        (
            {"instruction": "Is", "input": "it?", "chosen": "Yes.", "rejected": "No."},
            [("user", "Is\nit?")],
        ),
        ({"query": "Is it?", "response": "Yes.", "rejected_response": "No."}, [ASKED]),
        (
            {"query": "Is it?", "history": [["Q", "A"]], "chosen": "Yes.", "rejected": "No."},
            [("user", "Q"), ("assistant", "A"), ASKED],
        ),
    ],
)
def test_pairs_as_the_field_writes_them(record: dict[str, Any], before: Any) -> None:
    example = parsed(record)
    before = [BRIEF, ASKED] if before == 2 else before
    assert said(example) == [*before, ("assistant", "Yes.")]
    assert said(example.rejected) == [*before, ("assistant", "No.")]
    assert example.text == "Yes."
    assert [clip.path for clip in example.audio()] == ["/data/a.wav"] * (HEARD in before)


@pytest.mark.parametrize("form", ["list", "lines"])
def test_a_file_of_pairs_is_known_by_its_records(form: str, tmp_path: Path) -> None:
    record = {"instruction": "Is it?", "output": "Yes.", "rejected_response": "No."}
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([record]) if form == "list" else json.dumps(record) + "\n")
    assert messages.FORMAT.sniff(path)


@pytest.mark.parametrize(
    "record",
    [
        {"audio_filepath": "a.wav", "text": "hi", "chosen": True},
        {"audio_filepath": "a.wav", "text": "hi", "chosen": "yes", "rejected": "by whom"},
        {"wav_path": "a.wav", "text": "hi", "prompt": "Hm?", "chosen": "A", "rejected": "B"},
        {"prompt": "Hm?", "chosen": "by hand"},
    ],
)
def test_a_record_with_a_note_of_such_a_name_is_no_conversation(
    record: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert not messages.FORMAT.sniff(path)


def test_calls_of_tools_are_answers() -> None:
    call = {"role": "function_call", "content": '{"name": "ring"}'}
    example = parsed({"prompt": "Ring.", "chosen": [call, YES], "rejected": [call, NO]})
    assert said(example)[-2:] == [("assistant", '{"name": "ring"}'), ("assistant", "Yes.")]
    assert said(example.rejected)[-2:] == [("assistant", '{"name": "ring"}'), ("assistant", "No.")]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"chosen": "Yes", "rejected": "No"}, "chosen and rejected answer one of prompt, messages"),
        ({"prompt": "Is it?", "chosen": "Yes"}, "has chosen: a pair is chosen and rejected"),
        ({"prompt": "Is it?", "rejected": "No"}, "has rejected: a pair is chosen and rejected"),
        ({"messages": [PLAIN, YES], "chosen": "A", "rejected": "B"}, "'messages' ends in an answ"),
        ({"messages": [PLAIN], "rejected_response": "No."}, "its chosen answer ends in a message"),
        ({"prompt": "Q", "chosen": [YES], "rejected": [PLAIN, NO]}, "'rejected' begins with a pr"),
        ({"prompt": "Is it?", "chosen": 5, "rejected": "a"}, "field 'chosen' is a number, expect"),
        ({"prompt": "Q", "chosen": [PLAIN, YES], "rejected": [PLAIN, NO]}, "'prompt' says otherw"),
        ({"chosen": [PLAIN, YES], "rejected": [SYSTEM, NO]}, "do not begin with the same message"),
        ({"chosen": [PLAIN, YES], "rejected": [PLAIN, YES]}, "answers is missing"),
        ({"chosen": [PLAIN, YES], "rejected": [PLAIN]}, "answers is missing"),
        (
            {"instruction": "Is", "output": "A", "chosen": "B", "rejected": "C"},
            "'output' beside 'c",
        ),
        ({"instruction": "Is", "chosen": [YES, YES], "rejected": "C"}, "expected one text"),
        ({"rejected_messages": [PLAIN, NO]}, "there is none beside it"),
        ({"prompt": "<audio>", "chosen": "A", "rejected": "B"}, "has 1 <audio> tags and 0 clips"),
    ],
)
def test_what_is_no_pair_is_named(record: dict[str, Any], why: str) -> None:
    with pytest.raises(BadExample, match=why):
        parsed(record)


def encoder(model: dict[str, Any], folder: Path, objective: Any = "dpo", **data: Any) -> Encoder:
    settings = Data.model_validate({"train": [{"path": "x"}], **data})
    return make_encoder(Model.model_validate(model), settings, folder, objective)


def test_both_answers_are_encoded_as_each_would_be_alone(tmp_path: Path) -> None:
    turns = [
        PLAIN,
        {"role": "assistant", "content": "Perhaps."},
        {"role": "user", "content": "So?"},
    ]
    example = parsed({"prompt": turns, "chosen": "Yes, it is.", "rejected": "No."})
    pairs, alone = encoder(CAUSAL, tmp_path), encoder(CAUSAL, tmp_path, "sft", supervise="last")
    found = apart(pairs.encode(example, [], np.random.default_rng(0)))
    wanted = [
        alone.encode(parsed({"messages": [*turns, answer]}), [])
        for answer in ({"role": "assistant", "content": "Yes, it is."}, NO)
    ]
    for one, right in zip(found, wanted, strict=True):
        assert one.input_ids.tolist() == right.input_ids.tolist()
        assert one.labels.tolist() == right.labels.tolist()
    assert pairs.of_training().measure(example, []) == sum(len(one.input_ids) for one in wanted)
    # Who learns right answers has the chosen one.
    sft = encoder(CAUSAL, tmp_path, "sft").encode(example, [])
    assert sft.input_ids.tolist() == wanted[0].input_ids.tolist() and not sft.arrays


def test_both_answers_hear_units_with_the_same_noise(tmp_path: Path) -> None:
    heard = "".join(f"[Hu{number % 20}]" for number in range(40))
    example = parsed({"prompt": heard, "chosen": "Yes.", "rejected": "No."})
    noisy = encoder({**CAUSAL, "speech_units": 20}, tmp_path, unit_noise=0.5)
    prompts = set()
    for seed in range(4):
        chosen, rejected = apart(noisy.encode(example, [], np.random.default_rng(seed)))
        own, other = (tuple(one.input_ids[one.labels == -100]) for one in (chosen, rejected))
        assert own == other
        prompts.add(own)
    assert len(prompts) == 4


def test_both_answers_hear_the_clip_varied_alike(make_clips: Any, tmp_path: Path) -> None:
    clips = make_clips(1)
    (path,) = sorted(clips.parent.rglob("*.wav"))[:1]
    example = parsed({"messages": [ASK], "chosen": "Y", "rejected": "No!", "audios": [str(path)]})
    augment = {"speed": {"factors": [0.9, 1.1], "p": 1.0}, "volume": {"p": 1.0}, "spec": {"p": 1.0}}
    varied = encoder(AUDIO, tmp_path, augment=augment, tokens_per_batch=2000).of_training()
    clip = load_clip(example.audio()[0], varied.sample_rate)
    promised = varied.measure(example, [len(clip)])
    assert varied.workload(example, [len(clip)]) == pytest.approx(
        2
        * encoder(AUDIO, tmp_path, "sft", augment=augment)
        .of_training()
        .workload(example, [len(clip)])
    )
    lengths = set()
    for seed in range(12):
        rng = np.random.Generator(np.random.Philox(seed))
        sequence = varied.encode(example, [clip], rng, promised)
        chosen, rejected = apart(sequence)
        both = len(chosen.input_ids) + len(rejected.input_ids)
        assert both <= promised and rejected.arrays.keys() == chosen.arrays.keys()
        prompts = [one.input_ids[one.labels == -100].tolist() for one in (chosen, rejected)]
        assert prompts[0] == prompts[1]
        lengths.add(both)
    assert len(lengths) == 2  # faster or slower, and never one of each
    assert max(lengths) == promised


def test_an_example_without_a_pair_is_quarantined_in_training_alone(tmp_path: Path) -> None:
    pairs = encoder(CAUSAL, tmp_path)
    plain = parsed({"messages": [PLAIN, YES]})
    same = parsed({"prompt": "Is it?", "chosen": "Yes.", "rejected": "Yes."})
    with pytest.raises(
        BadExample, match=r"has no rejected answer, and train\.objective"
    ) as missing:
        pairs.of_training().measure(plain, [])
    with pytest.raises(BadExample, match="chosen and its rejected answer are the same") as equal:
        pairs.measure(same, [])
    assert [kind(str(error.value)) for error in (missing, equal)] == ["no pair"] * 2
    with pytest.raises(BadExample, match="has no rejected answer"):
        pairs.encode(plain, [], np.random.default_rng(0))
    assert REJECTED not in pairs.encode(plain, []).arrays
    fingerprints = {
        encoder(CAUSAL, tmp_path, "sft").fingerprint,
        pairs.fingerprint,
        pairs.of_training().fingerprint,
    }
    assert len(fingerprints) == 3
