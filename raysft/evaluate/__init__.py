"""Evaluation: generation in batches across workers, WER and CER, loss and perplexity by task."""
