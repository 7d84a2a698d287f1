"""Latents of codecs: what the codec itself quantises and decodes, on any number of threads."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from raysft import synthesize
from raysft.config.patches import Codec
from raysft.config.schema import Data, Model
from raysft.data.clips.audio import load
from raysft.data.encode import make_encoder
from raysft.errors import BadExample, UserError
from raysft.export import export
from raysft.families.patch_lm import spread
from raysft.families.patch_lm.codecs import CodecLatents
from raysft.families.patch_lm.encode import LATENTS, PatchEncoder
from raysft.synthesis.run import asked_of
from raysft.transcribe.model import load as answering
from tests.support import codecs, patches
from tests.support.in_process import losses, run
from tests.unit.families.test_patch_lm import encoded, examples_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder, made = tmp_path_factory.mktemp("codecs"), dict[str, Path]()
    return lambda kind: made.get(kind) or made.setdefault(kind, codecs.codec(folder, kind))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(round(seconds * codecs.RATE))).astype(np.float32)


def quantised(folder: Path, kind: str, wave: np.ndarray) -> torch.Tensor:
    """[frames, width]: what the codec, whole, gives to its quantiser (the VAE: its mean)."""
    net = transformers.AutoModel.from_pretrained(folder).eval()
    if kind == "vibevoice":
        extract = transformers.AutoFeatureExtractor.from_pretrained(folder)
        told = extract(wave, sampling_rate=codecs.RATE, pad_to_multiple_of=codecs.HOP[kind])
        return net.encode(told["input_values"], sample=False).latents[0]
    held: list[torch.Tensor] = []
    at = "forward" if kind == "dac" else "encode"
    inner = getattr(net.quantizer, at)
    setattr(net.quantizer, at, lambda given, *rest: (held.append(given), inner(given, *rest))[1])
    net(torch.from_numpy(wave).view(1, 1, -1))
    return held[0][0].T


@pytest.mark.parametrize("kind", codecs.KINDS)
def test_latents_are_what_the_codec_quantises(kind: str, make: Make) -> None:
    latents = CodecLatents(Codec(path=str(make(kind))))
    wave = noise(0.42)
    whole = wave[: len(wave) // codecs.HOP[kind] * codecs.HOP[kind]]
    found = latents(wave)
    assert found.shape == (latents.frames(len(wave)), codecs.WIDTH[kind]) == (42, latents.width)
    assert latents.frames_per_second == 100
    with torch.no_grad():
        expected = quantised(make(kind), kind, whole).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    scaled = CodecLatents(Codec(path=str(make(kind)), mean=0.5, std=2.0))
    np.testing.assert_allclose(scaled(wave), (found - 0.5) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", codecs.KINDS)
def test_a_clip_without_a_frame_has_no_latents(kind: str, make: Make) -> None:
    short = noise(0.5 * codecs.HOP[kind] / codecs.RATE)
    found = CodecLatents(Codec(path=str(make(kind))))(short)
    assert found.shape == (0, codecs.WIDTH[kind])
    asked = patches.model(mel=None, codec={"path": str(make(kind))}, size=5)
    encoder = make_encoder(Model.model_validate(asked), Data(), "none")
    with pytest.raises(BadExample, match="is too short: it has no whole patch"):
        encoder.speaking(asked_of("x", "tts", "short.wav"), [noise(0.03)])


@pytest.mark.parametrize("kind", codecs.KINDS)
def test_waves_are_the_codecs_own(kind: str, make: Make) -> None:
    latents = CodecLatents(Codec(path=str(make(kind)), mean=0.5, std=2.0))
    frames = np.random.default_rng(0).standard_normal((7, latents.width)).astype(np.float32)
    raw = torch.from_numpy(frames * 2 + 0.5).unsqueeze(0)
    net = transformers.AutoModel.from_pretrained(make(kind)).eval()
    with torch.no_grad():
        if kind == "vibevoice":
            expected = net.decode(raw).audio
        elif kind == "dac":
            expected = net.decode(quantized_representation=raw.mT).audio_values
        else:
            expected = net.decoder(raw.mT)
    found = latents.wave(frames)
    assert found.shape == (7 * codecs.HOP[kind],) and found.dtype == np.float32
    expected = expected.flatten().numpy()[: len(found)]
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", codecs.KINDS)
def test_threads_and_copies_change_no_bit(kind: str, make: Make) -> None:
    """A latent is computed on one thread, and those that compute else keep theirs."""
    latents = CodecLatents(Codec(path=str(make(kind))))
    wave, before = noise(3.0), torch.get_num_threads()
    first = latents(wave)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            copy = pickle.loads(pickle.dumps(latents))
            np.testing.assert_array_equal(copy(wave), first)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def told(path: Path, **more: Any) -> Model:
    return Model.model_validate(patches.model(mel=None, codec={"path": str(path), **more}))


def changed(path: Path, to: Path, drop: str = "", **values: Any) -> Path:
    """A copy of a codec's folder whose config says otherwise. drop: a file that is left out."""
    to.mkdir()
    for file in path.iterdir():
        if file.name != drop:
            (to / file.name).write_bytes(file.read_bytes())
    config = to / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    return to


