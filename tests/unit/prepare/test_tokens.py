"""Speech tokens by models: each method against its model asked directly, clip by clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.spatial
import torch

from raysft.config.prepare import TokenStream, UnitsOfModels
from raysft.errors import BadExample, UserError
from raysft.prepare.listener import Listener, Tokens, cleaned, deduplicated, trimmed
from raysft.prepare.tokens.codec import Codec
from raysft.prepare.tokens.kmeans import HiddenUnits
from raysft.prepare.tokens.onnx import Streams
from tests.support import listeners
from tests.support.listeners import RATE, clips

Saved = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As a maker has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("models")

    def one(name: str) -> Path:
        if not (folder / name).exists():
            listeners.saved(name, folder / name)
        return folder / name

    return one


def units(folder: Path, model: Path, **more: Any) -> tuple[UnitsOfModels, HiddenUnits]:
    settings = UnitsOfModels(model=str(model), **{"layer": 2, "clusters": 6, **more})
    if not HiddenUnits.is_fitted(settings, folder):
        HiddenUnits.fit(settings, folder, clips(), seed=1)
    return settings, HiddenUnits(settings, folder)


def hidden(model: Path, clip: np.ndarray, layer: int) -> np.ndarray:
    """All of the model, by transformers alone; of w2v-BERT without a frame that is half padding."""
    from transformers import AutoFeatureExtractor, AutoModel

    given = AutoFeatureExtractor.from_pretrained(model)(
        clip, sampling_rate=RATE, return_tensors="pt"
    )
    with torch.no_grad():
        made = AutoModel.from_pretrained(model).eval()(**given, output_hidden_states=True)
    states = made.hidden_states[layer][0].numpy()
    return states[: int(given["attention_mask"].sum())] if "attention_mask" in given else states


@pytest.mark.parametrize("name", ["hubert", "wavlm", "xlsr", "w2v_bert"])
@pytest.mark.parametrize(("layer", "stack"), [(2, 1), (3, 2)])
def test_a_token_is_the_nearest_centroid_of_a_hidden_layer(
    tmp_path: Path, saved: Saved, name: str, layer: int, stack: int
) -> None:
    _, made = units(tmp_path, saved(name), layer=layer, stack=stack)
    for clip in clips():
        frames = hidden(saved(name), clip, layer)
        rows = frames[: len(frames) // stack * stack].reshape(-1, stack * frames.shape[1])
        expected = scipy.spatial.distance.cdist(rows, made.centroids).argmin(axis=1)
        found = made.hear(clip)
        assert found.tolist() == expected.tolist()
        assert found.dtype == np.int32
    assert len(np.unique(np.concatenate([made.hear(clip) for clip in clips()]))) == 6


def test_what_is_fitted_is_found_again_and_of_nothing_else(
    tmp_path: Path, saved: Saved, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings, made = units(tmp_path, saved("hubert"))
    _, again = units(tmp_path / "other", saved("hubert"))
    np.testing.assert_array_equal(made.centroids, again.centroids)
    file = tmp_path / "units.safetensors"

    moved = listeners.saved("hubert", tmp_path / "moved")  # the same weights at another place
    HiddenUnits(settings.model_copy(update={"model": str(moved)}), tmp_path)
    for key, value, told in (
        ("layer", 1, f"prepare.speech_tokens.layer: 1, but {file} was fitted with 2"),
        ("stack", 2, f"prepare.speech_tokens.stack: 2, but {file} was fitted with 1"),
        ("model", str(saved("xlsr")), "prepare.speech_tokens.model: "),
    ):
        with pytest.raises(UserError, match=told):
            HiddenUnits(settings.model_copy(update={key: value}), tmp_path)
    others = listeners.saved("hubert", tmp_path / "others", seed=5)
    with pytest.raises(UserError, match=r"was fitted with .*hubert"):
        HiddenUnits(settings.model_copy(update={"model": str(others)}), tmp_path)
    with pytest.raises(UserError, match=r"has 6 x 16 values, and 7 clusters"):
        HiddenUnits(settings.model_copy(update={"clusters": 7}), tmp_path)
    with pytest.raises(UserError, match=r"layer: 9, but .* has 3 layers"):
        HiddenUnits(settings.model_copy(update={"layer": 9}), tmp_path)


def test_published_centroids_are_read_from_numpy(tmp_path: Path, saved: Saved) -> None:
    _, made = units(tmp_path, saved("xlsr"))
    np.save(tmp_path / "kmeans.npy", made.centroids)
    _, read = units(tmp_path, saved("xlsr"), path=str(tmp_path / "kmeans.npy"))
    for clip in clips():
        assert read.hear(clip).tolist() == made.hear(clip).tolist()


def test_too_many_clusters_are_refused(tmp_path: Path, saved: Saved) -> None:
    with pytest.raises(UserError, match=r"clusters: 400 clusters, but the 4 clips .*fit_clips"):
        units(tmp_path, saved("hubert"), clusters=400)


def test_a_model_without_its_weights_is_refused(saved: Saved, tmp_path: Path) -> None:
    from raysft.config.prepare import Speakers
    from raysft.prepare.speakers import XVector

    with pytest.raises(UserError, match=r"prepare\.speakers\.model: .* has no weights for "):
        XVector(Speakers(method="xvector", model=str(saved("wavlm"))), tmp_path)


def codes(name: str, model: Path, clip: np.ndarray) -> np.ndarray:
    """[codebooks, frames] by transformers alone, as each model's page does it."""
    import transformers

    extractor = transformers.AutoFeatureExtractor.from_pretrained(model)
    given = extractor(clip, sampling_rate=RATE, return_tensors="pt")
    kind = {"dac": "Dac", "encodec": "Encodec", "mimi": "Mimi"}.get(name, name.capitalize())
    net = getattr(transformers, f"{kind}Model").from_pretrained(model).eval()
    with torch.no_grad():
        if name == "encodec":
            return net.encode(given["input_values"], given["padding_mask"], 0.9).audio_codes[0, 0]
        if name == "xcodec2":
            made = net.encode(given["input_values"], given["input_features"]).audio_codes[0]
            return made[:, : (len(clip) + 1) // 320]
        return net.encode(given["input_values"]).audio_codes[0]


BOOKS = {"dac": 3, "encodec": 3, "mimi": 4, "xcodec": 3, "xcodec2": 1}


@pytest.mark.parametrize("name", BOOKS)
def test_a_codec_gives_its_own_codes(tmp_path: Path, saved: Saved, name: str) -> None:
    size = 32 if name == "dac" else 64
    expected = [np.asarray(codes(name, saved(name), clip)) for clip in clips(3)]
    assert len(np.unique(np.concatenate(expected, axis=1))) > 3

    def of(**settings: Any) -> list[list[int]]:
        made = Codec(UnitsOfModels(method="codec", model=str(saved(name)), **settings), tmp_path)
        return [made.hear(clip).tolist() for clip in clips(3)]

    assert of(pattern="first") == of(codebooks=1) == [one[0].tolist() for one in expected]
    books = BOOKS[name]
    turn = [
        [int(n) * size + one[n, t] for t in range(one.shape[1]) for n in range(books)]
        for one in expected
    ]
    assert of() == of(pattern="interleave", codebooks=books) == turn
    two = min(2, books)
    flat = [[n * size + code for n in range(two) for code in one[n].tolist()] for one in expected]
    assert of(pattern="flatten", codebooks=two) == flat
    with pytest.raises(UserError, match=rf"codebooks: 9, but .* has {books}$"):
        of(codebooks=9)


def test_a_model_that_is_no_codec_is_refused(tmp_path: Path, saved: Saved) -> None:
    with pytest.raises(UserError, match=r"speech_tokens\.model: .* is a HubertModel, and no codec"):
        Codec(UnitsOfModels(method="codec", model=str(saved("hubert"))), tmp_path)


@pytest.mark.parametrize("name", ["hubert", "w2v_bert", *BOOKS, "step"])
def test_a_clip_s_tokens_are_its_own(tmp_path: Path, saved: Saved, name: str) -> None:
    """Whatever was heard before it: other clips, longer ones, in another order, or nothing."""

    def fresh() -> Listener:
        if name == "step":
            return Streams(step(tmp_path), tmp_path)
        if name in BOOKS:
            return Codec(UnitsOfModels(method="codec", model=str(saved(name))), tmp_path)
        return units(tmp_path, saved(name))[1]

    some = clips(4, seconds=0.9)
    one = fresh()
    forward = [one.hear(clip).tolist() for clip in some]
    backward = [one.hear(clip).tolist() for clip in some[::-1]][::-1]
    alone = fresh().hear(some[2]).tolist()
    assert forward == backward
    assert forward[2] == alone


def test_a_clip_that_a_model_cannot_hear_costs_itself(tmp_path: Path, saved: Saved) -> None:
    _, made = units(tmp_path, saved("hubert"))
    with pytest.raises(BadExample, match=r"too short for .*: 0\.006 s") as told:
        made.hear(clips()[0][:100])
    assert told.value.kind == "too short"
    _, stacked = units(tmp_path / "other", saved("hubert"), stack=4)
    with pytest.raises(BadExample, match=r"too short: 1 frames of .*, and a token takes 4"):
        stacked.hear(clips()[0][:400])


def step(tmp_path: Path, **more: Any) -> UnitsOfModels:
    """Two streams as Step's: 16.67 and 25 tokens a second."""
    first = listeners.onnx_model(tmp_path / "vq02.onnx", "fbank", codes=16, step=6)
    second = listeners.onnx_model(tmp_path / "vq06.onnx", "mel", codes=32, step=4, seed=1)
    return UnitsOfModels(
        method="onnx",
        pattern=[2, 3],
        streams=[
            TokenStream(path=str(first), features="fbank80", codes=16, rate=16.67),
            TokenStream(
                path=str(second), features="whisper_mel128", codes=32, rate=25, chunk_s=0.5
            ),
        ],
        **more,
    )


def whisper_mel(clip: np.ndarray) -> np.ndarray:
    """Whisper's log-mel of 128 bins by torch's own transform: [1, 128, samples // 160]."""
    from torchaudio.functional import melscale_fbanks

    wave, window = torch.from_numpy(clip), torch.hann_window(400)
    power = torch.stft(wave, 400, 160, window=window, return_complex=True)[:, :-1].abs() ** 2
    banks = melscale_fbanks(201, 0, 8000, 128, RATE, norm="slaney", mel_scale="slaney")
    logs = (banks.T @ power).clamp(min=1e-10).log10()
    return ((logs.maximum(logs.max() - 8) + 4) / 4)[None].numpy()


def test_two_streams_in_turn_are_step_s(tmp_path: Path) -> None:
    import onnxruntime
    from torchaudio.compliance import kaldi

    settings = step(tmp_path)
    made = Streams(settings, tmp_path)
    vq02, vq06 = (onnxruntime.InferenceSession(one.path) for one in settings.streams)
    for clip in clips(4, seconds=1.1):
        bank = kaldi.fbank(torch.from_numpy(clip)[None], num_mel_bins=80, dither=0)
        a = vq02.run(None, {"feats": bank[None].numpy()})[0].reshape(-1).tolist()
        b: list[int] = []
        for start in range(0, len(clip), RATE // 2):
            chunk = clip[start : start + RATE // 2]
            if len(chunk) >= 480:
                mel = whisper_mel(chunk)
                given = {"feats": mel, "feats_length": np.array([mel.shape[2]], np.int32)}
                b += vq06.run(None, given)[0].reshape(-1).tolist()
        expected: list[int] = []
        while len(a) >= 2 and len(b) >= 3:
            expected += [*a[:2], *(16 + one for one in b[:3])]
            a, b = a[2:], b[3:]
        found = made.hear(clip).tolist()
        assert found == expected
        assert len(found) >= 5 * int(len(clip) / RATE / 0.12 - 1)
        assert max(found) > 16 > min(found)


def test_frames_of_a_model_become_their_nearest_centroids(tmp_path: Path) -> None:
    import onnxruntime

    path = listeners.onnx_model(tmp_path / "wave.onnx", "wave", codes=5, frames=True)
    centroids = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32)
    np.save(tmp_path / "centroids.npy", centroids)
    stream = {"path": str(path), "codes": 7, "centroids": str(tmp_path / "centroids.npy")}
    settings = UnitsOfModels(method="onnx", streams=[TokenStream(**stream)])
    clip = clips()[0][:9600]
    frames = onnxruntime.InferenceSession(path).run(None, {"feats": clip[None]})[0][0]
    expected = scipy.spatial.distance.cdist(frames, centroids).argmin(axis=1)
    assert Streams(settings, tmp_path).hear(clip).tolist() == expected.tolist()
    with pytest.raises(UserError, match=r"makes float32 of .*, no tokens: give their centroids"):
        bare = settings.streams[0].model_copy(update={"centroids": None})
        Streams(settings.model_copy(update={"streams": [bare]}), tmp_path).hear(clip)


def test_what_is_wrong_with_an_onnx_is_one_line(tmp_path: Path) -> None:
    settings = step(tmp_path)
    clip = clips(1, seconds=1.1)[0]

    def told(**changed: Any) -> str:
        second = settings.streams[1].model_copy(update=changed)
        both = [settings.streams[0], second]
        with pytest.raises(UserError) as error:
            Streams(settings.model_copy(update={"streams": both}), tmp_path).hear(clip)
        assert "\n" not in str(error.value)
        return str(error.value)

    key = "prepare.speech_tokens.streams.1"
    (tmp_path / "text.onnx").write_text("no model")
    assert told(path=str(tmp_path / "text.onnx")).startswith(
        f"{key}.path: {tmp_path}/text.onnx: no "
    )
    assert f"outside of 0 .. {key}.codes - 1 = 2" in told(codes=3)
    assert f"{key}.rate = 50 says 25.0" in told(rate=50.0)
    assert f"{key}.path: {tmp_path}/vq06.onnx refuses features of [1, 48, 80]: " in told(
        features="fbank80"
    )
    with pytest.raises(UserError, match=r"pattern: \[2\]: give a number for each of the 2 streams"):
        Streams(settings.model_copy(update={"pattern": [2]}), tmp_path)


def test_repeats_are_written_once_where_that_is_asked_for(tmp_path: Path, saved: Saved) -> None:
    assert deduplicated(np.array([3, 3, 1, 1, 1, 3, 2])).tolist() == [3, 1, 3, 2]
    assert deduplicated(np.zeros(0, np.int32)).tolist() == []
    settings, made = units(tmp_path, saved("hubert"))
    every = made.hear(clips()[0]).tolist()
    assert Tokens(made, settings).tokens(clips()[0]).tolist() == every
    once = settings.model_copy(update={"dedup": True})
    expected = [one for place, one in enumerate(every) if place == 0 or every[place - 1] != one]
    assert Tokens(made, once).tokens(clips()[0]).tolist() == expected != every


def test_a_clip_is_scaled_and_its_silence_cut_before_it_is_heard() -> None:
    tone = clips(1)[0]
    quiet = np.zeros(RATE, np.float32) + 1e-4
    clip = np.concatenate([quiet, tone, quiet])
    settings = UnitsOfModels(peak=0.999, trim_db=20.0)
    made = cleaned(clip, RATE, settings)
    assert np.abs(made).max() == pytest.approx(0.999)

    loud = []  # frames, one after the other, as the words of librosa say it
    for place in range(0, len(clip) + 1, 512):
        frame = [clip[n] if 0 <= n < len(clip) else 0 for n in range(place - 1024, place + 1024)]
        loud.append(float(np.sqrt(np.mean(np.square(np.array(frame, np.float64))))))
    heard = [n for n, one in enumerate(loud) if 20 * np.log10(one / max(loud)) > -20]
    start, stop = heard[0] * 512 - 800, (heard[-1] + 1) * 512 + 3520
    np.testing.assert_allclose(made, clip[start:stop] * (0.999 / np.abs(clip).max()), rtol=1e-6)
    assert RATE - 2000 < start < RATE
    np.testing.assert_array_equal(trimmed(np.zeros(5000, np.float32), RATE, 20), np.zeros(5000))


def test_an_onnx_that_needs_more_of_a_clip_costs_the_clip(tmp_path: Path) -> None:
    """This one reads blocks of 160 samples; of others, short ones may be too short for it."""
    path = listeners.onnx_model(tmp_path / "wave.onnx", "wave", codes=5)
    stream = TokenStream(path=str(path), codes=5)
    made = Streams(UnitsOfModels(method="onnx", streams=[stream]), tmp_path)
    assert len(made.hear(np.zeros(1600, np.float32))) == 10
    with pytest.raises(BadExample, match=r"too short for .*wave\.onnx: 0\.100 s"):
        made.hear(np.zeros(1601, np.float32))
    with pytest.raises(
        UserError, match=r"streams\.0\.path: .*wave\.onnx refuses features of \[1, "
    ):
        made.hear(np.zeros(RATE + 1, np.float32))
