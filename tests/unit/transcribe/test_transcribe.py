"""What is transcribed is what an evaluation hears, and what plain transformers hears: batched or
not, of a run or of its exported folder, with adapters and without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile
import torch
import yaml
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    Qwen2AudioForConditionalGeneration,
    WhisperForConditionalGeneration,
)

from raysft import command, library, transcribe, worker
from raysft.config import load_config
from raysft.config.schema import Data, Model
from raysft.data.encode import make_encoder
from raysft.driver import preflight
from raysft.errors import UserError
from raysft.export import export_run
from raysft.models import build
from raysft.models.base import SpeechModel
from raysft.parallel import World
from raysft.run.folder import open_run
from raysft.run.lines import read_lines
from raysft.train.loop import train
from raysft.transcribe.run import batches
from tests.support import seq2seq as zoo
from tests.support import whisper
from tests.support.models import AUDIO, CAUSAL
from tests.support.worlds import ROOT
from tests.unit.test_export_run import KINDS, as_a_user_reads

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
INSTRUCTION = "Write it down."
ANSWER = 24  # tokens generated at most


@dataclass
class Run:
    """A trained run, and what an evaluation of its last step said of `manifest`, by id."""

    folder: Path
    manifest: Path
    said: dict[str, str]
    references: dict[str, str]

    @property
    def clips(self) -> list[str]:
        """Paths of the manifest's clips, in its order."""
        lines = read_lines(self.manifest)
        return [str(self.manifest.parent / line["wav_path"]) for line in lines]


