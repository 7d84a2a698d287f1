"""What is trained on is what transformers' apply_chat_template gives, for every shape of template
and kind of tokenizer there is."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from raysft.config.schema import Data
from raysft.data import chat, text
from raysft.data.example import Example
from raysft.errors import BadExample, UserError

CORPUS = ["one two three four five", "repeat the sentence", "user assistant system model", "\n\n\n"]
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|end_head|>", "<|eot|>")
ADDED = ("<think>", "</think>", "<|channel|>", "<|message|>", "<|return|>")

SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
)
CHATML = (
    SYSTEM + "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# By what is peculiar to them: white space, lead, tail, thinking, order of marks.
TEMPLATES = {
    "chatml": CHATML,
    "inst, then a space": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "[INST] {{ m['content'] | trim }} [/INST]"
        "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
    ),
    "inst, no space": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "[INST] {{ m['content'] }}[/INST]{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|end_head|>\n\n"
        "{{ m['content'] | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|end_head|>\n\n{% endif %}"
    ),
    "markers of plain text": (
        "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    ),
    "an empty thought before the answer": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "<think>\n\n</think>\n\n{{ m['content'].lstrip('\\n') }}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "channels": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}"
        "{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|return|>{% else %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    ),
    "no header of its own for the answer": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}"
    ),
    "nothing behind the answer": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "plain": chat.plain_template("", "</s>", None),
    "plain behind a begin token": chat.plain_template("<s>", "</s>", None),
}
TEXTS = (
    ("Repeat.\none two", "three four"),
    ("Gib wieder: zwölf  Türme", "d'accord, \u0394x"),
    ("x", " one "),
    ("\n one", "two\n\nthree\n"),
    ("one two ", "\n\nthree"),
)


def finished(tokenizer: Tokenizer, **more: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **more
    )


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have it, with merges across newlines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return finished(tokenizer)


def sentencepiece(scheme: str, normalizer: normalizers.Normalizer | None = None):
    """As Llama 2, Mistral and Gemma have it: a word begins with its space, bytes for the rest."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if normalizer is not None:
        trained.normalizer = normalizer
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", *bytes_], show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    spaces = decoders.Replace("\u2581", " ")
    trained.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    return finished(trained, unk_token="<unk>")


