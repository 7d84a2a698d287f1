"""A family: text models, encoded and trained as those of causal_lm.

This is its row; its modules are imported when they are asked for."""

from __future__ import annotations

from raysft.config.families import Family, register

ROW = Family(
    name="my_family", encode="my_family.encode", model="my_family.model", every_causal_lm=True
)
register(ROW)
