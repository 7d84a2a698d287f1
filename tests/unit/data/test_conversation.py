"""Conversations: ids are those of transformers' apply_chat_template, whatever the template, and
learnt is what the assistant says, with its end token."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers

from raysft.config.schema import Data
from raysft.data import text
from raysft.data.example import Audio, Example, Part, Turn
from raysft.errors import BadExample
from tests.unit.data.test_chat import TEMPLATES, TOKENIZERS

AUDIO = ("<|bos|>", "<|AUDIO|>", "<|eos|>")
MARKUP = "".join(AUDIO)
SHOWN = (
    "{% macro shown(m) %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'audio' %}" + MARKUP + "{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
# What is learnt is marked in them, so that transformers says it too: END stands behind an answer.
MARKED = {
    "chatml": (
        SHOWN + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ shown(m) }}<|im_end|>{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ shown(m) }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "inst": (
        SHOWN + "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %} {{ shown(m) | trim }}</s>{% endgeneration %}"
        "{% else %}[INST] {{ shown(m) | trim }} [/INST]{% endif %}{% endfor %}"
    ),
    "headers": (
        SHOWN + "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|end_head|>\n\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ shown(m) | trim }}<|eot|>"
        "{% endgeneration %}{% else %}{{ shown(m) | trim }}<|eot|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|end_head|>\n\n{% endif %}"
    ),
}
# As Qwen3's: thoughts of turns before the last question are left out, the last one's are moved.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set said = m.content %}{% set thought = '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["one", "two three", "zwölf  Türme", "d'accord", "\u0394x", "four\nfive", " x ", "end.\n"]


def template_of(tokenizer, source: str, **data: object) -> text.Template:
    tokenizer.add_tokens(list(AUDIO), special_tokens=True)
    tokenizer.chat_template = source
    return text.Template(tokenizer, Data(**data), AUDIO, hole=AUDIO[1], markup=MARKUP)


def drawn(rng: random.Random, clips: bool, thoughts: bool = False) -> list[Turn]:
    """One to five turns of user and assistant, behind a system prompt or none."""
    turns = [Turn("system", ("Be kind.",))] * rng.randrange(2)
    for _ in range(rng.randint(1, 5)):
        asked: list[Part] = [rng.choice(WORDS) for _ in range(rng.randint(1, 2))]
        for at in range(rng.choice([0, 1, 3]) if clips else 0):
            asked.insert(rng.randint(0, len(asked)), Audio(f"{at}.wav"))
        said = rng.choice(WORDS)
        thought = "<think>\nhm\n</think>\n\n" if thoughts and rng.random() < 0.5 else ""
        turns += [Turn("user", tuple(asked)), Turn("assistant", (thought + said,))]
    return turns


def example(turns: list[Turn], **fields: str) -> Example:
    return Example("x", "chat", (), (), turns=tuple(turns), **fields)


def ours(template: text.Template, turns: list[Turn]) -> tuple[list[int], list[int]]:
    """Ids with the audio token for a clip, and a mask of what is learnt."""
    made = template.render(example(turns))
    hole = [template.tokenizer.convert_tokens_to_ids(AUDIO[1])]
    ids, mask = [], []
    for segment, learnt in zip(made.segments, made.learnt, strict=True):
        own = hole if isinstance(segment, Audio) else segment.tolist()
        ids += own
        mask += [int(learnt)] * len(own)
    return ids, mask


def messages(turns: list[Turn]) -> list[dict[str, object]]:
    """As a user of transformers writes them."""
    found = []
    for turn in turns:
        content: object = turn.text
        if any(isinstance(part, Audio) for part in turn.content):
            content = [
                {"type": "audio"} if isinstance(part, Audio) else {"type": "text", "text": part}
                for part in turn.content
            ]
        found.append({"role": turn.role, "content": content})
    return found


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "not marked"])
@pytest.mark.parametrize("name", MARKED)
def test_ids_and_mask_are_those_of_transformers(tokenizer, name: str, marked: bool) -> None:
    """Without the marks what is learnt has to be found, and is the same."""
    tokenizer.add_tokens(list(AUDIO), special_tokens=True)
    bare = MARKED[name].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    template = template_of(tokenizer, MARKED[name] if marked else bare)
    rng = random.Random(0)
    compared = 0
    for _ in range(60):
        turns = drawn(rng, clips=True)
        wanted = tokenizer.apply_chat_template(
            messages(turns),
            chat_template=MARKED[name],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = ours(template, turns)
        assert ids == wanted["input_ids"][: len(ids)]
        assert not any(wanted["assistant_masks"][len(ids) :]), "only what is not learnt is cut"
        assert mask == wanted["assistant_masks"][: len(ids)]
        compared += sum(mask)
    assert compared > 200


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_writes_conversations_as_transformers_does(tokenizer, name: str) -> None:
    template = template_of(tokenizer, TEMPLATES[name])
    rng = random.Random(1)
    for _ in range(20):
        turns = drawn(rng, clips=False)
        said = tokenizer.apply_chat_template(messages(turns), tokenize=False)
        ids, mask = ours(template, turns)
        ended = "</s>" if name == "nothing behind the answer" else ""
        whole = tokenizer(said[:-1] + ended if ended else said, add_special_tokens=False).input_ids
        assert ids == whole[: len(ids)]
        assert ids[-1] == template.end_id and mask[-1]
        learnt = tokenizer.decode(np.array(ids)[np.array(mask, bool)])
        for turn in turns:
            if turn.role == "assistant":
                assert "".join(turn.text.split()) in "".join(learnt.split())
            elif turn.text.split()[0] not in " ".join(t.text for t in turns[1::2]):
                assert turn.text.strip() not in learnt
        prompt = template.prompt(example(turns))
        asked = tokenizer.apply_chat_template(
            messages(turns[:-1]), tokenize=True, return_dict=True, add_generation_prompt=True
        )
        assert np.concatenate(prompt).tolist() == asked["input_ids"]


def test_a_template_that_moves_thoughts_learns_what_it_writes_behind_its_prompt(tokenizer) -> None:
    template = template_of(tokenizer, THINKING)
    rng = random.Random(2)
    for _ in range(40):
        turns = drawn(rng, clips=False, thoughts=True)
        ids, mask = ours(template, turns)
        whole = tokenizer.apply_chat_template(messages(turns), tokenize=False)
        assert ids == tokenizer(whole, add_special_tokens=False).input_ids[: len(ids)]
        learnt = [i for i, own in zip(ids, mask, strict=True) if own]
        ends = [piece.strip() for piece in tokenizer.decode(learnt).split("<|im_end|>")][:-1]
        spoken = [turn for turn in turns if turn.role == "assistant"]
        assert len(ends) == len(spoken)
        assert ends[-1].startswith("<think>") and "<think>" not in "".join(ends[:-1])


def test_only_the_last_turn_or_those_that_say_so_are_learnt() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    source = MARKED["chatml"].replace("{% generation %}", "").replace("{% endgeneration %}", "")

    def learnt(supervise: str, *flags: bool | None) -> list[str]:
        template = template_of(tokenizer, source, supervise=supervise)
        turns = []
        for number, flag in enumerate(flags):
            turns += [Turn("user", ("q",)), Turn("assistant", (f"a{number}",), flag)]
        ids, mask = ours(template, turns)
        said = tokenizer.decode([i for i, own in zip(ids, mask, strict=True) if own])
        return said.split("<|im_end|>")[:-1]

    assert learnt("all", None, None, None) == ["a0", "a1", "a2"]
    assert learnt("last", None, None, None) == ["a2"]
    assert learnt("all", None, False, None) == ["a0", "a2"]
    assert learnt("last", True, None, False) == ["a0"]
    assert learnt("all", None, None, False) == ["a0", "a1"]
    with pytest.raises(BadExample, match="no turn of the assistant is to be learnt"):
        learnt("last", None, False)
    prints = {
        template_of(tokenizer, source, supervise=name).fingerprint for name in ("all", "last")
    }
    assert len(prints) == 2


def test_a_row_of_the_assistant_alone_is_learnt_whole() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    template = template_of(tokenizer, MARKED["chatml"])
    ids, mask = ours(template, [Turn("assistant", ("all of this",))])
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == (
        "all of this<|im_end|>"
    )


def test_tools_are_shown_by_templates_that_have_a_place_for_them_and_else_refused() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    tools = [{"type": "function", "function": {"name": "ring"}}]
    calls = [{"type": "function", "function": {"name": "ring", "arguments": {"n": 2}}}]
    turns = [
        Turn("user", ("Ring twice.",)),
        Turn("assistant", ("",), None, json.dumps(calls)),
        Turn("tool", ("rung",)),
        Turn("assistant", ("Done.",)),
    ]
    source = (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<think>{{ c.function | tojson }}</think>{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = template_of(tokenizer, source)
    made = template.render(example(turns, tools=json.dumps(tools)))
    given = messages(turns)
    given[1]["tool_calls"] = calls
    wanted = tokenizer.apply_chat_template(given, tools=tools, tokenize=False)
    segments = [tokenizer.decode(segment) for segment in made.segments]
    assert "".join(segments) == wanted.removesuffix("\n")
    learnt = [part for part, own in zip(segments, made.learnt, strict=True) if own]
    assert learnt[0].startswith("<think>") and learnt[1] == "Done.<|im_end|>"
    without = template_of(tokenizer, MARKED["chatml"])
    with pytest.raises(BadExample, match="tools, which the chat template does not show"):
        without.render(example(turns, tools=json.dumps(tools)))
    with pytest.raises(BadExample, match="tool_calls, which the chat template does not show"):
        without.render(example(turns))


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_no_turn_brings_a_token_that_ends_a_turn_or_stands_for_a_clip(tokenizer, role: str) -> None:
    template = template_of(tokenizer, MARKED["chatml"])
    for token in ("<|im_end|>", "</s>", AUDIO[1]):
        turns = [Turn("user", ("q",)), Turn("assistant", ("a",)), Turn(role, (f"b {token} c",))]
        with pytest.raises(BadExample, match="turn 3 contains"):
            template.render(example([*turns, Turn("assistant", ("d",))]))


def test_a_template_that_takes_no_such_conversation_names_why() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = template_of(tokenizer, source)
    turns = [Turn("system", ("s",)), Turn("user", ("q",)), Turn("assistant", ("a",))]
    with pytest.raises(BadExample, match="does not take this conversation: no system here"):
        template.render(example(turns))


@pytest.mark.parametrize("marked", [True, False])
def test_no_text_becomes_a_control_token_by_normalisation(marked: bool) -> None:
    """Full-width letters that NFKC makes the name of a token, wherever learning is told from."""
    tokenizer = TOKENIZERS["bytes"]()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.NFKC()
    backend.add_tokens([AddedToken("<|stop|>", normalized=True, special=True)])
    source = MARKED["chatml"]
    if not marked:
        source = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    template = template_of(tokenizer, source)
    asked = [Turn("user", ("\uff1c|stop|\uff1e",)), Turn("assistant", ("a",))]
    with pytest.raises(BadExample, match=r"becomes <\|stop\|>"):
        template.render(example(asked))
