"""A format from outside the package is indexed, planned, read and trained as those in it are."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from raysft import worker
from raysft.config import Config
from raysft.config.schema import Data, Model, Source
from raysft.data import sources
from raysft.data.clips.audio import load
from raysft.data.encode import make_encoder
from raysft.data.example import Audio, Example, MicroBatch, Units
from raysft.data.index.build import Index, build_index
from raysft.data.read.reader import Reader, Work
from raysft.data.sources.records import OpenFile, Place, fetch
from raysft.driver.preflight import prepare
from raysft.errors import BadExample, UserError
from raysft.parallel import World
from raysft.run.lines import read_lines
from raysft.train.loop import train
from tests.conftest import tone
from tests.support.batches import differences
from tests.support.indexes import aged, recorded_probes
from tests.support.models import AUDIO, CAUSAL
from tests.support.outside_formats import ParquetRows, Ratings, Segments, write_rows

ROWS = 21


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats that a test adds go with it."""
    monkeypatch.setattr(sources, "_registered", {})


@pytest.fixture
def registered(table: None) -> None:
    """All of them."""
    for form in (ParquetRows(), Segments(), Ratings()):
        sources.register(form)


def rows(folder: Path, count: int = ROWS) -> list[tuple[str, str, bytes]]:
    """(id, text, bytes) of clips of every kind; the files lie in `folder` too."""
    folder.mkdir(exist_ok=True)
    found = []
    for number in range(count):
        path = folder / f"{number}.{('wav', 'flac', 'ogg')[number % 3]}"
        soundfile.write(path, tone(0.3 + 0.04 * number, 16000, 200 + 10 * number), 16000)
        aged(path)
        found.append((f"r{number}", f"text {number}", path.read_bytes()))
    return found


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def indexed(path: Path, folder: Path, model: dict[str, Any] = AUDIO, **data: Any) -> Reader:
    encoder = make_encoder(Model(**model), Data(**data), folder)
    index = build_index([Source(path=str(path))], "train", encoder, folder / "index")
    return Reader(index, encoder, int(index.tokens.sum()), 0)


def batch_of(reader: Reader, step: int = 1, order: Sequence[int] | None = None) -> MicroBatch:
    rows = np.arange(len(reader.index)) if order is None else np.array(order)
    (batch,) = reader.read_chunk([Work(0, step, 0, rows)])
    return batch


