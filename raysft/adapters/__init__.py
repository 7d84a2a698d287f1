"""Adapters of the peft library around a model: attached, begun with, ranked, merged."""