@pytest.mark.parametrize("key", ["rate", "width"])
def test_another_codec_than_the_config_says_is_refused_at_once(key: str, make: Make) -> None:
    own = {"rate": codecs.RATE, "width": 16}[key]
    make_encoder(told(make("dac"), **{key: own}), Data(), "none")
    with pytest.raises(UserError, match=rf"model\.patches\.codec\.{key}: 24000, but .* {own}"):
        make_encoder(told(make("dac"), **{key: 24000}), Data(), "none")


def test_what_is_no_codec_says_why(make: Make, tmp_path: Path) -> None:
    def refused(match: str, path: Path) -> None:
        with pytest.raises(UserError, match=rf"model\.patches\.codec\.{match}"):
            make_encoder(told(path), Data(), "none")

    encodec, vibevoice = make("encodec"), make("vibevoice")
    refused("path: .* does not exist", tmp_path / "nothing")
    refused("path: .* of type bert; codecs", changed(encodec, tmp_path / "a", model_type="bert"))
    refused("path: .* reads 2 channels", changed(encodec, tmp_path / "b", audio_channels=2))
    refused("path: .* has normalize", changed(encodec, tmp_path / "c", normalize=True))
    refused("path: .* has chunk_length_s", changed(encodec, tmp_path / "d", chunk_length_s=1.0))
    silent = changed(vibevoice, tmp_path / "e", drop="preprocessor_config.json")
    refused("rate: .* does not say for how many Hz", silent)
    make_encoder(told(silent, rate=24000), Data(), "none")
    refused("path: .* no weights", changed(encodec, tmp_path / "f", drop="model.safetensors"))
    wider = changed(encodec, tmp_path / "g", num_residual_layers=2)
    with pytest.raises(UserError, match=r"codec\.path: .*: \d+ weights are missing or"):
        CodecLatents(Codec(path=str(wider)))(noise(0.1))
    half = changed(encodec, tmp_path / "h") / "model.safetensors"
    half.write_bytes(half.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"codec\.path: .* cannot be read: "):
        CodecLatents(Codec(path=str(half.parent)))(noise(0.1))
    both = patches.model(codec={"path": str(encodec)})
    with pytest.raises(UserError, match="both mel and codec are given: leave one out"):
        make_encoder(Model.model_validate(both), Data(), "none")
    spec = Data.model_validate({"augment": {"spec": {"p": 1.0}}})
    with pytest.raises(UserError, match=r"data\.augment\.spec: masks a spectrogram"):
        make_encoder(told(encodec), spec, "none")


def test_the_spread_of_latents_is_measured_of_the_first_clips(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, path = patches.corpus(tmp_path, 4), make("encodec")
    spread.main([str(path), str(corpus), "3"])
    found = capsys.readouterr().out
    clips = [load(str(tmp_path / name), codecs.RATE) for name in ("0.wav", "1.wav", "2.wav")]
    values = np.concatenate([CodecLatents(Codec(path=str(path)))(clip) for clip in clips])
    mean, std = (float(values.astype(np.float64).mean()), float(values.astype(np.float64).std()))
    assert found == f"codec: {{path: {path}, mean: {mean:.6g}, std: {std:.6g}}}\n"
    with pytest.raises(UserError, match="do not vary"):
        spread.spread(CodecLatents(Codec(path=str(path))), [])
    with pytest.raises(UserError, match="usage"):
        spread.main([str(path)])


def test_a_run_learns_latents_and_speaks_by_the_codecs_decoder(make: Make, tmp_path: Path) -> None:
    codec = {"path": str(make("encodec")), "mean": -0.03, "std": 0.1}
    model = patches.model(mel=None, codec=codec)
    corpus = patches.corpus(tmp_path / "corpus", 12)
    data = {"train": [{"path": str(corpus)}], "tokens_per_batch": 400}
    speak = {"max_seconds": 0.3, "flow": {"steps": 2}}
    folder = run(
        tmp_path, data=data, model=model, train={"max_steps": 2, "precision": "fp32"}, speak=speak
    )
    assert len(losses(folder)) == 2
    (one,) = synthesize(folder, ["one"])
    patch = patches.SIZE * codecs.HOP["encodec"]
    assert one.rate == codecs.RATE and 0 < len(one.wave) <= 0.3 * codecs.RATE
    assert len(one.wave) % patch == 0 and 0 < np.abs(one.wave).max() <= 1
    with pytest.raises(UserError, match=r"speak\.vocoder: .* whose own decoder makes waves"):
        synthesize(folder, ["one"], ["speak.vocoder=some/hifigan"])

    # An export knows its codec, which may lie elsewhere, and is the same else.
    found = answering(str(folder))
    export(found.speech_model, tmp_path / "out")
    moved = changed(make("encodec"), tmp_path / "moved")
    for more in ({}, {"patches": {"codec": {"path": str(moved)}}}):
        given = Model.model_validate({"path": str(tmp_path / "out"), **more})
        again = make_encoder(given, Data(), "none")
        assert isinstance(again, PatchEncoder) and again.fingerprint == found.encoder.fingerprint
        (example,) = examples_of(tmp_path / "corpus", 12)[:1]
        own, other = (encoded(encoder, example) for encoder in (found.encoder, again))
        np.testing.assert_array_equal(own.arrays[LATENTS][0], other.arrays[LATENTS][0])
    with pytest.raises(UserError, match=r"model\.patches\.codec: the model at"):
        other = {"codec": {"path": str(moved), "std": 1.0}}
        given = Model.model_validate({"path": str(tmp_path / "out"), "patches": other})
        make_encoder(given, Data(), "none")
