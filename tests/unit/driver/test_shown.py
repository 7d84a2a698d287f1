"""`--dry-run --show N`: examples as the model reads them, what is supervised marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raysft.config.schema import Data, Model
from raysft.data.encode import make_encoder
from raysft.data.read.reader import Reader, Work
from raysft.driver.shown import END, LEARNT, examples
from tests.support import indexes, models


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """An index of conversations with 0, 1 and 3 clips, and its encoder."""
    folder: Path = tmp_path_factory.mktemp("talks")
    for number in range(3):
        indexes.clip(folder / f"{number}.wav", 0.3 + 0.2 * number)
    indexes.jsonl(
        folder / "talks.jsonl",
        [
            {"messages": [turn("user", "Say hi."), turn("assistant", "hi")]},
            {
                "messages": [
                    turn("system", "Be brief."),
                    turn("user", "<audio>Who is it?"),
                    turn("assistant", "A man."),
                    turn("user", "Compare <audio> and <audio>."),
                    turn("assistant", "The same."),
                    turn("user", "Sure?"),
                    turn("assistant", "Yes.\nI am."),
                ],
                "audios": ["0.wav", "1.wav", "2.wav"],
            },
            {
                "messages": [
                    turn("user", "<audio>Once more?"),
                    {"role": "assistant", "content": "No.", "loss": False},
                    turn("user", "Please."),
                    turn("assistant", "Well."),
                ],
                "audios": ["1.wav"],
                "id": "flagged",
            },
        ],
    )
    model = Model(**models.AUDIO)
    encoder = make_encoder(model, Data(), folder)
    index = indexes.build(folder / "index", folder / "talks.jsonl", encoder=encoder, workers=1)
    return index, encoder


def test_each_example_has_its_turns_with_what_is_learnt_marked(made) -> None:
    index, encoder = made
    lines = examples(index, encoder, 4096, 3, colours=False)
    titles = [line for line in lines if line.startswith("example")]
    assert [title.split(":")[1].split(",")[0] for title in titles] == [
        " talks", " talks", " flagged"
    ]  # fmt: skip
    assert "supervised, 1.5 s of audio" in titles[1]
    text = "\n".join(lines)
    first, second, third = text.split("example ")[1:]
    assert [part.split("\u27e7")[0] for part in first.split("\u27e6")[1:]] == ["hi<|eos|>"]
    marked = [part.split("\u27e7")[0] for part in second.split("\u27e6")[1:]]
    assert marked == ["A man.<|eos|>", "The same.<|eos|>", "Yes.", "I am.<|eos|>"]
    assert second.count("<|AUDIO|> x ") == 3 and "Be brief." in second
    assert [part.split("\u27e7")[0] for part in third.split("\u27e6")[1:]] == ["Well.<|eos|>"]
    coloured = "\n".join(examples(index, encoder, 4096, 3, colours=True))
    assert coloured.replace(LEARNT, "\u27e6").replace(END, "\u27e7") == text
    assert examples(index, encoder, 4096, 1, colours=False) == lines[: lines.index("") + 1]


def test_conversations_are_as_long_as_they_were_measured(made) -> None:
    index, encoder = made
    reader = Reader(index, encoder, 4096, seed=0)
    (batch,) = reader.read(iter([Work(0, 0, 0, np.arange(len(index)))]))
    assert batch.lengths.tolist() == index.tokens.tolist()
    assert not batch.quarantined
    features = batch.arrays["features"]
    assert features.owners.tolist() == [1, 1, 1, 2], "each clip belongs to its conversation"
