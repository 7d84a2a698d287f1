"""A picture of what the experts of a mixture do: how many tokens go to each, by layer.

Drawn of the second half of the lines of experts.jsonl, as the run does now rather than as it began.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raysft.json_types import JsonObject

EXPERTS = "experts.png"
_MOST = 3.0  # times its share: brighter it does not get


def heat_map(lines: Sequence[JsonObject], target: Path, title: str) -> None:
    """Draw lines of experts.jsonl: a panel a kind of token, a row a layer, a column an expert;
    1 is an equal share among the experts that tokens of the kind have gone to."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = lines[len(lines) // 2 :]
    tables = {
        kind: sum(np.array(line["tokens"][kind], float) for line in lines)
        for kind in lines[-1]["tokens"]
    }
    layers, experts = next(iter(tables.values())).shape
    width, height = max(5.0, 0.12 * experts), max(2.5, 0.2 * layers)
    figure, axes = plt.subplots(
        len(tables),
        1,
        figsize=(width, height * len(tables) + 0.8),
        constrained_layout=True,
        squeeze=False,
    )
    figure.suptitle(f"{title}: tokens by expert, 1 = an equal share")
    for axis, (kind, table) in zip(axes[:, 0], tables.items(), strict=True):
        used = max(1, int((table.sum(0) > 0).sum()))
        shares = used * table / np.maximum(table.sum(1, keepdims=True), 1)
        image = axis.imshow(shares, aspect="auto", vmin=0, vmax=_MOST, interpolation="nearest")
        dead = np.argwhere((table == 0) & (table.sum(0) > 0))
        axis.plot(dead[:, 1], dead[:, 0], "rx", markersize=4)
        axis.set_title("" if kind == "all" else kind)
        axis.set_ylabel("layer")
        figure.colorbar(image, ax=axis)
    axes[-1, 0].set_xlabel("expert (red: none of the tokens)")
    figure.savefig(target, dpi=110)
    plt.close(figure)
