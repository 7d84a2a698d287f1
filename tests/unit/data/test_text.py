"""Examples become one dialogue turn; audio and units never pass through the text tokenizer."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import lists, sampled_from
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from raysft.config.schema import Data, Model
from raysft.data import text
from raysft.data.example import Audio, Example, Units
from raysft.data.tokenizer import last_token
from raysft.errors import BadExample, UserError

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|start|>system\nBe brief.<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    return text.load_tokenizer(Model(tokenizer="bytes"), 20)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def example(**changes) -> Example:
    settings = {"id": "a", "task": "asr", "input": ("in",), "output": ("out",)} | changes
    return Example(**settings)


def shown(tokenizer, segments) -> str:
    """Segments as text, other parts in brackets."""
    return "".join(
        tokenizer.decode(s) if isinstance(s, np.ndarray) else f"[{type(s).__name__}]"
        for s in segments
    )


def test_the_plain_form_is_instruction_input_answer_and_end(tokenizer):
    template = text.Template(tokenizer, Data(prompts={"asr": "Do it."}))
    rendered = template.render(example())
    assert shown(tokenizer, rendered.prompt) == "Do it.\nin\n"
    assert shown(tokenizer, rendered.answer) == "out<|eos|>"


def test_an_empty_instruction_takes_its_newline_with_it(tokenizer):
    template = text.Template(tokenizer, Data())
    assert shown(tokenizer, template.render(example(instruction="")).prompt) == "in\n"
    bare = example(instruction="", input=())
    assert shown(tokenizer, template.render(bare).prompt) == ""
    assert shown(tokenizer, template.render(example(instruction="Say", input=())).prompt) == "Say\n"


def test_an_examples_own_instruction_comes_before_the_one_of_its_task(tokenizer):
    template = text.Template(tokenizer, Data(prompts={"asr": "Do it."}))
    assert shown(tokenizer, template.render(example(instruction="Mine")).prompt) == "Mine\nin\n"


def test_a_task_without_a_prompt_is_the_users_to_mend(tokenizer):
    with pytest.raises(UserError, match=r"data\.prompts: has no entry for task 'edit'"):
        text.Template(tokenizer, Data()).render(example(task="edit"))


def test_an_asr_answer_with_a_language_is_language_tab_text(tokenizer):
    template = text.Template(tokenizer, Data())
    assert shown(tokenizer, template.render(example(lang="EN")).answer) == "EN\tout<|eos|>"
    assert shown(tokenizer, template.render(example(task="tts", lang="EN")).answer) == "out<|eos|>"


def test_audio_and_units_stay_in_their_places(tokenizer):
    template = text.Template(tokenizer, Data(), hole="<|unit0|>")
    parts = ("a", Units((1, 2)), Audio("/x.wav"), "b", "c")
    rendered = template.render(example(instruction="I", input=parts, output=(Units((3,)),)))
    assert shown(tokenizer, rendered.prompt) == "I\na[Units][Audio]bc\n"
    assert shown(tokenizer, rendered.answer) == "[Units]<|eos|>"


def test_the_chat_form_ends_the_answer_with_the_templates_own_end_token(chat_tokenizer):
    template = text.Template(chat_tokenizer, Data(), hole="<|unit0|>")
    rendered = template.render(example(instruction="I", input=(Audio("/x.wav"), "!")))
    assert shown(chat_tokenizer, rendered.prompt) == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\nI\n[Audio]!<|end|>\n<|start|>assistant\n"
    )
    assert shown(chat_tokenizer, rendered.answer) == "out<|end|>"
    assert template.end_id == chat_tokenizer.convert_tokens_to_ids("<|end|>")


def test_the_chat_form_gives_the_ids_transformers_gives(chat_tokenizer):
    turns = [{"role": "user", "content": "I\nin"}, {"role": "assistant", "content": "out"}]
    theirs = chat_tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    rendered = text.Template(chat_tokenizer, Data()).render(example(instruction="I"))
    ours = np.concatenate([*rendered.prompt, *rendered.answer])
    newline = chat_tokenizer.encode("\n")
    assert ours.tolist() + newline == theirs
    asked = chat_tokenizer.apply_chat_template(
        turns[:1], tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    assert np.concatenate(rendered.prompt).tolist() == asked


def test_the_form_is_chat_where_there_is_a_template_unless_told_otherwise(chat_tokenizer):
    assert text.Template(chat_tokenizer, Data()).chat
    assert not text.Template(chat_tokenizer, Data(template="plain")).chat
    chat_tokenizer.chat_template = None
    assert not text.Template(chat_tokenizer, Data()).chat
    with pytest.raises(UserError, match="no chat template"):
        text.Template(chat_tokenizer, Data(template="chat"))


def test_a_chat_template_that_fails_or_hides_the_answer_is_refused(chat_tokenizer):
    for template in ("{{ raise_exception('no') }}", "{{ messages[0]['content'] }}", "{% if %}"):
        chat_tokenizer.chat_template = template
        with pytest.raises(UserError, match=r"data\.template"):
            text.Template(chat_tokenizer, Data())


def test_a_begin_token_is_put_where_the_tokenizer_puts_one(tokenizer):
    from tokenizers.processors import TemplateProcessing

    bos = ("<|bos|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[bos]
    )
    rendered = text.Template(tokenizer, Data()).render(example(instruction="I"))
    assert shown(tokenizer, rendered.prompt) == "<|bos|>I\nin\n"
    assert shown(tokenizer, rendered.answer) == "out<|eos|>"


def test_text_with_a_control_token_is_refused(chat_tokenizer):
    template = text.Template(chat_tokenizer, Data(), reserved=["<|AUDIO|>"])
    for token in ("<|eos|>", "<|end|>", "<|AUDIO|>"):
        with pytest.raises(BadExample, match="contains"):
            template.render(example(output=(f"a{token}b",)))


def test_the_byte_tokenizer_numbers_bytes_and_survives_saving(tokenizer, tmp_path):
    said = "zwölf 12 – 十二\t\n\x00\x7f ¡­"
    assert tokenizer.encode(said) == list(said.encode())
    assert tokenizer.decode(list(said.encode())) == said
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [
        256,
        257,
        258,
    ]
    tokenizer.save_pretrained(tmp_path)
    again = text.load_tokenizer(Model(tokenizer=str(tmp_path)), 20)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.encode(said) == list(said.encode())
    assert text.load_tokenizer(Model(path=str(tmp_path)), 20).get_vocab() == tokenizer.get_vocab()


def test_units_are_numbered_without_gaps_and_added_once():
    tokenizer = text.load_tokenizer(Model(tokenizer="bytes"), 10_000)
    assert text.unit_ids(tokenizer).tolist() == list(range(259, 10_259))
    text.add_units(tokenizer, 10_000)
    assert len(tokenizer) == 10_259
    assert text.unit_ids(text.byte_tokenizer()).shape == (0,)
    units = tokenizer.convert_ids_to_tokens([259, 10_258])
    assert tokenizer.decode([259, 97, 10_258], skip_special_tokens=True) == f"{units[0]}a{units[1]}"


def test_units_with_a_gap_are_refused():
    tokenizer = text.byte_tokenizer()
    tokenizer.add_tokens(["<|unit0|>", "<|unit2|>"])
    with pytest.raises(UserError, match=r"no <\|unit1\|>"):
        text.unit_ids(tokenizer)


def word_level(folder, **tokens):
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<end>", *["one", "two", "three"]]
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    return Model(tokenizer=str(folder))


def test_words_a_small_vocabulary_lacks_do_no_harm(tmp_path):
    tokenizer = text.load_tokenizer(word_level(tmp_path, eos_token="<end>", unk_token="<unk>"), 0)
    rendered = text.Template(tokenizer, Data()).render(example(input=("one",), output=("two",)))
    assert rendered.prompt[0].tolist()[-1] == 2
    assert np.concatenate(rendered.answer).tolist() == [3, 1]
    assert tokenizer.pad_token == "<end>"


def test_tokenizers_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.tokenizer"):
        text.load_tokenizer(Model(), 0)
    with pytest.raises(UserError, match=r"model\.tokenizer: no tokenizer could be loaded"):
        text.load_tokenizer(Model(tokenizer=str(tmp_path / "none")), 0)
    with pytest.raises(UserError, match="no end token"):
        text.load_tokenizer(word_level(tmp_path, unk_token="<unk>"), 0)


def test_a_pickled_template_renders_the_same_without_transformers(chat_tokenizer, tmp_path):
    template = text.Template(chat_tokenizer, Data())
    (tmp_path / "template").write_bytes(pickle.dumps((template, example())))
    code = (
        "import pickle, sys, pathlib; "
        f"t, e = pickle.loads(pathlib.Path({str(tmp_path / 'template')!r}).read_bytes()); "
        "print(t.render(e).prompt[0].tolist()); "
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules); "
        "assert t.fingerprint and t.tokenizer.eos_token == '<|eos|>'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(template.render(example()).prompt[0].tolist())


def test_the_fingerprint_changes_with_template_prompts_and_tokenizer(chat_tokenizer):
    def fingerprint(**data) -> str:
        return text.Template(chat_tokenizer, Data(**data)).fingerprint

    first = fingerprint()
    assert first == fingerprint()
    others = [fingerprint(template="plain"), fingerprint(prompts={"asr": "x"})]
    text.add_units(chat_tokenizer, 21)
    others.append(fingerprint())
    assert len({first, *others}) == 4


def byte_level():
    made = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdĠĊ<|x>")}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


def metaspace(scheme):
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((c, -1.0) for c in "▁abcd\n<|x>")], 0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return made


def prepending():
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((c, -1.0) for c in "▁abcd\n<|x>")], 0))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFKC()]
    )
    return made


@pytest.mark.parametrize(
    "made",
    [byte_level(), metaspace("first"), metaspace("always"), metaspace("never"), prepending()],
    ids=["bytes", "first", "always", "never", "prepend"],
)
@given(
    prompt=lists(sampled_from(["a", "b ", " ", "\n", "<|x|>", "<a>", "<|x|>c", "dd", "<n>"])),
    answer=lists(
        sampled_from(["a", " b", "\n", " ", "c", "<|x|>", "|>", "<a>b", "x|>", "<|", "b"])
    ),
    kinds=lists(sampled_from(["lstrip", "rstrip", "single_word"]), max_size=1),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_text_is_cut_before_a_token_only_where_its_ids_stay(made, prompt, answer, kinds):
    own = Tokenizer.from_str(made.to_str())
    own.add_special_tokens([AddedToken("<|x|>", normalized=False, **dict.fromkeys(kinds, True))])
    own.add_tokens([AddedToken("<a>", normalized=False), AddedToken("<a>b", normalized=False)])
    own.add_tokens([AddedToken("<n>", normalized=True)])
    begin, whole = "".join(prompt), "".join([*prompt, *answer])
    before, at = last_token(own, begin)
    ids = own.encode(begin, add_special_tokens=False).ids
    rest = own.encode(whole[at:], add_special_tokens=False).ids
    assert ids[:before] + rest == own.encode(whole, add_special_tokens=False).ids
    if begin.endswith("<|x|>") and not kinds:
        assert begin[at:] == "<|x|>"
