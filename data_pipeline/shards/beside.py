"""The files beside a tar: what img2dataset, or whoever else made the shard, notes of its samples.

    00000.tar          000000012.jpg ...
    00000.parquet      key 000000012 (or 12, or 12.0), caption, url, status, width, ...
    00000_stats.json   {"count": 10000, "successes": 8731, ...}: rows of the parquet, samples of the tar

Numbers and short texts go into the index. Captions do not: they would be most of it, and few runs read them
from here. So a run whose `data.captions` names such a column reads a shard's parquet along with its index.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from data_pipeline.errors import AccessDenied, DataError, in_a_line
from data_pipeline.shards.filter_values import OTHER, plain
from data_pipeline.shards.identities import is_identity
from data_pipeline.shards.index import PICTURE, ShardIndex
from data_pipeline.shards.records import parse_record, text_of
from data_pipeline.storage.editions import Edition, is_other
from data_pipeline.storage.listing import ListedFile


def parquet_of(shard: str) -> str:
    """URL of the parquet beside a tar."""
    return shard.removesuffix(".tar") + ".parquet"


NO_PARQUET = "none"


def edition_text(found: Edition | ListedFile | None) -> str:
    """What an index notes of the parquet that is beside its tar."""
    return NO_PARQUET if found is None else f"{found.size} {found.version}"


def has_changed(noted: str, now: str) -> bool:
    """Whether the parquet is another one than was noted; both as `edition_text`, "" where nobody knows.

    What was removed since is none: the index has what it told.
    """
    if "" in (noted, now) or now in (noted, NO_PARQUET):
        return False
    return noted == NO_PARQUET or is_other(_edition(noted), _edition(now))


def _edition(text: str) -> Edition:
    size, _, version = text.partition(" ")
    return Edition(int(size), version)


def stats_of(shard: str) -> str:
    """URL of the `_stats.json` beside a tar."""
    return shard.removesuffix(".tar") + "_stats.json"


def promised(shard: str, read: Callable[[str], bytes | None]) -> tuple[int, str] | None:
    """How many samples a shard has by the files beside it, and which file says so; None where none does.

    read: gives the file at a URL, None where there is none
    """
    for url, samples in ((stats_of(shard), promised_by_stats), (parquet_of(shard), _promised_by_parquet)):
        if (raw := read(url)) is not None and (found := samples(raw)) is not None:
            return found, url
    return None


def promised_by_stats(raw: bytes) -> int | None:
    """Samples of a shard by its `_stats.json`; None where that does not say."""
    samples = (parse_record(raw) or {}).get("successes")
    return samples if type(samples) is int and samples >= 0 else None


def _promised_by_parquet(raw: bytes) -> int | None:
    """Rows that became samples; None where it cannot be read, which an index is the one to tell."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(raw))
        if "status" not in file.schema_arrow.names:
            return int(file.metadata.num_rows)
        return _values(file.read(columns=["status"]).column(0)).count("success")
    except Exception:  # noqa: BLE001 - of damaged files it raises whatever it likes
        return None


KEY = "key"
"""Column of the samples' keys; `Key` and webdataset's `__key__` are it too where there is none."""


def is_key(name: str) -> bool:
    """Whether a column may have the keys."""
    return name.lower() in (KEY, f"__{KEY}__")