def spaced_end() -> PreTrainedTokenizerFast:
    """Control tokens that swallow the white space behind them, as Phi-3's."""
    tokenizer = byte_level()
    tokens = [AddedToken(name, rstrip=True, special=True) for name in ("<|im_end|>", "<|head|>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


TOKENIZERS = {
    "bytes": lambda: finished(text.byte_tokenizer().backend_tokenizer),
    "byte-level merges": byte_level,
    "sentencepiece, first": lambda: sentencepiece("first"),
    "sentencepiece, always": lambda: sentencepiece("always"),
    "sentencepiece, NFKC": lambda: sentencepiece("always", normalizers.NFKC()),
    "tokens that swallow spaces": spaced_end,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def rendered(template: text.Template, question: str, answer: str) -> tuple[list[int], list[int]]:
    made = template.render(Example("x", "say", (question,), (answer,), instruction=""))
    return tuple(
        np.concatenate([*part, []]).astype(int).tolist() for part in (made.prompt, made.answer)
    )


def theirs(tokenizer, messages, **more) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **more)[
        "input_ids"
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_conversation_are_those_of_transformers(tokenizer, name: str) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    template = text.Template(tokenizer, Data())
    for question, answer in TEXTS:
        prompt, learnt = rendered(template, question, answer)
        asked = {"role": "user", "content": question}
        assert prompt == theirs(tokenizer, [asked], add_generation_prompt=True)
        whole = theirs(tokenizer, [asked, {"role": "assistant", "content": answer}])
        assert learnt[-1] == template.end_id
        if name == "nothing behind the answer":  # then the end token is
            turns = [asked, {"role": "assistant", "content": answer}]
            said = tokenizer.apply_chat_template(turns, tokenize=False)[: -len("\n")]
            whole = tokenizer(f"{said}</s>", add_special_tokens=False).input_ids
        end = len(whole) - 1 - whole[::-1].index(template.end_id)
        if joined(prompt, whole):  # then the same pieces, but for one that is cut at the answer
            pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in (prompt + learnt, whole)]
            assert "".join(pieces[0]) == "".join(pieces[1][: end + 1])
        else:
            assert prompt + learnt == whole[: end + 1]


def joined(prompt: list[int], whole: list[int]) -> bool:
    """Whether the tokenizer makes one token of the prompt's end and the answer's beginning."""
    return whole[: len(prompt)] != prompt


def test_few_conversations_are_joined_at_the_answer(tokenizer) -> None:
    count = 0
    for source in TEMPLATES.values():
        for question, answer in TEXTS:
            asked = {"role": "user", "content": question}
            tokenizer.chat_template = source
            prompt = theirs(tokenizer, [asked], add_generation_prompt=True)
            whole = theirs(tokenizer, [asked, {"role": "assistant", "content": answer}])
            count += joined(prompt, whole)
    assert count <= 0.2 * len(TEMPLATES) * len(TEXTS), "else the test above would compare little"


def test_what_the_template_writes_around_an_answer_is_taken_off_what_is_generated(
    tokenizer,
) -> None:
    for name, source in TEMPLATES.items():
        tokenizer.chat_template = source
        template = text.Template(tokenizer, Data())
        _, learnt = rendered(template, "one", "two three")
        generated = tokenizer.decode(learnt[:-1], skip_special_tokens=True)
        assert template.answer_of(generated).strip() == "two three", name
        assert template.answer_of("one") == "one", name


# -- dates ---------------------------------------------------------------------------------------

DATED = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nToday is {{ day }}<|im_end|>\n" + CHATML
)


def test_a_date_in_a_template_stays_that_of_the_start() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = chat.freeze(DATED, datetime(2024, 2, 29))
    kept = text.Template(tokenizer, Data())
    assert "Today is 29 Feb 2024" in tokenizer.decode(rendered(kept, "x", "y")[0])
    tokenizer.chat_template = DATED
    template = text.Template(tokenizer, Data(), kept=kept.source)
    assert rendered(template, "x", "y") == rendered(kept, "x", "y")
    assert template.fingerprint == kept.fingerprint
    # And what is exported says the same on any day, in plain transformers.
    tokenizer.chat_template = template.source
    asked = [{"role": "user", "content": "x"}]
    assert theirs(tokenizer, asked, add_generation_prompt=True) == rendered(kept, "x", "y")[0]


def test_two_starts_on_one_day_have_one_fingerprint_and_those_of_two_days_two() -> None:
    tokenizer = byte_level()
    prints = []
    for day in (1, 1, 2):
        tokenizer.chat_template = chat.freeze(DATED, datetime(2024, 2, day))
        prints.append(text.Template(tokenizer, Data()).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_time_that_cannot_be_kept_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% set f = '%H:%M' %}{{ strftime_now(f) }}" + CHATML
    with pytest.raises(UserError, match=r"data\.template: .*writes the time in a way"):
        text.Template(tokenizer, Data())


# -- what cannot be ------------------------------------------------------------------------------


def test_a_prompt_that_no_conversation_begins_with_is_kept_and_remarked() -> None:
    """As of models that open a thought only where they are asked."""
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    template = text.Template(tokenizer, Data())
    assert "<think>" in template.remark
    prompt, learnt = rendered(template, "one", "two")
    asked = [{"role": "user", "content": "one"}]
    assert prompt == theirs(tokenizer, asked, add_generation_prompt=True)
    assert tokenizer.decode(learnt) == "two<|im_end|>"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            CHATML.replace("im_end", "finished"),
            r"ends an answer with '<\|finished\|>', which is no",
        ),
        (CHATML.replace("m['content'] }}", "m['content'] | upper }}"), "changes the text"),
        (CHATML.replace("m['content'] }}", "m['content'] * 2 }}"), "once"),
        ("{% for m in messages | reverse %}{{ m['content'] }}</s>{% endfor %}", "in this order"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused(source: str, said: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = source
    with pytest.raises(UserError, match=said):
        text.Template(tokenizer, Data())


def saying(content: str) -> str:
    """ChatML that writes a text so."""
    return CHATML.replace("{{ m['content'] }}", content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{{ m.content.replace('\\t', ' ') }}", "comes out otherwise"),
        ("{{ m.content.replace('\\r\\n', '\\n') }}", "comes out otherwise"),
        ("{{ m.content.replace('\\n\\n\\n', '\\n\\n') }}", "comes out otherwise"),
        ("{{ m.content[1:] if m.content.startswith(' ') else m.content }}", "'  Ab  '"),
        ("{{ m.content.removesuffix('\\n') }}", "comes out otherwise"),
        ("{{ m.content | replace('system', '') }}", "contains 'system'"),
        ("{{ m.content }}{% if 'please' in m.content %}!{% endif %}", "contains 'please'"),
        (
            "{% if m.content.endswith('...') %}{% endif %}{{ m.content.rstrip('.') }}",
            r"contains '\.'",
        ),
    ],
)
def test_a_template_that_changes_some_texts_is_refused(content: str, said: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = saying(content)
    with pytest.raises(UserError, match=rf"data\.template: .*changes the text .*{said}"):
        text.Template(tokenizer, Data())


THINKING = (
    "{% set ns = namespace(asked=messages | length) %}{% for m in messages[::-1] %}"
    "{% if m.role == 'user' and not (m.content.startswith('<reply>') and "
    "m.content.endswith('</reply>')) %}{% set ns.asked = messages | length - loop.index %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.asked %}<think>\n\n</think>\n\n"
    "{{ m.content.split('</reason>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "literals"),
    [
        (saying("{{ m.content.split('</reason>')[-1] }}"), ["a</reason>b", "</reason>"]),
        (saying("{{ m.content.replace('<image>', '') | trim }}"), ["a <image>", "<image>b"]),
        (saying("{{ m.content }}{% if '/no_think' in m.content %}!{% endif %}"), ["a /no_think"]),
        (
            saying(
                "{% if '<tool>' in m.content %}{{ raise_exception('') }}{% endif %}{{m.content}}"
            ),
            ["a <tool>"],
        ),
        (THINKING, ["<reply>a</reply>", "a</reason>b"]),
    ],
)
def test_texts_that_a_template_looks_for_are_refused_and_all_others_are_as_transformers_writes_them(
    source: str, literals: list[str]
) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = source
    template = text.Template(tokenizer, Data())
    for literal in literals:
        for question, answer in ((literal, "one"), ("one", literal)):
            with pytest.raises(BadExample, match="for which the chat template writes something"):
                rendered(template, question, answer)
        with pytest.raises(UserError, match=r"data\.prompts\.asr: contains .* something else"):
            text.Template(tokenizer, Data(prompts={"asr": f"Write. {literal}"}))
    for words in ("a reason", "<imag> /no", "  two\t\r\n", "system user </x>", "\n\none\n\n\n"):
        prompt, learnt = rendered(template, words, words)
        turns = [{"role": role, "content": words} for role in ("user", "assistant")]
        assert prompt == theirs(tokenizer, turns[:1], add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert f"{tokenizer.decode(prompt + learnt)}\n" == whole


@pytest.mark.parametrize("whole", ["", " | trim"])
@pytest.mark.parametrize("part", ["", " | trim", ".lstrip('\\n')"])
def test_white_space_is_taken_off_a_text_as_where_it_stands(part: str, whole: str) -> None:
    """Off each part of a message, or off the message."""
    tokenizer = byte_level()
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set shown %}{% for p in m.content %}"
        "{% if p.type == 'audio' %}<|channel|>{% else %}{{ p.text"
        f"{part} }}}}{{% endif %}}{{% endfor %}}{{% endset %}}{{{{ (shown | string){whole} }}}}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    made = chat.Chat(tokenizer, source, "<|channel|>")
    assert made.parts
    for kinds in (("text",), ("audio", "text"), ("text", "audio"), ("text", "audio", "text")):
        for words in ("one", "  one ", "\n one\t\n", "\n\none\n"):
            asked = [{"type": kind} | ({"text": words} if kind == "text" else {}) for kind in kinds]
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": asked}],
                chat_template=source,
                tokenize=False,
                add_generation_prompt=True,
            )
            assert made.frame(kinds).prompt([words] * kinds.count("text")) == prompt


def test_a_template_whose_tokens_are_unknown_is_refused() -> None:
    words = ["<unk>", "<end>", "user", "assistant", "one", "\n"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    backend.add_special_tokens([AddedToken("<end>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    )
    with pytest.raises(UserError, match=r"writes '<\|im_start\|>', for which .* no token"):
        text.Template(tokenizer, Data())
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|> ", "")
    assert rendered(text.Template(tokenizer, Data()), "one", "one") == ([2, 4, 1, 3], [4, 1])


def test_markers_that_are_no_tokens_are_remarked() -> None:
    """In some models they are text; beside another model's tokenizer they are a mistake."""
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATES["headers"]
    assert not text.Template(tokenizer, Data()).remark
    tokenizer.chat_template = TEMPLATES["headers"].replace("head|", "role|")
    remark = text.Template(tokenizer, Data()).remark
    assert "writes <|role|>, <|end_role|>, no token of the tokenizer" in remark


def test_of_several_templates_the_default_is_taken_or_none() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": CHATML, "tools": TEMPLATES["headers"]}
    assert text.Template(tokenizer, Data()).source == CHATML
    tokenizer.chat_template = {"tools": CHATML, "rag": CHATML}
    with pytest.raises(UserError, match=r"has chat templates for rag, tools, and none is"):
        text.Template(tokenizer, Data())
    assert not text.Template(tokenizer, Data(template="plain")).chat


def test_a_prompt_of_the_config_with_a_control_token_is_the_users_to_mend() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    with pytest.raises(UserError, match=r"data\.prompts\.asr: contains <\|im_end\|>"):
        text.Template(tokenizer, Data(prompts={"asr": "Write.<|im_end|>"}))


# -- control tokens ------------------------------------------------------------------------------


def test_no_text_brings_a_control_token_of_tokenizer_or_template(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATES["an empty thought before the answer"]
    template = text.Template(tokenizer, Data())
    for token in (*SPECIAL, *ADDED):
        for question, answer in ((f"a {token} b", "c"), ("a", f"{token}b")):
            with pytest.raises(BadExample, match="a token that steers the model"):
                rendered(template, question, answer)
    for harmless in ("<b>", "< s >", "</ s>", "<|", "[INST]", "a|>b"):
        rendered(template, harmless, harmless)


def test_a_token_of_text_that_is_no_control_token_is_text() -> None:
    """Runs of spaces, tags of markup: added tokens of some tokenizers, and ordinary."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("<b>")])
    tokenizer.chat_template = CHATML
    prompt, learnt = rendered(text.Template(tokenizer, Data()), "a    b", "<b>c")
    assert tokenizer.convert_tokens_to_ids("    ") in prompt
    assert tokenizer.convert_tokens_to_ids("<b>") in learnt


def test_text_that_becomes_a_control_token_by_normalisation_is_refused() -> None:
    tokenizer = sentencepiece("always", normalizers.NFKC())
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|go|>", normalized=True)]}
    )
    template = text.Template(tokenizer, Data())
    with pytest.raises(BadExample, match=r"becomes <\|go\|>, a token that steers"):
        rendered(template, "one", "two \uff1c|go|\uff1e")


@pytest.mark.parametrize("pad", [None, "<|endoftext|>"])
def test_one_token_for_begin_end_and_unknown_leaves_all_texts_usable(pad: str | None) -> None:
    """GPT-2, GPT-NeoX, SmolLM and CodeGen have it so."""
    end = "<|endoftext|>"
    tokenizer = byte_level()
    tokenizer.add_special_tokens({f"{name}_token": end for name in ("bos", "eos", "unk")})
    tokenizer.pad_token = pad
    template = text.Template(tokenizer, Data())
    prompt, learnt = rendered(template, "one", "two three")
    assert tokenizer.decode(prompt) == "one\n"
    assert learnt == [*tokenizer.encode("two three"), tokenizer.eos_token_id]
    with pytest.raises(BadExample, match=r"<\|endoftext\|>"):
        rendered(template, "one", f"two{end}")


def test_an_unknown_word_is_refused_where_it_would_end_the_answer() -> None:
    words = {"<end>": 0, "one": 1, "two": 2}
    backend = Tokenizer(models.WordLevel(words, "<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        unk_token="<end>",
    )
    template = text.Template(tokenizer, Data())
    assert rendered(template, "one", "two") == ([1], [2, 0])
    with pytest.raises(BadExample, match="its text becomes <end>"):
        rendered(template, "one", "two hundred")
