"""k-means units: as many as promised, the same for the same seed, kept in one file."""

import numpy as np
import pytest

from raysft.config.speech_tokens import SpeechTokens
from raysft.data.clips import speech_tokens
from raysft.data.clips.speech_tokens import KMeans
from raysft.errors import UserError


def clips(count: int = 12, seconds: float = 0.8) -> list[np.ndarray]:
    """Sequences of three tones in changing order, over faint noise."""
    rng = np.random.default_rng(0)
    time = np.arange(int(16000 * seconds)) / 16000
    made = []
    for _ in range(count):
        pitch = np.repeat(rng.permutation([300, 900, 2700]), len(time) // 3 + 1)[: len(time)]
        noise = rng.normal(0, 0.01, len(time))
        made.append((0.3 * np.sin(2 * np.pi * pitch * time) + noise).astype(np.float32))
    return made


def settings(**changes) -> SpeechTokens:
    return SpeechTokens(**({"clusters": 8, "mels": 40} | changes))


@pytest.mark.parametrize("features", ["log_mel", "fbank"])
@pytest.mark.parametrize("stack", [1, 3, 4])
def test_a_clip_has_exactly_as_many_units_as_its_length_promises(features, stack):
    tokenizer = KMeans.fit(clips(), settings(features=features, stack=stack), seed=0)
    noise = np.random.default_rng(1).normal(0, 0.1, 20000).astype(np.float32)
    for samples in (400, 800, 1000, 1039, 1040, 1041, 15999, 16000, 16001, 20000):
        units = tokenizer.encode(noise[:samples])
        assert units.dtype == np.int32
        assert len(units) == tokenizer.units_count(samples)
        assert set(units) <= set(range(8))
    assert tokenizer.units_per_second == 100 / stack


def test_the_same_clips_and_seed_give_the_same_units():
    first, again = (KMeans.fit(iter(clips()), settings(), seed=3) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    other = KMeans.fit(clips(), settings(), seed=4)
    assert first.fingerprint() != other.fingerprint()


def test_units_tell_sounds_apart():
    tokenizer = KMeans.fit(clips(), settings(clusters=3, stack=4), seed=0)
    steady = [
        0.3 * np.sin(2 * np.pi * pitch * np.arange(4480) / 16000) for pitch in (300, 900, 2700)
    ]
    units = tokenizer.encode(np.concatenate(steady).astype(np.float32)).reshape(3, 7)[:, 1:6]
    assert [len(set(row)) for row in units] == [1, 1, 1]
    assert len(set(units[:, 0])) == 3


def test_centroids_are_as_good_as_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(0)
    points = (rng.normal(0, 3, (20, 6))[rng.integers(20, size=3000)]).astype(np.float32)
    points += rng.normal(0, 0.7, points.shape).astype(np.float32)

    def spread(centroids: np.ndarray) -> float:
        return float(((points[:, None] - centroids) ** 2).sum(-1).min(1).mean())

    ours = [
        spread(speech_tokens.lloyd(points, speech_tokens.spread(points, 20, g)))
        for g in map(np.random.default_rng, range(5))
    ]
    theirs = [
        spread(cluster.KMeans(20, n_init=1, random_state=s).fit(points).cluster_centers_)
        for s in range(5)
    ]
    assert np.mean(ours) < 1.15 * np.mean(theirs)


def test_every_cluster_keeps_a_point():
    points = np.repeat(np.eye(6, dtype=np.float32), 50, axis=0)
    start = np.zeros((6, 6), np.float32)
    start[0] = 1
    centroids = speech_tokens.lloyd(points, start)
    assert sorted(map(tuple, centroids)) == sorted(map(tuple, np.eye(6)))


def test_it_is_fitted_once_and_loaded_from_then_on(tmp_path):
    fitted = speech_tokens.fit_or_load(settings(), tmp_path, clips(), seed=0)

    def never():
        raise AssertionError("drawn from although there is a fitted one")
        yield

    loaded = speech_tokens.fit_or_load(settings(), tmp_path, never(), seed=1)
    assert loaded.fingerprint() == fitted.fingerprint()
    assert np.array_equal(loaded.encode(clips()[0]), fitted.encode(clips()[0]))
    assert [path.name for path in tmp_path.iterdir()] == [speech_tokens.FILE_NAME]
    elsewhere = settings(path=str(tmp_path / speech_tokens.FILE_NAME))
    assert speech_tokens.load(elsewhere, tmp_path / "x").fingerprint() == fitted.fingerprint()


def test_no_more_clips_are_drawn_than_configured():
    drawn = []
    source = (drawn.append(i) or clip for i, clip in enumerate(clips()))
    KMeans.fit(source, settings(fit_clips=5), seed=0)
    assert drawn == [0, 1, 2, 3, 4]


def test_what_cannot_be_fitted_or_loaded_is_said(tmp_path):
    with pytest.raises(UserError, match=r"clusters: 500 clusters, but .* 2 clips"):
        KMeans.fit(clips(2), settings(clusters=500), seed=0)
    with pytest.raises(UserError, match="no fitted speech tokenizer"):
        speech_tokens.load(settings(), tmp_path)
    speech_tokens.fit_or_load(settings(), tmp_path, clips(), seed=0)
    for change in ({"clusters": 9}, {"features": "fbank"}, {"mels": 80}, {"stack": 2}):
        with pytest.raises(UserError, match=rf"speech_tokens\.{next(iter(change))}"):
            speech_tokens.load(settings(**change), tmp_path)
    (tmp_path / speech_tokens.FILE_NAME).write_bytes(b"junk" * 10)
    with pytest.raises(UserError, match="no speech tokenizer of raysft"):
        speech_tokens.load(settings(), tmp_path)


def test_a_clip_shorter_than_a_unit_has_none():
    tokenizer = KMeans.fit(clips(), settings(), seed=0)
    assert tokenizer.units_count(400) == len(tokenizer.encode(np.zeros(400, np.float32))) == 0
