"""What a process of an index knows; light to import, for each starts anew."""

from __future__ import annotations

from raysft.data import sources


def formats(job: object, shared: object) -> list[str]:
    """Names of the formats from outside."""
    return [name for name in sources.formats() if name.startswith("my_")]
