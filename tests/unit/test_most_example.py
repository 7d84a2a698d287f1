"""examples/most: its corpus, its tokenizer, and which experts its tokens go to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from raysft.config import load_config
from raysft.data.encode import make_encoder
from raysft.data.sources.most_json import FORMAT
from raysft.models import build

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "most"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("most") / "data"
    command = [sys.executable, str(FOLDER / "make_data.py"), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.mark.slow
def test_the_corpus_is_three_tasks_that_the_config_reads(data: Path) -> None:
    settings = [f"model.tokenizer={data / 'tokenizer'}"]
    config = load_config(FOLDER / "sft.yaml", settings)
    assert config.model.moe is not None and config.model.moe.modality is not None
    groups = config.model.moe.modality.groups
    encoder = make_encoder(config.model, config.data, data)
    tokens = encoder.tokenizer
    units = tokens.convert_tokens_to_ids(["[Hu0]", "[Hu99]", *(config.model.unit_markers or ())])
    assert groups["audio"]["ids"] == f"{units[0]}-{max(units)}" == "27-128"
    assert groups["text"]["ids"] == f"0-{units[0] - 1}" and len(tokens) == 129
    plain = AutoTokenizer.from_pretrained(data / "tokenizer")
    for name in ("asr/train.json", "tts/train_tts.json", "text/train.json"):
        item = json.loads((data / name).read_text())[0]
        example = FORMAT.parse(json.dumps(item).encode(), data / name, 0)
        assert example.task == name.partition("/")[0]
        sequence = encoder.encode(example, [])
        assert plain.unk_token_id not in sequence.input_ids
        said = tokens.decode(sequence.input_ids)
        assert said.startswith("<|begin_of_sentence|>") and said.endswith("<|end_of_sentence|>")
        assert "Output:" in said


@pytest.mark.slow
def test_no_token_goes_to_experts_of_another_kind(data: Path) -> None:
    config = load_config(FOLDER / "sft.yaml", [f"model.tokenizer={data / 'tokenizer'}"])
    encoder = make_encoder(config.model, config.data, data)
    model = build(config.model, config.data, encoder, 0)
    item = json.loads((data / "tts" / "train_tts.json").read_text())[0]
    example = FORMAT.parse(json.dumps(item).encode(), data / "x.json", 0)
    ids = torch.from_numpy(encoder.encode(example, []).input_ids).long()[None]
    seen: list[torch.Tensor] = []
    for name, module in model.net.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    with torch.no_grad():
        model.net(input_ids=ids)
    assert len(seen) == 2
    for chosen in seen:
        assert ((chosen >= 4) == (ids[0] >= 27)[:, None]).all()
