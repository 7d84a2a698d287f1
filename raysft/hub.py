"""Whether what a config names as a model can be had: asked once, on the driver, before Ray starts.

A name is a folder (raysft.paths.model) or an id of the hub. The hub is asked with one request of a
few seconds; where it cannot be reached, what is in its cache is used and nothing asks it again
(huggingface_hub would ask five times for every file, a minute each).
"""

from __future__ import annotations

import functools
import logging
import os

from raysft import paths
from raysft.errors import UserError

TIMEOUT_S = 10.0
MARKERS = {
    "model.path": ("config.json",),
    "model.tokenizer": ("tokenizer_config.json", "tokenizer.json"),
    "peft.path": ("adapter_config.json",),
}

log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=64)
def check(given: str, key: str, revision: str | None = None) -> None:
    """Raise UserError where `given`, the value of `key`, is no folder and not to be had elsewhere.

    Where the hub cannot be reached and has `given` in its cache: this process, and those it starts
    from now on, ask it no more.
    """
    place = paths.absolute(given)
    if os.path.exists(place):
        return
    if os.path.isabs(given) or paths.looks_local(given):
        raise UserError(f"{key}: {place} does not exist{paths.nearest(place)}")
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at {key.rpartition('.')[0]}.revision {revision}" if revision else ""
    nowhere = f"{key}: no model at {given!r}{at}"
    try:
        known = _cached(given, key, revision)
    except HFValidationError as error:
        raise UserError(
            f"{nowhere}: no such folder ({place}), and it is no id of the hub: {_line(error)}"
        ) from None
    neither = f"no such folder ({place}), and it is not in the hub's cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        if known:
            return
        raise UserError(f"{nowhere}: {neither}, which HF_HUB_OFFLINE keeps to")
    try:
        HfApi().model_info(given, revision=revision, timeout=TIMEOUT_S)
    except GatedRepoError as error:
        problem = f"its owner has to let you in, and HF_TOKEN to say who you are: {_line(error)}"
    except RevisionNotFoundError:
        problem = f"{constants.ENDPOINT} has no such revision of it"
    except RepositoryNotFoundError:
        problem = (
            f"no such folder ({place}), and {constants.ENDPOINT} has none of that name (or it is "
            "private: set HF_TOKEN)"
        )
    except Exception as error:  # noqa: BLE001 - of whichever client the hub's library uses
        if known:
            log.warning(
                "%s: %s cannot be reached (%s): %s is taken from its cache",
                key,
                constants.ENDPOINT,
                _line(error),
                given,
            )
            os.environ["HF_HUB_OFFLINE"] = "1"
            constants.HF_HUB_OFFLINE = True
            return
        problem = f"{neither}, and {constants.ENDPOINT} cannot be reached ({_line(error)})"
    else:
        return
    if not known:
        raise UserError(f"{nowhere}: {problem}")


def _cached(given: str, key: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(given, name, revision=revision), str)
        for name in MARKERS.get(key, MARKERS["model.path"])
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
