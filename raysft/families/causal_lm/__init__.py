"""causal_lm: text and speech units are tokens alike."""