def trained(folder: Path, manifest: Path, steps: int, **changes: Any) -> Run:
    """Train on `manifest`, and evaluate the checkpoint on it."""
    torch.set_num_threads(1)
    tree: dict[str, Any] = {
        "run": {"name": "heard", "storage_path": str(folder / "runs")},
        "data": {
            "train": [str(manifest)],
            "eval": [{"path": str(manifest), "name": "dev"}],
            "lanes": 1,
            "tokens_per_batch": 400,
            "prompts": {"asr": INSTRUCTION},
        },
        "model": AUDIO,
        "optim": {"lr": 0.01},
        "train": {"max_steps": steps},
        "log": {"tensorboard": False},
        "evaluate": {"at_end": False, "max_new_tokens": ANSWER, "normalize": []},
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(folder / "config.yaml")
    run = open_run(config)
    prepared = preflight.prepare(config, run)
    data = worker.Data.in_process(config, prepared.encoder, run, prepared.train, prepared.eval)
    make = (config, run, World.current(), data, prepared.total_steps)
    train(worker.build_job(*make))
    worker.evaluate_checkpoint(worker.build_job(*make), predictions=folder / "said.jsonl")
    lines = read_lines(folder / "said.jsonl")
    said = {line["id"]: line["hypothesis"] for line in lines}
    return Run(run, manifest, said, {line["id"]: line["reference"] for line in lines})


@pytest.fixture(scope="module")
def heard(make_clips: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    manifest = make_clips(12, kinds=KINDS)
    return trained(tmp_path_factory.mktemp("heard"), manifest, 30)


@pytest.fixture(scope="module")
def exported(heard: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_run(heard.folder, folder)
    return folder


def texts(found: Iterable[Any]) -> list[str]:
    every = list(found)
    assert not [one.error for one in every if one.error]
    return [one.text for one in every]


# -- the same answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_seconds", [1, 4, 1000])
def test_a_run_says_what_its_evaluation_says_batched_or_not(heard: Run, batch_seconds: int) -> None:
    found = list(library.transcribe(heard.folder, heard.clips, batch_seconds=batch_seconds))
    assert [one.text for one in found] == list(heard.said.values())
    assert len(set(heard.said.values())) > 3, "answers that are all the same show nothing"
    assert [one.path for one in found] == [one.id for one in found] == heard.clips
    lengths = [len(as_a_user_reads(Path(path))) / 16000 for path in heard.clips]
    assert [one.seconds for one in found] == pytest.approx(lengths, abs=1e-3)


@pytest.mark.parametrize("how", ["its run", "its export", "merged"])
def test_an_adapter_answers_over_its_base(adapted: Run, tmp_path: Path, how: str) -> None:
    place, wished = adapted.folder, {"prompt": INSTRUCTION, "max_new_tokens": ANSWER}
    if how != "its run":
        place = tmp_path / "out"
        export_run(adapted.folder, place, merge=how == "merged")
    found = library.transcribe(place, adapted.clips, **(wished if how != "its run" else {}))
    assert texts(found) == list(adapted.said.values())


@pytest.fixture(scope="module")
def adapted(heard: Run, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An adapter over what `heard` has learnt, which changes its answers."""
    folder, peft = tmp_path_factory.mktemp("adapted"), {"method": "lora", "r": 2}
    run = trained(folder, heard.manifest, 10, model={"path": str(exported)}, peft=peft)
    assert run.said != heard.said
    return run


def test_positions_that_train_answer_too(tmp_path: Path) -> None:
    items = [
        {"id": f"t{i}", "input": word * (1 + i), "output": word, "task": "asr"}
        for i, word in enumerate(("one ", "two ", "three "))
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(items))
    data = {"lanes": 1, "mode": "padded", "train": [str(file)], "eval": [str(file)]}
    data |= {"tokens_per_batch": 400, "prompts": {"asr": INSTRUCTION}}
    peft = {"method": "prompt", "virtual_tokens": 3}
    run = trained(tmp_path, file, 20, data=data, model=CAUSAL, peft=peft)
    found = library.transcribe(run.folder, [run.manifest], checkpoint="last")
    assert texts(found) == list(run.said.values())


def test_an_exported_folder_says_what_plain_transformers_says(heard: Run, exported: Path) -> None:
    net = Qwen2AudioForConditionalGeneration.from_pretrained(exported)
    processor = AutoProcessor.from_pretrained(exported)
    expected = []
    for path in heard.clips:
        wave = as_a_user_reads(Path(path))
        asked = [{"type": "text", "text": INSTRUCTION}, {"type": "audio"}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=prompt, audio=[wave], sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            answer = net.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
        new = answer[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(new, skip_special_tokens=True))
    wished = {"prompt": INSTRUCTION, "max_new_tokens": ANSWER}
    assert texts(library.transcribe(exported, heard.clips, **wished)) == expected
    assert expected == list(heard.said.values())
    other = texts(library.transcribe(exported, heard.clips, prompt="", max_new_tokens=ANSWER))
    assert other != expected, "another question"


def test_a_whisper_is_told_language_and_task(heard: Run, tmp_path: Path) -> None:
    model, data = Model(**whisper.model(tmp_path)), Data(mode="padded")
    built = build(model, data, make_encoder(model, data, tmp_path), 0)
    built.save(tmp_path / "whisper")
    net = WhisperForConditionalGeneration.from_pretrained(tmp_path / "whisper")
    processor = AutoProcessor.from_pretrained(tmp_path / "whisper")
    answers = []
    for lang, task, told in (("de", None, "transcribe"), ("zh", "translation", "translate")):
        expected = []
        for path in heard.clips:
            wave = as_a_user_reads(Path(path))
            inputs = processor(audio=wave, sampling_rate=16000, return_tensors="pt")
            tokens = net.generate(inputs.input_features, language=lang, task=told, max_new_tokens=9)
            expected.append(processor.batch_decode(tokens, skip_special_tokens=True)[0])
        wished = {"lang": lang, "task": task, "max_new_tokens": 9}
        assert texts(library.transcribe(tmp_path / "whisper", heard.clips, **wished)) == expected
        answers.append(expected)
    assert answers[0] != answers[1]
    found = list(library.transcribe(tmp_path / "whisper", heard.clips[:1], prompt="Write."))
    assert "an instruction" in found[0].error


@pytest.mark.parametrize("kind", sorted(zoo.TINY))
def test_a_clip_read_at_its_own_length_is_transcribed(
    kind: str, heard: Run, tmp_path: Path
) -> None:
    model, data = Model(**zoo.model(kind, tmp_path)), Data(mode="padded")
    encoder = make_encoder(model, data, tmp_path)
    out = tmp_path / "out"
    build(model, data, encoder, 0).save(out)
    net = AutoModelForSpeechSeq2Seq.from_pretrained(out)
    extractor = AutoProcessor.from_pretrained(out).feature_extractor
    start = encoder.template.prefix("asr", "de")
    expected = []
    for path in heard.clips:
        made = extractor(as_a_user_reads(Path(path)), sampling_rate=16000, return_tensors="pt")
        names = ("input_values", "input_features", "attention_mask")
        inputs = {name: made[name] for name in names if name in made}
        tokens = net.generate(**inputs, decoder_input_ids=torch.tensor([start]), max_new_tokens=9)
        expected.append(encoder.tokenizer.decode(tokens[0, len(start) :], skip_special_tokens=True))
    assert texts(library.transcribe(out, heard.clips, lang="de", max_new_tokens=9)) == expected


# -- what is asked -------------------------------------------------------------------------------


def test_folders_and_manifests_are_clips_in_their_order(heard: Run, tmp_path: Path) -> None:
    first, second, *_ = heard.clips
    for place, path in (("b/z.wav", first), ("b/a/y.WAV", second), ("b/.hidden/x.wav", first)):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / place)
    (tmp_path / "b/notes.txt").write_text("no clip")
    shutil.copy(second, tmp_path / "clip.data")  # a clip by what it holds
    said = list(heard.said.values())
    found = transcribe(heard.folder, [tmp_path / "b", heard.manifest, tmp_path / "clip.data"])
    assert len(found) == 2 + 12 + 1
    every = list(found)
    assert [one.text for one in every] == [said[1], said[0], *said, said[1]]
    assert [one.path for one in every[:2]] == [
        str(tmp_path / "b/a/y.WAV"),
        str(tmp_path / "b/z.wav"),
    ]
    assert [one.id for one in every[2:-1]] == list(heard.said)
    assert [one.reference for one in every[2:-1]] == list(heard.references.values())
    pairs = list(heard.references.values()), said
    assert found.figures() == {"wer/train": jiwer.wer(*pairs), "cer/train": jiwer.cer(*pairs)}


def test_a_conversation_is_answered_where_its_last_turn_is(heard: Run, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": f"{INSTRUCTION}<audio>"},
        {"role": "assistant", "content": "whatever is right"},
    ]
    line = {"id": "c", "messages": turns, "audios": [heard.clips[0]], "task": "asr"}
    (tmp_path / "talk.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = list(library.transcribe(heard.folder, [tmp_path / "talk.jsonl"]))
    assert (found.id, found.reference) == ("c", "whatever is right")
    # What the run asks of a clip, to the token; alone, for beside others rounding may decide.
    (alone,) = list(library.transcribe(heard.folder, heard.clips[:1]))
    assert found.text == alone.text
    with pytest.raises(UserError, match=r"--prompt: .*talk\.jsonl holds conversations \(c\)"):
        library.transcribe(heard.folder, [tmp_path / "talk.jsonl"], prompt="Say it.")


def test_a_language_is_taken_off_where_it_is_given(
    tmp_path: Path, heard: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        SpeechModel, "generate", lambda self, prompts, most, within=None: ["en\tone"]
    )
    for lang, text in (("en", "one"), (None, "en\tone")):
        assert texts(library.transcribe(heard.folder, heard.clips[:1], lang=lang)) == [text]


@pytest.mark.parametrize("most", [3.0, 10.0, 100.0])
def test_batches_hold_no_more_than_they_may(most: float) -> None:
    lengths = {place: (7 * place) % 11 / 2 for place in range(40)}
    found = list(batches(lengths, most))
    assert sorted(place for batch in found for place in batch) == list(range(40))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(1.0, *(lengths[p] for p in batch)) <= most
    assert len(found) < 40


# -- the command ---------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_and_the_rest_transcribed(
    heard: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, long, gone = (str(tmp_path / name) for name in ("broken.wav", "long.wav", "gone.wav"))
    Path(broken).write_bytes(Path(heard.clips[0]).read_bytes()[:100])
    soundfile.write(long, np.random.default_rng(0).normal(0, 0.1, 16000 * 4), 16000)  # reads 3 s
    silent = str(tmp_path / "silent.wav")  # which training leaves out
    soundfile.write(silent, np.zeros(16000), 16000)
    manifest = tmp_path / "some.jsonl"
    line = {"task_type": "asr", "wav_path": heard.clips[0], "text": "one"}
    manifest.write_text(json.dumps(line) + "\n{broken\n")
    words = [str(heard.folder), heard.clips[0], broken, long, gone, silent, str(manifest)]
    with pytest.raises(SystemExit) as left:
        command.main(["transcribe", *words])
    assert left.value.code == 1
    out, err = capsys.readouterr()
    said = next(iter(heard.said.values()))
    lines = out.splitlines()
    assert lines[0] == f"{heard.clips[0]}\t{said}" == lines[2]
    assert lines[1].startswith(f"{silent}\t") and len(lines) == 3
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    assert errors[0].startswith(f"error: {broken}: ")
    assert (
        errors[1].startswith(f"error: {long}: ")
        and "4.00 s, the model reads at most 3.00 s" in errors[1]
    )
    assert errors[2] == f"error: {gone}: no such file"
    assert "some.jsonl line 2" in errors[3]
    assert "wer" in err and "some" in err


def test_one_clip_is_its_text_and_json_says_the_rest(
    heard: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    said = list(heard.said.values())
    command.main(["transcribe", str(heard.folder), heard.clips[0]])
    assert capsys.readouterr().out == said[0] + "\n"
    command.main(["transcribe", str(heard.folder), heard.clips[1], "--json"])
    line = json.loads(capsys.readouterr().out)
    assert line["path"] == line["id"] == heard.clips[1] and line["text"] == said[1]
    assert sorted(line) == ["id", "path", "seconds", "text"] and 0.3 <= line["seconds"] <= 1.2
    command.main(["transcribe", str(heard.folder), str(heard.manifest), "--json"])
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert {line["id"]: line["text"] for line in lines} == heard.said
    assert {line["id"]: line["reference"] for line in lines} == heard.references


def test_an_answer_that_is_cut_is_said(heard: Run, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["transcribe", str(heard.folder), heard.clips[0], "--max-new-tokens", "1"])
    assert "warning: 1 of 1 answers are cut" in capsys.readouterr().err


CODE = """
import sys
from raysft import command
command.main(sys.argv[1:])
assert "ray" not in sys.modules
"""


def test_ray_is_not_needed(heard: Run) -> None:
    words = [sys.executable, "-W", "ignore", "-c", CODE, "transcribe", str(heard.folder)]
    words += [heard.clips[0], "--max-new-tokens", "1"]  # cut, so that there is one line to say
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 1
    assert next(iter(heard.said.values())).startswith(done.stdout.removesuffix("\n"))
    assert done.stderr.startswith("warning: 1 of 1 answers are cut")
    assert len(done.stderr.splitlines()) == 1


# -- what is refused -----------------------------------------------------------------------------


def refused(*words: object) -> str:
    with pytest.raises(UserError) as error:
        command.main(["transcribe", *map(str, words)])
    return str(error.value)


def test_mistakes_are_a_line(heard: Run, exported: Path, tmp_path: Path) -> None:
    clip = heard.clips[0]
    assert "--checkpoint 7: " in refused(heard.folder, clip, "--checkpoint", "7")
    assert "checkpoint.best" in refused(heard.folder, clip, "--checkpoint", "best")
    assert "is no run's folder" in refused(exported, clip, "--checkpoint", "best")
    assert "jobs/synthesize.py" in refused(heard.folder, clip, "--task", "tts")
    said = refused(heard.folder, clip, "--task", "translation")
    assert said.startswith("--task translation: ") and "give one by --prompt" in said
    assert "expected a whole number" in refused(heard.folder, clip, "--batch-seconds", "x")
    assert "does not exist" in refused(tmp_path / "none", clip)
    assert "neither a run" in refused(tmp_path, clip)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "an adapter that does not name its base" in refused(tmp_path, clip)
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "a/b"}'
    )
    assert "of type PROMPT_TUNING; name the run's folder" in refused(tmp_path, clip)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(heard.folder, tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("words\n")
    assert "is in no format that is known" in refused(heard.folder, tmp_path / "notes.txt")
    spoken = {"task_type": "tts", "wav_path": clip, "text": "one"}
    (tmp_path / "spoken.jsonl").write_text(json.dumps(spoken) + "\n")
    (one,) = list(library.transcribe(heard.folder, [tmp_path / "spoken.jsonl"]))
    assert "jobs/synthesize.py" in one.error and not one.text


def test_a_model_that_reads_no_audio_says_so(tmp_path: Path, heard: Run) -> None:
    model = Model(**CAUSAL)
    build(model, Data(), make_encoder(model, Data(), tmp_path), 0).save(tmp_path / "text")
    assert "its model reads no audio" in refused(tmp_path / "text", heard.clips[0])
