"""python -m raysft.report RUN [--out FILE.png]: a picture of a run, from the files it wrote.

Loss, evaluation and throughput over steps; by default RUN/report.png. Dotted lines: where the run
went on after a restart or a resize. Of a mixture beside it experts.png: what its experts do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raysft.cli import guarded, parse
from raysft.errors import UserError
from raysft.json_types import JsonObject
from raysft.offered import callable_too
from raysft.run.folder import load_plugins
from raysft.run.lines import read_lines
from raysft.run.stages import refuse_folder
from raysft.scorers import figure_of, of_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMMAND = "python -m raysft.report"
EXPERTS = "experts.png"
MOST = 3.0  # times its share: brighter an expert does not get
log = logging.getLogger(__name__)
if __name__ != "__main__":
    callable_too(__name__)  # `from raysft import report`: the function of the library, its page


def draw(folder: Path, target: Path | None = None) -> Path:
    """Draw metrics.jsonl and eval.jsonl of the run in `folder` as a PNG; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not (folder / "config.yaml").is_file():
        refuse_folder(folder)
        raise UserError(f"{folder}: no run is here (no config.yaml); name a run's folder")
    metrics = read_lines(folder / "metrics.jsonl", {"step": int, "loss": float})
    if not metrics:
        raise UserError(f"{folder}: nothing to draw, metrics.jsonl is missing or empty")
    evaluations = sorted(
        read_lines(folder / "eval.jsonl", {"step": int}), key=lambda line: line["step"]
    )
    try:
        load_plugins(folder)  # whose scorers say what their figures are
    except UserError as error:
        log.warning("%s; drawn without it", error)
    compared = [name for name in _names(evaluations) if "/" in name and not of_losses(name)]
    shares = [name for name in compared if figure_of(name).unit == "percent"]
    others = [name for name in compared if name not in shares]
    columns = 4 if others else 3
    figure, axes = plt.subplots(1, columns, figsize=(14 * columns / 3, 4), constrained_layout=True)
    figure.suptitle(folder.name)
    _losses(axes[0], metrics, evaluations)
    _shares(axes[1], evaluations, shares)
    _speed(axes[2], metrics)
    if others:
        axes[3].set_title("evaluation")
        _compared(axes[3], evaluations, others)
    events = read_lines(folder / "events.jsonl", {"event": str})
    again = [line for line in events if line["event"] == "continued" and "step" in line]
    for axis in axes:
        for line in again:
            axis.axvline(line["step"], color="0.6", linewidth=0.8, linestyle=":")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    target = target or folder / "report.png"
    figure.savefig(target, dpi=110)
    plt.close(figure)
    experts = read_lines(folder / "experts.jsonl", {"step": int})
    if experts:
        _experts(experts, target.with_name(EXPERTS), folder.name)
    return target


def _losses(axis: Axes, metrics: list[JsonObject], evaluations: list[JsonObject]) -> None:
    axis.set_title("loss per supervised token")
    names = [name for name in _names(metrics) if name.startswith("loss")]
    for name in names if len(names) != 2 else ["loss"]:  # one task: its loss is the loss
        found = [(line["step"], line[name]) for line in metrics if name in line]
        axis.plot(*zip(*found), label=f"train {name}", linewidth=1.2)
    for name in _names(evaluations):
        if name.startswith("loss/"):
            found = [(line["step"], line[name]) for line in evaluations if name in line]
            axis.plot(*zip(*found), "o--", label=f"eval {name}", markersize=4)
    axis.set_yscale("log")
    axis.legend(fontsize=8)


def _shares(axis: Axes, evaluations: list[JsonObject], names: list[str]) -> None:
    errors = all(figure_of(name).better == "min" for name in names)
    axis.set_title("error rates, evaluation (%)" if errors else "evaluation (%)")
    _compared(axis, evaluations, names, times=100, shown=".1f")
    axis.set_ylim(bottom=0)


def _compared(
    axis: Axes,
    evaluations: list[JsonObject],
    names: list[str],
    times: float = 1,
    shown: str = ".3g",
) -> None:
    for name in names:
        found = [(line["step"], times * line[name]) for line in evaluations if name in line]
        axis.plot(*zip(*found), "o-", label=f"{name} ({found[-1][1]:{shown}})", markersize=4)
    if names:
        axis.legend(fontsize=8)


def _speed(axis: Axes, metrics: list[JsonObject]) -> None:
    axis.set_title("tokens a second, and share of time waiting for data (%)")
    steps = [line["step"] for line in metrics]
    axis.plot(steps, [line["tokens_per_s"] for line in metrics], label="tokens/s", linewidth=1.2)
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower left", fontsize=8)
    wait = axis.twinx()
    wait.plot(steps, [100 * line["data_wait"] for line in metrics], "C3", linewidth=1, alpha=0.7)
    wait.set_ylim(0, 100)


def _names(lines: list[JsonObject]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line))


def _experts(lines: Sequence[JsonObject], target: Path, title: str) -> None:
    """Draw the second half of the lines of experts.jsonl, what the run does rather than how it
    began: a panel a kind of token, a row a layer, a column an expert; 1 is an equal share among the
    experts that tokens of the kind have gone to."""
    import matplotlib.pyplot as plt

    lines = lines[len(lines) // 2 :]
    tables = {
        kind: np.sum([line["tokens"][kind] for line in lines], 0, dtype=float)
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
        image = axis.imshow(shares, aspect="auto", vmin=0, vmax=MOST, interpolation="nearest")
        dead = np.argwhere((table == 0) & (table.sum(0) > 0))
        axis.plot(dead[:, 1], dead[:, 0], "rx", markersize=4)
        axis.set_title("" if kind == "all" else kind)
        axis.set_ylabel("layer")
        figure.colorbar(image, ax=axis)
    axes[-1, 0].set_xlabel("expert (red: none of the tokens)")
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str], command: str = COMMAND) -> None:
    """Draw, and say where. command: what was typed, for the usage."""
    usage = (__doc__ or "").replace(COMMAND, command)
    arguments = parse(argv, usage, positional=1, flags=["out="], keys=False)
    target = Path(str(arguments.flags["out"])) if "out" in arguments.flags else None
    try:
        picture = draw(Path(arguments.positional[0]), target)
        print(f"picture: {picture}")
        if (experts := picture.with_name(EXPERTS)).exists():
            print(f"experts: {experts}")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    guarded(main)
