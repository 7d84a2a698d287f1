"""What a user is told, before anything is evaluated, of metrics that go by nothing in data.eval."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from raysft.config import Config
from raysft.data.index.build import Index
from raysft.scorers import SPEAKING, figures_of

log = logging.getLogger(__name__)


def tell_of_metrics(config: Config, index: Index, say: Callable[[str], None]) -> None:
    """Which examples are not answered, for nothing would compare their answers; and tasks in
    evaluate.metrics that no example has."""
    metrics = config.evaluate.metrics
    counts = np.bincount(index.task, minlength=len(index.tasks)).tolist()
    found = {task: count for task, count in zip(index.tasks, counts) if count}
    silent = {task: count for task, count in found.items() if not figures_of(task, metrics)}
    for task in SPEAKING if config.evaluate.speaks else ("tts",):
        silent.pop(task, None)  # its answers are speech: there is no metric of texts to name
    if config.evaluate.generate and silent:
        tasks = ", ".join(f"{count:,} of {task}" for task, count in silent.items())
        say(
            f"data.eval: examples without a metric are not answered, only their loss is measured: "
            f"{tasks} (evaluate.metrics: {{{next(iter(silent))}: [...]}} names one)"
        )
    for task in metrics:
        if task not in found:
            log.warning(
                "evaluate.metrics.%s: no example of data.eval is of this task; there are %s",
                task,
                ", ".join(found) or "none",
            )
    words, names = config.evaluate.bleu_tokenize, [source.name for source in index.sources]
    for name in () if isinstance(words, str) else words:
        if name not in names:
            log.warning(
                "evaluate.bleu_tokenize.%s: no source of data.eval has this name; there are %s",
                name,
                ", ".join(names),
            )
