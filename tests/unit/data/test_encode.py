"""Encoders: what is measured is what is encoded, and only the answer is learnt."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from raysft.config.load import validate
from raysft.config.schema import Data, Model
from raysft.config.speech_tokens import SpeechTokens
from raysft.data.clips import speech_tokens
from raysft.data.encode import make_encoder, model_family
from raysft.data.example import Audio, Example, Units
from raysft.data.text import byte_tokenizer
from raysft.errors import BadExample, UserError
from raysft.families.audio_lm.encode import audio_tokens

CLIP = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
AUDIO_MODEL = Model(
    config={
        "model_type": "qwen2_audio",
        "audio_config": {"max_source_positions": 150, "num_mel_bins": 80},
        "text_config": {"model_type": "qwen2"},
    },
    tokenizer="bytes",
    feature_extractor={"chunk_length": 3},
)
UNIT_MODEL = Model(config={"model_type": "qwen3"}, tokenizer="bytes", speech_units=10)


def asr(*parts, **changes) -> Example:
    settings = {"id": "a", "task": "asr", "input": parts, "output": ("one",)} | changes
    return Example(**settings)


HEARD = asr(Audio("/clip.wav"))
SPOKEN = Example(id="t", task="tts", input=("one",), output=(Audio("/clip.wav"),))


@pytest.fixture(scope="module")
def audio_lm(tmp_path_factory):
    return make_encoder(AUDIO_MODEL, Data(), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A causal_lm with a speech tokenizer, and one with unit noise."""
    folder = tmp_path_factory.mktemp("run")
    config = SpeechTokens(clusters=10, mels=40)
    speech_tokens.fit_or_load(config, folder, [CLIP], seed=0)
    model = UNIT_MODEL.model_copy(update={"speech_units": 0})
    return [
        make_encoder(model, Data(speech_tokens=config, unit_noise=noise), folder)
        for noise in (0.0, 0.5)
    ]


def learnt(encoder, sequence) -> str:
    return encoder.tokenizer.decode(sequence.labels[sequence.labels != -100])


def check(encoder, example, clips):
    """The promises every encoder keeps for every example."""
    sequence = encoder.encode(example, clips)
    assert len(sequence.input_ids) == encoder.measure(example, [len(clip) for clip in clips])
    assert sequence.input_ids.dtype == sequence.labels.dtype == np.int32
    prompt = encoder.prompt(example, clips)
    start = len(prompt.input_ids)
    assert np.array_equal(sequence.input_ids[:start], prompt.input_ids)
    assert (prompt.labels == -100).all() and (sequence.labels[:start] == -100).all()
    assert np.array_equal(sequence.labels[start:], sequence.input_ids[start:])
    assert sequence.labels[-1] == encoder.end_id
    return sequence


def test_units_become_their_tokens_and_text_the_answer():
    encoder = make_encoder(UNIT_MODEL, Data(prompts={"asr": "Go."}), ".")
    sequence = check(encoder, asr(Units((3, 9, 3))), [])
    shown = encoder.tokenizer.decode(sequence.input_ids)
    assert shown == "Go.\n<|unit3|><|unit9|><|unit3|>\none<|eos|>"
    assert learnt(encoder, sequence) == "one<|eos|>"
    assert encoder.sample_rate is None


def test_units_in_the_answer_are_learnt():
    encoder = make_encoder(UNIT_MODEL, Data(), ".")
    sequence = check(encoder, Example("t", "tts", ("one",), (Units((1, 2)),)), [])
    assert learnt(encoder, sequence) == "<|unit1|><|unit2|><|eos|>"


@pytest.mark.parametrize("unit", [10, -1])
def test_a_unit_without_a_token_is_refused_when_measured(unit):
    encoder = make_encoder(UNIT_MODEL, Data(), ".")
    with pytest.raises(BadExample, match=f"unit {unit}, but there are 10 units"):
        encoder.measure(asr(Units((1, unit, 2))), [])


def test_causal_lm_says_what_audio_needs():
    encoder = make_encoder(UNIT_MODEL, Data(), ".")
    with pytest.raises(UserError, match=r"causal_lm reads no raw audio .*data\.speech_tokens"):
        encoder.measure(HEARD, [])


