"""Models of seq2seq that read a clip at its own length, held against transformers alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, PreTrainedModel, pipeline

from raysft.config.families import named
from raysft.config.schema import Data, Model
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import ASSISTANT, Audio, Example, MicroBatch, Sequence, Turn
from raysft.errors import BadExample, UserError
from raysft.evaluate.run import prompts_of
from raysft.export import export
from raysft.families.seq2seq.types import TYPES
from raysft.models import SpeechModel, build
from raysft.models.layout import tokens_of
from raysft.train.feed import turn_of
from raysft.train.flops import cost_of
from tests.support import seq2seq as zoo
from tests.support.model_zoo import gradients, loss_of
from tests.support.worlds import ROOT

RATE = 16000
PADDED = Data(mode="padded")
KINDS = sorted(zoo.TINY)
TOLD = [kind for kind in KINDS if zoo.TINY[kind].told]
SPOKEN = (  # samples, lang, task, text
    (8000, "en", "asr", "zero one"),
    (RATE, "de", "st", "a longer text, translated"),
    (31999, "German", "asr", "drei"),
    (5001, "fr", "asr", "ü"),
    (8000, "en", "asr", "of one length with the first"),
)


def example(text: str = "one", lang: str | None = "en", task: str = "asr") -> Example:
    return Example("e", task, (Audio("/clip.wav"),), (text,), lang=lang, text=text)


def wave(samples: int, seed: int = 0) -> np.ndarray:
    """A tone of its own, and some noise."""
    tone = np.sin(2 * np.pi * 190 * 2**seed * np.arange(samples) / RATE)
    noise = np.random.default_rng(seed).standard_normal(samples)
    return (0.3 * tone + 0.01 * noise).astype(np.float32)


def model(kind: str, folder: Path, **config: Any) -> Model:
    return Model(**zoo.model(kind, folder, **config))


@dataclass(frozen=True)
class Case:
    """A type: its model and encoder here, and what transformers loads of its export."""

    kind: str
    ours: SpeechModel
    encoder: Encoder
    plain: PreTrainedModel
    processor: Any
    exported: Path
    spoken: list[tuple[Example, np.ndarray, Sequence]]

    def inputs(self, one: Example, clip: np.ndarray) -> dict[str, Any]:
        """What transformers' processor alone makes of a clip, and of what is asked."""
        code = {"german": "de"}.get((one.lang or "en").lower(), one.lang)
        if self.kind == "cohere_asr":
            made = self.processor(clip, language=code, sampling_rate=RATE)
            return {name: torch.as_tensor(made[name]) for name in NAMES if name in made}
        if self.kind == "canary":
            target = "en" if one.task == "st" else code
            made = self.processor.apply_transcription_request(
                [clip], source_language=code, target_language=target
            )
            return {name: made[name] for name in NAMES if name in made}
        made = self.processor(clip, sampling_rate=RATE, return_tensors="pt")
        start = torch.tensor([[self.plain.config.decoder_start_token_id]])
        return {"input_values": made["input_values"], "decoder_input_ids": start}


