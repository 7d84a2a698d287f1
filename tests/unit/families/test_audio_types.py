"""Every model type of audio_lm against transformers alone: ids, losses, answers, exports."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import PreTrainedModel

from raysft.config import schema
from raysft.config.families import named
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import Audio, Example, MicroBatch, Sequence
from raysft.data.tokenizer import byte_tokenizer
from raysft.errors import BadExample, UserError
from raysft.export import export
from raysft.families.audio_lm.types import TYPES
from raysft.models import SpeechModel, build
from raysft.models.layout import Static
from tests.support import audio_voxtral
from tests.support import audio_zoo as zoo
from tests.support.worlds import ROOT

SAMPLES = (9000, 24000, 15000, 31000)  # under and over a second, under and over a chunk
FAST = ("glmasr", "granite_speech", "qwen2_5_omni_thinker", "qwen3_asr")  # in make test
KINDS = [
    pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in sorted(zoo.TINY)
]
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """folder(kind): a checkpoint of it, written once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = zoo.save(kind, tmp_path_factory.mktemp(kind) / "base")
        return made[kind]

    return make


def encoder_of(path: Path) -> Encoder:
    """As a data task has it: sent there."""
    model = schema.Model(path=str(path), family="audio_lm")
    found = make_encoder(model, schema.Data(), "unused")
    return pickle.loads(pickle.dumps(found))


def model_of(path: Path, mode: str = "packed") -> SpeechModel:
    model, data = schema.Model(path=str(path), family="audio_lm"), schema.Data(mode=mode)
    found = build(model, data, make_encoder(model, data, "unused"), 0)
    found.model.eval()
    return found


def examples() -> list[tuple[Example, np.ndarray]]:
    """Questions about one clip each."""
    return [
        (
            Example(f"e{i}", "asr", (Audio(f"{i}.wav"),), (f"it is {i}",), "Say it.", text="it"),
            zoo.clip(samples, i),
        )
        for i, samples in enumerate(SAMPLES)
    ]


def batch(*items: Sequence) -> MicroBatch:
    return MicroBatch.join(0, 1, 0, list(items))


def theirs(
    kind: str, path: Path, example: Example, wave: np.ndarray, answer: bool
) -> dict[str, Any]:
    """What transformers' processor makes of the whole dialogue, or of its prompt."""
    parts = [{"type": "audio"}, {"type": "text", "text": example.instruction}]
    turns = [{"role": "user", "content": parts}]
    if answer:
        said = [{"type": "text", "text": example.output[0]}]
        turns.append({"role": "assistant", "content": said})
    if kind == "voxtral":
        return audio_voxtral.inputs(path, turns, [wave])
    processor = zoo.processor_of(kind, zoo.spoken_of(kind))
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answer)
    made = dict(processor(text=[text], audio=[wave], return_tensors="pt"))
    made.pop("mm_token_type_ids", None)
    return made


def plain(kind: str, path: Path) -> PreTrainedModel:
    return named("audio_lm").net_class(kind).from_pretrained(path).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_tokens_are_planned_as_are_encoded(kind: str, folder: Folder) -> None:
    encoder = encoder_of(folder(kind))
    rng = np.random.default_rng(0)
    most = min(getattr(encoder, "most", None) or 40000, 40000)
    lengths = [*rng.integers(400, most, 40), *range(15998, 16003), *range(16158, 16163)]
    usable = 0
    for samples in lengths:
        try:
            planned = encoder.part_length(Audio("x"), int(samples), False)
        except BadExample as error:
            assert error.kind == "too short"
            continue
        usable += 1
        assert len(encoder.part_encoded(Audio("x"), zoo.clip(int(samples)), None).ids) == planned
    assert len(lengths) == 50 and usable > 40


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ids_losses_and_answers_are_those_of_transformers(kind: str, folder: Folder) -> None:
    path = folder(kind)
    encoder, net = encoder_of(path), plain(kind, path)
    items, expected, answers, prompts = [], 0.0, [], []
    for example, wave in examples():
        item = encoder.encode(example, [wave])
        made = theirs(kind, path, example, wave, answer=True)
        ids = made["input_ids"][0].tolist()
        assert item.input_ids.tolist() == ids[: len(item.input_ids)]
        labels = torch.full((1, len(ids)), -100)
        labels[0, : len(item.labels)] = torch.from_numpy(item.labels.astype(np.int64))
        logits = net(**made).logits[0, :-1]
        expected += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        items.append(item)
        asked = theirs(kind, path, example, wave, answer=False)
        prompts.append(encoder.prompt(example, [wave]))
        assert prompts[-1].input_ids.tolist() == asked["input_ids"][0].tolist()
        tokens = net.generate(**asked, max_new_tokens=5, do_sample=False)
        answers.append(tokens[0, asked["input_ids"].shape[1] :].tolist())
    for mode in ("packed", "padded"):
        ours = model_of(path, mode)
        for static in (None, Static(700)):  # of packed rows
            found = ours.loss(ours.collate(batch(*items), static=static))[0].sum.item()
            assert found == pytest.approx(expected, rel=1e-5)
        assert ours.generate(prompts, 5) == [
            ours._text(answer, ours.stop_ids) for answer in answers
        ]


