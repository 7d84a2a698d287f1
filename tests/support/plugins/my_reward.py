"""Rewards short answers."""

from __future__ import annotations

from raysft.config.rewards import Reward, register
from raysft.data.facts import Facts


def brief(answer: str, facts: Facts) -> float:
    """1 for an answer that is no longer than the right one."""
    return float(len(answer) <= len(facts.text or ""))


register(Reward("brief", "my_reward:brief", "an answer no longer than the right one"))
