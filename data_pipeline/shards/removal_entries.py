"""What a removal list says, in whatever form people keep it.

    bytes --- gzip? unpacked, with a bound ---> first bytes
                PAR1            columns of a Parquet file
                [               JSON array of texts and objects
                other archives  refused
                else, line by line
                  header        CSV or TSV: a first line with a column of COLUMNS
                  {             JSON object: each of its fields of COLUMNS counts
                  else          one identifier, or cells without a header: the first, and all URLs and digests

What cannot be read with certainty is refused with file, line and remedy: a list that is half understood is an
opt-out that is not honoured.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from data_pipeline.errors import DataError
from data_pipeline.shards.grouping import KNOWN_EXTENSIONS, split_name, tidy
from data_pipeline.shards.identities import (
    DIGESTS,
    IDENTITIES,
    hash_text,
    identity,
    identity_text,
    is_unpadded,
    numbered,
    readings,
)

COLUMNS = ("key", "__key__", *IDENTITIES)
"""Columns and fields, in any case, that identify a sample; `shard` beside a key says which shard's."""

_MAX_BYTES = 1 << 32
_MAX_ARRAY = 1 << 28
"""A JSON array is held in memory as a whole."""
_MAX_LINE = 1 << 20
_MAX_HEADER = 1 << 16
_BOM = b"\xef\xbb\xbf"
_REFUSED = {
    b"PK\x03\x04": "a zip file",
    b"BZh91AY": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\x1f\x8b": "compressed twice",
    b"ARROW1\0": "an Arrow file",
    b"\xff\xfe": "a text in UTF-16",
    b"\xfe\xff": "a text in UTF-16",
    b"<": "a page of HTML or XML",
}
_FORMS = "plain text, CSV, JSON lines or Parquet, as it is or compressed by gzip"
_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)
_PATTERN = re.compile(r"(^|://)\*|/\*+$")
"""A wildcard in place of a host or of all names in a folder."""
_NAMED = re.compile(rf"({'|'.join(COLUMNS)})\s*(?::\s|=)\s*(\S.*)", re.IGNORECASE)
_CODE = re.compile(r"""[\[({]\s*["']|["']\s*[\])}]""")
"""A quoted text in brackets, as no key or URL has it."""
_CONTROL = re.compile("[\0-\x08\x0e-\x1f]")
_SEPARATOR = re.compile(r'[\t,;|\s"]')
_KIND = {length: name for name, length in DIGESTS.items()}