@pytest.mark.parametrize("samples", [640, 15999, 16000])
def test_audio_becomes_units_on_either_side(speaking, samples):
    encoder = speaking[0]
    heard = check(encoder, HEARD, [CLIP[:samples]])
    assert learnt(encoder, heard) == "one<|eos|>"
    spoken = check(encoder, SPOKEN, [CLIP[:samples]])
    units = encoder.speech_tokens.encode(CLIP[:samples])
    assert learnt(encoder, spoken) == "".join(f"<|unit{u}|>" for u in units) + "<|eos|>"
    assert heard.arrays == {} and heard.seconds == len(units) / 25


def test_a_clip_without_a_single_unit_is_refused_when_measured(speaking):
    with pytest.raises(BadExample, match="shorter than one speech unit"):
        speaking[0].measure(HEARD, [480])


def test_unit_noise_changes_input_units_alone_and_follows_the_generator(speaking):
    encoder = speaking[1]
    both = asr(Audio("/a.wav"), output=(Audio("/b.wav"),))
    clean = encoder.encode(both, [CLIP, CLIP])
    noisy = [encoder.encode(both, [CLIP, CLIP], np.random.default_rng(s)) for s in (1, 1, 2)]
    assert np.array_equal(noisy[0].input_ids, noisy[1].input_ids)
    assert not np.array_equal(noisy[0].input_ids, noisy[2].input_ids)
    changed = np.flatnonzero(noisy[0].input_ids != clean.input_ids)
    assert 4 <= len(changed) <= 18  # of 25 units half are drawn anew, a tenth of those the same
    assert (clean.labels[changed] == -100).all()
    assert np.array_equal(clean.labels, noisy[0].labels)


def test_two_numbers_of_units_are_a_contradiction(tmp_path):
    config = SpeechTokens(clusters=5, mels=40)
    speech_tokens.fit_or_load(config, tmp_path, [CLIP], seed=0)
    with pytest.raises(UserError, match=r"model\.speech_units: 10, .* 5 clusters"):
        make_encoder(UNIT_MODEL, Data(speech_tokens=config), tmp_path)


@pytest.mark.parametrize("samples", [1000, 15999, 16000])
def test_a_clip_takes_its_audio_tokens_between_their_marks(audio_lm, samples):
    sequence = check(audio_lm, HEARD, [CLIP[:samples]])
    tokenizer = audio_lm.tokenizer
    count = audio_tokens(len(sequence.arrays["features"][0]) - audio_lm.front_end.tail)
    shown = tokenizer.decode(sequence.input_ids)
    assert shown == (
        "Transcribe the following speech into text.\n"
        + f"<|audio_bos|>{'<|AUDIO|>' * count}<|audio_eos|>\none<|eos|>"
    )
    assert (sequence.input_ids == audio_lm.audio_token_id).sum() == count
    assert learnt(audio_lm, sequence) == "one<|eos|>"
    assert sequence.seconds == samples / 16000


def test_audio_tokens_and_frames_are_those_of_the_models_own_processor(audio_lm):
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(**audio_lm.feature_settings)
    processor = Qwen2AudioProcessor(extractor, audio_lm.tokenizer)
    asked = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    for samples in (1000, 8000, 12345, 16000):
        wave = CLIP[:samples]
        theirs = processor(text=asked, audio=[wave], sampling_rate=16000, return_tensors="np")
        ours = audio_lm.prompt(asr(Audio("/clip.wav"), instruction=""), [wave])
        assert ours.input_ids[:-1].tolist() == theirs["input_ids"][0].tolist()  # but the newline
        features = theirs["input_features"][0].T
        frames = int(theirs["feature_attention_mask"].sum())
        assert frames == audio_lm.front_end.frames(samples)
        padded = audio_lm.front_end.pad(ours.arrays["features"][0], audio_lm.max_frames)
        np.testing.assert_allclose(padded, features, atol=1e-4)


def test_audio_tokens_are_as_many_as_the_model_makes():
    import torch
    from transformers import Qwen2AudioEncoder, Qwen2AudioEncoderConfig

    tower = Qwen2AudioEncoder(
        Qwen2AudioEncoderConfig(d_model=8, encoder_layers=1, encoder_attention_heads=1)
    )
    frames = torch.arange(5, 400)
    theirs = tower._get_feat_extract_output_lengths(frames)[1]
    assert [audio_tokens(int(n)) for n in frames] == theirs.tolist()


def test_clips_the_model_cannot_read_are_refused_when_measured(audio_lm):
    assert audio_lm.measure(HEARD, [48000])
    with pytest.raises(BadExample, match=r"3\.01 s, the model reads at most 3\.00 s"):
        audio_lm.measure(HEARD, [48161])
    with pytest.raises(BadExample, match="too short: 1 audio token"):
        audio_lm.measure(HEARD, [500])
    with pytest.raises(BadExample, match="shorter than one frame"):
        audio_lm.measure(HEARD, [399])


