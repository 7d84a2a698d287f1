"""ONNX models by onnxruntime: opened, their inputs matched, asked with one clip."""

from __future__ import annotations

import numpy as np

from raysft.errors import BadExample, UserError
from raysft.prepare.features import RATE, Features

_LENGTHS = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}


class OnnxModel:
    """A model that reads features, or features and their length."""

    def __init__(self, key: str, path: str) -> None:
        """key: of the config, for messages. Raises UserError: no such model, inputs that are others
        than these."""
        try:
            import onnxruntime
        except ImportError:
            raise UserError(
                f"{key}: {path} is read with onnxruntime: pip install 'raysft[onnx]'"
            ) from None
        self.key, self.path = key, path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # a maker has one CPU
        have = onnxruntime.get_available_providers()
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        try:
            self.session = onnxruntime.InferenceSession(
                path, options, providers=[name for name in wanted if name in have]
            )
        except Exception as error:  # noqa: BLE001 - a class of onnxruntime for each cause
            raise UserError(
                f"{key}: {path}: no model that onnxruntime reads: {_line(error)}"
            ) from None
        inputs = self.session.get_inputs()
        lengths = [one for one in inputs if one.type in _LENGTHS and len(one.shape) <= 1]
        features = [
            one for one in inputs if one.type == "tensor(float)" and len(one.shape) in (2, 3)
        ]
        if len(features) != 1 or len(lengths) > 1 or len(features) + len(lengths) != len(inputs):
            told = ", ".join(f"{one.name}: {one.type} of {one.shape}" for one in inputs)
            raise UserError(
                f"{key}: {path} reads {told}: what is known are features (floats of 2 or 3 "
                "dimensions), alone or with their length (a whole number)"
            )
        self._features, self._length = features[0], lengths[0] if lengths else None
        self.rank = len(self._features.shape)

    def hear(self, clip: np.ndarray, features: Features) -> np.ndarray:
        """What it makes first, of a clip of float32 [samples]. Raises BadExample where the clip is
        too short for it (a second is not), UserError where it refuses others."""
        try:
            return self._made(*features(clip))
        except UserError:
            if len(clip) >= RATE or not self._works(features):
                raise
            seconds = len(clip) / RATE
            raise BadExample(f"too short for {self.path}: {seconds:.3f} s", "too short") from None

    def _works(self, features: Features) -> bool:
        try:
            self._made(*features(np.zeros(RATE, np.float32)))
        except UserError:
            return False
        return True

    def _made(self, features: np.ndarray, length: int) -> np.ndarray:
        while features.ndim < self.rank:
            features = features[:, None]
        given: dict[str, np.ndarray] = {self._features.name: features}
        if self._length is not None:
            kind = _LENGTHS[self._length.type]
            given[self._length.name] = np.full([1] * len(self._length.shape), length, kind)
        try:
            return np.asarray(self.session.run(None, given)[0])
        except Exception as error:  # noqa: BLE001 - a class of onnxruntime for each cause
            shape = list(features.shape)
            raise UserError(
                f"{self.key}: {self.path} refuses features of {shape}: {_line(error)}"
            ) from None


def _line(error: Exception) -> str:
    """What onnxruntime says over several lines."""
    return " ".join(str(error).split())[:300]
