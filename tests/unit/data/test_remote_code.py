"""Tokenizers, extractors and models whose classes come with the model (`trust_remote_code`)."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from raysft.config.schema import Data, Model
from raysft.data import remote_code
from raysft.data.clips.features import ModelExtractor
from raysft.data.encode import make_encoder
from raysft.data.text import byte_tokenizer
from raysft.export import export
from raysft.models import build

TOKENIZER = """
from transformers import PreTrainedTokenizerFast

from .words import SHOUT


class MyTokenizerFast(PreTrainedTokenizerFast):
    def shout(self):
        return SHOUT
"""
CONFIG = """
from transformers import LlamaConfig


class MyConfig(LlamaConfig):
    model_type = "my_llama"
"""
MODEL = """
from transformers import LlamaForCausalLM

from .configuration_mine import MyConfig


class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig
"""
EXTRACTOR = """
from transformers import WhisperFeatureExtractor


class MyExtractor(WhisperFeatureExtractor):
    pass
"""


def change(path: Path, **keys: object) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **keys}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, config and model of classes that lie beside the weights."""
    folder = tmp_path_factory.mktemp("remote") / "base"
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, num_attention_heads=4, **small)).save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)
    (folder / "my_tok.py").write_text(TOKENIZER)
    (folder / "words.py").write_text('SHOUT = "AH"\n')
    (folder / "configuration_mine.py").write_text(CONFIG)
    (folder / "modeling_mine.py").write_text(MODEL)
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="MyTokenizerFast",
        auto_map={"AutoTokenizer": [None, "my_tok.MyTokenizerFast"]},
    )
    change(
        folder / "config.json",
        model_type="my_llama",
        architectures=["MyForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_mine.MyConfig",
            "AutoModelForCausalLM": "modeling_mine.MyForCausalLM",
        },
    )
    return folder


def elsewhere(tmp_path: Path, code: str, *arguments: str) -> str:
    """What a process prints that knows neither the model nor where its code was unpacked."""
    home = tmp_path / "another_machine"
    home.mkdir(exist_ok=True)
    env = {**os.environ, "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


READ = """
import pickle, sys
from pathlib import Path
encoder = pickle.loads(Path(sys.argv[1]).read_bytes())
tokenizer = encoder.tokenizer
print(type(tokenizer).__name__, tokenizer.shout(), len(tokenizer), tokenizer.pad_token_id,
      tokenizer("<|unit3|> a").input_ids, sorted(sys.modules).count("ray"))
"""


def test_an_encoder_is_read_on_a_machine_that_lacks_the_code(base: Path, tmp_path: Path) -> None:
    model = Model(path=str(base), trust_remote_code=True, speech_units=9)
    encoder = make_encoder(model, Data(), tmp_path)
    assert encoder.tokenizer.shout() == "AH"
    content = pickle.dumps(pickle.loads(pickle.dumps(encoder)))  # driver, store, worker
    (tmp_path / "encoder").write_bytes(content)
    ids = encoder.tokenizer("<|unit3|> a").input_ids
    said = elsewhere(tmp_path, READ, str(tmp_path / "encoder"))
    assert said == f"MyTokenizerFast AH 268 258 {ids} 0"


def test_data_tasks_never_run_the_models_code(base: Path, tmp_path: Path) -> None:
    """They take the tokenizer without its class."""
    encoder = make_encoder(Model(path=str(base), trust_remote_code=True), Data(), tmp_path)
    (tmp_path / "encoder").write_bytes(pickle.dumps(encoder))
    code = (
        "import pickle, sys\nfrom pathlib import Path\nfrom raysft.data.example import Example\n"
        "encoder = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "ids = encoder.encode(Example('a', 'text', ('x',), ('y',), instruction=''), []).input_ids\n"
        "print(ids.tolist(), any(name.startswith('transformers_modules') for name in sys.modules))"
    )
    said = elsewhere(tmp_path, code, str(tmp_path / "encoder"))
    assert said == f"{[ord('x'), 10, ord('y'), 257]} False"


@pytest.mark.slow
def test_an_extractor_of_the_models_own_travels_too(tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, WhisperFeatureExtractor

    WhisperFeatureExtractor(feature_size=8, chunk_length=2).save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "mine.py").write_text(EXTRACTOR)
    change(
        tmp_path / "own" / "preprocessor_config.json",
        feature_extractor_type="MyExtractor",
        auto_map={"AutoFeatureExtractor": "mine.MyExtractor"},
    )
    own = AutoFeatureExtractor.from_pretrained(tmp_path / "own", trust_remote_code=True)
    assert remote_code.is_remote(own)
    (tmp_path / "it").write_bytes(pickle.dumps(ModelExtractor(own, 16000, 8)))
    code = (
        "import pickle, sys\nfrom pathlib import Path\n"
        "it = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "print(type(it.extractor).__name__, it.extractor.feature_size, it.sample_rate)"
    )
    assert elsewhere(tmp_path, code, str(tmp_path / "it")) == "MyExtractor 8 16000"


def test_what_has_no_code_of_its_own_is_pickled_as_it_is() -> None:
    content = remote_code.packed(byte_tokenizer(), "AutoTokenizer")
    assert len(remote_code.unpacked(content)) == 259
    assert b"tokenizer.json" not in content


def test_an_export_brings_its_code_along(base: Path, tmp_path: Path) -> None:
    model = Model(path=str(base), trust_remote_code=True)
    adapter = build(model, Data(), make_encoder(model, Data(), tmp_path), 0)
    assert remote_code.is_remote(adapter.net)
    folder = export(adapter, tmp_path / "out")
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "net = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(net).__name__, tokenizer.shout())"
    )
    base.rename(base.with_name("gone"))
    try:
        assert elsewhere(tmp_path, code, str(folder)) == "MyForCausalLM AH"
    finally:
        base.with_name("gone").rename(base)
    plain = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(ids).logits
        assert torch.equal(ours, plain(ids).logits)
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).shout() == "AH"
