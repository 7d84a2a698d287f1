"""flow_decoder: what its encoder makes of examples, and its loss against the formula."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from raysft.config import Config
from raysft.config.combinations import contradictions
from raysft.config.mel import Mel
from raysft.config.schema import Data, Model, Source
from raysft.config.speaking import Speak
from raysft.config.speech_tokens import SpeechTokens
from raysft.data.clips import mels
from raysft.data.clips.speech_tokens import KMeans
from raysft.data.encode import make_encoder
from raysft.data.example import Audio, Example, MicroBatch, Units
from raysft.data.index.build import build_index
from raysft.driver import shown
from raysft.errors import BadExample, UserError
from raysft.families.flow_decoder.config import FlowDecoderConfig
from raysft.families.flow_decoder.draws import drawn
from raysft.families.flow_decoder.encode import FlowEncoder
from raysft.families.flow_decoder.model import FlowModel, rows_of
from raysft.families.flow_decoder.tokens import codes_of
from raysft.models import build
from raysft.models.flow_parts import T_UNITS
from raysft.run.lines import read_lines
from raysft.train.probe import _sequence
from tests.support import flows, in_process

KINDS = ("dit", "one", "voicebox")
VOICE = tuple(0.5 + 0.1 * n for n in range(flows.SPEAKER))


def encoder_of(kind: str, tmp_path: Path, **more: Any) -> FlowEncoder:
    found = make_encoder(Model(**flows.model(kind, **more)), Data(mode="padded"), tmp_path)
    assert isinstance(found, FlowEncoder)
    return found


def example_of(kind: str, seconds: float = 0.36, **changes: Any) -> tuple[Example, np.ndarray]:
    rng = np.random.default_rng(round(1000 * seconds))
    clip = (0.1 * rng.standard_normal(round(seconds * flows.RATE))).astype(np.float32)
    units = Units(tuple(flows.tokens_of(kind, seconds, rng)))
    example = Example(f"x{seconds}", "flow", (units,), (Audio("a.wav"),), voice=VOICE)
    return replace(example, **changes), clip


def model_of(kind: str, tmp_path: Path) -> FlowModel:
    encoder = encoder_of(kind, tmp_path)
    found = build(Model(**flows.model(kind)), Data(mode="padded"), encoder, 1)
    assert isinstance(found, FlowModel)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in found.net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return found


def batch_of(kind: str, encoder: FlowEncoder, seeds: list[int]) -> MicroBatch:
    sequences = []
    for number, seed in enumerate(seeds):
        example, clip = example_of(kind, 0.24 + 0.12 * number, task=("flow", "dub")[number % 2])
        sequences.append(encoder.encode(example, [clip], np.random.default_rng(seed)))
    return MicroBatch.join(0, 1, 0, sequences)


# -- what an example becomes ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_its_tokens_its_speaker_and_its_mel(kind: str, tmp_path: Path) -> None:
    encoder = encoder_of(kind, tmp_path)
    example, clip = example_of(kind)
    found = encoder.encode(example, [clip], np.random.default_rng(4))
    mel = mels.log_mel(clip, Mel(**flows.MEL))
    assert len(mel) == 18
    np.testing.assert_array_equal(found.arrays["mel"][0], mel)
    assert encoder.measure(example, [len(clip)]) == len(found.input_ids) == 18
    ids = example.input[0].ids
    codes = found.arrays["codes"][0]
    if kind == "dit":  # groups of 2 + 3
        expected = []
        for start in range(0, len(ids), 5):
            a, b, x, y, z = ids[start : start + 5]
            expected += [[a, x + 1], [b, y + 1], [5, z + 1]]
        assert codes.tolist() == expected
    else:
        assert codes.tolist() == [[one] for one in ids]
    assert ("voice" in found.arrays) == (kind != "voicebox")
    if kind != "voicebox":
        np.testing.assert_allclose(found.arrays["voice"][0], [VOICE], rtol=1e-6)
    assert found.seconds == pytest.approx(0.36)


def test_steps_tokens_are_placed_as_its_embedding_has_them() -> None:
    config = FlowDecoderConfig()
    found = codes_of([7, 1023, 1024, 5119, 1030, 0, 1, 2000, 2001, 2002], config)
    expected = [[7, 1025], [1023, 5120], [1024, 1031], [0, 2001], [1, 2002], [1024, 2003]]
    assert found.tolist() == expected
    assert config.table_rows == 5121


def test_what_is_random_is_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    encoder, (example, clip) = encoder_of("dit", tmp_path), example_of("dit")
    one, two, other = (
        encoder.encode(example, [clip], np.random.default_rng(seed)).arrays["draws"][0]
        for seed in (4, 4, 5)
    )
    assert one == two != other
    (still,) = {int(encoder.encode(example, [clip]).arrays["draws"][0][0]) for _ in range(3)}
    renamed = replace(example, id="another")
    assert int(encoder.encode(renamed, [clip]).arrays["draws"][0][0]) != still


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("dit", {"voice": ()}, "has no speaker embedding", "no speaker embedding"),
    ("dit", {"voice": (1.0, 2.0)}, "has 2 values, the model reads 6", "no speaker embedding"),
    ("dit", {"voice": (0.0,) * 6}, "points nowhere", "no speaker embedding"),
    ("dit", {"voice": (float("nan"),) * 6}, "points nowhere", "no speaker embedding"),
    ("dit", {"input": (Units((0,) * 14),)}, "no whole groups of 5", "unknown unit"),
    ("dit", {"input": (Units((0, 5, 5, 5, 5) * 3),)}, "unit 5, but there are 0 to 4 in the first",
     "unknown unit"),
    ("dit", {"input": (Units((0, 0, 5, 4, 5) * 3),)}, "unit 4, but there are 5 to 13 in the second",
     "unknown unit"),
    ("one", {"input": (Units((20,) * 9),)}, "unit 20, but there are 0 to 19", "unknown unit"),
    ("one", {"input": (Units((-1,) * 9),)}, "unit -1", "unknown unit"),
    ("one", {"input": (Units((3,) * 20),)}, "(20 rows) are 0.80 s and its clip 0.36 s",
     "tokens of another length"),
    ("voicebox", {"input": (Units((3,) * 2),)}, "0.04 s and its clip 0.36 s",
     "tokens of another length"),
    ("one", {"output": ()}, "has no clip,", "not one clip"),
    ("one", {"output": (Audio("a.wav"), Audio("b.wav"))}, "has 2 clips", "not one clip"),
    ("one", {"input": (Units((3,) * 9), Units((3,) * 9))}, "several runs", "malformed record"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "said", "reason"), REFUSED)
def test_an_example_that_cannot_be_used_says_why(
    kind: str, changes: dict[str, Any], said: str, reason: str, tmp_path: Path
) -> None:
    encoder = encoder_of(kind, tmp_path)
    example, clip = example_of(kind, **changes)
    for call in (
        lambda: encoder.measure(example, [len(clip)]),
        lambda: encoder.encode(example, [clip]),
    ):
        with pytest.raises(BadExample) as error:
            call()
        assert said in str(error.value) and error.value.kind == reason


def test_a_little_more_of_either_is_left_out(tmp_path: Path) -> None:
    encoder = encoder_of("one", tmp_path)
    example, clip = example_of("one", input=(Units((3,) * 12),))  # 3 more than there are frames for
    found = encoder.encode(example, [clip])
    assert (len(found.arrays["codes"][0]), len(found.arrays["mel"][0])) == (9, 18)
    example, clip = example_of("one", input=(Units((3,) * 6),))
    found = encoder.encode(example, [clip])
    assert (len(found.arrays["codes"][0]), len(found.arrays["mel"][0])) == (6, 12)
    assert encoder.measure(example, [len(clip)]) == 12


def test_tokens_are_made_of_clips_that_bring_none(tmp_path: Path) -> None:
    settings = SpeechTokens(clusters=20, path=str(tmp_path / "units.safetensors"))
    rng = np.random.default_rng(0)
    clips = [(0.1 * rng.standard_normal(16000)).astype(np.float32) for _ in range(3)]
    fitted = KMeans.fit(clips, settings, 0)
    fitted.save(tmp_path / "units.safetensors")
    data = Data(mode="padded", speech_tokens=settings)
    encoder = make_encoder(Model(**flows.model("one")), data, tmp_path)
    example, clip = example_of("one", 0.6, input=("some text",))
    found = encoder.encode(example, [clip])
    expected = fitted.encode(clip)
    rows = found.arrays["codes"][0].ravel()
    assert len(rows) == len(expected) == 15
    np.testing.assert_array_equal(rows, expected)
    assert encoder.measure(example, [len(clip)]) == len(found.input_ids) == 30
    for changes, said in (
        ({"codebooks": [30]}, "model.config.codebooks: [30], but data.speech_tokens has 20"),
        (
            {"tokens_per_second": 12.5, "upsample": 4},
            "model.config.tokens_per_second: 12.5, but data.speech_tokens makes 25",
        ),
    ):
        with pytest.raises(UserError) as error:
            make_encoder(Model(**flows.model("one", **changes)), data, tmp_path)
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("data", "model", "said"),
    [
        ({"mode": "packed"}, {}, "data.mode: packed"),
        ({"prompts": {"tts": "Say"}}, {}, "data.prompts: flow_decoder reads no text"),
        ({"unit_noise": 0.1}, {}, "data.unit_noise"),
        ({}, {"tokenizer": "bytes"}, "model.tokenizer: flow_decoder reads no text"),
        ({}, {"speech_units": 4}, "model.speech_units"),
    ],
)
def test_keys_of_text_are_refused(
    data: dict[str, Any], model: dict[str, Any], said: str, tmp_path: Path
) -> None:
    section = Model(**{**flows.model("one"), **model})
    with pytest.raises(UserError) as error:
        make_encoder(section, Data(**{"mode": "padded", **data}), tmp_path)
    assert said in str(error.value)


def test_without_tokens_and_without_what_makes_them_the_source_is_refused(tmp_path: Path) -> None:
    encoder = encoder_of("one", tmp_path)
    example, clip = example_of("one", input=("text",))
    with pytest.raises(UserError, match=r"no speech tokens.*data\.speech_tokens"):
        encoder.measure(example, [len(clip)])


# -- what is drawn -------------------------------------------------------------------------------


def test_draws_have_the_published_rates() -> None:
    step, usdm = FlowDecoderConfig(), FlowDecoderConfig(estimator="voicebox")
    of_step = [drawn(seed, 200, step)[0] for seed in range(6000)]
    times = np.array([d.units / 2**24 for d in of_step])
    assert abs(times.mean() - 0.5) < 0.015 and abs(times.var() - 1 / 12) < 0.005
    assert np.mean([d.dropped for d in of_step]) == pytest.approx(0.2, abs=0.02)
    assert np.mean([d.stop > 0 for d in of_step]) == pytest.approx(0.5 * 60 / 61, abs=0.03)
    assert max(d.stop for d in of_step) == 60 and {d.start for d in of_step} == {0}
    assert {d.scored for d in of_step} == {200}  # what is given is scored as well
    of_usdm = [drawn(seed, 200, usdm)[0] for seed in range(6000)]
    given = [d for d in of_usdm if d.stop > d.start]
    assert np.mean([d.dropped for d in of_usdm]) == pytest.approx(0.2, abs=0.02)
    assert len(given) / 6000 == pytest.approx(0.8 * 0.7 * 60 / 61, abs=0.03)
    assert not any(d.dropped for d in given)
    assert max(d.stop - d.start for d in given) == 60 and max(d.stop for d in given) > 190
    assert all(d.scored == 200 - (d.stop - d.start) for d in of_usdm)


# -- the loss ------------------------------------------------------------------------------------


def reference(model: FlowModel, mb: MicroBatch) -> tuple[torch.Tensor, dict[str, float], float]:
    """Sum of squared errors, by task too, and how many values: from the formulas, row by row."""
    config, net = model.config, model.net
    sigma, total, by_task, values = float(config.sigma), torch.zeros(()), {}, 0.0
    for number, document in enumerate(model.documents(mb)):
        x1 = torch.from_numpy(document.arrays["mel"][0].copy())
        seed = int(document.arrays["draws"][0][0])
        draws, rng = drawn(seed, len(x1), config)
        z = torch.from_numpy(rng.standard_normal(x1.shape, np.float32))
        t = draws.units / 2**24
        y = (1 - (1 - sigma) * t) * z + t * x1
        u = x1 - (1 - sigma) * z
        given = torch.zeros_like(x1)
        given[draws.start : draws.stop] = x1[draws.start : draws.stop]
        mask = torch.ones(len(x1), dtype=torch.bool)
        if config.of_voicebox:
            mask[draws.start : draws.stop] = False
        found = velocity(net, document.arrays, y, t, given, draws.dropped)
        squared = ((found - u)[mask] ** 2).sum()
        total = total + squared
        by_task[mb.tasks[number]] = by_task.get(mb.tasks[number], 0.0) + squared.item()
        values += float(mask.sum() * x1.shape[1])
    return total, by_task, values


def velocity(
    net: torch.nn.Module,
    arrays: dict[str, list[np.ndarray]],
    y: torch.Tensor,
    t: float,
    given: torch.Tensor,
    dropped: bool,
) -> torch.Tensor:
    """By the net's parts: what is dropped is not there, or zero."""
    codes = torch.from_numpy(arrays["codes"][0].astype(np.int64))
    units, there = torch.tensor([round(t * 2**24)]), torch.ones(1, len(y), dtype=torch.bool)
    if net.config.of_voicebox:
        ids = torch.full((len(y),), 20) if dropped else None
        if ids is None:  # the unit in the middle of each frame, at 50 a second
            at = [min(len(codes) - 1, int((n + 0.5) * 320 / 16000 * 50)) for n in range(len(y))]
            ids = codes[at, 0]
        mean = net.input_embedding(ids)[None]
        speaker = None
    else:
        embedded = net.input_embedding(codes).reshape(1, len(codes), -1)
        known = torch.ones(1, len(codes), dtype=torch.bool)
        mean = net.encoder_proj(net.encoder(embedded, known))
        direction = functional.normalize(torch.from_numpy(arrays["voice"][0]), dim=1)
        speaker = net.spk_embed_affine_layer(direction)
        if dropped:
            mean, speaker = 0 * mean, 0 * speaker
    prompt = (0 * given if dropped else given)[None]
    return net.decoder(y[None], units, mean, prompt, speaker, there)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_formula(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path)
    model.model.eval()  # no dropout
    mb = batch_of(kind, encoder_of(kind, tmp_path), [11, 12, 13, 14, 15, 16])
    (term,) = model.loss(model.collate(mb))
    total, by_task, values = reference(model, mb)
    assert (term.name, term.counted) == ("flow", "flow_values")
    assert model.counts(mb)["flow_values"] == values == term.count.item()
    assert term.sum.item() == pytest.approx(total.item(), rel=1e-6)
    assert {task: s.item() for task, (s, _) in term.by_task.items()} == pytest.approx(
        by_task, rel=1e-6
    )
    assert sum(c.item() for _, c in term.by_task.values()) == values
    parameters = dict(model.net.named_parameters())
    found = torch.autograd.grad(term.trained / values, list(parameters.values()))
    expected = torch.autograd.grad(total / values, list(parameters.values()))
    largest = max(one.abs().max().item() for one in expected)
    for name, one, two in zip(parameters, found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6 * largest, msg=name)


