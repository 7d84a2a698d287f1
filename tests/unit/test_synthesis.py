"""From a run of a model that speaks to waves: the command, what it refuses, and vocoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from raysft import command, synthesize
from raysft.config.mel import Mel
from raysft.data.clips import mels
from raysft.data.clips.speech_tokens import KMeans
from raysft.errors import UserError
from raysft.synthesis.asked import read
from raysft.synthesis.vocoders import GriffinLim, vocoder_of
from tests.support import flows, patches
from tests.support.in_process import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("speaks")
    data: dict[str, Any] = {"train": [{"path": str(patches.corpus(folder / "corpus"))}]}
    data |= {"tokens_per_batch": 400, "prompts": {"asr": "", "tts": ""}}
    speak = {"max_seconds": 0.4, "flow": {"steps": 2}}
    train = {"max_steps": 2, "precision": "fp32"}
    return run(folder, data=data, model=patches.model(), train=train, speak=speak)


def said(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_texts_and_files_become_waves(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("one two\n\nthree\n")
    out = tmp_path / "said"
    command.synthesize([str(trained), "four", str(lines), "--out", str(out)])
    found = said(capsys)
    assert [text for _, text in found] == ["four", "one two", "three"]
    assert sorted(out.iterdir()) == sorted(Path(path) for path, _ in found)
    for path, _ in found:
        wave, rate = soundfile.read(path)
        assert rate == patches.RATE and 0 < len(wave) <= 0.4 * rate
        assert len(wave) % (320 * patches.SIZE) == 0 and np.abs(wave).max() > 0


def test_a_manifest_is_said_by_its_ids_and_one_text_into_one_file(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = trained.parent / "corpus" / "patches.jsonl"
    command.synthesize([str(trained), str(manifest), "--out", str(tmp_path / "said")])
    found = said(capsys)
    assert len(found) == 24 and Path(found[0][0]).name == "p0.wav"
    command.synthesize([str(trained), "one", "--out", str(tmp_path / "one.wav")])
    assert said(capsys) == [[str(tmp_path / "one.wav"), "one"]]
    with pytest.raises(UserError, match="is one file for 2 texts: name a folder"):
        command.synthesize([str(trained), "one", "two", "--out", str(tmp_path / "one.wav")])


def test_the_same_seed_says_the_same_alone_and_among_others(trained: Path) -> None:
    many = list(synthesize(trained, ["one", "two", "three four"]))
    (again,) = synthesize(trained, ["one"])
    # Phases are guessed from magnitudes, and rounding may turn those of an edge.
    assert np.linalg.norm(again.wave - many[0].wave) < 0.05 * np.linalg.norm(again.wave)
    (other,) = synthesize(trained, ["one"], ["speak.seed=1"])
    assert len(other.wave) != len(again.wave) or not np.allclose(other.wave, again.wave, atol=0.1)


def test_a_clip_is_spoken_anew(trained: Path, tmp_path: Path) -> None:
    clip = tmp_path / patches.clip(tmp_path, "a.wav", 5.2, 1)
    (found,) = synthesize(trained, ["say it anew"], speaker=clip)
    assert found.seconds > 0 and not found.error
    (lost,) = synthesize(trained, ["x"], speaker=tmp_path / "none.wav")
    assert "none.wav" in lost.error and not len(lost.wave)


def test_what_a_manifest_says_of_what_is_heard_is_not_passed_over(trained: Path) -> None:
    manifest, clip = trained.parent / "corpus" / "patches.jsonl", trained.parent / "corpus/0.wav"
    with pytest.raises(UserError, match=r"--speaker: .* says itself what is heard before p0"):
        synthesize(trained, [str(manifest)], speaker=clip)


@pytest.mark.parametrize(
    ("word", "task", "named"),
    [
        ("missing.jsonl", "tts", "missing.jsonl: there is no such file"),
        ("missing.txt", "tts", "missing.txt: there is no such file"),
        ("question.wav", "tts", "is the name of a clip, and no text: say --task dialog"),
        ("latin.txt", "tts", "latin.txt: not valid UTF-8 at byte 1"),
        ("lines.txt", "dialog", "replies to clips, and these are texts"),
        ("tts.jsonl", "dialog", "q1: task dialog replies to dialogs, and this is none"),
    ],
)
def test_files_that_are_not_there_or_of_another_task_are_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, task: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"h\xe9")
    Path("lines.txt").write_text("one\n")
    record = {"id": "q1", "task_type": "asr", "wav_path": "a.wav", "text": "hello"}
    Path("tts.jsonl").write_text(json.dumps(record) + "\n")
    patches.clip(tmp_path, "a.wav", 0.5, 1)
    with pytest.raises(UserError, match=named):
        read([word], task, None)
    assert [one.text for one in read(["Play a.wav"], "tts", None)] == ["Play a.wav"]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("speak.flow.stepz=3", r"speak\.flow\.stepz: unknown key; did you mean speak\.flow\.steps"),
        ("speak.flow.solver=rk4", "speak.flow.solver"),
        ("optim.lr=1", "only keys of speak can be set here"),
    ],
)
def test_keys_that_cannot_be_are_named(trained: Path, key: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        list(synthesize(trained, ["x"], [key]))


def test_tokens_are_spoken_by_a_flow_decoder(tmp_path: Path) -> None:
    folder, corpus = (
        flows.base(tmp_path, "voicebox"),
        flows.corpus(tmp_path / "corpus", "voicebox", 5),
    )
    found = list(synthesize(folder, [str(corpus)], ["speak.flow.steps=2"]))
    assert [one.id for one in found] == [f"f{number}" for number in range(5)]
    rate, hop = flows.MEL["rate"], flows.MEL["hop"]
    for number, one in enumerate(found):
        seconds = 0.12 * (1 + number % 5)
        assert one.rate == rate and abs(one.seconds - seconds) <= 2 * hop / rate
    (silent,) = synthesize(folder, ["a text"])
    assert "has no speech tokens to be spoken" in silent.error


def test_a_decoder_stands_beside_a_model_that_writes_units(trained: Path, tmp_path: Path) -> None:
    folder = flows.base(tmp_path, "voicebox")
    with pytest.raises(UserError, match=r"its model writes no units for .* to speak"):
        synthesize(trained, ["x"], decoder=folder)
    text = {"model_type": "qwen3", **{k: v for k, v in patches.TEXT.items() if k != "model_type"}}
    model = {"tokenizer": "bytes", "speech_units": 20, "config": text}
    lines = tmp_path / "units.json"
    items = [
        {"id": f"u{n}", "instruction": "say", "input": "x", "output": f"[Hu{n}][Hu{n + 1}]"}
        for n in range(8)
    ]
    lines.write_text(json.dumps(items))
    data = {"train": [{"path": str(lines), "task": "tts"}], "tokens_per_batch": 200}
    writes = run(tmp_path / "writes", data=data, model=model, train={"max_steps": 1})
    with pytest.raises(UserError, match="does not speak; name a run of a family that does"):
        synthesize(writes, ["x"])
    with pytest.raises(UserError, match=r"--decoder: .* is no flow decoder"):
        synthesize(writes, ["x"], decoder=trained)
    found = list(synthesize(writes, ["x", "y"], ["speak.max_seconds=1"], decoder=folder))
    assert all(one.seconds > 0 or "no speech tokens" in one.error for one in found)


def test_a_decoder_of_other_units_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    books = []
    for name in ("one", "two"):
        centroids = rng.standard_normal((20, 2 * 80)).astype(np.float32)
        KMeans(centroids, "log_mel", 80, 2).save(tmp_path / name)
        books.append({"clusters": 20, "stack": 2, "path": str(tmp_path / name)})
    flows.corpus(tmp_path)
    clips = tmp_path / "clips.jsonl"
    items = [
        {"task_type": "asr", "wav_path": f"{n}.wav", "text": "x", "id": f"c{n}"} for n in range(8)
    ]
    clips.write_text("".join(json.dumps(item) + "\n" for item in items))
    data: dict[str, Any] = {"train": [{"path": str(clips), "task": "tts"}]}
    data |= {"tokens_per_batch": 400, "speech_tokens": books[0]}
    text = {"tokenizer": "bytes", "config": dict(patches.TEXT)}
    train = {"max_steps": 1, "precision": "fp32"}
    writes = run(tmp_path / "writes", data=data, model=text, train=train)
    data |= {"train": [{"path": str(clips), "task": "flow"}], "mode": "padded"}
    decoders = [
        run(
            tmp_path / f"speaks{number}",
            data={**data, "speech_tokens": book},
            model=flows.model("voicebox"),
            train=train,
        )
        for number, book in enumerate(books)
    ]
    list(synthesize(writes, ["x"], ["speak.max_seconds=0.2"], decoder=decoders[0]))
    with pytest.raises(UserError, match=r"learnt other units than .* writes"):
        synthesize(writes, ["x"], decoder=decoders[1])


# -- vocoders ------------------------------------------------------------------------------------


def speech(rate: int) -> np.ndarray:
    """Like a vowel: harmonics that glide, a second."""
    at = np.arange(rate) / rate
    pitch = 2 * np.pi * (120 * at + 20 * at**2)
    wave = sum(np.sin(k * pitch) / k for k in range(1, 20))
    return (0.1 * wave * np.hanning(rate)).astype(np.float32)


@pytest.mark.parametrize("preset", ["step", "usdm"])
def test_griffin_lims_waves_have_the_mel_that_they_were_made_of(preset: str) -> None:
    mel = Mel.model_validate({"preset": preset})
    wave = speech(mel.rate)
    frames = mels.log_mel(wave, mel)
    again = GriffinLim(mel)(frames)
    assert len(again) == len(frames) * mel.hop
    found = mels.log_mel(again, mel)
    loud = frames[4:-4] * mel.std + mel.mean > -5  # of what is heard
    off = np.abs(found[: len(frames)][4:-4] - frames[4:-4])[loud] * mel.std
    assert np.median(off) < 0.2
    silence = GriffinLim(mel)(np.full((9, mel.bins), (np.log(1e-5) - mel.mean) / mel.std))
    assert np.abs(silence).max() < 1e-3


def test_a_vocoder_reads_the_mel_that_is_spoken(tmp_path: Path) -> None:
    from transformers import (
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
        UnivNetConfig,
        UnivNetFeatureExtractor,
        UnivNetModel,
    )

    torch.manual_seed(0)
    hifigan = SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        upsample_initial_channel=8,
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
    )
    SpeechT5HifiGan(hifigan).save_pretrained(tmp_path / "hifigan")
    univnet = UnivNetConfig(
        num_mel_bins=8,
        resblock_stride_sizes=[4, 4],
        resblock_kernel_sizes=[3, 3],
        resblock_dilation_sizes=[[1], [1]],
        model_in_channels=4,
        model_hidden_channels=4,
        kernel_predictor_hidden_channels=4,
    )
    UnivNetModel(univnet).save_pretrained(tmp_path / "univnet")
    UnivNetFeatureExtractor(sampling_rate=24000).save_pretrained(tmp_path / "univnet")
    fits = {"rate": 16000, "hop": 16, "n_fft": 64, "win": 64, "bins": 8}
    frames = np.random.default_rng(0).standard_normal((7, 8)).astype(np.float32)
    for name, rate in (("hifigan", 16000), ("univnet", 24000)):
        mel = Mel.model_validate({**fits, "rate": rate})
        vocoder = vocoder_of(str(tmp_path / name), mel)
        wave = vocoder(frames)
        assert wave.dtype == np.float32 and len(wave) == 7 * 16 and np.abs(wave).max() <= 1
        np.testing.assert_array_equal(wave, vocoder(frames))
        for key, value in (("bins", 9), ("hop", 32), ("rate", 22050)):
            other = Mel.model_validate({**fits, "rate": rate, key: value})
            with pytest.raises(UserError, match=f"speak.vocoder: .* of {key} .*{value}"):
                vocoder_of(str(tmp_path / name), other)
    with pytest.raises(UserError, match=r"speak\.vocoder: no vocoder at"):
        vocoder_of(str(tmp_path / "nothing"), Mel.model_validate(fits))
