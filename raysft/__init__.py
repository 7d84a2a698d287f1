"""raysft: supervised fine-tuning of speech+text models on Ray."""

from raysft import environment as environment  # first of all: before libraries look for a home

__version__ = "0.1.0"
