"""What libraries say of themselves, kept off the terminal.

Their warnings are about their own internals and come from every process: they go to a file of the
run. Errors, and everything raysft itself says, stay where they are.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

LOG = "warnings.log"
"""In a run's folder: what libraries warned of, in the first worker."""

LIBRARIES = (
    *("transformers", "tokenizers", "huggingface_hub", "peft", "accelerate", "datasets"),
    *("DeepSpeed", "deepspeed", "bitsandbytes", "torch", "torchaudio", "py.warnings"),
)

# For the environment (see `environment`), before a library is imported: on the driver, in tasks.
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "BITSANDBYTES_NOWELCOME": "1",
    # Ray's driver prints what its processes write, but for lines that match. All of it lies in
    # Ray's own logs. The first two: of Ray Train's own caretaker, when a controller ends.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "|".join(
        (
            "Failed to query Ray Train Controller actor state",
            "placement_group_cleaner|PlacementGroupCleaner",
            "Ray Train controller actor .* is dead",
            "A worker died or was killed while executing",  # raysft says it, with its reason
            "gemm_4bit",
            r"\[Gloo\] Rank",
            "Loading extension module|ninja: no work|as PyTorch extensions root",
            "Time to load .* op:",
        )
    ),
}


def before_imports() -> None:
    """Keep off the terminal what a library says while it is imported, before `quiet` can act."""
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting accelerator to CPU" not in record.getMessage()
    )
    # Of processors with AVX512-BF16 alone: a faster product of 4 bits that another package has.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "Failed to load CPU gemm_4bit" not in record.getMessage()
    )


def quiet(folder: Path | None = None) -> None:
    """Send libraries' warnings of this process to the log of the run in `folder`; None: nowhere.

    To be called once the libraries are imported: they bring handlers of their own.
    """
    logging.captureWarnings(True)
    if "transformers" in sys.modules:  # bars of loading and writing weights
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is a no-op.*")
    warnings.filterwarnings("ignore", message="Position ids are not supported")
    handlers: list[logging.Handler] = [_errors()]
    if folder is not None:
        kept = logging.FileHandler(folder / LOG, delay=True, encoding="utf-8")
        kept.setLevel(logging.WARNING)
        kept.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        handlers.append(kept)
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.close()
        logger.handlers, logger.propagate = list(handlers), False
        if name != "torch":  # whose TORCH_LOGS set levels
            logger.setLevel(logging.WARNING)


def _errors() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.ERROR)
    return handler