NAMES = ("input_features", "attention_mask", "decoder_input_ids")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """case(kind): made once."""
    made: dict[str, Case] = {}

    def make(kind: str) -> Case:
        if kind not in made:
            made[kind] = _case(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


def _case(kind: str, folder: Path) -> Case:
    section = model(kind, folder)
    encoder = make_encoder(section, PADDED, folder)
    ours = build(section, PADDED, encoder, 0)
    with torch.no_grad():  # norms and biases too, which start as ones and zeros
        for number, (name, parameter) in enumerate(ours.net.named_parameters()):
            noise = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
            if "subsampling" in name or "encoder_attn.o_proj" in name:  # else clips hardly count
                parameter.mul_(8)
    ours.model.eval()
    exported = export(ours, folder / "exported")
    plain = AutoModelForSpeechSeq2Seq.from_pretrained(exported).eval()
    spoken = []
    for number, (samples, lang, task, text) in enumerate(SPOKEN):
        task = task if kind == "canary" else "asr"
        one, clip = example(text, lang, task), wave(samples, number)
        planned = encoder.measure(one, [samples])
        spoken.append((one, clip, encoder.encode(one, [clip], promised=planned)))
    processor = AutoProcessor.from_pretrained(exported)
    return Case(kind, ours, encoder, plain, processor, exported, spoken)


def batch(items: list[tuple[Example, np.ndarray, Sequence]]) -> MicroBatch:
    return MicroBatch.join(0, 1, 0, [encoded for _, _, encoded in items])


def heard(net: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """What transformers' encoder makes of a clip, alone: [positions, H], padding left out."""
    rest = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    found = net.get_encoder()(**rest)
    mask = found.attention_mask
    return found.last_hidden_state[0] if mask is None else found.last_hidden_state[0][mask[0] > 0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_as_many_positions_are_planned_as_are_encoded_and_computed(
    kind: str, case: Callable[[str], Case]
) -> None:
    one = case(kind)
    rng = np.random.default_rng(0)
    borders = [*range(895, 905), *range(15998, 16003), *range(16158, 16163)]
    lengths = [*rng.integers(1400, 32000, 30), *borders]
    assert len(lengths) == 50
    for number, samples in enumerate(map(int, lengths)):
        asked = example("x" * int(rng.integers(0, 20)))
        planned = one.encoder.measure(asked, [samples])
        found = one.encoder.encode(asked, [wave(samples)], promised=planned)
        assert len(found.input_ids) == planned
        prompt = len(one.encoder.template.prefix("asr", "en"))
        positions = planned - prompt - len(asked.text or "") - 1
        if number % 5 == 0 or kind == "moonshine":
            assert len(heard(one.plain, one.inputs(asked, wave(samples)))) == positions


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_before_a_text_is_what_the_processor_writes(
    kind: str, case: Callable[[str], Case]
) -> None:
    one = case(kind)
    for asked, clip, encoded in one.spoken:
        prompt = one.inputs(asked, clip)["decoder_input_ids"][0].tolist()
        text = list((asked.text or "").encode())
        end = one.processor.tokenizer.eos_token_id
        ids = encoded.input_ids.tolist()
        assert ids[len(ids) - len(prompt) - len(text) - 1 :] == [*prompt, *text, end]
        assert encoded.labels[encoded.labels != -100].tolist() == [*text, end]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_transformers(
    kind: str, case: Callable[[str], Case]
) -> None:
    """Of a plain loop over the clips, each alone."""
    one = case(kind)
    total = torch.zeros(())
    one.plain.zero_grad()
    for asked, clip, _ in one.spoken:
        inputs = one.inputs(asked, clip)
        prompt = inputs.pop("decoder_input_ids")
        said = [*(asked.text or "").encode(), one.processor.tokenizer.eos_token_id]
        rows = torch.cat([prompt, torch.tensor([said[:-1]], dtype=torch.long)], 1)
        logits = one.plain(**inputs, decoder_input_ids=rows).logits[0, prompt.shape[1] - 1 :]
        total = total + functional.cross_entropy(logits, torch.tensor(said), reduction="sum")
    total.backward()
    one.ours.model.zero_grad()
    found = loss_of(one.ours, one.ours.collate(batch(one.spoken)))
    found.sum.backward()
    assert found.sum.item() == pytest.approx(total.item(), rel=1e-5)
    expected = dict(one.plain.named_parameters())
    ours = gradients(one.ours)
    assert ours.keys() == expected.keys()
    largest = max(float(p.grad.abs().max()) for p in expected.values())
    for name, gradient in ours.items():
        assert (gradient - expected[name].grad).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_clip_and_its_loss_do_not_depend_on_their_neighbours(
    kind: str, case: Callable[[str], Case]
) -> None:
    ours, spoken = case(kind).ours, case(kind).spoken
    seen: list[dict[str, torch.Tensor]] = []
    hook = ours.net.get_decoder().register_forward_pre_hook(
        lambda part, args, given: seen.append(given), with_kwargs=True
    )
    together = loss_of(ours, ours.collate(batch(spoken))).sum.item()
    rows, mask = (seen[0][f"encoder_{name}"] for name in ("hidden_states", "attention_mask"))
    total = 0.0
    for row, item in enumerate(spoken):
        total += loss_of(ours, ours.collate(batch([item]))).sum.item()
        alone = seen[-1]["encoder_hidden_states"][0]
        assert mask[row].sum() == len(alone) and mask[row, : len(alone)].all()
        torch.testing.assert_close(rows[row, : len(alone)], alone, rtol=1e-5, atol=1e-5)
    hook.remove()
    assert together == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_transformers_together_and_alone(
    kind: str, case: Callable[[str], Case]
) -> None:
    one = case(kind)
    end = one.processor.tokenizer.eos_token_id
    strange = [*range(32), *range(127, one.plain.config.vocab_size)]
    for net in (one.plain, one.ours.net):  # which is heeded: letters, and an end
        net.generation_config.suppress_tokens = [token for token in strange if token != end]
    prompts = prompts_of(one.ours, batch(one.spoken))
    together = one.ours.generate(prompts, 9)
    assert [one.ours.generate([prompt], 9)[0] for prompt in prompts] == together
    for (asked, clip, _), answer in zip(one.spoken, together, strict=True):
        inputs = one.inputs(asked, clip)
        tokens = one.plain.generate(**inputs, max_new_tokens=9)[0]
        rest = tokens[inputs["decoder_input_ids"].shape[1] :]
        assert answer == one.processor.tokenizer.decode(rest, skip_special_tokens=True)
    for net in (one.plain, one.ours.net):
        net.generation_config.suppress_tokens = None
    assert len(set(together)) > 1 and "".join(together).isascii()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_export_is_what_transformers_loads_and_trains_on_as_it_is(
    kind: str, case: Callable[[str], Case]
) -> None:
    one = case(kind)
    assert type(one.plain) is named("seq2seq").net_class(kind)
    asked, clip, _ = one.spoken[1]
    inputs = one.inputs(asked, clip)
    frames = next(value for name, value in inputs.items() if name.startswith("input_"))
    mask = inputs.get("attention_mask", torch.ones(frames.shape[:2], dtype=torch.long)) > 0
    known = {frames_name: frames for frames_name in inputs if frames_name.startswith("input_")}
    lengths = int(mask.sum())
    cut = {name: value[:, :lengths] for name, value in known.items()}
    ids = {"decoder_input_ids": inputs["decoder_input_ids"]}
    ours = one.ours.net(**cut, **ids, attention_mask=mask[:, :lengths].long()).logits
    torch.testing.assert_close(one.plain(**inputs).logits, ours, rtol=1e-5, atol=1e-5)
    again = make_encoder(Model(path=str(one.exported)), PADDED, "unused")
    assert again.fingerprint == one.encoder.fingerprint
    built = build(Model(path=str(one.exported)), PADDED, again, 1)
    built.model.eval()
    laid_out = one.ours.collate(batch(one.spoken))
    assert loss_of(built, laid_out).sum.item() == loss_of(one.ours, laid_out).sum.item()


def test_a_moonshine_transcribes_in_a_pipeline(case: Callable[[str], Case]) -> None:
    one = case("moonshine")
    transcribe = pipeline("automatic-speech-recognition", str(one.exported), device="cpu")
    answers = one.ours.generate(prompts_of(one.ours, batch(one.spoken)), 9)
    for (_, clip, _), answer in zip(one.spoken, answers, strict=True):
        told = {"max_new_tokens": 9, "num_beams": 1}  # its default is 5
        text = transcribe({"raw": clip, "sampling_rate": RATE}, generate_kwargs=told)["text"]
        assert text == answer


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_that_are_computed(kind: str, case: Callable[[str], Case]) -> None:
    one = case(kind)
    turn = turn_of(one.ours, batch(one.spoken))
    lengths = [len(encoded.input_ids) for _, _, encoded in one.spoken]
    rows = [
        len(one.encoder.template.prefix(asked.task, asked.lang))
        + len((asked.text or "").encode())
        + 1
        for asked, _, _ in one.spoken
    ]
    assert turn.counts["tokens"] == sum(lengths)
    assert tokens_of(turn.batch).shape == (len(rows), max(rows))
    spoken = sum(lengths) - sum(rows)
    assert turn.counts["positions"] == spoken + len(rows) * max(rows)
    assert turn.counts["squares"] == sum(row * row for row in rows)
    assert cost_of(one.ours.net) is None  # no formula: no tflops


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_micro_batch_reaches_every_parameter(
    kind: str, case: Callable[[str], Case]
) -> None:
    ours = case(kind).ours
    ours.model.zero_grad()
    found = loss_of(ours, ours.dummy())
    assert float(found.count) == 0
    found.sum.backward()
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients(ours).values())
    assert turn_of(ours, MicroBatch.join(0, 1, 0, [])).counts["squares"] == 0
    longer = ours.full_document(20)
    assert 18 <= len(longer.input_ids) - 2 <= 22


@pytest.mark.parametrize("kind", KINDS)
def test_batch_norms_stay_as_they_were_learned(kind: str, case: Callable[[str], Case]) -> None:
    ours, spoken = case(kind).ours, case(kind).spoken
    before = {name: tensor.clone() for name, tensor in ours.net.named_buffers()}
    ours.model.train()
    found = loss_of(ours, ours.collate(batch(spoken))).sum.item()
    ours.model.eval()
    assert all(torch.equal(before[name], t) for name, t in ours.net.named_buffers())
    if kind == "moonshine":  # which has no dropout either
        assert found == loss_of(ours, ours.collate(batch(spoken))).sum.item()


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_travels(kind: str, case: Callable[[str], Case]) -> None:
    one = case(kind)
    again = pickle.loads(pickle.dumps(one.encoder))
    assert again.fingerprint == one.encoder.fingerprint
    for asked, clip, encoded in one.spoken:
        found = again.encode(asked, [clip])
        assert found.input_ids.tolist() == encoded.input_ids.tolist()
        np.testing.assert_array_equal(found.arrays["features"][0], encoded.arrays["features"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_clips_that_do_not_fit_are_said_and_none_is_cut(
    kind: str, case: Callable[[str], Case]
) -> None:
    encoder, most = case(kind).encoder, zoo.TINY[kind].most
    if most is None:
        assert encoder.measure(example(), [60 * RATE]) > 2000
    else:
        encoder.measure(example(), [int(most * RATE)])
        with pytest.raises(BadExample, match=r"is 2\.01 s, the model reads at most 2\.00 s") as why:
            encoder.measure(example(), [int(most * RATE) + 160])
        assert why.value.kind == "too long"
    with pytest.raises(BadExample, match=r"too short|shorter than one frame") as why:
        encoder.measure(example(), [300])
    assert why.value.kind == "too short"


def test_a_clip_of_which_nothing_is_left_is_too_short(case: Callable[[str], Case]) -> None:
    encoder = case("moonshine").encoder
    encoder.measure(example(), [895])
    with pytest.raises(BadExample, match=r"its clip of 0\.056 s is too short: the encoder makes"):
        encoder.measure(example(), [894])


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


def test_the_page_has_every_type_and_what_is_refused() -> None:
    page = (ROOT / "docs" / "whisper.md").read_text(encoding="utf-8")
    row = named("seq2seq")
    assert set(TYPES) == set(zoo.TINY) == set(row.types) - {"whisper"}
    for kind in (*TYPES, *row.refused_types):
        assert f"`{kind}`" in page, kind
