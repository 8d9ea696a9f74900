"""Lists of prompts: text, tables, lines of JSON, or the captions of shards."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.shards.beside import read_column
from data_pipeline.shards.records import clean
from data_pipeline.storage.files import read_bytes, read_text
from data_pipeline.storage.urls import name_of
from data_pipeline.tools.given import read_prompts
from data_pipeline.tools.picture_sets import captions_in

COLUMNS = ("caption", "prompt", "text")
"""Of a table, the first that it has."""


def listed_prompts(url: str, most: int | None = None) -> list[str]:
    """Prompts, cleaned as captions are, in order; rows without a visible character are left out.

    Args:
        url: .txt (one a line), .csv, .tsv, .json, .jsonl or .parquet with a column `caption`, `prompt` or
            `text`; anything else is a folder of pictures or shards, whose captions are taken.
        most: enough of them.

    Raises:
        DataError: no such file, another table, or none at all.
    """
    ending = name_of(url).rpartition(".")[2].lower()
    read = _READERS.get(ending, captions_in)
    found = list(itertools.islice(read(url), most))
    if not found:
        raise DataError(
            f"there is no caption in {url}; name a text file with a prompt a line, a table with one of the "
            f"columns {', '.join(COLUMNS)}, or shards with captions."
        )
    return found


def prompts_of(url: str) -> list[str]:
    """What a file of prompts holds: a table as `listed_prompts` reads it, else a text with one a line.

    Raises:
        DataError: no such file, or another table.
    """
    ending = name_of(url).rpartition(".")[2].lower()
    return list(_READERS.get(ending, _lines)(url))


def _lines(url: str) -> Iterator[str]:
    return iter(read_prompts(url))


def _separated(url: str) -> Iterator[str]:
    tabs = url.lower().endswith(".tsv")
    text = io.StringIO(read_text(url), newline="")
    # a caption of a .tsv may hold a lone quote
    rows = csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.DictReader(text)
    return _cleaned(_in_rows(rows, _column(list(rows.fieldnames or ()), url), url), url)


def _in_rows(rows: csv.DictReader[str], column: str, url: str) -> Iterator[str]:
    for row in rows:
        if None in row or None in row.values():
            raise DataError(
                f"line {rows.line_num} of {url} has more or fewer cells than the header, so a caption may be "
                "cut; put cells that hold the separator in quotes."
            )
        yield row[column]


def _json_lines(url: str) -> Iterator[str]:
    values: list[Any] = []
    for number, line in enumerate(read_text(url).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"line {number} of {url} is not JSON ({error}); write one object a line."
            ) from error
        values.append(value[_column(list(value), url)] if isinstance(value, dict) else value)
    return _cleaned(iter(values), url)


def _json(url: str) -> Iterator[str]:
    """A list of texts, or of objects as lines of JSON have them."""
    try:
        values = json.loads(read_text(url))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url} is not JSON ({error}); lines of JSON are named .jsonl.") from error
    if not isinstance(values, list):
        raise DataError(f"{url} is JSON but no list; write a list of texts, or of objects with a caption.")
    found = (value[_column(list(value), url)] if isinstance(value, dict) else value for value in values)
    return _cleaned(found, url)


def _parquet(url: str) -> Iterator[str]:
    raw = read_bytes(url)
    try:
        values = read_column(raw, lambda names: _column(names, url))
    except DataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's are of these
        raise DataError(f"{url} cannot be read as a parquet ({error}); write it anew.") from error
    return _cleaned(iter(values), url)


_READERS: dict[str, Callable[[str], Iterator[str]]] = {
    "txt": _lines,
    "csv": _separated,
    "tsv": _separated,
    "jsonl": _json_lines,
    "ndjson": _json_lines,
    "json": _json,
    "parquet": _parquet,
}


def _column(names: list[str], url: str) -> str:
    for name in COLUMNS:
        if name in names:
            return name
    raise DataError(
        f"{url} has the columns {', '.join(map(str, names)) or 'of nothing'}; name that of the prompts "
        f"{', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}."
    )


def _cleaned(values: Iterator[Any], url: str) -> Iterator[str]:
    """Texts without those that are blank or null. Raises DataError for what is something else."""
    for number, value in enumerate(values, 1):
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"prompt {number} of {url} is {str(value)[:80]}, which is no text; write a text in each row."
            )
        if value and (text := clean(value)):
            yield text
