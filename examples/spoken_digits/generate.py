"""Generate the spoken-digits corpus: clips, manifests and the tokenizer.

    python examples/spoken_digits/generate.py [--out FOLDER]

What it stands for: real compressed audio files and Ming-UniAudio JSON lines, small enough for a
repository, on which a model can learn to transcribe from nothing. It needs the `espeak-ng` command
and is run by whoever changes the corpus; everybody else uses the files beside it. Costs about a
minute on four cores.

`plan` is pure: which clip says what, in which voice and file format, follows from `SEED` alone, so
the manifests come out byte for byte the same. The audio depends on the versions of espeak-ng and
of the encoders, and Ogg files carry a random stream number.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, WhisperTokenizer

SEED = 7
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LONGEST = 5  # digits in a clip
CLIPS = {"train": 2400, "dev": 60, "test": 100, "test_unseen": 100}

# Voices of training, dev and test: accent, or accent+variant (espeak-ng's names).
VOICES = (
    "en-us",
    "en-us+f2",
    "en-us+m3",
    "en-gb",
    "en-gb+f4",
    "en-gb-scotland+m7",
    "en-gb-x-rp+f1",
    "en-029+m4",
)
# Voices of test_unseen: other variants throughout, and three accents that training never has.
UNSEEN_VOICES = (
    "en-us+m6",
    "en-gb+f5",
    "en-us-nyc+m2",
    "en-gb-x-gbclan+f3",
    "en-gb-x-gbcwmd+m5",
)

SPEEDS = (175, 235)  # words a minute, uniform
PITCHES = (38, 62)  # espeak-ng's 0..99, uniform
LOUDNESS = (0.25, 0.8)  # peak, log-uniform
MARGIN_S = 0.05  # silence kept at each end
SILENCE = 0.003  # amplitude below which a sample counts as silence


@dataclass(frozen=True)
class Encoding:
    """How a clip is stored."""

    suffix: str
    container: str
    subtype: str
    rate: int
    channels: int = 1
    level: float | None = None  # soundfile's compression level: 0 large .. 1 small


# About 10 kbit/s: the smallest at which Opus still keeps the band up to 8 kHz.
OPUS = Encoding("opus", "OGG", "OPUS", 16000, 1, 0.985)
OPUS_8K = Encoding("opus", "OGG", "OPUS", 8000, 1, 0.985)
# The small splits also hold what corpora out there are made of.
MIXTURE = (
    Encoding("mp3", "MP3", "MPEG_LAYER_III", 44100, 2, 0.9),
    Encoding("flac", "FLAC", "PCM_16", 16000, 1, 1.0),
    Encoding("ogg", "OGG", "VORBIS", 22050, 2, 0.9),
    Encoding("wav", "WAV", "PCM_16", 8000),
    Encoding("mp3", "MP3", "MPEG_LAYER_III", 16000, 1, 0.9),
)


@dataclass(frozen=True)
class Clip:
    """One clip to be made: what it says, how, and the file it goes to."""

    split: str
    number: int
    text: str
    voice: str
    speed: int
    pitch: int
    peak: float
    encoding: Encoding

    @property
    def id(self) -> str:
        """Unique over all splits."""
        return f"{self.split}-{self.number:04d}"

    @property
    def path(self) -> str:
        """Relative to the corpus folder, with forward slashes."""
        return f"audio/{self.split}/{self.number:04d}.{self.encoding.suffix}"


def plan(seed: int = SEED) -> dict[str, list[Clip]]:
    """Every clip of every split, as a function of `seed`.

    No digit string of train occurs in dev or test and dev and test share none; test_unseen says
    test's strings, so that only the voice differs between their error rates.
    """
    rng = np.random.default_rng(seed)
    held_out = _distinct_strings(rng, CLIPS["dev"] + CLIPS["test"])
    texts = {
        "train": _training_strings(rng, CLIPS["train"], set(held_out)),
        "dev": held_out[: CLIPS["dev"]],
        "test": held_out[CLIPS["dev"] :],
    }
    texts["test_unseen"] = texts["test"]
    return {split: _clips(rng, split, texts[split]) for split in CLIPS}


def _random_string(rng: np.random.Generator, shortest: int) -> str:
    length = rng.integers(shortest, LONGEST + 1)
    return " ".join(DIGITS[digit] for digit in rng.integers(0, 10, length))


def _distinct_strings(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different strings of two or more digits: the ten single digits are all for train."""
    strings: dict[str, None] = {}
    while len(strings) < count:
        strings[_random_string(rng, 2)] = None
    return list(strings)


def _training_strings(rng: np.random.Generator, count: int, held_out: set[str]) -> list[str]:
    strings: list[str] = []
    while len(strings) < count:
        string = _random_string(rng, 1)
        if string not in held_out:
            strings.append(string)
    return strings


def _clips(rng: np.random.Generator, split: str, texts: list[str]) -> list[Clip]:
    voices = UNSEEN_VOICES if split == "test_unseen" else VOICES
    low, high = np.log(LOUDNESS)
    return [
        Clip(
            split=split,
            number=number,
            text=text,
            voice=voices[number % len(voices)],
            speed=int(rng.integers(SPEEDS[0], SPEEDS[1] + 1)),
            pitch=int(rng.integers(PITCHES[0], PITCHES[1] + 1)),
            peak=round(float(np.exp(rng.uniform(low, high))), 3),
            encoding=_encoding(split, number),
        )
        for number, text in enumerate(texts)
    ]


