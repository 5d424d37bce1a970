"""Parquet files become a `Table`, held in memory; a file that unpacks to far more than it is refused while it is read.

Enters: a path. Leaves: a `Table` whose pictures are binary columns or structs {bytes, path}, nothing decoded yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_pipe.data.sources import Lazy, Table, member_path, need_column
from ldm_pipe.pretrained import LdmPipeError

MAX_UNPACKED = 64 << 20  # bytes that any file may unpack to
MAX_RATIO = 100  # beyond that: to this many times its size; pictures are compressed already
VALUE_BYTES = 8  # at least what one value takes as an object of Python, even a null
_BATCH_BYTES = 256 << 20


def read_parquet(path: Path, image_column: str) -> Table:
    """Read one parquet file; pictures are binary columns or structs {bytes, path}.

    Raises: LdmPipeError if it is damaged, has no such column, or unpacks to more than `MAX_UNPACKED` bytes and
        `MAX_RATIO` times its size (a dictionary of one large value makes a small file of any number of rows).
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise LdmPipeError("parquet files need pyarrow", str(path), 'pip install "ldm-pipe[train]"') from error
    try:
        with pq.ParquetFile(path) as file:
            table = _read_bounded(file, path)
    except (pa.ArrowException, OSError) as error:
        raise LdmPipeError(f"cannot be read as parquet ({str(error)[:200]})", str(path)) from error
    need_column(image_column, table.column_names, str(path))
    columns: dict[str, Sequence[Any]] = {}
    for name in table.column_names:
        kind = table.schema.field(name).type
        if pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} >= {"bytes"}:
            columns[name] = _pictures(table.column(name), path)
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            columns[name] = _bytes(table.column(name))
        elif name == image_column:
            raise LdmPipeError(f"column {name!r} of type {kind} holds no pictures", str(path))
        else:
            columns[name] = table.column(name).to_pylist()
    images = columns[image_column]
    return Table(images, columns, [f"{path}:row {row}" for row in range(len(images))], image_column)


def check_announced(path: Path, metadata: Any) -> int:
    """Compare what the footer of a file announces with its size.

    Returns: the bytes that it may unpack to.
    Raises: LdmPipeError if it announces more.
    """
    allowed = max(MAX_UNPACKED, MAX_RATIO * path.stat().st_size)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    announced = sum(group.total_byte_size for group in groups)
    _refuse_more(max(announced, metadata.num_rows * metadata.num_columns * VALUE_BYTES), allowed, path)
    return allowed


def _refuse_more(made: int, allowed: int, path: Path) -> None:
    if made > allowed:
        what = f"its {path.stat().st_size} bytes unpack to {made} or more, at most {allowed} are read"
        how = f"The limit is {MAX_RATIO} times the size of the file. Split it, or store the pictures compressed."
        raise LdmPipeError(what, str(path), how)


def _read_bounded(file: Any, path: Path) -> Any:
    """Read a file in pieces, and stop as soon as they have become too many bytes."""
    import pyarrow as pa

    allowed, made, parts = check_announced(path, file.metadata), 0, []
    for number in range(file.metadata.num_row_groups):
        # One value can be as large as what its group announces, and repeated in every row for nothing.
        rows = max(1, min(65536, _BATCH_BYTES // max(file.metadata.row_group(number).total_byte_size, 1)))
        pieces = []
        for piece in file.iter_batches(batch_size=rows, row_groups=[number]):
            made += sum(_size(column) for column in piece.columns)
            _refuse_more(made, allowed, path)
            pieces.append(piece)
        part = pa.Table.from_batches(pieces, schema=file.schema_arrow)
        parts.append(part.combine_chunks() if len(pieces) > 1 else part)
    return pa.concat_tables(parts) if parts else file.schema_arrow.empty_table()


def _size(column: Any) -> int:
    """Return the bytes of an Arrow array, counting what its values take as objects of Python."""
    import pyarrow as pa

    total = max(column.nbytes, VALUE_BYTES * len(column))
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
        total += VALUE_BYTES * len(column)
    return total


def _bytes(column: Any) -> Sequence[Any]:
    return Lazy(len(column), lambda row: column[row].as_py())


def _pictures(column: Any, path: Path) -> Sequence[Any]:
    def get(row: int) -> Any:
        value = column[row].as_py()
        if value is None or value.get("bytes") is not None:
            return value and value["bytes"]
        name = value.get("path")
        return None if name is None else member_path(path.parent, name, f"{path}:row {row}")

    return Lazy(len(column), get)
