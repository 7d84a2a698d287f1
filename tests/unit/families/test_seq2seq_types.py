"""Models of seq2seq that read a clip at its own length, held against transformers alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel, pipeline

from raysft.config.families import named
from raysft.config.schema import Model
from raysft.data.encode import make_encoder
from raysft.data.example import Example, MicroBatch, Sequence
from raysft.errors import BadExample
from raysft.evaluate.run import prompts_of
from raysft.families.seq2seq.types import TYPES
from raysft.models import build
from raysft.models.layout import tokens_of
from raysft.train.feed import turn_of
from raysft.train.flops import cost_of
from tests.support import seq2seq as zoo
from tests.support.model_zoo import gradients, loss_of
from tests.support.seq2seq_cases import KINDS, PADDED, RATE, Case, cases, example, wave
from tests.support.worlds import ROOT

# Canary is made of parts of the others: make test-all tries it as long.
MANY = [pytest.param(kind, marks=pytest.mark.slow if kind == "canary" else []) for kind in KINDS]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """case(kind): made once."""
    return cases(tmp_path_factory)


def batch(items: list[tuple[Example, np.ndarray, Sequence]]) -> MicroBatch:
    return MicroBatch.join(0, 1, 0, [encoded for _, _, encoded in items])


def heard(net: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """What transformers' encoder makes of a clip, alone: [positions, H], padding left out."""
    rest = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    found = net.get_encoder()(**rest)
    mask = found.get("attention_mask")
    return found.last_hidden_state[0] if mask is None else found.last_hidden_state[0][mask[0] > 0]


@pytest.mark.parametrize("kind", MANY)
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
        positions = planned - prompt - len(one.ids(asked)) - 1
        if number % 7 == 0 or kind == "moonshine":
            assert len(heard(one.plain, one.inputs(asked, wave(samples)))) == positions


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_before_a_text_is_what_the_processor_writes(
    kind: str, case: Callable[[str], Case]
) -> None:
    one = case(kind)
    for asked, clip, encoded in one.spoken:
        prompt = one.inputs(asked, clip)["decoder_input_ids"][0].tolist()
        text = one.ids(asked)
        end = one.processor.tokenizer.eos_token_id
        ids = encoded.input_ids.tolist()
        assert ids[len(ids) - len(prompt) - len(text) - 1 :] == [*prompt, *text, end]
        assert encoded.labels[encoded.labels != -100].tolist() == [*text, end]


@pytest.mark.parametrize("kind", MANY)
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
        said = [*one.ids(asked), one.processor.tokenizer.eos_token_id]
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


@pytest.mark.parametrize("kind", MANY)
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
        len(one.encoder.template.prefix(asked.task, asked.lang)) + len(one.ids(asked)) + 1
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
def test_checkpointing_changes_nothing(kind: str, case: Callable[[str], Case]) -> None:
    one = case(kind)
    section = Model(path=str(one.exported))
    found = []
    for recompute in (False, True):
        ours = build(section, PADDED, make_encoder(section, PADDED, "unused"), 1)
        if recompute:
            ours.enable_gradient_checkpointing()
        ours.model.train()
        torch.manual_seed(7)  # for what drops out
        loss = loss_of(ours, ours.collate(batch(one.spoken))).sum
        loss.backward()
        found.append((loss.item(), gradients(ours)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in found[0][1].values())
    for name, gradient in found[0][1].items():
        assert (gradient - found[1][1][name]).abs().max() < 1e-5 * largest, name


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


def test_the_page_has_every_type_and_what_is_refused() -> None:
    page = (ROOT / "docs" / "whisper.md").read_text(encoding="utf-8")
    row = named("seq2seq")
    assert set(TYPES) == set(zoo.TINY) == set(row.types) - {"whisper"}
    for kind in (*TYPES, *row.refused_types):
        assert f"`{kind}`" in page, kind
