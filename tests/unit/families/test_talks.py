"""Conversations with clips in any turn through models that hear: ids, masks and losses of a plain
loop over transformers' own processor and model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysft.data.example import Audio, Example, Sequence, Turn
from tests.support import audio_voxtral
from tests.support import audio_zoo as zoo
from tests.unit.data.test_conversation import messages
from tests.unit.families.test_audio_types import batch, encoder_of, model_of, plain

KINDS = [
    pytest.param(kind, marks=[] if kind in ("granite_speech", "qwen3_asr") else pytest.mark.slow)
    for kind in sorted(zoo.TINY)
]
LIKE = (
    "fun_asr_nano",
    "granite_speech",
    "granite_speech_plus",
    "phi4_multimodal",
    "gemma3n",
    "gemma4",
    "qwen3_asr",
)


def talks(kind: str) -> list[tuple[Example, list[np.ndarray]]]:
    """One to five turns, of 0, 1 and 3 clips each; one with none at all.

    Clips are whole frames, none shorter than a window of 100, and of kinds in LIKE all of one
    length: else what transformers makes of a clip depends on those beside it (by up to 1e-2), and
    here it is the same as alone.
    """
    rng = random.Random(3)
    found = []
    for number in range(5):
        # Voxtral takes none beside clips.
        turns: list[Turn] = [Turn("system", ("Be brief.",))] * (number % 2 * (kind != "voxtral"))
        waves: list[np.ndarray] = []
        for _ in range(number + 1):
            asked: list[str | Audio] = [f"Say {rng.randint(10, 99)}."]
            for _ in range(rng.choice([0, 1, 3]) if number else 0):
                asked.insert(rng.randint(0, len(asked)), Audio(f"{len(waves)}.wav"))
                frames = 120 if kind in LIKE else rng.randint(100, 130)
                waves.append(zoo.clip(160 * frames, len(waves)))
            learnt = False if rng.random() < 0.2 else None
            turns += [Turn("user", tuple(asked)), Turn("assistant", (f"it is {number}",), learnt)]
        turns[-1] = Turn("assistant", turns[-1].content)
        found.append((Example(f"t{number}", "chat", (), (), turns=tuple(turns)), waves))
    return found


def theirs(kind: str, path: Path, example: Example, waves: list[np.ndarray]) -> dict[str, Any]:
    """What the processor makes of it: clip by clip, for some take one a text."""
    if kind == "voxtral":
        return audio_voxtral.inputs(path, messages(list(example.turns)), waves)
    spoken = zoo.spoken_of(kind)
    processor = zoo.processor_of(kind, spoken)
    text = processor.apply_chat_template(messages(list(example.turns)), tokenize=False)
    made: dict[str, Any] = {}
    if waves:
        merged = processor._merge_kwargs(tokenizer_init_kwargs=spoken.init_kwargs)["audio_kwargs"]
        tensors, shown = processor._process_audio(waves, **{**merged, "return_tensors": "pt"})
        made = {k: v for k, v in tensors.items() if k not in processor.unused_input_names}
        (text,), _ = processor.get_text_with_replacements([text], audio_replacements=shown)
    return made | {"input_ids": spoken(text, return_tensors="pt").input_ids}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ids_and_losses_of_conversations_are_those_of_a_plain_loop(
    kind: str, tmp_path: Path
) -> None:
    path = zoo.save(kind, tmp_path / "base")
    encoder, net = encoder_of(path), plain(kind, path)
    items: list[Sequence] = []
    expected, supervised = 0.0, 0
    for example, waves in talks(kind):
        item = encoder.encode(example, waves)
        assert len(item.input_ids) == encoder.measure(example, [len(wave) for wave in waves])
        made = theirs(kind, path, example, waves)
        ids = made["input_ids"][0].tolist()
        assert item.input_ids.tolist() == ids[: len(item.input_ids)]
        said = encoder.tokenizer.decode(item.input_ids[item.labels != -100])
        spoken = [t for t in example.turns if t.role == "assistant" and t.learnt is not False]
        assert said == "".join(f"{turn.text}{encoder.tokenizer.eos_token}" for turn in spoken)
        labels = torch.full((len(ids),), -100)
        labels[: len(item.labels)] = torch.from_numpy(item.labels.astype(np.int64))
        logits = net(**made).logits[0, :-1]
        expected += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
        supervised += int((labels[1:] != -100).sum())
        items.append(item)
    for mode in ("packed", "padded"):
        ours = model_of(path, mode)
        term = ours.loss(ours.collate(batch(*items)))[0]
        assert term.sum.item() == pytest.approx(expected, rel=1e-5)
        assert int(term.count) == supervised
