"""Units of a hidden layer: the nearest of so many centroids for each frame (or stack of frames).

Frames are hidden_states[layer] of any model of transformers that reads audio; layers behind that
one are not computed. Fitted once, with the preparation's seed, on clips drawn from its corpus:

    <prepare.path>/units.safetensors    centroids float32 [clusters, stack x hidden]; what they are
                                        of in its metadata

Costs: fitting takes clusters x points x dimensions x 50 operations or so: 500 clips of 10 s in 500
clusters of 768 values a minute on a core, in 10,000 of 1,024 an hour.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from raysft.config.listeners import TOKENS
from raysft.config.prepare import UnitsOfModels
from raysft.config.schema import Model
from raysft.data.clips.speech_tokens import fitted
from raysft.errors import BadExample, UserError
from raysft.prepare import pretrained
from raysft.prepare.listener import Fitted
from raysft.run import identity
from raysft.run.storage import write_whole

FILE = "units.safetensors"
KEY = f"{TOKENS}.model"
ENTRY = "units"  # of the metadata; one, for safetensors writes several in any order


class Hidden:
    """Frames of a model's layer."""

    def __init__(self, settings: UnitsOfModels) -> None:
        self.path, self.layer = str(settings.model), settings.layer or 0
        self.stack = settings.stack
        self.extractor = pretrained.extractor(KEY, self.path, settings.revision)
        self.sample_rate = int(self.extractor.sampling_rate)
        self.net = pretrained.net(KEY, "AutoModel", self.path, settings.revision)
        layers = getattr(getattr(self.net, "encoder", None), "layers", None)
        if layers is None or self.layer > len(layers):
            there = "no encoder with layers" if layers is None else f"{len(layers)} layers"
            raise UserError(f"{TOKENS}.layer: {self.layer}, but {self.path} has {there}")
        # One layer more than is read: some models norm what their last one makes.
        self.net.encoder.layers = layers[: self.layer + 1]
        self.size = int(self.net.config.hidden_size)

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> float32 [tokens, stack x hidden]. Raises BadExample."""

        def hear(samples: np.ndarray) -> np.ndarray:
            given = pretrained.inputs(self.extractor, samples, self.sample_rate)
            states = self.net(**given, output_hidden_states=True).hidden_states[self.layer][0]
            mask = given.get("attention_mask")
            if mask is not None and mask.shape[1] == len(states):  # of frames, not of samples
                states = states[mask[0].bool()]
            return states.cpu().numpy()

        frames = pretrained.heard(KEY, self.path, clip, self.sample_rate, hear)
        count = len(frames) // self.stack
        if not count:
            raise BadExample(
                f"too short: {len(frames)} frames of {self.path}, and a token takes {self.stack}",
                "too short",
            )
        return frames[: count * self.stack].reshape(count, self.stack * self.size)


class HiddenUnits(Fitted):
    """Tokens 0 .. clusters - 1."""

    def __init__(self, settings: UnitsOfModels, folder: Path) -> None:
        """Raises UserError: no centroids, or those of something else."""
        self.hidden = Hidden(settings)
        self.sample_rate = self.hidden.sample_rate
        self.centroids = np.ascontiguousarray(_load(settings, folder), np.float32)
        size = self.hidden.size * settings.stack
        if self.centroids.shape != (settings.clusters, size):
            rows = " x ".join(map(str, self.centroids.shape))
            raise UserError(
                f"{TOKENS}.path: {location(settings, folder)} has {rows} values, and "
                f"{settings.clusters} clusters of {self.hidden.path} have {settings.clusters} x "
                f"{size}: name the clusters, stack and model they were fitted with"
            )
        self._half_squares = (self.centroids**2).sum(axis=1) / 2

    @classmethod
    def rate(cls, settings: UnitsOfModels) -> int:
        """Hz that the model reads."""
        path = str(settings.model)
        return int(pretrained.extractor(KEY, path, settings.revision).sampling_rate)

    @classmethod
    def is_fitted(cls, settings: UnitsOfModels, folder: Path) -> bool:
        """Whether its centroids are there. Raises UserError where .npy is named and is not."""
        path = location(settings, folder)
        if path.suffix == ".npy" and not path.exists():
            raise UserError(f"{TOKENS}.path: {path} does not exist")
        return path.exists()

    @classmethod
    def fit(
        cls, settings: UnitsOfModels, folder: Path, clips: Iterable[np.ndarray], seed: int
    ) -> None:
        """k-means++ and Lloyd's algorithm on the clips. The same clips and seed give the same."""
        hidden = Hidden(settings)
        rows = []
        for clip in clips:
            try:
                rows.append(hidden(clip))
            except BadExample:
                continue  # named when its shard is made
        centroids = fitted(rows, settings.clusters, seed, TOKENS)
        content = safetensors.numpy.save(
            {"centroids": centroids}, {ENTRY: json.dumps(_facts(settings))}
        )
        path = location(settings, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)

    def hear(self, clip: np.ndarray) -> np.ndarray:
        """float32 [samples] -> int32 [tokens]."""
        scores = self.hidden(clip) @ self.centroids.T - self._half_squares
        return scores.argmax(axis=1).astype(np.int32)


def location(settings: UnitsOfModels, folder: Path) -> Path:
    """Where the centroids are, or will be."""
    return Path(settings.path) if settings.path else folder / FILE


def _facts(settings: UnitsOfModels) -> dict[str, str]:
    """What centroids are of. A folder's model is known by its weights, wherever it lies."""
    base = identity.of(Model(path=settings.model, revision=settings.revision)) or {}
    known = base if "weights" in base else {"model": settings.model, "revision": settings.revision}
    return {
        "method": "kmeans",
        "model": str(settings.model),
        "weights": json.dumps(known, sort_keys=True),
        "layer": str(settings.layer),
        "stack": str(settings.stack),
    }


def _load(settings: UnitsOfModels, folder: Path) -> np.ndarray:
    path = location(settings, folder)
    if path.suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{TOKENS}.path: {path}: no array of numpy ({error})") from None
    try:
        with safetensors.safe_open(path, framework="np") as file:
            told = (file.metadata() or {}).get(ENTRY)
            found, centroids = json.loads(told or "{}"), file.get_tensor("centroids")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{TOKENS}.path: {path}: no centroids ({error}): remove it") from None
    wanted = _facts(settings)
    for fact, key in {"weights": "model", "layer": "layer", "stack": "stack"}.items():
        if found.get(fact) != wanted[fact]:
            other = " of other weights" if found.get(key) == wanted[key] else ""
            raise UserError(
                f"{TOKENS}.{key}: {wanted[key]}, but {path} was fitted with "
                f"{found.get(key)}{other}: use that, or another {TOKENS}.path"
            )
    return centroids
