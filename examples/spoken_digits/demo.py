"""Train on the spoken digits, show the word error rates, three transcripts and a picture.

    python examples/spoken_digits/demo.py [key=value ...]

The same as `python jobs/sft.py examples/spoken_digits/asr.yaml`, and then what the run wrote, read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from raysft import load_config, train
from raysft.cli import guarded
from raysft.progress import ProgressLine


def main(argv: Sequence[str]) -> None:
    """Train (or continue), then report."""
    begun = time.monotonic()
    os.chdir(ROOT)  # the example's paths are relative to the repository
    overrides = [word for word in argv if not word.startswith("--")]
    config = load_config("examples/spoken_digits/asr.yaml", overrides)

    from raysft.report import draw

    with ProgressLine() as show:
        outcome = train(config, show)
    lines = (outcome.folder / "predictions" / f"step_{outcome.step}.jsonl").read_text().splitlines()
    said = [p for p in map(json.loads, lines) if p["source"] == "test"]
    print()
    for prediction in said[:: max(1, len(said) // 3)][:3]:
        print(f"{prediction['id']}\n  reference   {prediction['reference']}")
        print(f"  hypothesis  {prediction['hypothesis']}")
    wer = outcome.evaluation
    print()
    print(f"WER, held-out digit strings, voices of the training set   {wer['wer/test']:.1%}")
    print(f"WER, held-out digit strings, voices never heard           {wer['wer/test_unseen']:.1%}")
    print(f"picture      {draw(outcome.folder)}")
    print(f"run folder   {outcome.folder}")
    print(f"in all       {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    guarded(main)
