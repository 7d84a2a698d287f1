"""Latents that the data brings: a column of Parquet is learnt without audio, and spoken as such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysft import command, synthesize
from raysft.config import Config
from raysft.config.schema import Data, Model, Source
from raysft.data import sources
from raysft.data.clips.audio import Limits, load, probe
from raysft.data.encode import Encoder, make_encoder
from raysft.data.example import Audio, Example
from raysft.driver.preflight import prepare
from raysft.errors import BadExample, UserError
from raysft.export import export
from raysft.families.patch_lm.encode import LATENTS, PatchEncoder
from raysft.hearing.check import check_tools
from raysft.transcribe.model import load as answering
from tests.support import codecs, patches
from tests.support.in_process import losses, run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WIDTH, RATE = 6, 100.0
COLUMN = {"rate": RATE, "width": WIDTH, "mean": 0.25, "std": 2.0}
KINDS: dict[str, pa.DataType] = {
    "lists": pa.list_(pa.list_(pa.float32())),
    "fixed": pa.list_(pa.list_(pa.float32(), WIDTH)),
    "double": pa.large_list(pa.list_(pa.float64())),
}


def latents(number: int) -> np.ndarray:
    """Of a row: 4 to 20 patches and a frame."""
    rng = np.random.default_rng(number)
    shape = ((4 + number % 17) * patches.SIZE + 1, WIDTH)
    return rng.standard_normal(shape).astype(np.float32)


def table(folder: Path, kind: str = "lists", count: int = 12, **other: Any) -> Path:
    """Parquet of so many rows in groups of five. other: row -> what its cell holds instead."""
    path = folder / f"{kind}.parquet"
    cells = [other.get(f"row{n}", latents(n).tolist()) for n in range(count)]
    columns = {
        "z": pa.array(cells, KINDS.get(kind, pa.list_(pa.float32()))),
        "text": [f"say {number}" for number in range(count)],
        "id": [f"r{number}" for number in range(count)],
    }
    pq.write_table(pa.table(columns), path, row_group_size=5)
    return path


def source(path: Path) -> dict[str, Any]:
    return {"path": str(path), "task": "tts", "columns": {"latents": "z", "text": "text"}}


def listed(path: Path, folder: Path) -> list[Example]:
    data = {"train": [source(path)], "index_path": str(folder / "index")}
    found = sources.resolve(Source.model_validate(data["train"][0]), "train")
    items = [item for file in found.files for item in sources.scan(found, file, keep=folder)]
    assert all(item.example for item in items), [item.error for item in items]
    return [item.example for item in items if item.example is not None]


def told(**more: Any) -> Model:
    return Model.model_validate(patches.model(mel=None, column={**COLUMN, **more}))


def encoder_of(**more: Any) -> PatchEncoder:
    found = make_encoder(told(**more), Data(), "none")
    assert isinstance(found, PatchEncoder)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_its_cell(kind: str, tmp_path: Path) -> None:
    encoder, examples = encoder_of(), listed(table(tmp_path, kind), tmp_path)
    assert [one.id for one in examples] == [f"r{number}" for number in range(12)]
    for number, example in enumerate(examples):
        (clip,), own = example.audio(), latents(number)
        probed = probe(clip, encoder.limits)
        assert probed.samples == own.size and probed.samples / probed.rate == len(own) / RATE
        values = load(clip, encoder.sample_rate, encoder.limits)
        np.testing.assert_array_equal(values.reshape(-1, WIDTH), own)
        assert encoder.measure(example, [probed.samples]) > len(own) // patches.SIZE
        rendered = encoder.encode(example, [values])
        (frames,) = rendered.arrays[LATENTS]
        whole = len(own) // patches.SIZE * patches.SIZE
        np.testing.assert_allclose(frames, (own[:whole] - 0.25) / 2, rtol=1e-6, atol=1e-7)
        assert rendered.seconds == pytest.approx(len(own) / RATE)


def test_cells_that_cannot_be_used_are_named_by_row(tmp_path: Path) -> None:
    uneven = [[1.0] * WIDTH, [1.0] * 3]
    path = table(tmp_path, row1=None, row2=[], row3=uneven, row4=[[float("nan")] * WIDTH] * 9)
    found = sources.resolve(Source.model_validate(source(path)), "train")
    items = [item for file in found.files for item in sources.scan(found, file, keep=tmp_path)]
    wrong = {item.id: str(item.error) for item in items if item.example is None}
    assert set(wrong) == {"r1", "r2", "r3"}
    assert (
        "'z' holds no frames (lists.parquet: row 2)" in wrong["r1"] and "no frames" in wrong["r2"]
    )
    assert "frames of several widths" in wrong["r3"]
    (lost,) = [item.example for item in items if item.id == "r4"]
    assert lost is not None
    with pytest.raises(BadExample, match=r"::5: has NaN or infinite values"):
        load(lost.audio()[0], round(RATE * WIDTH), Limits(latents=round(RATE * WIDTH)))
    flat = table(tmp_path, "flat", **{f"row{n}": [1.0] * 12 for n in range(12)})
    with pytest.raises(
        UserError, match=r"columns\.latents: column 'z' .* expected lists of frames"
    ):
        listed(flat, tmp_path)


def test_another_width_or_kind_of_data_is_refused_by_the_index(tmp_path: Path) -> None:
    def refused(model: Model, given: dict[str, Any], match: str) -> None:
        tree = {"data": {"train": [given], "tokens_per_batch": 400}, "run": {"name": "x"}}
        tree["data"]["index_path"] = str(tmp_path / "index")
        config = Config.model_validate({**tree, "model": model.model_dump()})
        with pytest.raises(UserError, match=match):
            prepare(config, tmp_path)

    path = table(tmp_path)
    match = r"data\.train\[0\]: r0 .*: model\.patches\.column\.width: 8, .* have 6 values: say 6"
    refused(told(width=8), source(path), match)
    clips = {"path": str(patches.corpus(tmp_path / "c", 3))}
    refused(told(), clips, r"holds a clip, and model\.patches\.column reads latents")
    other = Model.model_validate(patches.model())
    encoder: Encoder = make_encoder(other, Data(), "none")
    (example, *_) = listed(path, tmp_path)
    with pytest.raises(BadExample, match="holds latents, and this model reads clips"):
        probe(example.audio()[0], encoder.limits)
    with pytest.raises(UserError, match=r"holds latents .* set model\.patches\.column"):
        encoder.measure(example, [100])


def test_what_contradicts_a_column_is_refused(tmp_path: Path) -> None:
    def refused(match: str, data: Data | None = None, **more: Any) -> None:
        given = Model.model_validate(patches.model(**{"mel": None, "column": COLUMN, **more}))
        with pytest.raises(UserError, match=match):
            make_encoder(given, data or Data(), "none")

    codec = str(codecs.codec(tmp_path, "encodec"))
    refused("both mel and column are given", mel=patches.MEL)
    refused("12.5 times width 7 is no whole number", column={"rate": 12.5, "width": 7})
    match = r"column\.width: 8, but the codec at .* has 6"
    refused(match, column={**COLUMN, "width": 8}, codec={"path": codec})
    match = r"column\.rate: 50, but the codec at .* has 100"
    refused(match, column={**COLUMN, "rate": 50.0}, codec={"path": codec})
    refused(r"codec\.mean, std: .* normalised by", codec={"path": codec, "std": 3.0})
    speed = Data.model_validate({"augment": {"speed": {"p": 1.0}}})
    refused(r"data\.augment: varies clips", speed)


def test_a_run_learns_a_column_and_speaks_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = patches.model(mel=None, column=COLUMN)
    train = {"max_steps": 2, "precision": "fp32"}
    data = {"train": [source(table(tmp_path))], "tokens_per_batch": 400}
    speak = {"max_seconds": 0.2, "flow": {"steps": 2}}
    folder = run(tmp_path, data=data, model=model, train=train, speak=speak)
    encoder = answering(str(folder)).encoder
    with pytest.raises(UserError, match=r"evaluate\.asr: .* latents of a column"):
        check_tools(Config.model_validate({"evaluate": {"asr": "some"}}), encoder)
    assert len(losses(folder)) == 2
    out = tmp_path / "one.npy"
    command.synthesize([str(folder), "one", "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\tone\n"
    (one,) = synthesize(folder, ["one"])
    found = np.load(out)
    assert one.latents is not None and found.dtype == np.float32
    np.testing.assert_array_equal(found, one.latents)
    assert found.shape == (round(one.seconds * RATE), WIDTH) and 0 < one.seconds <= 0.2
    with pytest.raises(UserError, match=r"--out: one\.wav: what is said is written as \*\.npy"):
        command.synthesize([str(folder), "one", "--out", str(tmp_path / "one.wav")])
    # As the data has them: an export with the codec that made them gives waves.
    ready = answering(str(folder))
    export(ready.speech_model, tmp_path / "out")
    codec = codecs.codec(tmp_path, "encodec")
    given = {"path": str(tmp_path / "out"), "patches": {"codec": {"path": str(codec)}}}
    again = make_encoder(Model.model_validate(given), Data(), "none")
    assert again.waves is not None and again.spoken_rate == codecs.RATE
    assert again.fingerprint == ready.encoder.fingerprint
    assert len(again.waves(found)) == len(found) * codecs.HOP["encodec"]


def test_a_prompt_hears_no_clip() -> None:
    asked = Example("a", "edit", (Audio("none"), "x"), (Audio("none"),))
    with pytest.raises(UserError, match="holds a clip"):
        encoder_of().prompt(asked, [np.zeros(600, np.float32)])
