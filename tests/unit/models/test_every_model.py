"""Every type of AutoModelForCausalLM: exact, or refused with a reason; docs/models.md says which.

`python -m tests.unit.models.test_every_model` writes the table anew.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

from raysft.models import copies, proof
from raysft.models.loading import line_of
from raysft.models.meta import on_meta
from raysft.models.proof import FAILURES, Verdict

TABLE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
# What the defaults of a config class leave out, or make a model that does not run.
MISSING: dict[str, dict[str, Any]] = {
    "dbrx": {},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
}
LONGROPE = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 48,
        "long_factor": [4.0] * 48,
        "original_max_position_embeddings": 4096,
    },
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
# Further kinds of a type, by what is set.
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("phi3", "longrope (Phi-3-128k, Phi-3.5, Phi-4-mini)", LONGROPE),
    ("llama", "dynamic RoPE", DYNAMIC),
    ("internlm3", "dynamic RoPE", DYNAMIC),
    ("qwen2_moe", "sliding window", {"use_sliding_window": True, "sliding_window": 4096}),
    ("phimoe", "sliding window", {"sliding_window": 4096}),
    ("bert", "is_decoder: true", {"is_decoder": True}),
    ("roberta", "is_decoder: true", {"is_decoder": True}),
]


def verdict_of(kind: str, settings: dict[str, Any]) -> Verdict | str:
    """What is proven of a model type as its config class makes it, or why it makes no model."""
    try:
        config = CONFIG_MAPPING[kind](**settings)
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        made = found[0] if isinstance(found, tuple) else found
        if made.config_class is not type(config):  # what can see, but is trained on text
            config = config.get_text_config()
        with on_meta():
            net = made._from_config(copies.small_config(config))
    except (*FAILURES, StrictDataclassError) as error:
        return line_of(error)
    net.config = config
    return proof.prove(net)


def line(kind: str, what: str, found: Verdict | str) -> str:
    """A row of the table."""
    name = f"{kind}, {what}" if what else kind
    if isinstance(found, str):
        return f"| {name} | not tried: {_short(found)} | | | |"
    if found.copied is not None:
        return f"| {name} | not tried: {_short(found.copied)} | | | |"
    if found.causal is not None:
        return f"| {name} | refused: {_short(found.causal)} | refused | | |"
    packed = "yes" if found.packed is None else f"refused: {_short(found.packed)}"
    padded = "yes" if found.padded is None else f"refused: {_short(found.padded)}"
    answers = {"any": "together", "length": "by length", "one": "one by one"}[found.answers]
    if found.answers != "any" and found.answers_until:
        answers += f" beyond {found.answers_until}"
    learned = "" if found.learned is None else str(found.learned)
    return f"| {name} | {packed} | {padded} | {answers} | {learned} |"


def _short(reason: str) -> str:
    """Without numbers that rounding may change."""
    reason = re.sub(r"a document of \d+ tokens .* alone$", "documents depend on others", reason)
    return " ".join(reason.replace("|", "/").split())[:90]


def rows(kinds: list[tuple[str, str, dict[str, Any]]]) -> Iterator[str]:
    """Rows, as they are found."""
    torch.set_num_threads(1)
    for kind, what, settings in kinds:
        yield line(kind, what, verdict_of(kind, {**MISSING.get(kind, {}), **settings}))
        gc.collect()


def every() -> list[tuple[str, str, dict[str, Any]]]:
    """All types, and the further kinds."""
    return [*((kind, "", {}) for kind in TYPES), *KINDS]


def committed() -> dict[str, str]:
    """Name -> row, of the table in docs."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    found = [text for text in lines if text.startswith("| ") and not text.startswith("| model")]
    return {text.split("|")[1].strip(): text for text in found}


def test_the_table_names_every_type() -> None:
    assert set(TYPES) <= committed().keys()


def test_what_people_train_is_packed() -> None:
    table = committed()
    names = [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "phi3",
        "gemma3_text",
        "mixtral",
        "olmo2",
        "gpt2",
        "opt",
    ]
    names += [f"{kind}, {what}" for kind, what, _ in KINDS[:5]]
    for name in names:
        assert table[name].split("|")[2:4] == [" yes ", " yes "], table[name]


@pytest.mark.slow
def test_the_table_is_what_the_proof_says() -> None:
    """In a process of its own: some models change how torch is set up."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.unit.models.test_every_model", "--json"],
        cwd=TABLE.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found == list(committed().values())


HEAD = """# Text models

What `AutoModelForCausalLM` of transformers can build (version {version}), each type as its config
class makes it, and some kinds by what their config sets. Found by the proof that every run makes at
its start, on a small copy with random weights (`raysft/models/proof.py`); a run proves its own
config. Written by `python -m tests.unit.models.test_every_model`, and held to it by a test.

- packed: `data.mode: packed`, rows of several documents; padded: `data.mode: padded`.
- answers: which prompts evaluation answers in one batch; `by length`: those of one length.
- positions: learned ones end there. Longer examples are quarantined; answers end with them.
- not tried: the config class alone makes no model that runs, or no small one. A config that does is
  proven when a run starts.

| model type | packed | padded | answers | positions |
|---|---|---|---|---|
"""


def main() -> None:
    """Print rows as JSON, or write the table."""
    found = []
    for row in rows(every()):
        found.append(row)
        print(row, file=sys.stderr, flush=True)
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    import transformers

    TABLE.parent.mkdir(exist_ok=True)
    text = HEAD.format(version=transformers.__version__) + "\n".join(found) + "\n"
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
