"""What a step learns beside right answers: prompts answered, rewarded and learnt from (GRPO)."""