def read_table(raw: bytes, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Columns of a parquet by name, that of the keys as KEY; `columns` beside it, None: all.

    Raises DataError where there is no column of keys or two columns have one name, else whatever pyarrow
    raises for damaged files.
    """
    file, _, key = _opened(raw)
    table = file.read(columns=None if columns is None else [*dict.fromkeys((key, *columns))])
    values = {name: _values(table.column(name)) for name in table.column_names}
    return {KEY: values[key], **values}


def read_column(raw: bytes, choose: Callable[[list[str]], str]) -> list[Any]:
    """Values of the column that `choose` names, of a parquet that need not name samples.

    Raises what `choose` does, and DataError where two columns have that name, else whatever pyarrow raises
    for damaged files.
    """
    import pyarrow.parquet as pq  # as below

    file = pq.ParquetFile(io.BytesIO(raw))
    names = file.schema_arrow.names
    name = choose(names)
    if names.count(name) > 1:
        raise DataError(f"there are two columns {name}; which one is meant nobody can tell")
    return _values(file.read(columns=[name]).column(name))


def _opened(raw: bytes) -> tuple[Any, list[str], str]:
    """The parquet, its columns, and which of them has the keys; raises as `read_table`."""
    import pyarrow.parquet as pq  # half a second and 60 MB, for those who need it

    file = pq.ParquetFile(io.BytesIO(raw))
    names = file.schema_arrow.names
    keys = [KEY] if KEY in names else [name for name in names if is_key(name)]
    if not keys:
        raise DataError(f"has no column {KEY} that names the samples (there are {', '.join(names[:20])})")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(f"has two columns {twice[0]}; which one is meant nobody can tell")
    return file, names, keys[0]


def _values(column: Any) -> list[Any]:
    """Values of a column; of texts that are no UTF-8, which no writer checks, as far as they are.

    What Python has no type for (a time of a zone that it does not know) is there, but nothing: OTHER.
    """
    import pyarrow as pa

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else text_of(value) for value in raw]
    except (ValueError, ArithmeticError, TypeError, NotImplementedError, ImportError, LookupError):
        return [OTHER if value else None for value in column.is_valid().to_pylist()]


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
        table = read_table(raw, wanted)
        keys = [key.decode() for key in index.keys]
        rows = rows_by_key(table[KEY], keys)
        for name in wanted:
            found[name] = [table[name][rows[key]] if key in rows else None for key in keys]
    return found


class JsonCheck:
    """Whether the json members of a shard have what is needed of it, window by window.

    Without an index, or with one that is older than the parquet, only what is in the tar counts: an opt-out
    that stands beside it must not be passed over. The parquet is read once, for the names of its columns, and
    again where a window has no value of one that is needed.
    """

    def __init__(
        self,
        shard: str,
        wanted: Iterable[str],
        removing: bool,
        read: Callable[[str], bytes | None],
        tell: Callable[[str], object],
        noted: str = "",
        look: Callable[[str], Edition | None] = lambda url: None,
    ) -> None:
        """What is asked of a shard.

        Args:
            shard: URL of the tar.
            wanted: columns of filters and captions.
            removing: whether identifying columns are wanted, too.
            read: gives the file at a URL, None where there is none.
            tell: takes the sentence about a parquet that is of no use.
            noted: the parquet that an index knows, which is read where it is another one by now.
            look: says which edition the file at a URL is of, None where there is none.
        """
        self._shard, self._wanted, self._removing = shard, frozenset(wanted), removing
        self._read, self._tell = read, tell
        self._noted, self._look = noted, look
        self._names: frozenset[str] | None = None
        """Columns of the parquet; none where there is no such file, None before anybody has looked."""

    def __call__(self, index: ShardIndex) -> None:
        """Raise DataError where the parquet has a value that no json member of these samples has, of a column
        that is needed.

        index: of a window, with what is in the tar alone.
        """
        known = _with_values(index)
        missing = self._wanted - known
        raw: bytes | None = None
        if not missing and not self._removing:
            return
        if self._names is None:
            raw = self._read_it() if self._is_news() else None
            self._names = frozenset(self._of_use(raw, lambda raw: _opened(raw)[1]) or ())
        others = self._names - known - {KEY}
        only = [n for n in sorted(others) if n in missing or (self._removing and is_identity(n))]
        if only and (raw := raw or self._read_it()) is not None:
            only = self._of_use(raw, partial(_having_values, names=only, index=index)) or []
            if only:
                raise DataError(
                    f"{', '.join(only)} of {self._shard} stand in the parquet beside it alone, which is read "
                    "with an index: run `ldm data index` once, then train with data.order=indexed."
                )

    def _is_news(self) -> bool:
        """Whether there may be a parquet that no index has seen."""
        if not self._noted:
            return True
        try:
            found = self._look(parquet_of(self._shard))
        except AccessDenied:
            return False
        return has_changed(self._noted, edition_text(found))

    def _read_it(self) -> bytes | None:
        try:
            return self._read(parquet_of(self._shard))
        except AccessDenied:  # which S3 may say of what is not there
            return None

    def _of_use(self, raw: bytes | None, use: Callable[[bytes], list[str]]) -> list[str] | None:
        """What `use` gives; None where there is no parquet, or one of no use, which is told."""
        if raw is None:
            return None
        try:
            return use(raw)
        except DataError as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001 - pyarrow raises many types for damaged files
            why = f"is not readable ({in_a_line(error)})"
        self._names = frozenset()
        self._tell(f"{parquet_of(self._shard)} {why}: filters and removal lists see nothing of it")
        return None


def _with_values(index: ShardIndex) -> set[str]:
    """Columns and members that some of these samples have, as far as the index knows."""
    return {
        *(name for name, numbers in index.numbers.items() if name in PICTURE or not np.isnan(numbers).all()),
        *(name for name, codes in index.codes.items() if (codes != -1).any()),
        *(name for name, hashes in index.hashes.items() if hashes.any()),
        *index.omitted,
        *index.extensions,
    }


def _having_values(raw: bytes, names: Sequence[str], index: ShardIndex) -> list[str]:
    """Which of these columns of a parquet have a value for one of these samples; raises as `read_table`."""
    table = read_table(raw, names)
    keys = [key.decode() for key in index.keys]
    rows = rows_by_key(table[KEY], keys)
    mine = [rows[key] for key in keys if key in rows]
    return [name for name in names if any(plain(table[name][row]) is not None for row in mine)]


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
