"""pair: what its encoder makes of examples, and its losses against those of each model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysft.config.schema import Data, Model
from raysft.config.speech_tokens import SpeechTokens
from raysft.data.clips.speech_tokens import KMeans
from raysft.data.encode import make_encoder
from raysft.data.encode.base import Encoder
from raysft.data.example import Audio, Example, MicroBatch, Sequence
from raysft.errors import BadExample, UserError
from raysft.families.pair.model import PairLM
from raysft.models import build
from raysft.models.base import SpeechModel
from tests.support import flows, pairs

TASKS = ("tts", "dub")


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> SpeechTokens:
    path = tmp_path_factory.mktemp("pair") / "units.safetensors"
    settings = SpeechTokens(clusters=pairs.UNITS, path=str(path))
    rng = np.random.default_rng(0)
    clips = [(0.1 * rng.standard_normal(16000)).astype(np.float32) for _ in range(3)]
    KMeans.fit(clips, settings, 0).save(path)
    return settings


def encoders(units: SpeechTokens, folder: Path, mode: str = "padded") -> dict[str, Encoder]:
    """Of the pair, and of each model alone."""
    found = {}
    for name, section in (("pair", pairs.model()), ("llm", pairs.llm()), ("flow", pairs.flow())):
        data = Data(mode="padded" if name == "flow" else mode, speech_tokens=units)
        found[name] = make_encoder(Model(**section), data, folder)
    return found


def examples(count: int) -> list[tuple[Example, np.ndarray]]:
    rng, found = np.random.default_rng(5), []
    for number in range(count):
        clip = 0.1 * rng.standard_normal(round((0.2 + 0.08 * number) * flows.RATE))
        parts = ((f"say {number}",), (Audio(f"{number}.wav"),))
        example = Example(f"x{number}", TASKS[number % 2], *parts, instruction="Say it.")
        found.append((example, clip.astype(np.float32)))
    return found


def batch_of(encoder: Encoder, count: int = 4, seed: int = 7) -> MicroBatch:
    found = []
    for number, (example, clip) in enumerate(examples(count)):
        found.append(encoder.encode(example, [clip], np.random.default_rng(seed + number)))
    return MicroBatch.join(0, 1, 0, found)


def models(
    units: SpeechTokens, folder: Path, mode: str = "padded"
) -> tuple[dict[str, SpeechModel], dict[str, Encoder]]:
    """The pair, and models alone that have its weights."""
    made = encoders(units, folder, mode)
    found: dict[str, SpeechModel] = {}
    for name, section in (("pair", pairs.model()), ("llm", pairs.llm()), ("flow", pairs.flow())):
        data = Data(mode="padded" if name == "flow" else mode, speech_tokens=units)
        found[name] = build(Model(**section), data, made[name], 1)
    pair = found["pair"]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in pair.net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for name in ("llm", "flow"):
        found[name].net.load_state_dict(getattr(pair.net, name).state_dict())
    for one in found.values():
        one.model.eval()
        one.supervised.eval()
    return found, made


def same(one: Sequence, tokens: Sequence, sound: Sequence) -> None:
    count = len(tokens.input_ids)
    np.testing.assert_array_equal(one.input_ids[:count], tokens.input_ids)
    np.testing.assert_array_equal(one.labels[:count], tokens.labels)
    assert (one.labels[count:] == -100).all()
    assert len(one.input_ids) == count + len(sound.input_ids)
    for name, (values,) in sound.arrays.items():
        np.testing.assert_array_equal(one.arrays[name][0], values)


def test_an_example_is_that_of_each_model(units: SpeechTokens, tmp_path: Path) -> None:
    """In evaluation to the last bit; its length is measured as it is."""
    made = encoders(units, tmp_path)
    for example, clip in examples(5):
        alone = [made[name].encode(example, [clip]) for name in ("llm", "flow")]
        found = made["pair"].encode(example, [clip])
        same(found, *alone)
        assert made["pair"].measure(example, [len(clip)]) == len(found.input_ids)
    with pytest.raises(BadExample, match="no conversation"):
        made["pair"].measure(Example("d", "tts", (), (), document=("text",)), [])


@pytest.mark.parametrize("mode", ["padded", "packed"])
def test_losses_and_gradients_are_those_of_each_model_times_its_weight(
    mode: str, units: SpeechTokens, tmp_path: Path
) -> None:
    found, made = models(units, tmp_path, mode)
    mb = batch_of(made["pair"])
    pair = found["pair"]
    counts = pair.counts(mb)
    terms = {term.name: term for term in pair.loss(pair.collate(mb))}
    assert [(name, term.weight) for name, term in terms.items()] == [
        ("cross_entropy", 0.4),
        ("flow", 0.6),
    ]
    for name, term_name, counted in (
        ("llm", "cross_entropy", "supervised"),
        ("flow", "flow", "flow_values"),
    ):
        alone, own = found[name], batch_of(made[name])
        if name == "flow":  # the pair draws what is random of an example once
            own.arrays["draws"] = mb.arrays["draws"]
        (expected,) = alone.loss(alone.collate(own))
        term = terms[term_name]
        assert term.counted == expected.counted == counted
        assert counts[counted] == alone.counts(own)[counted] == term.count.item()
        assert term.sum.item() == pytest.approx(expected.sum.item(), rel=1e-6)
        for task in TASKS:
            ours, theirs = term.by_task[task], expected.by_task[task]
            assert [v.item() for v in ours] == pytest.approx([v.item() for v in theirs], rel=1e-6)
        loss = term.weight * term.trained / counts[counted]
        loss.backward(retain_graph=True)
        (expected.trained / counts[counted]).backward()
        for key, parameter in getattr(pair.net, name).named_parameters():
            theirs = dict(alone.net.named_parameters())[key].grad
            wanted = term.weight * theirs
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6, msg=key)


def test_a_turn_of_nothing_reaches_every_parameter_and_counts_nothing(
    units: SpeechTokens, tmp_path: Path
) -> None:
    found, made = models(units, tmp_path)
    pair = found["pair"]
    terms = pair.loss(pair.dummy())
    assert [(term.sum.item(), term.count.item()) for term in terms] == [(0, 0), (0, 0)]
    sum(term.trained for term in terms).backward()
    for name, parameter in pair.net.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    empty = pair.counts(MicroBatch.join(0, 0, 0, []))
    assert empty.keys() == pair.counts(batch_of(made["pair"])).keys()
    assert not any(empty.values())


def test_it_writes_what_the_language_model_does(units: SpeechTokens, tmp_path: Path) -> None:
    found, made = models(units, tmp_path)
    example, clip = examples(1)[0]
    answers = [
        found[name].generate([made[name].prompt(example, [clip])], 5) for name in ("pair", "llm")
    ]
    assert answers[0] == answers[1]


def test_what_is_exported_is_loaded_again(units: SpeechTokens, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from raysft.export import export

    found, _ = models(units, tmp_path)
    assert isinstance(found["pair"], PairLM)
    export(found["pair"], tmp_path / "out")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded = net.state_dict()
    for name, value in found["pair"].net.state_dict().items():
        assert torch.equal(loaded[name], value), name
    section = Model(path=str(tmp_path / "out"))
    data = Data(mode="padded", speech_tokens=units)
    again = build(section, data, make_encoder(section, data, tmp_path), 3)
    for name, value in again.net.state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"flow_config": {"codebook": 3}}, "model.config.flow_config.codebook: unknown key"),
        ({"llm_wait": 0.4}, "model.config.llm_wait: unknown key"),
    ],
)
def test_a_config_that_is_wrong_is_refused(
    changes: dict[str, Any], said: str, units: SpeechTokens, tmp_path: Path
) -> None:
    section = Model(**pairs.model(**changes))
    data = Data(mode="padded", speech_tokens=units)
    with pytest.raises(UserError, match=said):
        build(section, data, make_encoder(section, data, tmp_path), 1)
