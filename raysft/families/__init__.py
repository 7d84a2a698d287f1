"""Families of models: a folder each, with its encoder (`encode`) and its model (`model`).

`raysft.config.families` has a row for each, which names these modules: they are imported when a
model of the family is asked for. Importing this package imports nothing.
"""
