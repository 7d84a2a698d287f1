"""What conversations call their messages and who says them, whoever wrote them down."""

from __future__ import annotations

from raysft.data.example import ASSISTANT

LISTS = ("messages", "conversations", "conversation")
PAIRS = {"query": "response", "instruction": "output"}  # question -> answer, of the last turn
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "function_call", "tool_call"), ASSISTANT),
    **dict.fromkeys(("tool", "tool_response", "function", "function_response"), "tool"),
    "observation": "tool",
}