def test_tasks_weigh_in_training_alone(tmp_path: Path) -> None:
    model = model_of("voicebox", tmp_path)
    model.task_weights["dub"] = 3.0
    mb = batch_of("voicebox", encoder_of("voicebox", tmp_path), [1, 2, 3])
    model.model.train()
    model.supervised.train()
    (term,) = model.loss(model.collate(mb))
    parts = {task: s.item() for task, (s, _) in term.by_task.items()}
    assert term.sum.item() == pytest.approx(parts["flow"] + 3 * parts["dub"], rel=1e-5)
    model.supervised.eval()
    (term,) = model.loss(model.collate(mb))
    assert term.sum.item() == pytest.approx(sum(parts.values()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_of_nothing_reaches_every_parameter_and_counts_nothing(
    kind: str, tmp_path: Path
) -> None:
    model = model_of(kind, tmp_path)
    (term,) = model.loss(model.dummy())
    assert (term.sum.item(), term.count.item()) == (0, 0)
    term.trained.backward()
    for name, parameter in model.net.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    empty = model.counts(MicroBatch.join(0, 0, 0, []))
    assert set(empty) == set(model.counts(batch_of(kind, encoder_of(kind, tmp_path), [1])))
    assert empty["flow_values"] == 0


def test_what_the_published_training_freezes_is_named(tmp_path: Path) -> None:
    model = model_of("dit", tmp_path)
    model.freeze(["encoder.*", "input_embedding.*", "encoder_proj.*"])
    left = {name.split(".")[0] for name, p in model.net.named_parameters() if p.requires_grad}
    assert left == {"decoder", "spk_embed_affine_layer"}


# -- a run ---------------------------------------------------------------------------------------


def sections(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    path = str(flows.corpus(folder, kind))
    return {
        "data": {
            "train": [{"path": path}],
            "eval": [{"path": path, "name": "dev"}],
            "mode": "padded",
            "tokens_per_batch": 200,
        },
        "model": flows.model(kind),
        "optim": {"lr": 1e-2},
        "train": {"max_steps": 20, "precision": "fp32"},
        "parallel": {"device": "cpu"},
        "evaluate": {"every": 10},
        "checkpoint": {"every": 10, "best": "loss/flow"},
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_is_evaluated_by_its_loss_and_nothing_is_asked(tmp_path: Path) -> None:
    place = in_process.run(tmp_path / "runs", **sections(tmp_path, "dit"))
    losses = in_process.losses(place)
    assert len(losses) == 20 and losses[-1] < 0.3 * losses[0]
    figures = read_lines(place / "eval.jsonl")[-1]
    assert figures["loss/flow"] == pytest.approx(losses[-1], rel=0.3)
    assert not [name for name in figures if name.startswith(("wer", "perplexity"))]


def test_what_is_shown_of_an_example_is_its_arrays(tmp_path: Path) -> None:
    encoder = encoder_of("dit", tmp_path)
    source = Source(path=str(flows.corpus(tmp_path)))
    index = build_index([source], "train", encoder, tmp_path / "index", workers=1)
    lines = shown.examples(index, encoder, 200, 1, colours=False)
    assert lines[0] == "example 1: f0, task flow: 6 positions, 6 supervised, 0.1 s of audio"
    assert "    mel: float32 [6, 8]" in lines and "    codes: int32 [3, 2]" in lines


def test_configs_name_no_tokenizer_and_text_models_do() -> None:
    said = [m.key for m in contradictions(Config.model_validate({"model": flows.model("dit")}))]
    assert "model.tokenizer" not in said
    other = Config.model_validate({"model": {"config": {"model_type": "qwen3"}}})
    assert "model.tokenizer" in [mistake.key for mistake in contradictions(other)]


def test_a_budget_is_tried_with_frames(tmp_path: Path) -> None:
    model = model_of("voicebox", tmp_path)
    found = _sequence(model, 37)
    mb = MicroBatch.join(0, 1, 0, [found, found])
    (term,) = model.loss(model.collate(mb))
    assert len(found.input_ids) == 37
    assert model.counts(mb)["flow_values"] == term.count.item() > 0


def test_text_is_not_asked_of_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="FlowDecoder reads and writes no text"):
        _ = model_of("one", tmp_path).tokenizer
    silent = replace(example_of("one")[0], input=())
    with pytest.raises(BadExample, match="has no speech tokens to be spoken"):
        encoder_of("one", tmp_path).prompt(silent, [])


@pytest.mark.parametrize("kind", ["dit", "one", "voicebox"])
def test_tokens_are_spoken_by_the_flow_from_their_noise(kind: str, tmp_path: Path) -> None:
    model, encoder = model_of(kind, tmp_path), encoder_of(kind, tmp_path)
    examples = [example_of(kind, 0.24 + 0.12 * number)[0] for number in range(5)]
    prompts = [encoder.prompt(example, []) for example in examples]
    settings = Speak.model_validate({"flow": {"steps": 3, "guidance": 0.7, "schedule": "cosine"}})
    together = model.speak(prompts, range(5), settings)
    config, bins = encoder.config, encoder.mel.bins
    assert [len(one) for one in together] == [len(prompt.input_ids) for prompt in prompts]
    for place, prompt in enumerate(prompts):
        (alone,) = model.speak([prompt], [place], settings)
        np.testing.assert_allclose(alone, together[place], rtol=0, atol=1e-4)
    # By the net itself, as it is trained: a step of Euler along v + 0.7 (v - v_null).
    prompt, length = prompts[-1], len(prompts[-1].input_ids)
    codes = prompt.arrays["codes"][0]
    noise = np.random.default_rng(4).standard_normal((length, bins), np.float32)
    where = torch.from_numpy(noise)[None]
    told = {
        "input_ids": torch.from_numpy(codes.astype(np.int64))[None],
        "rows": torch.tensor([len(codes)]),
        "frames": torch.tensor([length]),
        "prompt": torch.zeros(1, length, bins),
    }
    if kind == "voicebox":
        told["rows_of"] = torch.from_numpy(rows_of(length, len(codes), config))[None]
    if config.speaker_width:
        told["voice"] = torch.from_numpy(prompt.arrays["voice"][0])
    model.net.eval()
    times = [1 - math.cos(math.pi * step / 6) for step in range(4)]
    with torch.no_grad():
        for start, stop in pairwise(times):
            units = torch.tensor([round(start * T_UNITS)])
            given, bare = (
                model.net(at=where, units=units, dropped=torch.tensor([off]), **told).velocity
                for off in (False, True)
            )
            where = where + (stop - start) * (given + 0.7 * (given - bare))
    np.testing.assert_allclose(where[0].numpy(), together[-1], rtol=0, atol=1e-4)