def _encoding(split: str, number: int) -> Encoding:
    """Train: Opus, one clip in ten at 8 kHz. Elsewhere one clip in four is of the mixture."""
    if split != "train" and number % 4 == 0:
        return MIXTURE[number // 4 % len(MIXTURE)]
    return OPUS_8K if number % 10 == 9 else OPUS


def manifest(clips: list[Clip]) -> Iterator[str]:
    """Ming-UniAudio JSON lines, paths relative to the manifest's folder."""
    for clip in clips:
        record = {
            "task_type": "asr",
            "wav_path": clip.path,
            "text": clip.text,
            "id": clip.id,
            "voice": clip.voice,
        }
        yield json.dumps(record) + "\n"


def render(clip: Clip, out: Path) -> None:
    """Speak `clip` and write its file under `out`; a failing espeak-ng raises."""
    with tempfile.TemporaryDirectory() as folder:
        spoken = Path(folder) / "clip.wav"
        settings = ["-v", clip.voice, "-s", str(clip.speed), "-p", str(clip.pitch)]
        command = ["espeak-ng", *settings, "-w", str(spoken), clip.text]
        subprocess.run(command, check=True, capture_output=True)
        samples, rate = soundfile.read(spoken, dtype="float32")
    samples = _trim(samples, rate) * (clip.peak / np.abs(samples).max())
    encoding = clip.encoding
    samples = soxr.resample(samples, rate, encoding.rate)
    if encoding.channels == 2:  # a little to one side, so that the channels differ
        samples = np.stack([0.9 * samples, 0.6 * samples], axis=1)
    path = out / clip.path
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(
        path,
        samples,
        encoding.rate,
        format=encoding.container,
        subtype=encoding.subtype,
        compression_level=encoding.level,
    )
    if encoding.subtype == "OPUS":
        path.write_bytes(without_padding(path.read_bytes()))


def without_padding(opus: bytes) -> bytes:
    """Shrink the comment page of an Ogg Opus file to what it says: no comments.

    libsndfile leaves some 760 bytes of room for tags, a third of a clip of one second. The page's
    layout is that of RFC 3533, section 6; its comment header that of RFC 7845, section 5.2.
    """
    start = opus.index(b"OggS", 4)  # the second page: one lacing value a 255 bytes of body
    lacing = opus[start + 27 : start + 27 + opus[start + 26]]
    body = start + 27 + len(lacing)
    vendor_end = body + 12 + int.from_bytes(opus[body + 8 : body + 12], "little")
    comments = opus[body:vendor_end] + bytes(4)
    page = bytearray(opus[start : start + 26] + bytes([1, len(comments)]) + comments)
    page[22:26] = bytes(4)
    page[22:26] = _ogg_checksum(page).to_bytes(4, "little")
    return opus[:start] + bytes(page) + opus[body + sum(lacing) :]


def _ogg_checksum(page: bytes | bytearray) -> int:
    """RFC 3533's CRC-32: polynomial 0x04c11db7, most significant bit first, from 0."""
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1) ^ (0x104C11DB7 if checksum & 0x80000000 else 0)
    return checksum


def _trim(samples: np.ndarray, rate: int) -> np.ndarray:
    """Cut the silence at both ends down to `MARGIN_S`."""
    loud = np.flatnonzero(np.abs(samples) > SILENCE)
    margin = int(MARGIN_S * rate)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: ten digits, the two instructions of units.yaml, a newline.

    Digits and instructions are separated by spaces; text is decoded the same way.
    """
    control = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    audio = ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
    words = [*control.values(), *audio, "\n", *DIGITS, "transcribe", "say"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, control["unk_token"]))
    spaces = pre_tokenizers.Split(Regex(" +"), "removed")
    newlines = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, newlines])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=audio,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **control,
    )


def build_whisper_tokenizer() -> WhisperTokenizer:
    """A tokenizer of Whisper's class, for whisper.yaml: bytes, joined to a token for each digit,
    with a space before it or without, and the control tokens of a Whisper that knows English."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in DIGITS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
        merges.append(("\u0120", word))  # how a space is written
    merges = list(dict.fromkeys(merges))
    pieces += [first + second for first, second in merges]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=merges, pad_token="<|pad|>")  # noqa: S106
    names = ("startoftranscript", "en", "translate", "transcribe", "startoflm", "startofprev")
    names += ("nospeech", "notimestamps")
    tokenizer.add_tokens([f"<|{name}|>" for name in names], special_tokens=True)
    tokenizer.set_prefix_tokens()  # which are known only now
    return tokenizer


def main() -> None:
    """Write the whole corpus, replacing the audio that is there."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Generate the spoken-digits corpus.")
    parser.add_argument("--out", type=Path, default=here, help="folder to write into")
    parser.add_argument("--jobs", type=int, default=4, help="clips rendered at a time")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if shutil.which("espeak-ng") is None:
        parser.error("needs the espeak-ng command (Debian: apt-get install espeak-ng)")
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "audio", ignore_errors=True)
    splits = plan()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        clips = [clip for split in splits.values() for clip in split]
        for _ in pool.map(lambda clip: render(clip, out), clips):
            pass
    for split, clips in splits.items():
        (out / f"{split}.jsonl").write_text("".join(manifest(clips)))
    build_tokenizer().save_pretrained(out / "tokenizer")
    build_whisper_tokenizer().save_pretrained(out / "whisper_tokenizer")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{sum(map(len, splits.values()))} clips, {size / 1e6:.2f} MB in {out}")


if __name__ == "__main__":
    main()
