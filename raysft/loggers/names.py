"""What loggers call figures: the same names everywhere, and never one for training and evaluation.

train/loss/asr is `loss/asr` of metrics.jsonl, eval/loss/asr that of eval.jsonl.
"""

from __future__ import annotations

from raysft.json_types import JsonObject
from raysft.run.evaluations import figures

# Groups of what metrics.jsonl holds; what is not named here is `train/`.
_GROUPS = {
    "speed": (
        *("tokens_per_s", "tokens_per_s_worker", "supervised_tokens_per_s", "audio_seconds_per_s"),
        *("tflops", "mfu", "peak_memory_gb", "data_wait", "seconds", "world_size"),
    ),
    "data": ("tokens", "supervised_tokens", "examples", "audio_seconds", "padding"),
    "run": ("restarts", "steps_again", "lost_s"),
}
_GROUP_OF = {key: group for group, keys in _GROUPS.items() for key in keys}


def tag(key: str) -> str:
    """Of a key of metrics.jsonl: train/loss/asr, speed/tokens_per_s."""
    if key.startswith("experts/"):
        return key
    return f"{_GROUP_OF.get(key, 'train')}/{key}"


def of_metrics(line: JsonObject) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, but for its step."""
    return {tag(key): value for key, value in _numbers(line).items() if key != "step"}


def of_evaluation(line: JsonObject) -> dict[str, float]:
    """The figures of a line of eval.jsonl."""
    return {f"eval/{key}": value for key, value in _numbers(figures(line)).items()}


def _numbers(line: JsonObject) -> dict[str, float]:
    return {
        key: value
        for key, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
