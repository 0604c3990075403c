"""Reads the rows of a Parquet file as records, a few at a time.

A compressed or dictionary-encoded column can be far larger than its file, so only as many rows are read
at once as are sure to fit. One page is the minimum; the format allows 2 GiB. A value without a Python
type makes only its field unreadable, not its row or its file.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastcpt.corpus.streams import CHUNK, Most

MOST_ROWS = 64  # at once; some acts have 3 M characters
AT_ONCE = 64_000_000  # bytes of rows at once; a larger row is read alone


class DamagedParquetError(Exception):
    """The file cannot be read, or not to its end."""


@dataclass(frozen=True, slots=True)
class Unconvertible:
    """Stands for a value that cannot be read."""

    reason: str


def read_rows(
    stream: Any, top: Container[str], most: Most
) -> Iterator[tuple[dict[str, Any] | None, float]]:
    """Each row's columns of ``top`` (or with a dot in the name), and the row's share of the file.

    A row with more bytes than ``most`` allows is None.
    """
    try:
        file = pq.ParquetFile(stream, buffer_size=CHUNK)
        names = [name for name in file.schema_arrow.names if name in top or "." in name]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DamagedParquetError(f"the column '{twice[0]}' is there twice")
        number = 0
        for group in range(file.num_row_groups):
            size = _rows_at_once(file.metadata.row_group(group))
            for batch in file.iter_batches(size, row_groups=[group], columns=names):
                for row in _records(batch, number, most):
                    yield row, 1 / file.metadata.num_rows
                number += batch.num_rows
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        # pyarrow's errors about the content are OSErrors without an errno
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedParquetError((str(error).splitlines() or [type(error).__name__])[0]) from error


def _rows_at_once(group: pq.RowGroupMetaData) -> int:
    # a row is at most as large as its column chunks, but dictionary encoding may repeat a value in each row
    sizes: list[int] = [group.column(n).total_uncompressed_size for n in range(group.num_columns)]
    return max(1, min(MOST_ROWS, AT_ONCE // max(1, *sizes)))


def _records(batch: pa.RecordBatch, first: int, most: Most) -> Iterator[dict[str, Any] | None]:
    allowed = [most(first + n) for n in range(batch.num_rows)]
    if max(allowed) < 0:
        yield from [None] * batch.num_rows
    elif batch.nbytes <= min(allowed):
        yield from _converted(batch)
    else:
        for n, bytes_allowed in enumerate(allowed):
            row = batch.slice(n, 1)
            yield _converted(row)[0] if row.nbytes <= bytes_allowed else None


_NOT_CONVERTED = (
    ValueError,
    OverflowError,
    ArithmeticError,
    TypeError,
    KeyError,
    pa.ArrowException,
)


def _converted(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except _NOT_CONVERTED:
        # convert one by one: a bad value must not make its neighbours unreadable
        return [
            {name: _value(batch.column(name)[n]) for name in batch.schema.names}
            for n in range(batch.num_rows)
        ]
    return rows


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except _NOT_CONVERTED as error:
        if isinstance(scalar, pa.StructScalar):
            return _struct(scalar)
        if isinstance(scalar, pa.TimestampScalar) and scalar.type.unit == "ns":
            return _value(scalar.cast(pa.timestamp("us", scalar.type.tz), safe=False))
        if isinstance(error, UnicodeDecodeError):
            return Unconvertible(f"is not UTF-8 text at byte {error.start}")
        return Unconvertible(f"cannot be read: {str(error).splitlines()[0][:200]}")


def _struct(scalar: pa.StructScalar) -> dict[str, Any]:
    names = [scalar.type.field(n).name for n in range(scalar.type.num_fields)]
    return {
        name: _value(scalar[n])
        if names.count(name) == 1
        else Unconvertible("is there twice in its object")
        for n, name in enumerate(names)
    }
