"""Evaluation: generation in batches across workers, WER and CER, loss and perplexity by task."""

from raysft.offered import callable_too

callable_too(__name__)
