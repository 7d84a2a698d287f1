"""What a model speaks is heard by another run: what it heard is what that run transcribes, WER is
jiwer's, the bound is the real clip by the same vocoder; and what cannot be heard is said first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile
import torch
import transformers
import yaml

from raysft import library, synthesize, transcribe
from raysft.config import Config
from raysft.config.mel import Mel
from raysft.config.prepare import Speakers
from raysft.data import sources
from raysft.data.clips import mels
from raysft.data.clips.audio import load as decode
from raysft.data.clips.audio import resample
from raysft.data.clips.speech_tokens import KMeans
from raysft.data.encode import make_encoder
from raysft.data.encode.base import IGNORED
from raysft.errors import UserError
from raysft.families.patch_lm.prompt import PATCH
from raysft.hearing.distortion import distortion
from raysft.hearing.samples import newest, read
from raysft.prepare.speakers import Campplus
from raysft.run.evaluations import table
from raysft.run.folder import read_config
from raysft.run.lines import read_lines
from raysft.synthesis.vocoders import GriffinLim
from tests.support import codecs, flows, listeners, pairs, patches
from tests.support.in_process import run
from tests.support.models import AUDIO, CAUSAL

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SPEAK = {"max_seconds": 0.4, "flow": {"steps": 2}}
PROMPTS = {"asr": "Write it down.", "tts": "", "edit": "anew"}
MEL = {**patches.MEL, "rate": 12000, "n_fft": 480, "win": 480, "hop": 240, "fmax": 6000}


def source(path: Path, **more: str) -> list[dict[str, str]]:
    return [{"path": str(path), **more}]


def of_task(corpus: Path, task: str) -> Path:
    """The lines of one task."""
    path = corpus.with_name(f"{task}.jsonl")
    lines = [line for line in corpus.read_text().splitlines() if f'"{task}"' in line]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hearing")


@pytest.fixture(scope="module")
def asr(folder: Path) -> Path:
    """A run that transcribes, of clips at 16 kHz."""
    data = {"train": source(of_task(patches.corpus(folder / "corpus"), "asr")), "prompts": PROMPTS}
    data |= {"tokens_per_batch": 400, "lanes": 1}
    train = {"max_steps": 30, "precision": "fp32"}
    return run(
        folder / "asr",
        data=data,
        model=AUDIO,
        train=train,
        optim={"lr": 0.01},
        evaluate={"max_new_tokens": 12},
    )


@pytest.fixture(scope="module")
def embedding(folder: Path) -> Path:
    return listeners.onnx_model(folder / "campplus.onnx", "fbank")


@pytest.fixture(scope="module")
def spoke(folder: Path, asr: Path, embedding: Path) -> Path:
    """A run that speaks, at 12 kHz, evaluated at its end."""
    corpus = patches.corpus(folder / "corpus")
    data: dict[str, Any] = {"train": source(corpus), "eval": source(corpus)}
    data |= {"tokens_per_batch": 400, "prompts": PROMPTS}
    evaluate = {"asr": str(asr), "speakers": {"path": str(embedding)}, "speak_examples": 5}
    evaluate |= {"max_new_tokens": 4, "normalize": []}
    train = {"max_steps": 2, "precision": "fp32"}
    return run(
        folder / "speaks",
        data=data,
        model=patches.model(mel=MEL),
        train=train,
        speak=SPEAK,
        evaluate=evaluate,
    )


@pytest.fixture(scope="module")
def lines(spoke: Path) -> list[dict[str, Any]]:
    """Of what was spoken."""
    there = newest(spoke)
    assert there is not None and there.name == "step_2.spoken"
    found = read(there)
    for line in found:
        line |= {name: there / line[name] for name in ("spoken", "bound")}
    return found


def figures(place: Path) -> dict[str, Any]:
    return read_lines(place / "eval.jsonl")[-1]


def test_examples_of_each_task_that_speaks_are_spoken_evenly(
    spoke: Path, lines: list[dict[str, Any]]
) -> None:
    # Of 24 lines every third is tts, and every third is edit, of which half say their text.
    assert [line["id"] for line in lines if line["task"] == "tts"] == [
        "p0",
        "p3",
        "p9",
        "p15",
        "p21",
    ]
    assert [line["id"] for line in lines if line["task"] == "edit"] == [
        "p2",
        "p5",
        "p11",
        "p17",
        "p23",
    ]
    found = figures(spoke)
    assert found["spoken/tts"] == found["heard/tts"] == found["spoken/edit"] == 5
    assert found["heard/edit"] == sum("reference" in x for x in lines if x["task"] == "edit") == 4
    assert not any(name.startswith(("spoken/asr", "mcd/asr")) for name in found)


def test_what_was_heard_is_what_the_run_transcribes(asr: Path, lines: list[dict[str, Any]]) -> None:
    for name, key in (("spoken", "heard"), ("bound", "heard_bound")):
        again = list(transcribe(asr, [str(line[name]) for line in lines]))
        assert [one.text for one in again] == [line[key] for line in lines]
    assert len({line[key] for line in lines for key in ("heard", "heard_bound")}) > 1, (
        "shows little"
    )


@pytest.mark.parametrize("task", ["tts", "edit"])
def test_error_rates_are_jiwers_of_what_was_heard(
    spoke: Path, lines: list[dict[str, Any]], task: str
) -> None:
    own = [line for line in lines if line["task"] == task and "reference" in line]
    said = [line["reference"] for line in own]
    found = figures(spoke)
    for bound in ("", "_bound"):
        heard = [line[f"heard{bound}"] for line in own]
        assert found[f"wer{bound}/{task}"] == pytest.approx(jiwer.wer(said, heard))
        assert found[f"cer{bound}/{task}"] == pytest.approx(jiwer.cer(said, heard))
        for line, one, other in zip(own, said, heard, strict=True):
            assert line[f"wer{bound}"] == pytest.approx(jiwer.wer(one, other))


def test_what_was_spoken_is_what_synthesize_says(spoke: Path, lines: list[dict[str, Any]]) -> None:
    manifest = spoke.parents[1] / "corpus" / "patches.jsonl"
    said = {one.id: one for one in synthesize(spoke, [str(manifest)])}
    for line in lines:
        wave, rate = soundfile.read(line["spoken"], dtype="float32")
        again = said[line["id"]].wave
        assert rate == said[line["id"]].rate and len(wave) == len(again)
        # Phases are guessed from magnitudes, and rounding may turn them.
        mel = Mel.model_validate(MEL)
        assert np.abs(mels.log_mel(wave, mel) - mels.log_mel(again, mel)).max() < 0.2


def test_the_bound_is_the_real_clip_by_the_same_vocoder(
    spoke: Path, lines: list[dict[str, Any]], embedding: Path
) -> None:
    mel, corpus = Mel.model_validate(MEL), spoke.parents[1] / "corpus"
    camp = Campplus(Speakers(path=str(embedding)), spoke)
    rows = {x["id"]: x for x in read_lines(corpus / "patches.jsonl")}

    def vector(wave: np.ndarray) -> np.ndarray:
        found = camp.hear(resample(wave, mel.rate, 16000)).astype(np.float64)
        return found / np.linalg.norm(found)

    for line in lines:
        row = rows[line["id"]]
        real = decode(str(corpus / row.get("wav_path", row.get("target_wav_path"))), mel.rate)
        expected = GriffinLim(mel)(mels.log_mel(real, mel))
        bound, _ = soundfile.read(line["bound"], dtype="float32")
        np.testing.assert_allclose(bound, expected, atol=2**-14)
        spoken, _ = soundfile.read(line["spoken"], dtype="float32")
        # What is spoken is known to 16 bits here; between bits of nothing a filter bank may differ.
        for wave, end, off in ((spoken, "", 0.05), (expected, "_bound", 1e-4)):
            far = distortion(wave, real, mel.rate)
            assert line[f"distortion{end}"] == pytest.approx(far, rel=off)
            alike = float(vector(wave) @ vector(real))
            assert line[f"similarity{end}"] == pytest.approx(alike, abs=off)
    found = figures(spoke)
    for task in ("tts", "edit"):
        for name, key in (("mcd", "distortion"), ("speaker_similarity", "similarity")):
            for end in ("", "_bound"):
                own = [line[f"{key}{end}"] for line in lines if line["task"] == task]
                assert found[f"{name}{end}/{task}"] == pytest.approx(np.mean(own))
    assert 0 < found["mcd_bound/tts"] < found["mcd/tts"]


def test_the_bound_of_a_codec_is_what_it_makes_of_its_own_latents(folder: Path, asr: Path) -> None:
    codec = codecs.codec(folder, "encodec")
    corpus = patches.corpus(folder / "corpus")
    data: dict[str, Any] = {"train": source(corpus), "eval": source(of_task(corpus, "tts"))}
    data |= {"tokens_per_batch": 800, "prompts": PROMPTS}
    there = run(
        folder / "codec",
        data=data,
        model=patches.model(mel=None, codec={"path": str(codec)}),
        train={"max_steps": 1, "precision": "fp32"},
        speak=SPEAK,
        evaluate={"asr": str(asr), "speak_examples": 2, "max_new_tokens": 4},
    )
    found = newest(there)
    assert found is not None
    model = transformers.EncodecModel.from_pretrained(codec).eval()
    rows = {x["id"]: x for x in read_lines(corpus)}
    for line in read(found):
        real = decode(str(corpus.parent / rows[line["id"]]["wav_path"]), codecs.RATE)
        with torch.no_grad():
            wave = torch.from_numpy(real).view(1, 1, -1)
            expected = model.decoder(model.encoder(wave)).flatten().numpy()
        bound, rate = soundfile.read(found / line["bound"], dtype="float32")
        assert rate == codecs.RATE
        np.testing.assert_allclose(bound, expected[: len(bound)].clip(-1, 1), atol=1e-3)


def test_speech_begins_where_training_has_it_begin(spoke: Path) -> None:
    """Also behind a text that is written before it."""
    config = read_config(spoke)
    encoder = make_encoder(config.model, config.data, spoke)
    (given,) = sources.resolve_all(config.data.eval, "eval")
    seen = set()
    for item in sources.scan(given, given.files[0]):
        example = item.example
        if example is None or example.task == "asr":
            continue
        clips = [decode(clip, MEL["rate"]) for clip in example.audio()]
        whole = encoder.encode(example, clips)
        found = encoder.speaking(example, clips[:-1])
        patch = encoder.tokenizer.convert_tokens_to_ids(PATCH)
        begins = np.flatnonzero(whole.labels == patch)[0]
        np.testing.assert_array_equal(found.input_ids, whole.input_ids[:begins])
        assert (found.labels == IGNORED).all()
        seen.add((example.task, example.text is None))
    assert len(seen) == 3


def test_people_read_them_with_the_losses_of_the_task(spoke: Path) -> None:
    said = table(figures(spoke)).splitlines()
    head, row = (next(x for x in said if x.split()[0] == word) for word in ("task", "tts"))
    cells = dict(zip(head.split(), row.split(), strict=True))
    assert (
        cells["spoken"] == "5" and cells["wer"].endswith("%") and cells["wer_bound"].endswith("%")
    )
    assert {"loss", "flow", "mcd", "speaker_similarity"} <= cells.keys()


def test_a_flow_decoder_is_heard_where_its_examples_say_their_text(folder: Path, asr: Path) -> None:
    plain = flows.corpus(folder / "flows", "voicebox", 6)
    told = plain.with_name("told.jsonl")
    rows = [json.loads(line) for line in plain.read_text().splitlines()]
    told.write_text("".join(json.dumps({**row, "text": "one two"}) + "\n" for row in rows[:4]))
    data = {"train": source(plain), "eval": source(told), "mode": "padded", "tokens_per_batch": 200}
    place = run(
        folder / "flow",
        data=data,
        model=flows.model("voicebox"),
        train={"max_steps": 1, "precision": "fp32"},
        speak=SPEAK,
        evaluate={"asr": str(asr)},
    )
    found = figures(place)
    assert found["spoken/flow"] == found["heard/flow"] == 4
    assert {"wer/flow", "wer_bound/flow", "mcd/flow"} <= found.keys()
    assert not any(name.startswith("speaker_similarity") for name in found)


# -- what cannot be heard ------------------------------------------------------------------------


def refused(place: Path, *words: str) -> str:
    """By jobs/evaluate.py, before Ray."""
    with pytest.raises(UserError) as error:
        library.evaluate(place, words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pair_is_heard_by_what_its_decoder_makes_of_its_units(folder: Path, asr: Path) -> None:
    data = pairs.data(folder / "pair", tokens_per_batch=400)
    rng = np.random.default_rng(0)
    KMeans(rng.standard_normal((pairs.UNITS, 4 * 80)).astype(np.float32), "log_mel", 80, 4).save(
        Path(data["speech_tokens"]["path"])
    )
    data["eval"] = data["train"]
    there = run(
        folder / "both",
        data=data,
        model=pairs.model(),
        train={"max_steps": 12, "precision": "fp32"},
        optim={"lr": 0.02},
        speak=SPEAK,
        evaluate={"asr": str(asr), "speak_examples": 4, "max_new_tokens": 4},
    )
    found = newest(there)
    assert found is not None
    lines, mel = read(found), Mel.model_validate(flows.MEL)
    said = {one.id: one for one in synthesize(there, [str(folder / "pair" / "said.jsonl")])}
    for line in lines:
        spoken, rate = soundfile.read(found / line["spoken"], dtype="float32")
        again = said[line["id"]].wave
        assert rate == pairs.RATE and len(spoken) == len(again)
        assert np.abs(mels.log_mel(spoken, mel) - mels.log_mel(again, mel)).mean() < 0.1
    assert 1 <= len(lines) == figures(there)["spoken/tts"] <= 4


def test_what_does_not_transcribe_is_refused_first(folder: Path, spoke: Path, asr: Path) -> None:
    (folder / "empty").mkdir()
    said = refused(spoke, f"evaluate.asr={folder / 'empty'}")
    assert "evaluate.asr" in said and "neither a run (config.yaml) nor a model" in said
    said = refused(spoke, f"evaluate.asr={folder / 'nothing'}")
    assert "evaluate.asr" in said and "does not exist" in said
    said = refused(spoke, f"evaluate.asr={folder / 'flow' / 'run'}")
    assert "family flow_decoder, which writes no text" in said
    tts = folder / "tts"
    shutil.copytree(asr, tts)
    plan = json.loads((tts / "plan.json").read_text())
    (tts / "plan.json").write_text(json.dumps([{**plan[0], "tasks": ["tts"]}]))
    assert "was trained on tts and does not transcribe" in refused(spoke, f"evaluate.asr={tts}")
    text = folder / "text"
    shutil.copytree(asr, text)
    tree = yaml.safe_load((text / "config.yaml").read_text())
    (text / "config.yaml").write_text(yaml.safe_dump({**tree, "model": CAUSAL}))
    assert "reads no audio" in refused(spoke, f"evaluate.asr={text}")


def test_what_does_not_speak_and_speakers_that_are_none_are_refused(
    folder: Path, spoke: Path, asr: Path
) -> None:
    said = refused(spoke, "evaluate.speakers.path=none.onnx")
    assert "evaluate.speakers.path" in said and "does not exist" in said
    said = refused(spoke, "evaluate.generate=false")
    assert "evaluate.asr: nothing is spoken" in said
    with pytest.raises(UserError, match=r"evaluate\.asr: .*family causal_lm do not speak"):
        from raysft.hearing.check import check

        check(Config.model_validate({"model": CAUSAL, "evaluate": {"asr": str(asr)}}))


def test_data_without_anything_that_is_spoken_is_refused(folder: Path, asr: Path) -> None:
    corpus = patches.corpus(folder / "corpus")
    data: dict[str, Any] = {"train": source(corpus), "eval": source(of_task(corpus, "asr"))}
    data |= {"tokens_per_batch": 400, "prompts": PROMPTS}
    rest = {"model": patches.model(), "train": {"max_steps": 1}}
    evaluate = {"asr": str(asr)}
    with pytest.raises(UserError, match=r"no example that is spoken .*; its tasks are asr"):
        run(folder / "unspoken", data=data, evaluate=evaluate, **rest)
    data["eval"] = source(corpus, name="tts")
    with pytest.raises(UserError, match="give the source another name"):
        run(folder / "named", data=data, evaluate=evaluate, **rest)
    data["eval"] = source(corpus)
    with pytest.raises(UserError, match=r"speak\.vocoder: no vocoder at"):
        speak = {"vocoder": str(folder / "nothing")}
        run(folder / "vocoder", data=data, evaluate=evaluate, speak=speak, **rest)


# -- by the job, on workers ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_job_finds_the_same_with_two_workers(spoke: Path) -> None:
    found = library.evaluate(spoke, ["parallel.workers=2"])
    expected = figures(spoke)
    for name, value in expected.items():
        if name.endswith(("/tts", "/edit")):
            assert found.evaluation[name] == pytest.approx(value, rel=0.05), name
    there = newest(spoke)
    assert there is not None and there == found.folder / "predictions.spoken"
    assert [line["id"] for line in read(there)][:5] == ["p0", "p3", "p9", "p15", "p21"]
