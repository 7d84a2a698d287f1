"""raysft: supervised fine-tuning of speech+text models on Ray."""

__version__ = "0.1.0"
