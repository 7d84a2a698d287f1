"""Speaker embeddings: by the models themselves, and means of speakers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raysft.config.prepare import Prepare, Speakers
from raysft.data.clips.audio import Limits
from raysft.data.example import Audio, Example
from raysft.errors import BadExample
from raysft.prepare import embed, shard
from raysft.prepare.speakers import Campplus, XVector
from tests.support import layouts, listeners
from tests.support.listeners import RATE, clips


def test_campplus_hears_fbank_less_its_mean(tmp_path: Path) -> None:
    import onnxruntime
    from torchaudio.compliance import kaldi

    path = listeners.onnx_model(tmp_path / "campplus.onnx", "fbank")
    made = Campplus(Speakers(path=str(path)), tmp_path)
    session = onnxruntime.InferenceSession(path)
    for clip in clips():
        bank = kaldi.fbank(
            torch.from_numpy(clip)[None], num_mel_bins=80, dither=0, sample_frequency=RATE
        )
        bank = bank - bank.mean(dim=0, keepdim=True)
        expected = session.run(None, {"feats": bank[None].numpy()})[0][0]
        np.testing.assert_allclose(made.hear(clip), expected, rtol=1e-5)
    assert made.hear(clips()[0]).shape == (12,)
    with pytest.raises(BadExample, match="too short: 399 samples"):
        made.hear(clips()[0][:399])


def test_x_vectors_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, WavLMForXVector

    model = listeners.saved("xvector", tmp_path / "model")
    made = XVector(Speakers(method="xvector", model=str(model)), tmp_path)
    extractor = AutoFeatureExtractor.from_pretrained(model)
    net = WavLMForXVector.from_pretrained(model).eval()
    for clip in clips():
        given = extractor(clip, sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            expected = net(**given).embeddings[0].numpy()
        np.testing.assert_allclose(made.hear(clip), expected, rtol=1e-4, atol=1e-12)
    with pytest.raises(BadExample, match="too short for"):
        made.hear(clips()[0][:800])


class Counted:
    """Embeddings that tell which clip they are of: [samples, 1]."""

    sample_rate = RATE

    def hear(self, clip: np.ndarray) -> np.ndarray:
        if len(clip) == RATE // 2 + 800:
            raise BadExample("too short: it is said to be", "too short")
        return np.array([len(clip), 1], np.float32)


def test_a_speaker_is_the_mean_of_its_utterances_in_all_shards(tmp_path: Path) -> None:
    """Of each speaker, over shards; one that cannot be heard costs its row, and stands alone who
    has no name."""
    told = layouts.corpus(6)
    paths = layouts.written(tmp_path / "audio", told)
    examples = [
        Example(one.id, "tts", (Audio(str(path)),), (), text=one.text, speaker=one.speaker)
        for one, path in zip(told, paths)
    ]
    examples.append(Example("nobody", "tts", (Audio(str(paths[0])),), (), text="x"))
    shards = [examples[:3], examples[3:5], examples[5:]]
    for number, some in enumerate(shards):
        embed.make(tmp_path, number, some, Limits(), Counted())  # type: ignore[arg-type]
    embed.average(tmp_path, len(shards))
    sizes = [len(one.samples) for one in told]
    expected = {"s0": (sizes[0] + sizes[4]) / 2, "s1": (sizes[1] + sizes[3] + sizes[5]) / 3}
    assert {name: mean.tolist() for name, mean in embed.means(tmp_path).items()} == {
        name: [pytest.approx(mean), 1.0] for name, mean in expected.items()
    }

    rows = {}
    for number, some in enumerate(shards):
        embedded = embed.of_shard(tmp_path, number, embed.means(tmp_path))
        made = shard.make([(one, "s") for one in some], Prepare(), Limits(), None, embedded)
        names = made.columns["utt"], made.columns["utt_embedding"], made.columns["spk_embedding"]
        rows |= {utt: (own[0], mean[0]) for utt, own, mean in zip(*names)}  # type: ignore[index]
        assert [one.id for one in made.rejected] == ([told[2].id] if number == 0 else [])
        assert all(one.kind == "too short" for one in made.rejected)
    assert rows["nobody"] == (sizes[0], sizes[0])
    for place in (0, 1, 3, 4, 5):
        mean = pytest.approx(expected[told[place].speaker])
        assert rows[told[place].id] == (sizes[place], mean)
