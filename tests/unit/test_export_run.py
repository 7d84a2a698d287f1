"""A run, trained and evaluated, says the same in plain transformers once it is exported."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile
import soxr
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Qwen2AudioForConditionalGeneration,
)

from raysft import worker
from raysft.config import Config, load_config
from raysft.data.encode import TEMPLATE
from raysft.data.example import MicroBatch
from raysft.data.read.reader import Work
from raysft.driver import preflight
from raysft.errors import UserError
from raysft.export import export_run
from raysft.models.attention import document_mask
from raysft.models.base import SpeechModel
from raysft.parallel import World
from raysft.run.folder import open_run, read_config
from raysft.train.loop import train
from tests.conftest import WORDS
from tests.support.models import AUDIO, CAUSAL

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
README = Path(__file__).parents[2] / "README.md"
STEPS = 30
ANSWER = 24  # tokens generated at most
INSTRUCTION = "Write it down."
KINDS = (("wav", 16000, 1), ("wav", 8000, 1), ("wav", 44100, 2), ("flac", 22050, 1))


@dataclass
class Run:
    """A trained run, its exported folder, and what it said itself of its evaluation data."""

    config: Config
    exported: Path
    scores: dict[str, float]
    said: dict[str, dict[str, str]]  # predictions by id
    logits: dict[str, np.ndarray]  # [tokens, vocabulary] of each whole sequence, by id


def trained(folder: Path, data: Path, model: dict[str, Any], name: str) -> Run:
    """Train on `data`, evaluate the checkpoint on the same, export it."""
    torch.set_num_threads(1)
    tree = {
        "run": {"name": name, "storage_path": str(folder / "runs")},
        "data": {
            "train": [str(data)],
            "eval": [{"path": str(data), "name": "heard"}],
            "lanes": 1,
            "tokens_per_batch": 400,
            "prompts": {"asr": INSTRUCTION},
        },
        "model": model,
        "optim": {"lr": 0.01},
        "train": {"max_steps": STEPS},
        "log": {"tensorboard": False},
        "evaluate": {"at_end": False, "max_new_tokens": ANSWER, "normalize": []},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(folder / f"{name}.yaml", [])
    run = open_run(config)
    prepared = preflight.prepare(config, run)
    assert not prepared.rejected
    data_of_run = worker.Data.in_process(
        config, prepared.encoder, run, prepared.train, prepared.eval
    )
    make = (config, run, World.current(), data_of_run, prepared.total_steps)
    train(worker.build_job(*make))
    job = worker.build_job(*make)
    scores = worker.evaluate_checkpoint(job, predictions=folder / "said.jsonl")
    lines = (folder / "said.jsonl").read_text().splitlines()
    said = {line["id"]: line for line in map(json.loads, lines)}
    assert data_of_run.read_eval is not None and prepared.eval is not None
    every = np.arange(len(prepared.eval))
    batch = next(data_of_run.read_eval(iter([Work(0, 0, 0, every)])))
    logits = packed_logits(job.stream.speech_model, batch)
    assert export_run(run, folder / "out") == STEPS
    return Run(read_config(run), folder / "out", scores, said, logits)


@torch.no_grad()
def packed_logits(adapter: SpeechModel, batch: MicroBatch) -> dict[str, np.ndarray]:
    """Logits of a micro-batch laid out as in training: one packed row."""
    inputs = adapter.collate(batch)
    for name in ("keep", "targets", "tasks"):
        inputs.pop(name)
    inputs["attention_mask"] = document_mask(inputs.pop("documents"))
    row = adapter.model.eval()(**inputs, use_cache=False).logits[0].numpy()
    order = np.argsort(batch.lengths, kind="stable")  # as `collate` lays them out
    parts = np.split(row, np.cumsum(batch.lengths[order])[:-1])
    return {batch.ids[place]: part for place, part in zip(order, parts, strict=True)}


def check(run: Run, heard: dict[str, np.ndarray], written: dict[str, str]) -> None:
    """What plain transformers computed (`heard`) and answered (`written`) is what the run did."""
    assert heard.keys() == written.keys() == run.said.keys()
    for name, logits in heard.items():
        np.testing.assert_allclose(run.logits[name], logits, rtol=1e-5, atol=1e-5, err_msg=name)
    assert written == {name: line["hypothesis"] for name, line in run.said.items()}
    assert len(set(written.values())) > 3, "answers that are all the same show nothing"
    references = [run.said[name]["reference"] for name in written]
    assert run.scores["wer/heard"] == jiwer.wer(references, list(written.values()))
    assert run.scores["cer/heard"] == jiwer.cer(references, list(written.values()))


# -- a model that hears --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(make_clips: Callable[..., Path]) -> Path:
    return make_clips(12, kinds=KINDS)


@pytest.fixture(scope="module")
def hearing(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("hearing"), clips, AUDIO, "hearing")


def as_a_user_reads(path: Path) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), rate, 16000)


@torch.no_grad()
def test_an_exported_audio_model_answers_as_the_run_did(hearing: Run, clips: Path) -> None:
    net = Qwen2AudioForConditionalGeneration.from_pretrained(hearing.exported)
    processor = AutoProcessor.from_pretrained(hearing.exported)
    heard, written = {}, {}
    for number, line in enumerate(map(json.loads, clips.read_text().splitlines()), start=1):
        wave = as_a_user_reads(clips.parent / line["wav_path"])
        prompt = f"{INSTRUCTION}\n<|audio_bos|><|AUDIO|><|audio_eos|>\n"
        whole = f"{prompt}{line['text']}{processor.tokenizer.eos_token}"
        asked, told = (
            processor(text=text, audio=[wave], sampling_rate=16000, return_tensors="pt")
            for text in (prompt, whole)
        )
        name = f"{clips.stem}:{number}"  # as the run calls a line without an id
        heard[name] = net(**told).logits[0].numpy()
        answer = net.generate(**asked, max_new_tokens=ANSWER, do_sample=False)
        new = answer[0, asked["input_ids"].shape[1] :]
        written[name] = processor.decode(new, skip_special_tokens=True)
    check(hearing, heard, written)


def test_the_readmes_lines_give_what_the_run_said_itself(
    hearing: Run, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    block = block.replace('"exported"', repr(str(hearing.exported)))
    block = block.replace("max_new_tokens=16", f"max_new_tokens={ANSWER}")
    # This run has an instruction, which the README's has not.
    block = block.replace("asked = [", f"asked = [{{'type': 'text', 'text': {INSTRUCTION!r}}}, ")
    said = {}
    lines = list(enumerate(map(json.loads, clips.read_text().splitlines()), start=1))
    for number, line in lines[: len(KINDS)]:
        path = repr(str(clips.parent / line["wav_path"]))
        changed, count = re.subn(r'"examples/[^"]+"', path, block)
        assert count == 1
        exec(changed, {})
        said[f"{clips.stem}:{number}"] = capsys.readouterr().out.removesuffix("\n")
    assert said == {name: hearing.said[name]["hypothesis"] for name in said}


def test_a_run_that_kept_no_prompts_is_not_exported_under_others(
    hearing: Run, tmp_path: Path
) -> None:
    run = hearing.config.run
    copy = shutil.copytree(Path(run.storage_path) / run.name, tmp_path / "run")
    (copy / TEMPLATE).unlink()
    with pytest.raises(UserError, match=r"no chat_template\.jinja"):
        export_run(copy, tmp_path / "out")


# -- a model that reads units --------------------------------------------------------------------


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 items of units with their words, in MoST JSON."""
    rng = np.random.default_rng(0)
    items = []
    for number in range(12):
        digits = rng.integers(0, 10, rng.integers(2, 5))
        items.append(
            {
                "id": f"item{number}",
                "instruction": INSTRUCTION,
                "input": "".join(f"[Hu{digit}][Hu{digit + 10}]" for digit in digits),
                "output": " ".join(WORDS[digit] for digit in digits),
            }
        )
    file = tmp_path_factory.mktemp("units") / "train.json"
    file.write_text(json.dumps(items))
    return file


