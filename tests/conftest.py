"""Fixtures shared by all tests: small real audio and manifests."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysft import patience
from raysft.config.marks import one_of
from tests.support.parts import PARTS, part_of

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def tone(seconds: float, rate: int, pitch: float, channels: int = 1) -> np.ndarray:
    """A decaying tone with a little noise: float32 [samples] or [samples, channels]."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(int(pitch)).normal(0, 0.01, len(time))
    wave = (0.4 * np.sin(2 * np.pi * pitch * time) * np.exp(-time) + noise).astype(np.float32)
    return wave if channels == 1 else np.stack([wave * (0.5 + c / 4) for c in range(channels)], 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--part=NAME`: one part of the tests, see `tests.support.parts`."""
    parser.addoption("--part", help=f"one of {', '.join(PARTS)}")


def pytest_configure(config: pytest.Config) -> None:
    """A part that there is not is said in a line."""
    part = config.getoption("--part")
    if part is not None and part not in PARTS:
        raise pytest.UsageError(f"PART={part}: there is no such part; name {one_of([*PARTS])}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of other parts are not even imported."""
    part = config.getoption("--part")
    test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if part is not None and test and part_of(collection_path) != part else None


@pytest.fixture(autouse=True)
def little_patience() -> None:
    """Storage is waited for a moment only, unless a config says otherwise."""
    patience.allow(0.2)


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    """A test that fails leaves no process behind: one that is stopped would hold up the end."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def make_clips(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_clips(count, ...) writes clips of 0.3 to 1.2 s and a Ming JSON-lines file."""

    def make(
        count: int,
        tasks: tuple[str, ...] = ("asr",),
        kinds: tuple[tuple[str, int, int], ...] = (("wav", 16000, 1),),
        absolute: bool = False,
        seed: int = 0,
    ) -> Path:
        folder = tmp_path_factory.mktemp("clips")
        rng = np.random.default_rng(seed)
        lines = []
        for number in range(count):
            suffix, rate, channels = kinds[number % len(kinds)]
            name = f"clip{number:04d}.{suffix}"
            wave = tone(rng.uniform(0.3, 1.2), rate, 200 + 10 * (number % 50), channels)
            soundfile.write(folder / name, wave, rate)
            text = " ".join(rng.choice(WORDS, rng.integers(1, 6)))
            path = str(folder / name) if absolute and number % 2 else name
            lines.append({"task_type": tasks[number % len(tasks)], "wav_path": path, "text": text})
        manifest = folder / "train.jsonl"
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return manifest

    return make
