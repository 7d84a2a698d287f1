"""Make the corpus of performances: clips, records with ratings, and the tokenizer.

    python examples/drama/make_data.py [--out FOLDER]

Lines of `lines.yaml` are spoken by espeak-ng. How much the pitch moves, how fast it is spoken and
how loud it is are set, each to one of five levels, so that true ratings are known; three simulated
raters give them, now and then one off. It needs the `espeak-ng` command and is run by whoever
changes the corpus; everybody else uses the files beside it. Costs 80 s on two cores.

`plan` is pure: what each clip says, how, and what its raters give follows from `SEED` alone, so
the records come out byte for byte the same. The audio depends on the version of espeak-ng.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import soundfile
import soxr
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from raysft.data import rubric

SEED = 11
CLIPS = {"train": 1000, "dev": 60, "test": 160}

# accent+variant (espeak-ng's names): one voice, whose pitch is that of each accent.
VOICES = ("en-us+f2", "en-gb-x-rp+f2", "en-gb-scotland+f2", "en-029+f2")
# Of test: accents that training never has.
UNSEEN_VOICES = ("en-us-nyc+f2", "en-gb-x-gbclan+f2")

# A level's setting is drawn between these, evenly. Swing: by how much of the voice's pitch one word
# is said higher and the next lower, in %.
SWINGS = ((0, 4), (20, 28), (44, 52), (68, 76), (92, 99))
SPEEDS = ((95, 108), (125, 141), (163, 184), (213, 240), (278, 313))  # words a minute
LEVELS = ((-44, -41), (-37.5, -34.5), (-31, -28), (-24.5, -21.5), (-18, -15))  # dB of full scale
PITCHES = (46, 54)  # espeak-ng's 0..99
DIMENSIONS = ("pitch_variation", "pace", "loudness")
RATERS = 3
OFF = 0.1  # of a rating: how often it is one too high, and how often one too low
MARGIN_S = 0.05  # silence kept at each end
LONGEST_S = 4.0


@dataclass(frozen=True)
class Clip:
    """One performance: what is said, how, and what it is rated."""

    split: str
    number: int
    scene: str
    text: str
    voice: str
    truth: tuple[int, ...]  # a level, 1 to 5, of each of DIMENSIONS
    pitch: int
    swing: int  # below 0: the first word is the higher
    speed: int
    level: float
    ratings: tuple[tuple[int, ...], ...]  # of each of DIMENSIONS, one a rater

    @property
    def id(self) -> str:
        """Unique over all splits."""
        return f"{self.split}-{self.number:04d}"

    @property
    def path(self) -> str:
        """Relative to the corpus folder, with forward slashes."""
        return f"audio/{self.split}/{self.number:04d}.opus"


@functools.cache
def lines(split: str) -> list[tuple[str, str]]:
    """(scene, line) of a split; no line is in two splits."""
    scenes: dict[str, list[str]] = yaml.safe_load((HERE / "lines.yaml").read_text())
    part = {"train": slice(0, -3), "dev": slice(-3, -2), "test": slice(-2, None)}[split]
    return [(scene, line) for scene, said in scenes.items() for line in said[part]]


def plan(seed: int = SEED) -> dict[str, list[Clip]]:
    """Every clip of every split, as a function of `seed`."""
    rng = np.random.default_rng(seed)
    return {split: [_clip(rng, split, number) for number in range(CLIPS[split])] for split in CLIPS}


def _clip(rng: np.random.Generator, split: str, number: int) -> Clip:
    said, voices = lines(split), UNSEEN_VOICES if split == "test" else VOICES
    scene, text = said[rng.integers(len(said))]
    truth = tuple(int(level) for level in rng.integers(1, 6, len(DIMENSIONS)))
    pitch, pace, loudness = truth
    return Clip(
        split=split,
        number=number,
        scene=scene,
        text=text,
        voice=voices[number % len(voices)],
        truth=truth,
        pitch=int(rng.integers(PITCHES[0], PITCHES[1] + 1)),
        swing=round(rng.uniform(*SWINGS[pitch - 1])) * int(rng.choice([-1, 1])),
        speed=round(rng.uniform(*SPEEDS[pace - 1])),
        level=round(rng.uniform(*LEVELS[loudness - 1]), 1),
        ratings=tuple(_ratings(rng, level) for level in truth),
    )


def _ratings(rng: np.random.Generator, level: int) -> tuple[int, ...]:
    """What the raters give: the level, now and then one off, never outside the scale."""
    off = rng.choice([-1, 0, 1], RATERS, p=[OFF, 1 - 2 * OFF, OFF])
    return tuple(int(rating) for rating in np.clip(level + off, 1, 5))


def records(clips: list[Clip]) -> Iterator[str]:
    """Lines of format `drama`, paths relative to their file. Nothing reads `voice` and `truth`."""
    for clip in clips:
        record = {
            "id": clip.id,
            "dataset_name": "ROLE",
            "wav_path": clip.path,
            "local_scene": clip.scene,
            "transcript": clip.text,
            "voice": clip.voice,
            "truth": dict(zip(DIMENSIONS, clip.truth, strict=True)),
            "annotations": dict(zip(DIMENSIONS, map(list, clip.ratings), strict=True)),
        }
        yield json.dumps(record) + "\n"


def render(clip: Clip, out: Path, digits: ModuleType) -> None:
    """Speak `clip` and write its file under `out`; a failing espeak-ng raises."""
    words = clip.text.split()
    swings = [clip.swing if number % 2 else -clip.swing for number in range(len(words))]
    told = (
        f'<prosody pitch="{100 + s}%">{w}</prosody>' for s, w in zip(swings, words, strict=True)
    )
    text = f"<speak>{' '.join(told)}</speak>"
    with tempfile.TemporaryDirectory() as folder:
        spoken = Path(folder) / "clip.wav"
        settings = ["-m", "-v", clip.voice, "-s", str(clip.speed), "-p", str(clip.pitch)]
        command = ["espeak-ng", *settings, "-w", str(spoken), text]
        subprocess.run(command, check=True, capture_output=True)
        samples, rate = soundfile.read(spoken, dtype="float32")
    samples = soxr.resample(_trim(samples, rate), rate, 16000)
    samples *= 10 ** (clip.level / 20) / np.sqrt(np.mean(samples**2))
    assert len(samples) <= LONGEST_S * 16000, (clip, len(samples) / 16000)
    path = out / clip.path
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, 16000, format="OGG", subtype="OPUS", compression_level=0.985)
    path.write_bytes(digits.without_padding(path.read_bytes()))


def _trim(samples: np.ndarray, rate: int) -> np.ndarray:
    """Cut the silence at both ends down to `MARGIN_S`."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    margin = int(MARGIN_S * rate)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes joined to the words of what is asked; a digit is a token, and so is an answer's tag."""
    file = HERE / "rubrics.yaml"
    asked = rubric.rubrics(*rubric.named(str(file), ""))
    texts = [asked.texts["context"], *(one.text for one in asked.dimensions.values())]
    texts += [f"Scene: {scene}" for scene, _ in lines("train")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = {f"{name}_token": f"<|{name}|>" for name in ("pad", "bos", "eos")}
    audio = ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # more than there are words: each is joined
        min_frequency=1,
        special_tokens=[*control.values(), *audio],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["<answer>", "</answer>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=audio,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **control,
    )


def spoken_digits() -> ModuleType:
    """The module that made the spoken digits, for what it knows of small Opus files."""
    file = HERE.parent / "spoken_digits" / "generate.py"
    spec = importlib.util.spec_from_file_location("spoken_digits_generate", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Write the whole corpus, replacing the audio that is there."""
    parser = argparse.ArgumentParser(description="Make the corpus of performances.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into")
    parser.add_argument("--jobs", type=int, default=2, help="clips rendered at a time")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if shutil.which("espeak-ng") is None:
        parser.error("needs the espeak-ng command (Debian: apt-get install espeak-ng)")
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "audio", ignore_errors=True)
    splits, digits = plan(), spoken_digits()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        clips = [clip for split in splits.values() for clip in split]
        for _ in pool.map(lambda clip: render(clip, out, digits), clips):
            pass
    for split, clips in splits.items():
        (out / f"{split}.jsonl").write_text("".join(records(clips)))
    build_tokenizer().save_pretrained(out / "tokenizer")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{sum(map(len, splits.values()))} clips, {size / 1e6:.2f} MB in {out}")


if __name__ == "__main__":
    main()
