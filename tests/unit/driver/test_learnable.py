"""What GRPO cannot do is said in a line, before a model is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from raysft.config.load import validate
from raysft.driver.preflight import prepare
from raysft.errors import UserError
from raysft.run.folder import open_run, resolve, run_folder
from tests.support import rewarded


def refused(folder: Path, grpo: dict[str, Any], **changes: Any) -> str:
    """What is said of a run with these settings."""
    with pytest.raises(UserError) as raised:
        config = validate(rewarded.tree(folder, "run", grpo, **changes), "run.yaml")
        config = resolve(config, run_folder(config))
        prepare(config, open_run(config))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_reward_that_there_is_not(tmp_path: Path) -> None:
    said = refused(tmp_path, {"rewards": {"acuracy": 1.0}})
    assert said.startswith("run.yaml: train.grpo.rewards")
    assert "(did you mean accuracy?), found 'acuracy'" in said and "'rating'" in said


def test_a_group_of_one(tmp_path: Path) -> None:
    assert refused(tmp_path, {"group": 1}).startswith("run.yaml: train.grpo.group: 1, but an ")


def test_a_prompt_that_leaves_no_room_for_its_longest_answer(tmp_path: Path) -> None:
    said = refused(tmp_path, {"max_new_tokens": 100})
    found = r"q\d+ takes (\d+) positions; its prompt with an answer of 100 tokens does not fit "
    match = re.search(found, said)
    assert match is not None
    longest = int(match[1])
    assert f"data.tokens_per_batch: 130; raise that to {longest + 98}, or lower" in said
    fits = {"max_new_tokens": 130 - longest + 2}
    assert said.endswith(f"lower max_new_tokens to {fits['max_new_tokens']}")
    config = validate(rewarded.tree(tmp_path, "fits", fits), "run.yaml")
    config = resolve(config, run_folder(config))
    assert prepare(config, open_run(config)).total_steps == 4
