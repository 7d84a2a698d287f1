"""Corpora -> shards: what jobs/prepare.py does with data.train, on Ray."""

from raysft.offered import callable_too

callable_too(__name__)
