"""What is minimised: a model's forward returns terms (`term`), each divided by a count of its own.

`chunked` makes the losses of tokens without holding all logits; `config.losses` has the table of
the losses of tokens that can be added to the cross-entropy (`train.losses`).
"""

from raysft.losses.term import CROSS_ENTROPY, Sums, Term

__all__ = ["CROSS_ENTROPY", "Sums", "Term"]