class Entries:
    """Collects the identifiers of one file, by their hashes."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.unit, self.number = "line", 0
        """What is being read."""
        self.hashes = array("Q")
        self.numbers = array("L")
        """Which line, row or entry each hash is from."""
        self.kinds: Counter[str] = Counter()

    def read(self, raw: bytes) -> None:
        """Take in a whole file."""
        zipped = raw.startswith(b"\x1f\x8b")
        inner: Any = gzip.GzipFile(fileobj=io.BytesIO(raw)) if zipped else io.BytesIO(raw)
        stream = io.BufferedReader(inner)
        try:
            head = stream.read(4096)
            stream.seek(0)
            self._read(stream, head)
        except (EOFError, OSError, zlib.error) as error:  # of gzip alone: the bytes are in memory
            self.refuse(f"the compressed file is cut short or damaged ({error}); copy it again", here=False)

    def _read(self, stream: io.BufferedReader, head: bytes) -> None:
        if not head:
            self.refuse(
                "the file is empty; take it out of data.removal_lists, or write the list again", here=False
            )
        for magic, what in _REFUSED.items():
            if head.removeprefix(_BOM).lstrip().startswith(magic):
                self.refuse(f"it is {what}; write it as {_FORMS}, in UTF-8", here=False)
        if head.startswith(b"PAR1"):
            self._parquet(self._whole(stream, _MAX_BYTES, "split it"))
        elif head.removeprefix(_BOM).lstrip().startswith(b"["):
            self._array(self._whole(stream, _MAX_ARRAY, "write an object per line instead of an array"))
        else:
            self._text(_Lines(stream, self))

    def _whole(self, stream: io.BufferedReader, most: int, remedy: str) -> bytes:
        data = stream.read(most + 1)
        if len(data) > most:
            self.refuse(f"it is larger than {most:,} bytes when unpacked; {remedy}", here=False)
        return data

    def _text(self, lines: _Lines) -> None:
        """Lines of a text; the first that is no comment may be a header."""
        for first, text in enumerate(lines):
            if first == 0 and len(text) < _MAX_HEADER and (header := _header(text)):
                self._table(lines, *header)
                return
            text = text.strip()
            if text.startswith("{"):
                try:
                    record = json.loads(text)
                except (ValueError, RecursionError) as error:
                    self.refuse(f"it is no JSON object ({error}); write each object on one line")
                self._record(record.items())
            elif _SEPARATOR.search(text):
                try:
                    self._cells(text)
                except csv.Error as error:
                    self.refuse(f"{error}; write shorter cells")
            else:
                self._line(text)

    def _table(self, lines: _Lines, names: list[str], delimiter: str) -> None:
        rows = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                self.refuse(f"{error}; put cells in quotes, and double those inside")
            if row is None:
                return
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(names):
                what = f"it has {len(row)} cells and the header {len(names)}"
                self.refuse(f"{what}; put cells that hold {delimiter!r} in quotes")
            self._record(zip(names, row, strict=True))

    def _cells(self, text: str) -> None:
        """A line with separators and no header above it: cells, or a name that happens to hold one."""
        for delimiter in (d for d in "\t,;| " if d in text):
            found = next(csv.reader([text], delimiter=delimiter, skipinitialspace=True))
            cells = [cell.strip() for cell in found if cell.strip()]
            if any(_has_shape(cell) for cell in cells[1:]):
                for i, cell in enumerate(cells):
                    if i == 0 or _has_shape(cell):
                        self._add(cell)
                if _URL.fullmatch(text):
                    self._add(text, counted=False)
                return
            if delimiter == " " and cells and len(identity(cells[0])) in _KIND and _has_shape(cells[0]):
                self._add(cells[0])  # what sha256sum and its kin print: digest, spaces, file
                return
        alone = next(csv.reader([text]))
        if text.startswith('"') and len(alone) == 1:
            text = alone[0].strip()
        elif any(_has_shape(reading) or not _SEPARATOR.search(reading) for reading in readings(text)):
            pass  # one cell, with its end or a comment
        elif "\t" in text or ("," in text and not _URL.fullmatch(text)):
            self.refuse(
                f"{text[:80]!r} has several columns, of which none is a URL or a digest, and the file no "
                f"header; name the columns in the first line ({', '.join(COLUMNS)}), or write a name with a "
                'comma as {"key": "..."}',
            )
        elif "," in text:
            # A URL with a comma, or a URL and a cell behind it: nobody can tell, so both are removed.
            self._add(text.partition(",")[0], counted=False)
        self._line(text)

    def _line(self, text: str) -> None:
        """A line that is one identifier, and what it may mean without bullet, quotes or comment."""
        *others, bare = text, *readings(text)
        if named := _NAMED.fullmatch(bare):  # of YAML, say: `- key: "000000001"`
            self._record([(named[1], [named[2], *readings(named[2])][-1])])
            return
        if _CODE.search(bare):
            self.refuse(f"{bare[:80]!r} looks like a piece of a program or of settings; write it as {_FORMS}")
        if _PATTERN.search(bare):
            self.refuse(f"{bare[:80]!r} is a pattern, and patterns are not read; name each URL or key")
        self._add(bare)
        for other in others:
            self._add(other, counted=False)

    def _array(self, data: bytes) -> None:
        try:
            values = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            why = f"it begins like a JSON array and is none ({error}); mend it, or write JSON lines"
            self.refuse(why, here=False)
        self.unit = "entry"
        for self.number, value in enumerate(values, 1):
            if isinstance(value, str) and value.strip():
                self._add(value.strip())
            elif isinstance(value, dict):
                self._record(value.items())
            else:
                self.refuse(f"{str(value)[:80]!r} is neither a text nor an object")

    def _parquet(self, data: bytes) -> None:
        import pyarrow.parquet as pq  # heavy, and few lists need it

        self.unit = "row"
        try:
            file = pq.ParquetFile(io.BytesIO(data))
            names = file.schema_arrow.names
            columns = [name for name in names if name.lower() in (*COLUMNS, "shard")]
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            size = sum(group.total_byte_size for group in groups)
            batches = file.iter_batches(batch_size=65_536, columns=columns)
            if not any(name.lower() in COLUMNS for name in columns):
                what = f"its columns are {', '.join(names)}"
                self.refuse(f"{what}; one of them must be called {', '.join(COLUMNS)}", here=False)
            if size > _MAX_BYTES:
                self.refuse(f"it is larger than {_MAX_BYTES:,} bytes when unpacked; split it", here=False)
            for batch in batches:
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    self.number += 1
                    self._record(zip(batch.schema.names, row, strict=True))
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - pyarrow raises many types for damaged files
            self.refuse(f"the Parquet file is damaged ({str(error)[:120]}); write it again", here=False)

    def _record(self, record: Iterable[tuple[Any, Any]]) -> None:
        """Every identifying field of an object or row, `url` and `URL` both; other fields do not matter."""
        fields = [(str(name).strip().lower(), value) for name, value in record]
        shard = next((text for name, v in fields if name == "shard" and (text := self._value(name, v))), "")
        values = [(name, text) for name, v in fields if name in COLUMNS and (text := self._value(name, v))]
        if not values:
            self.refuse(f"it names no sample: give one of {', '.join(COLUMNS)}")
        for name, value in values:
            digits = DIGESTS.get(name)
            if digits and (len(identity(value)) != digits or not _has_shape(value)):
                what = f"{value[:80]!r} is no {name}"
                self.refuse(f"{what}; write it as {digits} hexadecimal digits")
            if name in ("key", "__key__"):
                whole = shard and "/" not in value
                value = f"{shard.removesuffix('.tar')}/{value}" if whole else value
                name = "shard/key" if "/" in value else "key"
            self._add(value, name)

    def _value(self, name: str, value: Any) -> str:
        if value is None or value != value:
            return ""
        # LAION's hashes are numbers, without leading zeros
        if isinstance(value, bytes) or (isinstance(value, (int, float)) and name in ("hash", "uid")):
            value = identity_text(name, value)
        if not isinstance(value, str):
            what = f"{name} is {str(value)[:80]}, which is no text"
            self.refuse(f"{what}; write it in quotes or as a text column, with its leading zeros")
        return value.strip()

    def _add(self, text: str, kind: str = "", *, counted: bool = True) -> None:
        canonical = identity(text)
        looks = _kind(canonical)
        self._keep(canonical)
        if looks in ("key", "shard/key") and kind not in ("hash", "uid"):
            # Lists made from listings: `./00000.tar/000000001.jpg` names a sample too.
            stem, extension = split_name(canonical)
            plain = (stem if extension in KNOWN_EXTENSIONS else canonical).replace(".tar/", "/")
            plain = tidy(plain) or plain
            if plain != canonical:
                self._keep(plain)
            if is_unpadded(plain) and (number := numbered(plain)):
                self._keep(number)
        if counted:
            self.kinds[kind if kind and kind != "hash" else looks] += 1

    def _keep(self, canonical: str) -> None:
        self.hashes.append(hash_text(canonical))
        self.numbers.append(self.number)

    def refuse(self, why: str, *, here: bool = True) -> NoReturn:
        """Raise DataError, about the line that is being read or about the file."""
        where = f"{self._url}, {self.unit} {self.number}" if here else self._url
        raise DataError(f"Removal list {where}: {why}.")


class _Lines(Iterator[str]):
    """Lines of a text in UTF-8, blank ones and comments left out; tells `entries` the number of each.

    Line ends may be of Unix, Windows or an old Mac.
    """

    def __init__(self, stream: io.BufferedReader, entries: Entries) -> None:
        self._stream, self._entries = stream, entries
        self._pieces: list[bytes] = []
        self._bytes = 0

    def __next__(self) -> str:
        while True:
            if not self._pieces:
                self._pieces = self._more()[::-1]
            self._entries.number += 1
            try:
                text = self._pieces.pop().decode("utf-8")
            except UnicodeDecodeError as error:
                self._entries.refuse(f"it is no UTF-8 ({error.reason}); save the file as UTF-8")
            if _CONTROL.search(text):
                self._entries.refuse(f"it is not a text; write the list as {_FORMS}")
            if text.strip() and not text.startswith("#"):
                return text

    def _more(self) -> list[bytes]:
        raw = self._stream.readline(_MAX_LINE + 1)
        if not raw:
            raise StopIteration
        self._bytes += len(raw)
        if len(raw) > _MAX_LINE:
            self._entries.number += 1
            self._entries.refuse(f"it is longer than {_MAX_LINE:,} bytes; write shorter ones")
        if self._bytes > _MAX_BYTES:
            self._entries.refuse(
                f"it is larger than {_MAX_BYTES:,} bytes when unpacked; split it", here=False
            )
        if self._entries.number == 0:
            raw = raw.removeprefix(_BOM)
        return raw.rstrip(b"\r\n").split(b"\r")


def _header(text: str) -> tuple[list[str], str] | None:
    """Names of the columns in lower case and what separates them, if the line is a header."""
    for delimiter in "\t,;|":
        names = [name.strip().lower() for name in next(csv.reader([text], delimiter=delimiter))]
        if any(name in COLUMNS for name in names):
            return names, delimiter
    return None


def _has_shape(text: str) -> bool:
    """Whether a text is a URL or a digest by its looks."""
    return _kind(identity(text)) in DIGESTS or _URL.fullmatch(text) is not None


def _kind(canonical: str) -> str:
    """What a text in its one spelling seems to be."""
    if len(canonical) in _KIND and re.fullmatch("[0-9a-f]+", canonical):
        return _KIND[len(canonical)]
    return "url" if "://" in canonical else "shard/key" if "/" in canonical else "key"