def first_row(given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[positions, H] of what a layer is given; gemma3n has a dimension more in front."""
    return given[0][0].reshape(-1, given[0].shape[-1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_clip_does_not_depend_on_its_neighbours(kind: str, folder: Folder) -> None:
    ours = model_of(folder(kind))
    encoder = encoder_of(folder(kind))
    items = [encoder.encode(example, [wave]) for example, wave in examples()]
    seen: list[torch.Tensor] = []
    first = ours.net.get_decoder().layers[0]
    hook = first.register_forward_pre_hook(
        lambda part, args, given: seen.append(first_row(args or (given["hidden_states"],))),
        with_kwargs=True,
    )
    ours.loss(ours.collate(batch(*items)))
    together = seen.pop()
    for item in items:
        ours.loss(ours.collate(batch(item)))
    hook.remove()
    alone = sorted(seen, key=len)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_export_is_what_transformers_loads(kind: str, folder: Folder, tmp_path: Path) -> None:
    ours = model_of(folder(kind))
    for parameter in ours.net.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.01)
    weights = {f"lm.{name}": tensor for name, tensor in ours.net.state_dict().items()}
    again = plain(kind, export(model_of(folder(kind)), tmp_path / "out", weights))
    example, wave = examples()[1]
    made = theirs(kind, folder(kind), example, wave, answer=False)
    left, right = (net(**made).logits for net in (again, ours.net))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    left, right = (
        net.generate(**made, max_new_tokens=6, do_sample=False) for net in (again, ours.net)
    )
    assert left.tolist() == right.tolist()
    # Training goes on from it as from the base.
    encoder, base = encoder_of(tmp_path / "out"), encoder_of(folder(kind))
    assert encoder.fingerprint == base.fingerprint
    name = TYPES[kind].features
    spoken = zoo.spoken_of(kind)
    assert encoder.tokenizer.get_vocab() == spoken.get_vocab()
    assert np.array_equal(
        encoder.prompt(example, [wave]).arrays["features"],
        base.prompt(example, [wave]).arrays["features"],
    )
    assert name in made


@pytest.mark.parametrize("kind", KINDS)
def test_clips_that_do_not_fit_are_said_and_none_is_cut(kind: str, folder: Folder) -> None:
    encoder = encoder_of(folder(kind))
    most = getattr(encoder, "most", None)
    if most is not None:
        encoder.part_length(Audio("x"), most, False)
        said = r"its clip is \d+\.\d\d s, the model reads at most \d+\.\d\d s"
        with pytest.raises(BadExample, match=said) as raised:
            encoder.part_length(Audio("x"), most + 1, False)
        assert raised.value.kind == "too long"


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_that_trains_has_a_gradient_without_any_clip(
    kind: str, folder: Folder
) -> None:
    ours = model_of(folder(kind))
    ours.model.train()
    encoder = encoder_of(folder(kind))
    text = encoder.encode(Example("t", "asr", (), ("four",), "Two and two?"), [])
    for mb in (batch(text), MicroBatch.join(0, 1, 0, [])):
        ours.model.zero_grad(set_to_none=True)
        ours.loss(ours.collate(mb))[0].trained.backward()
        lacking = [
            n for n, p in ours.model.named_parameters() if p.requires_grad and p.grad is None
        ]
        assert not lacking


@pytest.mark.parametrize("kind", sorted(zoo.WHOLE))
@torch.no_grad()
def test_a_thinker_comes_from_its_whole_checkpoint_and_goes_back_into_it(
    kind: str, tmp_path: Path
) -> None:
    base = zoo.save_whole(kind, tmp_path / "base")
    whole = getattr(transformers, TYPES[kind].whole_net)
    before = whole.from_pretrained(base).state_dict()
    ours = model_of(base)
    assert type(ours.net) is named("audio_lm").net_class(kind)
    for name, tensor in ours.net.state_dict().items():
        assert torch.equal(tensor, before[f"thinker.{name}"])
    weights = {name: tensor + 0.01 for name, tensor in ours.net.state_dict().items()}
    out = export(ours, tmp_path / "out", {f"lm.{name}": t for name, t in weights.items()})
    with (
        safe_open(out / "model.safetensors", "pt") as after,
        safe_open(base / "model.safetensors", "pt") as theirs,
    ):
        assert set(after.keys()) == set(theirs.keys())
    after = whole.from_pretrained(out).state_dict()
    for name, tensor in before.items():
        mine = weights.get(name.removeprefix("thinker."))
        assert torch.equal(after[name], tensor if mine is None else mine), name
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == kind and config["talker_config"]
    assert (out / "spk_dict.pt").read_bytes() == (base / "spk_dict.pt").read_bytes()
    assert encoder_of(out).fingerprint == encoder_of(base).fingerprint


def test_the_page_has_every_type_and_what_is_refused() -> None:
    page = (ROOT / "docs" / "audio.md").read_text(encoding="utf-8")
    row = named("audio_lm")
    for kind in (*row.types, *row.refused_types):
        assert f"`{kind}`" in page, kind
    assert set(TYPES) == set(row.types) - {"qwen2_audio"}
    tried = set(zoo.TINY) | {"qwen2_5_omni", "qwen3_omni_moe"}
    assert tried == set(TYPES)


@pytest.mark.parametrize(
    "kind",
    ["qwen2_5_omni_thinker", "audioflamingo3", "musicflamingo", "glmasr", "voxtral"],
)
def test_our_log_mel_has_the_frames_that_the_processor_keeps(kind: str, folder: Folder) -> None:
    encoder = encoder_of(folder(kind))
    assert encoder._log_mel is not None
    longer = (32001, 32150, 41000, 64000, 70000) if TYPES[kind].layout == "rows" else ()
    for samples in (1301, 9000, 15999, 31999, 32000, *longer):
        wave = zoo.clip(samples, samples)
        ours = encoder.part_encoded(Audio("x"), wave, None)
        encoder._log_mel, fast = None, encoder._log_mel
        plain = encoder.part_encoded(Audio("x"), wave, None)
        encoder._log_mel = fast
        assert ours.ids.tolist() == plain.ids.tolist()
        np.testing.assert_allclose(ours.arrays["features"], plain.arrays["features"], atol=1e-4)
        assert ours.arrays.keys() == plain.arrays.keys()
        for counted in ours.arrays.keys() - {"features"}:
            assert ours.arrays[counted].tolist() == plain.arrays[counted].tolist()


def test_a_processor_that_does_not_hear_is_refused(folder: Folder, tmp_path: Path) -> None:
    deaf = shutil.copytree(folder("qwen3_asr"), tmp_path / "deaf")
    (deaf / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"model\.path: .* so nothing there reads audio"):
        encoder_of(deaf)
    other = shutil.copytree(folder("qwen3_asr"), tmp_path / "other")
    byte_tokenizer().save_pretrained(other)
    with pytest.raises(UserError, match=r"model\.tokenizer: it does not belong to a Qwen3ASRProc"):
        encoder_of(other)
    settings = zoo.config_of("qwen3_asr", zoo.tokenizer(zoo.TINY["qwen3_asr"].tokens))
    random = schema.Model(config=settings, tokenizer="bytes")
    with pytest.raises(UserError, match=r"model\.tokenizer: 'bytes' has no Qwen3ASRProcessor"):
        make_encoder(random, schema.Data(), "unused")
    random = random.model_copy(update={"tokenizer": str(folder("qwen3_asr"))})
    encoder = make_encoder(random, schema.Data(), "unused")
    assert build(random, schema.Data(), encoder, 0).dummy_document().arrays


def test_settings_that_the_processor_decides_are_refused(folder: Folder) -> None:
    path = str(folder("qwen3_asr"))
    with pytest.raises(UserError, match=r"data\.features: fbank, but qwen3_asr reads what its"):
        make_encoder(schema.Model(path=path), schema.Data(features="fbank"), "unused")
    model = schema.Model(path=path, feature_extractor={"chunk_length": 1})
    with pytest.raises(UserError, match=r"model\.feature_extractor: qwen3_asr takes the settings"):
        make_encoder(model, schema.Data(), "unused")
