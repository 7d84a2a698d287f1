"""Clips in cells of Parquet: read by groups of rows, as Parquet lets them be read.

Stands under clips/file.py; cells of latents, lists of frames, are read as their float32 values, one
after the other. A cell is in a page that is compressed together with its neighbours', so
that a group of rows is decoded for it; what was decoded last is kept, for neighbours are read one
after the other. Shards that raysft writes need none of this: see sources/shards.py.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from raysft import stores
from raysft.data.example import Cell
from raysft.errors import BadExample, first_line

if TYPE_CHECKING:
    import pyarrow as pa

KEPT = 1 << 28  # bytes of columns that are kept

_lock = threading.Lock()
_columns: OrderedDict[tuple[object, ...], list[bytes | None]] = OrderedDict()


def read(cell: Cell) -> bytes:
    """The bytes of a cell. Raises BadExample: it is empty, not there, or damaged; OSError where its
    file cannot be read."""
    state = stores.state(stores.at(cell.file))
    key = (cell.file, state, cell.group, cell.column)
    with _lock:
        column = _columns.get(key)
        if column is None:
            column = _read_column(cell)
            _columns[key] = column
            while len(_columns) > 1 and sum(map(_size, _columns.values())) > KEPT:
                _columns.popitem(last=False)
        _columns.move_to_end(key)
    found = column[cell.row] if cell.row < len(column) else None
    if found is None:
        where = f"{cell.file}: row {cell.row} of group {cell.group}"
        raise BadExample(f"{where}: empty file (column {cell.column} holds no bytes)", "empty")
    return found


def _read_column(cell: Cell) -> list[bytes | None]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    place = stores.at(cell.file)
    try:
        with stores.random_access(place) as stream:
            table = pq.ParquetFile(stream).read_row_group(cell.group, columns=[cell.column])
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the storage's
        raise BadExample(
            f"{cell.file}: damaged or cut off: group {cell.group} of its rows cannot be read "
            f"({first_line(error)})",
            "truncated",
        ) from None
    column = table.column(0)
    if pa.types.is_struct(column.type):  # of the name there may be dots in its own
        column = pc.struct_field(column, cell.column.rpartition(".")[2])
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return [_values(cell) for cell in column]
    return column.to_pylist()


def _values(cell: pa.Scalar) -> bytes | None:
    """A list of frames. Whoever listed it has seen that all have as many values."""
    if not cell.is_valid:
        return None
    flat = cell.values.flatten()  # of this row alone
    return flat.to_numpy(zero_copy_only=False).astype("<f4").tobytes()


def _size(column: list[bytes | None]) -> int:
    return sum(len(cell) for cell in column if cell is not None)


def _forget() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)
