"""Whisper, held against transformers alone: its ids, features, losses, answers and exports."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    WhisperForConditionalGeneration,
    pipeline,
)

from raysft.config.schema import Data, Model
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import Audio, Example, MicroBatch, Units
from raysft.data.example import Sequence as Encoded
from raysft.errors import BadExample, UserError
from raysft.evaluate.run import prompts_of
from raysft.export import export
from raysft.models import SpeechModel, build
from raysft.models.layout import tokens_of
from raysft.train.feed import turn_of
from raysft.train.flops import cost_of, formula_holds
from tests.support import whisper
from tests.support.model_zoo import gradients, loss_of

RATE = 16000
PADDED = Data(mode="padded")
SPOKEN = (  # samples, lang, task, text
    (8000, "en", "asr", "zero one"),
    (RATE, "de", "st", "a longer text, translated"),
    (2 * RATE, "German", "asr", "drei"),
    (5001, "zh", "asr", "ü"),
)


def example(text: str = "one", lang: str | None = "en", task: str = "asr") -> Example:
    return Example("e", task, (Audio("/clip.wav"),), (text,), lang=lang, text=text)


def wave(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def encoder(folder: Path, data: Data = PADDED, **config: Any) -> Encoder:
    return make_encoder(Model(**whisper.model(folder, **config)), data, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whisper")


@pytest.fixture(scope="module")
def ours(folder: Path) -> SpeechModel:
    made = encoder(folder)
    model = Model(**whisper.model(folder))
    built = build(model, PADDED, made, 0)
    built.model.eval()
    return built


@pytest.fixture(scope="module")
def exported(ours: SpeechModel, folder: Path) -> Path:
    return export(ours, folder / "exported")


@pytest.fixture(scope="module")
def spoken(folder: Path) -> list[tuple[Example, np.ndarray, Encoded]]:
    """Examples with clips, encoded."""
    made, found = encoder(folder), []
    for number, (samples, lang, task, text) in enumerate(SPOKEN):
        one, clip = example(text, lang, task), wave(samples, number)
        planned = made.measure(one, [samples])
        found.append((one, clip, made.encode(one, [clip], promised=planned)))
    return found


def batch(spoken: Sequence[tuple[Example, np.ndarray, Encoded]]) -> MicroBatch:
    return MicroBatch.join(0, 1, 0, [encoded for _, _, encoded in spoken])


def asked(one: Example) -> dict[str, str]:
    """What transformers is told of an example."""
    task = "translate" if one.task == "st" else "transcribe"
    return {"language": (one.lang or "en").lower(), "task": task}


def of_transformers(processor: Any, one: Example, clip: np.ndarray) -> dict[str, torch.Tensor]:
    """Inputs and labels, of the processor alone; nothing is learnt of the prefix."""
    heard = processor.feature_extractor(clip, sampling_rate=RATE, return_tensors="pt")
    processor.tokenizer.set_prefix_tokens(**asked(one), predict_timestamps=False)
    ids = processor.tokenizer(one.text).input_ids
    labels = torch.tensor([ids[1:]])
    labels[0, : len(processor.tokenizer.prefix_tokens) - 1] = -100
    return {
        "input_features": heard.input_features,
        "decoder_input_ids": torch.tensor([ids[:-1]]),
        "labels": labels,
    }


def test_ids_are_those_of_the_tokenizer_of_whisper(
    spoken: list[tuple[Example, np.ndarray, Encoded]], exported: Path
) -> None:
    tokenizer = AutoProcessor.from_pretrained(exported).tokenizer
    for one, _, encoded in spoken:
        tokenizer.set_prefix_tokens(**asked(one), predict_timestamps=False)
        ids = tokenizer(one.text).input_ids
        assert encoded.input_ids[100:].tolist() == ids
        learnt = encoded.labels[encoded.labels != -100].tolist()
        assert learnt == ids[4:], "the prefix is given, text and end are learnt"


def test_losses_and_gradients_are_those_of_transformers(
    spoken: list[tuple[Example, np.ndarray, Encoded]], ours: SpeechModel, exported: Path
) -> None:
    plain = WhisperForConditionalGeneration.from_pretrained(exported).eval()
    processor = AutoProcessor.from_pretrained(exported)
    total = torch.zeros(())
    for one, clip, _ in spoken:
        inputs = of_transformers(processor, one, clip)
        total = total + plain(**inputs).loss * int((inputs["labels"] != -100).sum())
    total.backward()
    found = loss_of(ours, ours.collate(batch(spoken)))
    found.sum.backward()
    assert found.sum.item() == pytest.approx(total.item(), rel=1e-5)
    assert {task: int(count) for task, (_, count) in found.by_task.items()} == {"asr": 17, "st": 26}
    expected = dict(plain.named_parameters())
    for name, gradient in gradients(ours).items():
        difference = (gradient - expected[name].grad).abs().max()
        assert difference < 1e-4 * expected[name].grad.abs().max().clamp(min=1e-2), name


def test_answers_are_those_of_transformers_together_and_alone(
    spoken: list[tuple[Example, np.ndarray, Encoded]], ours: SpeechModel, exported: Path
) -> None:
    plain = WhisperForConditionalGeneration.from_pretrained(exported).eval()
    processor = AutoProcessor.from_pretrained(exported)
    prompts = prompts_of(ours, batch(spoken))
    together = ours.generate(prompts, 12)
    assert [ours.generate([prompt], 12)[0] for prompt in prompts] == together
    for (one, clip, _), answer in zip(spoken, together, strict=True):
        heard = processor.feature_extractor(clip, sampling_rate=RATE, return_tensors="pt")
        tokens = plain.generate(heard.input_features, **asked(one), max_new_tokens=12)
        assert answer == processor.batch_decode(tokens, skip_special_tokens=True)[0]
    assert len(set(together)) > 1


def test_what_a_model_never_says_is_not_answered(
    spoken: list[tuple[Example, np.ndarray, Encoded]], ours: SpeechModel, exported: Path
) -> None:
    plain = WhisperForConditionalGeneration.from_pretrained(exported).eval()
    for net in (plain, ours.net):
        net.generation_config.suppress_tokens = [*range(32), *range(127, 256)]
    free = ours.generate(prompts_of(ours, batch(spoken)), 6)
    first = sorted({ord(answer[0]) for answer in free})
    for net in (plain, ours.net):
        net.generation_config.begin_suppress_tokens = first
    answers = ours.generate(prompts_of(ours, batch(spoken)), 6)
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        setattr(ours.net.generation_config, key, None)
    processor = AutoProcessor.from_pretrained(exported)
    for (one, clip, _), answer in zip(spoken, answers, strict=True):
        assert answer.isascii() and ord(answer[0]) not in first
        heard = processor.feature_extractor(clip, sampling_rate=RATE, return_tensors="pt")
        tokens = plain.generate(heard.input_features, **asked(one), max_new_tokens=6)
        assert answer == processor.batch_decode(tokens, skip_special_tokens=True)[0]


def test_an_export_transcribes_in_a_pipeline(
    spoken: list[tuple[Example, np.ndarray, Encoded]], ours: SpeechModel, exported: Path
) -> None:
    assert isinstance(
        AutoModelForSpeechSeq2Seq.from_pretrained(exported), WhisperForConditionalGeneration
    )
    transcribe = pipeline("automatic-speech-recognition", str(exported), device="cpu")
    answers = ours.generate(prompts_of(ours, batch(spoken)), 12)
    for (one, clip, _), answer in zip(spoken, answers, strict=True):
        told = asked(one) | {"max_new_tokens": 12, "num_beams": 1}  # its default is 5
        text = transcribe({"raw": clip, "sampling_rate": RATE}, generate_kwargs=told)["text"]
        assert text == answer


def test_a_checkpoint_is_trained_as_it_is(
    spoken: list[tuple[Example, np.ndarray, Encoded]], ours: SpeechModel, exported: Path
) -> None:
    model = Model(path=str(exported))
    made = make_encoder(model, PADDED, "unused")
    again = build(model, PADDED, made, 1)
    frozen = [name for name, p in again.net.named_parameters() if not p.requires_grad]
    assert frozen == ["model.encoder.embed_positions.weight"]
    again.model.eval()
    laid_out = ours.collate(batch(spoken))
    assert loss_of(again, laid_out).sum.item() == loss_of(ours, laid_out).sum.item()
    settings = again.net.generation_config
    assert settings.lang_to_id == {
        name: made.tokenizer.convert_tokens_to_ids(name) for name in whisper.LANGUAGES
    }


@pytest.mark.parametrize("mels", [16, 24])
def test_every_example_takes_what_was_planned(mels: int, tmp_path: Path) -> None:
    made = encoder(tmp_path, num_mel_bins=mels)
    rng = np.random.default_rng(0)
    for samples in np.linspace(401, 2 * RATE, 50).astype(int).tolist():
        one = example("x" * int(rng.integers(0, 50)))
        planned = made.measure(one, [samples])
        found = made.encode(one, [wave(samples)], promised=planned)
        assert len(found.input_ids) == planned == 100 + 4 + len(one.text or "") + 1


def test_positions_are_those_that_are_computed(
    spoken: list[tuple[Example, np.ndarray, Encoded]], ours: SpeechModel
) -> None:
    """Encoder and decoder, so that short answers do not fill a micro-batch with hours of audio."""
    turn = turn_of(ours, batch(spoken))
    lengths = [len(encoded.input_ids) for _, _, encoded in spoken]
    assert turn.counts["tokens"] == sum(lengths)
    assert turn.counts["positions"] == len(lengths) * max(lengths)
    assert turn.counts["clips"] == len(lengths)
    assert turn.counts["supervised"] == int((turn.batch["targets"] >= 0).sum())
    assert tokens_of(turn.batch).shape == (len(lengths), max(lengths) - 100)


@pytest.mark.parametrize("frozen", ["", "encoder"])
def test_its_cost_is_what_torch_counts(frozen: str, folder: Path) -> None:
    # Wide enough for matrices to be most of it, as they are of a real one.
    section = Model(**whisper.model(folder, d_model=128, encoder_ffn_dim=512, decoder_ffn_dim=512))
    net = build(section, PADDED, make_encoder(section, PADDED, folder), 0).net
    if frozen:
        net.model.encoder.requires_grad_(False)
    net.set_attn_implementation("eager")
    length, clips = 40, 3
    rows = torch.arange(clips * length).view(clips, length) % 200
    with FlopCounterMode(display=False) as counter:
        features = torch.randn(clips, 16, 200)
        net(
            input_features=features, decoder_input_ids=rows, use_cache=False
        ).logits.sum().backward()
    cost = cost_of(net)
    assert cost is not None and formula_holds(net)
    counts = {
        "tokens": clips * (100 + length),
        "supervised": clips * length,
        "squares": 2 * clips * length**2,  # torch computes the pairs that nobody sees as well
        "clips": clips,
    }
    assert cost.total(counts) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_an_empty_micro_batch_reaches_every_parameter(ours: SpeechModel) -> None:
    found = loss_of(ours, ours.dummy())
    assert float(found.count) == 0
    found.sum.backward()
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients(ours).values())


def test_an_encoder_travels_without_transformers(folder: Path) -> None:
    made = encoder(folder)
    content = pickle.dumps(made)
    assert b"WhisperTokenizer" not in content.replace(
        made.template.__getstate__()["_tokenizer"], b""
    )
    again = pickle.loads(content)
    assert again.fingerprint == made.fingerprint
    one = example("zero")
    assert (
        again.encode(one, [wave(5000)]).input_ids == made.encode(one, [wave(5000)]).input_ids
    ).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lang": "xx"}, r"its language 'xx' is unknown to the tokenizer, which has en, zh, de"),
        ({"lang": "french"}, r"its language 'french' is unknown"),
        ({"lang": None}, r"it names no language: give it a lang, or set data\.language"),
        ({"input": ("text",)}, r"has no clip, and seq2seq reads one"),
        ({"input": (Audio("/a.wav"), Audio("/b.wav"))}, r"has 2 clips, and seq2seq reads one"),
        ({"input": (Audio("/a.wav"), "what is said?")}, r"text beside its clip"),
        ({"instruction": "Transcribe."}, r"brings an instruction"),
        ({"output": ("a <|de|> b",)}, r"its text contains <\|de\|>, a token that steers"),
        ({"output": ("a<|0.00|>",)}, r"its text contains <\|0\.00\|>"),
        ({"output": ("x" * 70,)}, r"takes 175 positions, and the model has learned 164"),
    ],
)
def test_an_example_that_cannot_be_used_says_why(
    wrong: dict[str, Any], said: str, folder: Path
) -> None:
    made = encoder(folder)
    made.limit(64)
    parts: dict[str, Any] = {"input": (Audio("/a.wav"),), "output": ("one",), "lang": "en"}
    one = Example("e", "asr", **(parts | wrong))
    with pytest.raises(BadExample, match=said) as raised:
        made.measure(one, [RATE] * len(one.audio()))
    assert raised.value.kind in (
        "unknown language",
        "not one clip",
        "bad text",
        "beyond learned positions",
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"output": (Audio("/a.wav"),), "input": ("text",)}, r"seq2seq answers in text only"),
        ({"input": (Units((1, 2)),)}, r"seq2seq reads audio, no speech units"),
        ({"task": "qa"}, r"seq2seq knows the tasks asr, .* not 'qa': set the task of the source"),
    ],
)
def test_a_source_that_cannot_be_used_says_why(
    wrong: dict[str, Any], said: str, folder: Path
) -> None:
    parts: dict[str, Any] = {"input": (Audio("/a.wav"),), "output": ("one",), "lang": "en"}
    one = Example("e", **({"task": "asr"} | parts | wrong))
    with pytest.raises(UserError, match=said):
        encoder(folder).measure(one, [RATE] * len(one.audio()))


def test_a_clip_longer_than_the_chunk_is_not_cut(folder: Path) -> None:
    made = encoder(folder)
    with pytest.raises(BadExample, match=r"its clip is 2\.01 s, the model reads at most 2\.00 s"):
        made.measure(example(), [2 * RATE + 160])
    with pytest.raises(BadExample, match="reads at most"):
        made.encode(example(), [wave(2 * RATE + 160)])


def test_examples_without_a_language_take_that_of_the_config(folder: Path) -> None:
    made = encoder(folder, Data(mode="padded", language="German"))
    ids = made.encode(example(lang=None), [wave(5000)]).input_ids[100:104]
    assert made.tokenizer.convert_ids_to_tokens(ids)[1] == "<|de|>"
    own = made.encode(example(lang="EN"), [wave(5000)]).input_ids[100:104]
    assert made.tokenizer.convert_ids_to_tokens(own)[1] == "<|en|>"
    assert made.fingerprint != encoder(folder).fingerprint
    with pytest.raises(UserError, match=r"data\.language: language 'klingon' is unknown"):
        encoder(folder, Data(mode="padded", language="klingon"))


def test_what_transformers_would_put_before_a_text_changes_nothing(folder: Path) -> None:
    section = whisper.model(folder)
    tokenizer = whisper.tokenizer()
    tokenizer.set_prefix_tokens(language="german", task="translate")
    tokenizer.save_pretrained(folder / "set")
    again = make_encoder(Model(**section | {"tokenizer": str(folder / "set")}), PADDED, folder)
    assert again.fingerprint == encoder(folder).fingerprint


def test_a_model_of_one_language_is_told_that_one(tmp_path: Path) -> None:
    section = whisper.model(tmp_path, ("<|en|>",))
    made = make_encoder(Model(**section), PADDED, tmp_path)
    ids = made.encode(example(lang=None), [wave(5000)]).input_ids[100:104]
    assert made.tokenizer.convert_ids_to_tokens(ids)[1] == "<|en|>"


def test_an_english_only_model_is_told_nothing(ours: SpeechModel, tmp_path: Path) -> None:
    ours.net.generation_config.is_multilingual = False
    export(ours, tmp_path / "en")
    ours.net.generation_config.is_multilingual = True
    made = make_encoder(Model(path=str(tmp_path / "en")), PADDED, tmp_path)
    for lang in (None, "en", "English"):
        ids = made.encode(example("1", lang), [wave(5000)]).input_ids[100:].tolist()
        names = ["<|startoftranscript|>", "<|notimestamps|>", "1", "<|endoftext|>"]
        assert made.tokenizer.convert_ids_to_tokens(ids) == names
    with pytest.raises(BadExample, match="its language is 'de', and the model knows English only"):
        made.measure(example(lang="de"), [RATE])
    with pytest.raises(UserError, match="knows English only and cannot be trained on task 'st'"):
        made.measure(example(task="st"), [RATE])
    with pytest.raises(UserError, match=r"data\.language: de, but the model knows English only"):
        make_encoder(Model(path=str(tmp_path / "en")), Data(language="de"), tmp_path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"prompts": {"asr": "Transcribe."}}, r"data\.prompts: seq2seq writes no dialogue"),
        ({"template": "plain"}, r"data\.template: seq2seq writes no dialogue"),
        ({"features": "fbank"}, r"data\.features: seq2seq reads its model's own features"),
    ],
)
def test_keys_that_say_nothing_here_are_refused(
    data: dict[str, Any], said: str, folder: Path
) -> None:
    with pytest.raises(UserError, match=said):
        encoder(folder, Data(mode="padded", **data))


def test_a_language_is_refused_where_nobody_is_told_it() -> None:
    for kind in ("qwen3", "qwen2_audio"):
        model = Model(config={"model_type": kind}, tokenizer="bytes")
        with pytest.raises(UserError, match=r"data\.language: only seq2seq is told"):
            make_encoder(model, Data(language="en"), "unused")


def test_a_tokenizer_without_the_tokens_is_refused(folder: Path) -> None:
    section = whisper.model(folder) | {"tokenizer": "bytes"}
    with pytest.raises(UserError, match=r"model\.tokenizer: it has no <\|startoftranscript\|>"):
        make_encoder(Model(**section), PADDED, folder)


def test_packed_rows_are_refused(folder: Path) -> None:
    data = Data()
    section = Model(**whisper.model(folder))
    with pytest.raises(UserError, match=r"data\.mode: packed .* whisper: .*use data\.mode: padded"):
        build(section, data, make_encoder(section, data, folder), 0)


def test_a_run_goes_on_with_its_own_prompt(folder: Path, tmp_path: Path) -> None:
    section = Model(**whisper.model(folder))
    source = make_encoder(section, PADDED, tmp_path).template.source
    (tmp_path / "chat_template.jinja").write_text(source)
    make_encoder(section, PADDED, tmp_path)
    with pytest.raises(UserError, match=r"data\.language: the run began with .* start a new run"):
        make_encoder(section, Data(mode="padded", language="de"), tmp_path)


def test_masks_of_specaugment_follow_from_the_seed_of_the_step(
    spoken: list[tuple[Example, np.ndarray, Encoded]], folder: Path
) -> None:
    """numpy's generator, which transformers draws them from, goes on by itself."""
    section = Model(**whisper.model(folder, apply_spec_augment=True, mask_time_prob=0.3))
    augmented = build(section, PADDED, make_encoder(section, PADDED, folder), 0)
    laid_out = augmented.collate(batch(spoken))
    kept = laid_out["input_features"].clone()
    before = np.random.get_state()[1].copy()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return loss_of(augmented, laid_out).sum.item()

    augmented.model.train()
    first = loss(3)
    assert loss(4) != first
    assert loss(3) == first
    assert torch.equal(laid_out["input_features"], kept)
    assert (np.random.get_state()[1] == before).all()
    augmented.model.eval()
    assert loss(3) == loss(4) != first