def trained(folder: Path, corpus: Path) -> tuple[list[float], list[list[str]], str]:
    """Losses, ids by line of the ledger, and the hash of the plan of a run of a few steps."""
    torch.set_num_threads(1)
    config = Config.model_validate(
        {
            "run": {"name": corpus.stem, "storage_path": str(folder), "seed": 1},
            "data": {
                "train": [{"path": str(corpus)}],
                "lanes": 2,
                "tokens_per_batch": 200,
                "index_path": str(folder / "index"),
            },
            "model": AUDIO,
            "train": {"max_steps": 6},
            "log": {"every": 1, "tensorboard": False},
        }
    )
    run = folder / corpus.stem
    run.mkdir()
    prepared = prepare(config, run)
    data = worker.Data.in_process(config, prepared.encoder, run, prepared.train, prepared.eval)
    train(worker.build_job(config, run, World.current(), data, prepared.total_steps, None))
    ledger = [
        line["ids"] for path in sorted(run.glob("ledger/*.jsonl")) for line in read_lines(path)
    ]
    losses = [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    return losses, ledger, prepared.train.hash


# -- rows of Parquet, whose records carry the clips ----------------------------------------------


def test_a_format_is_known_once_it_is_registered(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", rows(tmp_path / "clips", 3))
    assert sources.resolve(Source(path=str(path)), "train").format == "parquet"
    sources.register(ParquetRows())  # whoever gives one means it
    for given in ("auto", "outside_parquet"):
        found = sources.resolve(Source(path=str(path), format=given), "train")
        assert (found.format, found.files) == ("outside_parquet", (path,))
    path.write_bytes(b"PAR1 and no more of it")
    with pytest.raises(UserError, match=r"data\.train\[0\]: .*a\.parquet: no Parquet"):
        build_index([Source(path=str(path))], "train", None, tmp_path / "index")
    other = tmp_path / "other.bin"
    other.write_bytes(b"\x00binary")
    with pytest.raises(UserError, match="is in no format that is known: it is a binary file"):
        sources.resolve(Source(path=str(other)), "train")


def test_a_name_of_a_format_is_given_once() -> None:
    sources.register(ParquetRows())
    for name in ("outside_parquet", "ming_jsonl", "auto"):
        form = ParquetRows()
        form.name = name
        with pytest.raises(UserError, match=f"there is a format {name} already"):
            sources.register(form)


def as_files(folder: Path, clips: list[tuple[str, str, bytes]]) -> list[dict[str, Any]]:
    """Lines of ming_jsonl about the files below clips/ that hold what rows hold."""
    names = [entry.name for entry in sorted((folder / "clips").iterdir(), key=_number)]
    return [
        {"id": name, "task_type": "asr", "wav_path": f"clips/{file}", "text": text}
        for (name, text, _), file in zip(clips, names, strict=True)
    ]


@pytest.mark.usefixtures("registered")
def test_rows_are_read_as_files_of_the_same_clips_are(tmp_path: Path) -> None:
    clips = rows(tmp_path / "clips")
    path = write_rows(tmp_path / "rows.parquet", clips)
    records = as_files(tmp_path, clips)
    ours = indexed(path, tmp_path / "ours")
    theirs = indexed(lines(tmp_path / "rows.jsonl", records), tmp_path / "theirs")
    for column in ("tokens", "seconds", "task"):
        np.testing.assert_array_equal(getattr(ours.index, column), getattr(theirs.index, column))
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    assert differences(batch_of(ours, order=order), batch_of(theirs, order=order)) == []
    assert ours.index.ids(np.array(order)) == [f"r{number}" for number in order]


@pytest.mark.usefixtures("registered")
def test_a_run_over_rows_trains_as_one_over_files(tmp_path: Path) -> None:
    clips = rows(tmp_path / "clips")
    path = write_rows(tmp_path / "rows.parquet", clips)
    records = as_files(tmp_path, clips)
    losses, ledger, _ = trained(tmp_path, path)
    assert len(losses) == 6 and len({name for ids in ledger for name in ids}) == ROWS
    manifest = lines(tmp_path / "files.jsonl", records)
    assert trained(tmp_path, manifest)[:2] == (losses, ledger)


@pytest.mark.usefixtures("registered")
def test_rows_are_measured_once_and_a_group_that_came_is_measured_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = rows(tmp_path / "clips")
    clips[5] = ("r5", "text 5", b"no audio")
    path = write_rows(tmp_path / "rows.parquet", clips[:16])
    aged(path)
    first = indexed(path, tmp_path / "run").index
    (bad,) = first.rejected
    assert (bad.id, bad.path) == ("r5", f"{path}:6")
    assert bad.reason.startswith(f"rows.parquet row 6: {path}:6: not audio")
    seen = recorded_probes(monkeypatch)
    assert indexed(path, tmp_path / "run").index.hash == first.hash
    assert seen == ["rows.parquet:6"]  # what could not be used is looked at again
    seen.clear()
    write_rows(path, clips)
    grown = indexed(path, tmp_path / "run").index
    assert sorted(seen) == sorted(f"rows.parquet:{line}" for line in (6, *range(17, ROWS + 1)))
    assert grown.ids(np.arange(ROWS - 1)) == [f"r{n}" for n in range(ROWS) if n != 5]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("changed", ["row", "fewer", "none"])
def test_rows_that_changed_since_they_were_indexed_are_refused(
    tmp_path: Path, changed: str
) -> None:
    clips = rows(tmp_path / "clips")
    path = write_rows(tmp_path / "rows.parquet", clips)
    reader = indexed(path, tmp_path / "run")
    reader = replace(reader, index=Index.load(reader.index.folder))
    if changed == "row":
        clips[7] = ("r7", "text X", clips[7][2])
    write_rows(path, clips[:5] if changed == "fewer" else clips)
    if changed == "none":
        path.write_bytes(b"no Parquet any more")
    with pytest.raises(UserError, match=r"rows\.parquet has changed since it was indexed"):
        batch_of(reader)


def _number(path: Path) -> int:
    return int(path.stem)


# -- fetching --------------------------------------------------------------------------------------


class Failing(ParquetRows):
    """Gives the numbers of its places; its storage fails when it is told to."""

    def __init__(self, failures: list[int]) -> None:
        self.failures = failures
        self.given: list[int] = []
        self.opened = 0

    def fetch(self, file: OpenFile, places: Sequence[Place]) -> Iterator[bytes]:
        file.kept(self._open)
        for place in places:
            if place.offset in self.failures:
                self.failures.remove(place.offset)
                raise OSError(errno.ESTALE, "stale")
            self.given.append(place.offset)
            yield str(place.offset).encode()

    def _open(self, path: Path) -> Any:
        self.opened += 1
        return SimpleNamespace(close=lambda: None)


def test_what_is_left_is_fetched_again_where_the_storage_failed_for_a_moment() -> None:
    form = Failing([0, 3, 3])
    places = [Place(1, number, 1) for number in range(6)]
    found = list(fetch(form, OpenFile(Path("rows")), places))
    assert found == [str(number).encode() for number in range(6)]
    assert form.given == [*range(6)]
    assert form.opened == 4
    with pytest.raises(UserError, match="rows: its storage does not give it"):
        list(fetch(Failing([2] * 1000), OpenFile(Path("rows")), places))


def test_what_is_kept_open_is_given_back_once(tmp_path: Path) -> None:
    closed: list[Path] = []
    file = OpenFile(tmp_path)
    made = [
        file.kept(lambda path: SimpleNamespace(close=lambda: closed.append(path))) for _ in "ab"
    ]
    assert made[0] is made[1]
    file.close()
    file.close()
    assert closed == [tmp_path]
    file.kept(lambda path: SimpleNamespace(close=lambda: closed.append(path)))
    del file
    assert closed == [tmp_path] * 2


# -- parts of recordings ---------------------------------------------------------------------------


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", ["wav", "mp3"])
def test_segments_of_recordings_are_read_as_clips_cut_from_them(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wave = np.stack([tone(8.0, 16000, pitch) for pitch in (300, 500)], axis=1)
    recording = tmp_path / f"talk.{kind}"
    soundfile.write(recording, wave, 16000)
    aged(recording)
    records = [
        {"begin": n / 2, "end": n / 2 + 0.7, "channel": n % 2, "text": str(n), "id": f"s{n}"}
        for n in range(14)
    ]
    segments = [{"recording": recording.name, **record} for record in records]
    segments.append({**segments[0], "begin": 7.5, "end": 9.0, "id": "behind"})
    seen = recorded_probes(monkeypatch)
    ours = indexed(lines(tmp_path / "segments.jsonl", segments), tmp_path / "ours")
    assert seen == [recording.name], "the file is asked once for all its parts"
    assert [item.id for item in ours.index.rejected] == ["behind"]
    assert "of which 7.5 s to 9 s is no part" in ours.index.rejected[0].reason
    assert ours.index.seconds.tolist() == pytest.approx([0.7] * 14)

    manifest = []
    for record in records:
        clip = Audio(str(recording), None, record["begin"], record["end"], record["channel"])
        soundfile.write(tmp_path / f"{record['id']}.wav", load(clip, 16000), 16000, subtype="FLOAT")
        manifest.append({"wav_path": f"{record['id']}.wav", "text": record["text"]})
        manifest[-1] |= {"task_type": "asr", "id": record["id"]}
    theirs = indexed(lines(tmp_path / "files.jsonl", manifest), tmp_path / "theirs")
    assert differences(batch_of(ours), batch_of(theirs)) == []

    seen.clear()
    again = indexed(tmp_path / "segments.jsonl", tmp_path / "ours")
    assert again.index.hash == ours.index.hash
    assert seen == [recording.name]  # for the one that was behind its end
    soundfile.write(recording, wave[: 16000 * 5], 16000)
    shorter = indexed(tmp_path / "segments.jsonl", tmp_path / "ours")
    assert len(shorter.index) == 9


# -- examples that draw ----------------------------------------------------------------------------

RATINGS = {"clarity": 4, "naturalness of the whole of it": 2.5, "noise": 1}


def rated(folder: Path, heard: list[list[str]]) -> Path:
    records = [
        {"id": f"q{number}", "heard": names, "ratings": RATINGS}
        for number, names in enumerate(heard)
    ]
    return lines(folder / "rated.jsonl", records)


def text_of(reader: Reader, batch: MicroBatch) -> list[str]:
    """Each sequence as the model reads it."""
    cuts = np.cumsum(batch.lengths)[:-1]
    return [reader.encoder.tokenizer.decode(ids) for ids in np.split(batch.input_ids, cuts)]


@pytest.mark.usefixtures("registered")
def test_examples_that_draw_are_measured_at_their_longest_and_drawn_by_step_and_slot(
    tmp_path: Path,
) -> None:
    reader = indexed(rated(tmp_path, [["some words"]] * 8), tmp_path / "run", CAUSAL)
    (example,) = reader.index.examples([0])
    assert [form.output for form in example.forms] == [("4",), ("2.5",), ("1",)]
    lengths = [reader.encoder.measure(form, []) for form in example.forms[1:]]
    longest = max(lengths)
    assert reader.index.tokens.tolist() == [longest] * 8

    drawn = [text_of(reader, batch_of(reader, step)) for step in range(1, 41)]
    assert drawn == [text_of(reader, batch_of(reader, step)) for step in range(1, 41)]
    counts = Counter(text for texts in drawn for text in texts)
    assert len(counts) == 3 and min(counts.values()) > 70
    assert len(set(map(tuple, drawn))) == 40  # neither by step alone nor by slot alone
    other = replace(reader, seed=1)
    assert drawn != [text_of(other, batch_of(other, step)) for step in range(1, 41)]
    batch = batch_of(reader)
    assert batch.ids == [f"q{number}" for number in range(8)]
    assert batch.quarantined == [] and set(batch.tasks) == {"rate"}
    alone = batch_of(reader, order=[0])
    assert text_of(reader, alone)[0] == text_of(reader, batch)[0]

    evaluated = replace(reader, seed=None)
    (first,) = {text for step in (1, 2) for text in text_of(evaluated, batch_of(evaluated, step))}
    assert "clarity" in first and "4" in first


@pytest.mark.usefixtures("registered")
def test_the_clips_of_a_form_are_in_its_own_order(tmp_path: Path) -> None:
    for name, seconds in (("a", 0.5), ("b", 0.9)):
        soundfile.write(tmp_path / f"{name}.wav", tone(seconds, 16000, 300), 16000)
    reader = indexed(rated(tmp_path, [["a.wav", "b.wav"]]), tmp_path / "run")
    assert reader.index.seconds.tolist() == pytest.approx([1.4])
    encoder = reader.encoder
    (example,) = reader.index.examples([0])
    assert [Path(clip.path).stem for clip in example.audio()] == ["a", "b"]
    clips = [load(clip, 16000) for clip in example.audio()]
    orders = set()
    for seed in range(20):
        form = example.drawn(np.random.default_rng(seed))
        own = [load(clip, 16000) for clip in form.audio()]
        expected = encoder.encode(replace(form, variants=()), own)
        found = encoder.encode(example, clips, np.random.default_rng(seed))
        np.testing.assert_array_equal(found.input_ids, expected.input_ids)
        np.testing.assert_array_equal(found.labels, expected.labels)
        orders.add(tuple(len(clip) for clip in own[:2]))
    assert orders == {(8000, 14400), (14400, 8000)}


def test_an_example_without_variants_draws_nothing_and_keeps_its_augmentation(
    tmp_path: Path,
) -> None:
    model = Model(**{**CAUSAL, "speech_units": 20})
    encoder = make_encoder(model, Data(unit_noise=0.5), tmp_path)
    heard = Units(tuple(range(20)))
    plain = Example("a", "asr", (heard,), ("text",), "Write.", text="text")
    given, left = np.random.default_rng(3), np.random.default_rng(3)
    sequence = encoder.encode(plain, [], given)
    noise = left.random(20) < 0.5
    units = np.where(noise, left.integers(20, size=20), np.arange(20))
    assert given.random() == left.random()
    names = encoder.tokenizer.convert_ids_to_tokens(sequence.input_ids.tolist())
    assert [name for name in names if "unit" in name] == [f"<|unit{unit}|>" for unit in units]
    assert plain.forms == [plain] and plain.drawn(given) is plain


def test_an_example_of_which_one_form_cannot_be_used_cannot(tmp_path: Path) -> None:
    encoder = make_encoder(Model(**{**CAUSAL, "speech_units": 20}), Data(), tmp_path)
    good = Example("a", "asr", (Units((1, 2)),), ("text",), "Write.")
    bad = replace(good, input=(Units((99,)),))
    with pytest.raises(BadExample, match="unit 99, but there are 20 units"):
        encoder.measure(replace(good, variants=(good, bad)), [])
    assert encoder.measure(replace(good, variants=(good,)), []) == encoder.measure(good, [])
