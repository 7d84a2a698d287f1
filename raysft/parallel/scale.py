"""The factor on the loss that keeps small fp16 gradients from becoming zero."""

from __future__ import annotations

from raysft.json_types import JsonObject

START = 65536.0
GROW_AFTER = 2000  # steps in a row that were finite


class LossScale:
    """Halved after a step that overflowed, doubled after many that did not; 1 if not dynamic.

    The rule of torch.amp.GradScaler, here because ours has to be the same on every worker, to be
    saved with a checkpoint, and to work on sharded gradients.
    """

    def __init__(self, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = START if dynamic else 1.0
        self._finite = 0

    def update(self, finite: bool) -> None:
        """Once a step. finite: whether its gradient was."""
        if not self.dynamic:
            return
        self._finite = self._finite + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self._finite == GROW_AFTER:
            self.value, self._finite = self.value * 2, 0

    def state(self) -> JsonObject:
        """For the checkpoint."""
        return {"value": self.value, "finite": self._finite}

    def load(self, state: JsonObject) -> None:
        """Go on from a checkpoint; one of another precision has nothing to say."""
        if self.dynamic and state["value"] != 1.0:
            self.value, self._finite = state["value"], state["finite"]
