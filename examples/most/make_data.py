"""Write the corpus of sft.yaml: spoken digits as speech units, as text to speak, and text alone.

    python examples/most/make_data.py [--out FOLDER]

Three tasks, in MoST instruction JSON: asr/ (units to words, by ../spoken_digits/make_units.py),
tts/ (those items through convert.py) and text/ (counting on). And a tokenizer of words with MoST's
template: `<|begin_of_sentence|>` question `<|end_of_sentence|>`, `Output:`, the answer between the
same two. The same clips give the same bytes; costs half a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
DIGITS = HERE.parent / "spoken_digits"
SPLITS = ("train", "dev", "test", "test_unseen")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ASR = "Transcribe the following speech."
COUNT = "Count on from the following text."
COUNTED = {"train": 1200, "dev": 60, "test": 100}
SEED = 0
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|begin_of_sentence|>{{ message['content'] }}<|end_of_sentence|>"
    "{% else %}"
    "<|begin_of_sentence|>{{ message['content'] }}<|end_of_sentence|>\n\nOutput: "
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|begin_of_sentence|>{% endif %}"
)


def script(path: Path) -> ModuleType:
    """Another example's file as a module."""
    spec = importlib.util.spec_from_file_location(f"raysft_example_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def tokenizer(instructions: list[str]) -> PreTrainedTokenizerFast:
    """A token a word, for the words of `instructions`, of the template and of the answers."""
    control = {"pad_token": "<|pad|>", "unk_token": "<|unk|>"}
    control |= {"bos_token": "<|begin_of_sentence|>", "eos_token": "<|end_of_sentence|>"}
    words = dict.fromkeys(word for text in instructions for word in text.split(" "))
    vocabulary = [*control.values(), "\n", "Output:", *WORDS, *words]
    numbered = {word: number for number, word in enumerate(vocabulary)}
    made = Tokenizer(models.WordLevel(numbered, control["unk_token"]))
    spaces = pre_tokenizers.Split(Regex(" +"), "removed")
    lines = pre_tokenizers.Split("\n", "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([spaces, lines])
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, padding_side="left", **control
    )
    found.chat_template = TEMPLATE
    return found


def counting(split: str) -> list[dict[str, Any]]:
    """How many are to follow, some digits in order, and those that follow, around zero again."""
    source = random.Random(f"{SEED} {split}")  # noqa: S311 - no secret
    items = []
    for number in range(COUNTED[split]):
        start, given, asked = source.randrange(10), source.randint(1, 4), source.randint(1, 4)
        said = [WORDS[(start + i) % 10] for i in range(given + asked)]
        items.append(
            {
                "id": f"count_{split}_{number}",
                "instruction": COUNT,
                "input": f"{WORDS[asked]} {' '.join(said[:given])}",
                "output": " ".join(said[given:]),
                "metadata": {"task": "text"},
            }
        )
    return items


def main() -> None:
    """Write all of it."""
    parser = argparse.ArgumentParser(description="Write the corpus of examples/most/sft.yaml.")
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder to write into")
    out: Path = parser.parse_args().out
    units, convert = script(DIGITS / "make_units.py"), script(HERE / "convert.py")
    speech = units.fit()
    for split in SPLITS:
        items = []
        for record in units.read_manifest(split):
            asr, _ = units.items(record, speech.encode(units.read_clip(record)))
            items.append({**asr, "instruction": ASR})
        convert.write(out / "asr" / f"{split}.json", items)
    found, _ = convert.convert(convert.Job(out / "asr", out / "tts", "spoken_digits"))
    for split in COUNTED:
        found[out / "text" / f"{split}.json"] = counting(split)
    for path, items in found.items():
        convert.write(path, items)
    tokenizer([ASR, COUNT, convert.INSTRUCTION]).save_pretrained(out / "tokenizer")
    speech.save(out / "speech_tokens.safetensors")
    for path in sorted(out.glob("*/*.json")):
        if path.parent.name != "tokenizer":
            print(f"{path}: {len(json.loads(path.read_text()))} items")


if __name__ == "__main__":
    main()
