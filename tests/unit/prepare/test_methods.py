"""The tables of methods: keys that go with each, what a preparation's check finds, others' rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from raysft import load_config
from raysft.config import listeners
from raysft.config.listeners import TOKENS, Method
from raysft.config.prepare import Speakers, UnitsOfModels
from raysft.errors import UserError
from raysft.prepare.check import check
from raysft.prepare.listener import Listener
from raysft.prepare.tools import Tools
from tests.support import layouts
from tests.support.listeners import saved


def told(tmp_path: Path, **prepare: object) -> str:
    """What the check says of a section `prepare`."""
    kaldi = tmp_path / "kaldi"
    if not kaldi.exists():
        layouts.LAYOUTS["kaldi"].write(kaldi, layouts.corpus(2))
    tree = {"data": {"train": [str(kaldi)]}, "prepare": {"path": str(tmp_path / "out"), **prepare}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as error:
        check(load_config(tmp_path / "c.yaml", model=False))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_keys_that_do_not_go_with_a_method_are_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    of = {"model": str(model)}
    key = "prepare.speech_tokens"
    assert told(tmp_path, speech_tokens=of) == f"{key}.layer: not given, and method kmeans needs it"
    assert told(tmp_path, speech_tokens={"method": "codec", **of, "clusters": 3}) == (
        f"{key}.clusters: method codec has none: leave it out (it is for kmeans)"
    )
    assert told(tmp_path, speech_tokens={"method": "onnx"}).startswith(f"{key}.streams: not given")
    pattern = {"method": "codec", **of, "pattern": [2, 3]}
    assert told(tmp_path, speech_tokens=pattern).startswith(f"{key}.pattern: [2, 3]: numbers are")
    stream = {"path": str(tmp_path / "no.onnx"), "codes": 4}
    assert told(tmp_path, speech_tokens={"method": "onnx", "streams": [stream]}) == (
        f"{key}.streams.0.path: {tmp_path}/no.onnx does not exist, or is no file"
    )
    near = told(tmp_path, speech_tokens={"method": "kmean", **of})
    assert "'kmeans', 'codec' or 'onnx' (did you mean kmeans?)" in near
    nowhere = {"method": "xvector", "model": str(tmp_path / "none")}
    assert "prepare.speakers.model: " in told(tmp_path, speakers=nowhere)
    assert "method onnx needs it" in told(tmp_path, speakers={})


def test_methods_of_models_are_not_for_a_run(tmp_path: Path) -> None:
    """It would hear every clip again in every epoch."""
    (tmp_path / "c.yaml").write_text("data: {train: [x], speech_tokens: {method: codec}}\n")
    with pytest.raises(UserError, match=r"data\.speech_tokens\.method: .*prepare\.speech_tokens"):
        load_config(tmp_path / "c.yaml", model=False)


def test_weights_that_are_replaced_are_others(tmp_path: Path) -> None:
    """A preparation that goes on is held against them (prepare.json), not against their place."""
    hubert = saved("hubert", tmp_path / "model")
    onnx = tmp_path / "speaker.onnx"
    onnx.write_bytes(b"one")

    def facts() -> object:
        settings = UnitsOfModels(model=str(hubert), layer=1)
        return Tools(None, settings, Speakers(path=str(onnx)), tmp_path).facts()["models"]

    first = facts()
    assert facts() == first
    onnx.write_bytes(b"two")
    second = facts()
    assert second != first
    saved("hubert", hubert, seed=9)
    assert facts() != second


class Loudness(Listener):
    """A token a tenth of a second: whether it is loud."""

    sample_rate = 8000

    def __init__(self, settings: UnitsOfModels, folder: Path) -> None:
        self.folder = folder

    def hear(self, clip: np.ndarray) -> np.ndarray:
        blocks = clip[: len(clip) // 800 * 800].reshape(-1, 800)
        return (np.abs(blocks).max(axis=1) > 0.25).astype(np.int32)


def test_a_method_from_outside_is_a_row(tmp_path: Path) -> None:
    row = Method(TOKENS, "loud", f"{__name__}:Loudness", about="loud or not")
    listeners.register(row)
    listeners.register(row)
    with pytest.raises(UserError, match="has a method loud already"):
        listeners.register(Method(TOKENS, "loud", "other:Class"))
    settings = UnitsOfModels(method="loud", dedup=True)
    listeners.check(TOKENS, settings)
    tools = Tools(None, settings, None, tmp_path)
    assert not tools.unfitted()
    tokenizer = tools.tokenizer()
    assert tokenizer is not None
    clip = np.concatenate([np.zeros(1600), np.full(2400, 0.5), np.zeros(900)]).astype(np.float32)
    assert tokenizer.tokens(clip).tolist() == [0, 1, 0]