@pytest.fixture(scope="module")
def reading(units: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    model = {**CAUSAL, "speech_units": 20}
    return trained(tmp_path_factory.mktemp("reading"), units, model, "reading")


@torch.no_grad()
def test_an_exported_unit_model_answers_as_the_run_did(reading: Run, units: Path) -> None:
    net = AutoModelForCausalLM.from_pretrained(reading.exported)
    tokenizer = AutoTokenizer.from_pretrained(reading.exported)
    heard, written = {}, {}
    for item in json.loads(units.read_text()):
        spoken = item["input"].replace("[Hu", "<|unit").replace("]", "|>")
        turns = [
            {"role": "user", "content": f"{INSTRUCTION}\n{spoken}"},
            {"role": "assistant", "content": item["output"]},
        ]
        asked, told = (
            tokenizer.apply_chat_template(
                turns[:count],
                add_generation_prompt=count == 1,
                return_tensors="pt",
                return_dict=True,
            )
            for count in (1, 2)
        )
        heard[item["id"]] = net(**told).logits[0].numpy()
        answer = net.generate(**asked, max_new_tokens=ANSWER, do_sample=False)
        new = answer[0, asked["input_ids"].shape[1] :]
        written[item["id"]] = tokenizer.decode(new, skip_special_tokens=True)
    check(reading, heard, written)