def test_audio_lm_says_what_it_cannot_do(audio_lm):
    with pytest.raises(UserError, match="answers in text only; task tts needs causal_lm"):
        audio_lm.measure(SPOKEN, [16000])
    with pytest.raises(UserError, match="reads audio, no speech units"):
        audio_lm.measure(asr(Units((1,))), [])
    with pytest.raises(BadExample, match=r"contains <\|AUDIO\|>"):
        audio_lm.measure(asr("<|AUDIO|>"), [])


def test_fbank_can_be_the_models_input(tmp_path):
    encoder = make_encoder(AUDIO_MODEL, Data(features="fbank"), tmp_path)
    sequence = check(encoder, HEARD, [CLIP])
    assert sequence.arrays["features"][0].shape == (98, 80)
    np.testing.assert_allclose(sequence.arrays["features"][0].mean(0), 0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feature_extractor": {"chunk_length": 30}}, "set chunk_length to 3"),
        ({"feature_extractor": {"mels": 80}}, r"feature_extractor\.mels: no such setting"),
        ({"feature_extractor": {"chunk_length": 3, "feature_size": 40}}, "reads 80 mels"),
        ({"family": "audio_lm", "config": {"model_type": "qwen3"}}, "audio_lm knows qwen2_audio"),
        ({"family": "audio_lm", "config": {"model_type": "none"}}, r"model\.config"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        make_encoder(AUDIO_MODEL.model_copy(update=changes), Data(), tmp_path)


def test_a_clip_longer_than_its_header_said_is_refused(audio_lm):
    promised = audio_lm.measure(HEARD, [8000])
    audio_lm.encode(HEARD, [CLIP[:8000]], promised=promised)
    with pytest.raises(BadExample, match="headers are wrong"):
        audio_lm.encode(HEARD, [CLIP], promised=promised)


def test_the_family_follows_the_models_type(tmp_path):
    assert model_family(AUDIO_MODEL).name == "audio_lm"
    assert model_family(UNIT_MODEL).name == "causal_lm"
    assert model_family(AUDIO_MODEL.model_copy(update={"family": "causal_lm"})).name == "causal_lm"
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio"}')
    assert model_family(Model(path=str(tmp_path))).name == "audio_lm"
    with pytest.raises(UserError, match="neither path nor config"):
        model_family(Model())
    with pytest.raises(UserError, match=r"model\.path: no model"):
        model_family(Model(path=str(tmp_path / "none")))


def test_the_fingerprint_changes_with_all_that_ids_and_lengths_depend_on(tmp_path):
    fits = {c: SpeechTokens(clusters=c, mels=40, path=str(tmp_path / f"{c}")) for c in (4, 5)}
    for config in fits.values():
        speech_tokens.fit_or_load(config, tmp_path, [CLIP], seed=0)
    text = Model(config={"model_type": "qwen3"}, tokenizer="bytes")
    made = [
        make_encoder(model, data, tmp_path).fingerprint
        for model, data in [
            (AUDIO_MODEL, Data()),
            (AUDIO_MODEL, Data(features="fbank")),
            (AUDIO_MODEL, Data(prompts={"asr": "x"})),
            (text, Data()),
            (UNIT_MODEL, Data()),
            (text, Data(speech_tokens=fits[4])),
            (text, Data(speech_tokens=fits[5])),
        ]
    ]
    assert len(set(made)) == len(made)
    assert make_encoder(AUDIO_MODEL, Data(), tmp_path).fingerprint == made[0]


def test_a_pickled_encoder_works_without_torch_or_transformers(audio_lm, speaking, tmp_path):
    (tmp_path / "all").write_bytes(pickle.dumps(([audio_lm, speaking[0]], HEARD, CLIP)))
    code = (
        "import pickle, sys, pathlib; "
        f"encoders, e, c = pickle.loads(pathlib.Path({str(tmp_path / 'all')!r}).read_bytes()); "
        "print(*[len(encoder.encode(e, [c]).input_ids) for encoder in encoders]); "
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lengths = [encoder.measure(HEARD, [16000]) for encoder in (audio_lm, speaking[0])]
    assert done.stdout.split() == [str(length) for length in lengths]


# -- prompts of models with a processor ----------------------------------------------------------


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    """An audio_lm whose tokenizer has the markers of Qwen2-Audio, and transformers' processor."""
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = byte_tokenizer()
    tokens = ["<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    template = Qwen2AudioProcessor.default_chat_template.fget(None)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    model = AUDIO_MODEL.model_copy(update={"tokenizer": str(folder)})
    encoder = make_encoder(model, Data(), folder / "run")
    extractor = WhisperFeatureExtractor(**encoder.feature_settings)
    return encoder, Qwen2AudioProcessor(extractor, tokenizer, chat_template=template), model


CLIPS = {"/a.wav": CLIP, "/b.wav": CLIP[:7000]}


@pytest.mark.parametrize(
    ("given", "instruction"),
    [
        ((Audio("/a.wav"),), "Write it down."),
        ((Audio("/a.wav"),), ""),
        ((Audio("/b.wav"), "Which word is next?", Audio("/a.wav")), "Answer."),
        (("First:", Audio("/b.wav"), "then", Audio("/a.wav")), ""),
        (("only text",), "Repeat."),
    ],
)
def test_a_model_that_hears_is_asked_as_its_processor_asks(asking, given, instruction):
    encoder, processor, _ = asking
    said = [
        {"type": "audio", "audio": CLIPS[part.path]}
        if isinstance(part, Audio)
        else {"type": "text", "text": part}
        for part in given
    ]
    if not any(isinstance(part, Audio) for part in given):
        said = [{"type": "text", "text": f"{instruction}\n{given[0]}"}]
    elif instruction:
        said.append({"type": "text", "text": instruction})
    turns = [
        {"role": "user", "content": said},
        {"role": "assistant", "content": [{"type": "text", "text": "one two"}]},
    ]
    ask = {"tokenize": True, "return_dict": True, "return_tensors": "np"}
    asked = processor.apply_chat_template(turns[:1], add_generation_prompt=True, **ask)
    whole = processor.apply_chat_template(turns, **ask)
    example = Example("x", "asr", given, ("one two",), instruction=instruction)
    sequence = check(encoder, example, [CLIPS[part.path] for part in example.audio()])
    prompt = encoder.prompt(example, [CLIPS[part.path] for part in example.audio()])
    assert prompt.input_ids.tolist() == asked["input_ids"][0].tolist()
    assert sequence.input_ids.tolist() == whole["input_ids"][0].tolist()[:-1]  # but the newline
    assert learnt(encoder, sequence) == "one two<|im_end|>"


def test_a_template_of_text_alone_is_given_the_clip_as_text(asking, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asking[2].tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    model = AUDIO_MODEL.model_copy(update={"tokenizer": str(tmp_path)})
    encoder = make_encoder(model, Data(), tmp_path / "run")
    prompt = encoder.prompt(asr(Audio("/a.wav"), instruction="Write."), [CLIP])
    count = int((prompt.input_ids == encoder.audio_token_id).sum())
    assert encoder.tokenizer.decode(prompt.input_ids) == (
        f"<|im_start|>user\nWrite.\n<|audio_bos|>{'<|AUDIO|>' * count}<|audio_eos|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_what_transformers_writes_for_a_processor_without_a_template_is_none_of_the_models(
    tmp_path,
):
    """Folders that were exported with such a template, whose tokens they do not have."""
    from transformers import Qwen2AudioProcessor

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = Qwen2AudioProcessor.default_chat_template.fget(None)
    tokenizer.save_pretrained(tmp_path)
    model = AUDIO_MODEL.model_copy(update={"tokenizer": str(tmp_path)})
    with pytest.raises(UserError, match=r"'<\|im_end\|>', which is no control token"):
        make_encoder(model, Data(), tmp_path / "run")
    plain = make_encoder(model, Data(template="plain"), tmp_path / "run")
    assert not plain.template.chat


# -- names of units ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["[Hu{}]", "<audio_{}>", "<|unit{}|>"])
def test_units_under_their_own_names_keep_the_tokens_there_are(form, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([form.format(unit) for unit in range(6)])
    old = [tokenizer.convert_tokens_to_ids(form.format(unit)) for unit in range(6)]
    tokenizer.save_pretrained(tmp_path)
    changes = {"tokenizer": str(tmp_path), "unit_token": form}
    encoder = make_encoder(UNIT_MODEL.model_copy(update=changes), Data(), ".")
    sequence = check(encoder, asr(Units((0, 5, 9)), instruction="Go."), [])
    first, last, new = (form.format(unit) for unit in (0, 5, 9))
    assert encoder.tokenizer.decode(sequence.input_ids) == f"Go.\n{first}{last}{new}\none<|eos|>"
    assert sequence.input_ids[4:6].tolist() == [old[0], old[5]]
    assert encoder.tokenizer.convert_ids_to_tokens(list(encoder.new_ids)) == [
        form.format(unit) for unit in range(6, 10)
    ]
    assert encoder.units == f"10 unit tokens, 4 of them new: {first} .. {new}"
    with pytest.raises(BadExample, match="steers the model"):
        encoder.measure(asr("one", output=(f"two {last}",)), [])


def test_markers_stand_around_every_run_of_units():
    marked = UNIT_MODEL.model_copy(update={"unit_markers": ["<|boa|>", "<|eoa|>"]})
    encoder = make_encoder(marked, Data(), ".")
    plain = make_encoder(UNIT_MODEL, Data(), ".")
    heard = check(encoder, asr(Units((0, 5)), "or", Units((9,)), instruction="Go."), [])
    said = encoder.tokenizer.decode(heard.input_ids)
    assert said.count("<|boa|><|unit0|><|unit5|><|eoa|>") == 1
    assert said.count("<|boa|><|unit9|><|eoa|>") == 1
    spoken = check(encoder, asr("one", output=(Units((3, 4)),)), [])
    assert learnt(encoder, spoken) == "<|boa|><|unit3|><|unit4|><|eoa|><|eos|>"
    markers = encoder.tokenizer.convert_tokens_to_ids(["<|boa|>", "<|eoa|>"])
    assert list(encoder.new_ids) == [*plain.new_ids, *markers]
    assert encoder.units == plain.units and encoder.fingerprint != plain.fingerprint
    with pytest.raises(BadExample, match="steers the model"):
        encoder.measure(asr("one", output=("two <|eoa|>",)), [])


@pytest.mark.parametrize("given", [["<|a|>"], ["<|a|>", "<|a|>"], ["<|a|>", " "], ["a", "b", "c"]])
def test_markers_are_two(given):
    tree = {"data": {"train": [__file__]}, "model": {"path": "base", "unit_markers": given}}
    with pytest.raises(UserError, match=r"model\.unit_markers: .*two tokens that differ"):
        validate(tree, "config")


def test_only_units_that_a_checkpoint_lacks_are_new(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"[Hu{unit}]" for unit in range(6)])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    model = Model(path=str(tmp_path), speech_units=8, unit_token="[Hu{}]")
    encoder = make_encoder(model, Data(), ".")
    assert encoder.tokenizer.convert_ids_to_tokens(list(encoder.new_ids)) == ["[Hu6]", "[Hu7]"]
    assert encoder.units == "8 unit tokens, 2 of them new: [Hu0] .. [Hu7]"
    some = make_encoder(model.model_copy(update={"speech_units": 0}), Data(), ".")
    assert some.new_ids == () and some.units.startswith("6 unit tokens, all in the tokenizer")


@pytest.mark.parametrize("units", [0, 2])
def test_units_of_the_base_vocabulary_are_used_as_they_are(units, tmp_path):
    """No added tokens, as in a tokenizer whose vocabulary was written with its units."""
    backend = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    names = [f"<|{name}|>" for name in ("bos", "eos", "pad", *(f"unit{i}" for i in range(6)))]
    backend["model"]["vocab"] |= {name: 256 + i for i, name in enumerate(names)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    changes = {"tokenizer": str(tmp_path), "speech_units": units}
    encoder = make_encoder(UNIT_MODEL.model_copy(update=changes), Data(), ".")
    sequence = check(encoder, asr(Units((5, 0, 5)), instruction="Go."), [])
    assert sequence.input_ids[3:7].tolist() == [10, 264, 259, 264]
    assert encoder.tokenizer.decode(sequence.input_ids).startswith("Go.\n<|unit5|><|unit0|>")
    assert encoder.new_ids == () and len(encoder.tokenizer) == 265


@pytest.mark.parametrize("form", ["[Hu]", "{}", "[{}{}]", "[Hu{:03}]", "{0}abc"])
def test_a_name_of_units_without_its_number_is_refused(form):

    tree = {
        "data": {"train": ["x.jsonl"]},
        "model": {"config": {"model_type": "qwen3"}, "tokenizer": "bytes", "unit_token": form},
    }
    with pytest.raises(UserError, match=r"model\.unit_token: .*such as \[Hu\{\}\]"):
        validate(tree, "config.yaml")
