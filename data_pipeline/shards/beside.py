"""The parquet beside a tar: what img2dataset, or whoever else made the shard, notes of its samples.

    00000.tar        000000012.jpg ...
    00000.parquet    key 000000012 (or 12, or 12.0), caption, url, width, ...

Numbers and short texts go into the index. Captions do not: they would be most of it, and few runs read them
from here. So a run whose `data.captions` names such a column reads a shard's parquet along with its index.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.shards.filter_values import plain
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.records import text_of


def parquet_of(shard: str) -> str:
    """URL of the parquet beside a tar."""
    return shard.removesuffix(".tar") + ".parquet"


def read_table(raw: bytes, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Columns of a parquet by name; None: all. Whatever pyarrow raises for damaged files."""
    import pyarrow.parquet as pq  # half a second and 60 MB, for those who need it

    table = pq.read_table(io.BytesIO(raw), columns=columns)
    return {name: _values(column) for name, column in zip(table.column_names, table.columns, strict=True)}


def _values(column: Any) -> list[Any]:
    """Values of a column; texts that are no UTF-8, which no writer checks, as far as they are."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        import pyarrow as pa

        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else text_of(value) for value in raw]


def rows_by_key(column: Sequence[Any], keys: Sequence[str]) -> dict[str, int]:
    """Row of every key of the parquet, spelled as the tar's members are."""
    return {key: i for i, key in enumerate(_member_keys(column, keys))}


def unkept(index: ShardIndex, names: Sequence[str]) -> list[str]:
    """Which of the columns have texts in the parquet alone, which the index does not keep."""
    return [name for name in names if name in index.codes and bool((index.codes[name] == -2).any())]


def texts_beside(index: ShardIndex, names: Sequence[str], raw: bytes | None) -> dict[str, list[Any]]:
    """[n] texts, or lists of them, of each column that is not in the json (or is there, too, and kept).

    raw: the parquet, where `unkept` names a column
    """
    found = {name: list(index.column(name)) for name in names if name in index.codes}  # type: ignore[arg-type]
    wanted = unkept(index, names)
    if wanted and raw is not None:
        table = read_table(raw, ["key", *wanted])
        keys = [key.decode() for key in index.keys]
        rows = rows_by_key(table["key"], keys)
        for name in wanted:
            found[name] = [table[name][rows[key]] if key in rows else None for key in keys]
    return found


def _member_keys(column: Sequence[Any], keys: Sequence[str]) -> Iterator[str]:
    """The parquet's keys as the members spell them: 12 (or 12.0, or a Decimal) is sample 000000012."""
    spellings: dict[int, list[str]] = {}
    for key in set(keys):
        if key.isascii() and key.isdigit() and len(key) < 40:
            spellings.setdefault(int(key), []).append(key)
    for key in column:
        number = None if isinstance(key, (str, bool)) else plain(key)
        if isinstance(number, float) and number.is_integer():
            whole = int(key)
            # Two members that differ in zeros alone: only the one that is spelled as the number is.
            found = spellings.get(whole, [])
            yield found[0] if len(found) == 1 else str(whole)
        else:
            yield key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)
