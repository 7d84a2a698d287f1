"""A format whose files are no text: rows of Parquet that hold their clips."""

from __future__ import annotations

from raysft.data.sources import register
from tests.support.outside_formats import ParquetRows

register(ParquetRows())
