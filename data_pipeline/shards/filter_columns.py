"""Whether the columns of a filter exist: asked at the start, where the answer is a sentence."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from data_pipeline.errors import DataError
from data_pipeline.shards.filters import Filter, written
from data_pipeline.shards.manifest import ManifestRow

logger = logging.getLogger(__name__)


def check_columns(rule: Filter, rows: Sequence[ManifestRow]) -> None:
    """Compare a filter with the columns of a set.

    Raises DataError for a column of no shard, and for comparisons that no value of a column can satisfy.
    Says which columns are missing in some shards: they count as missing there.
    """
    tables = [row.columns for row in rows if row.samples]
    if not rule.columns or not tables:
        return
    where = f"the {len(tables)} shards"
    holders = Counter(name for table in tables for name in table)
    for name in sorted(rule.columns):
        if not holders[name]:
            raise DataError(unknown_column(name, holders, f"any of {where}") + _unread_parquets(rows))
        if holders[name] < len(tables):
            logger.warning(
                "data.filter: %d of %s have no column %s, which counts as missing there%s",
                len(tables) - holders[name],
                where,
                name,
                _other_spelling(name, holders),
            )
    kinds = {name: {t[name] for t in tables if name in t} - {"empty"} for name in rule.columns}
    _check_kinds(rule, kinds)


def _unread_parquets(rows: Sequence[ManifestRow]) -> str:
    """What is said of parquets that could not be read, where a column is missed that may be theirs."""
    unread = [(row.shard, p) for row in rows for p in row.problems if p.startswith("parquet ")]
    if not unread:
        return ""
    return f" The columns of {len(unread)} parquets are missing, first beside {unread[0][0]}: {unread[0][1]}."


def check_captions(sources: Sequence[str], rows: Sequence[ManifestRow]) -> None:
    """Raise DataError for a source of captions that is neither a member nor a column of any shard."""
    members = {name for row in rows for name in row.members}
    columns = {name for row in rows for name in row.columns}
    for source in sources:
        if rows and source != "txt" and source not in members | columns:
            near = difflib.get_close_matches(source, columns | members, n=1, cutoff=0.0)
            nearest = f"; the nearest is {near[0]}" if near else ""
            raise DataError(
                f"data.captions names {source}, which is neither a member nor a column of any shard{nearest}."
                + _unread_parquets(rows)
            )


def _check_kinds(rule: Filter, kinds: dict[str, set[str]]) -> None:
    for clause in rule.clauses:
        for name, asked in sorted(clause.asked):
            found = kinds[name]
            if not found:
                continue
            if found == {"unkept"}:
                raise DataError(
                    f"data.filter: `{clause.text}` cannot be decided: {name} is in the parquet alone, and "
                    "the index keeps no values that are long, of many different texts or no number or text; "
                    "put it into the json, or filter on another column."
                )
            if asked == "number" and found <= {"text", "unkept"}:
                raise DataError(
                    f"data.filter: `{clause.text}` wants a number, but {name} is a text that spells none in "
                    f"every shard; compare it with a text, e.g. {name} == 'text'."
                )
            if asked == "text" and found == {"number"}:
                raise DataError(
                    f"data.filter: `{clause.text}` compares {name} with a text, but it is a number in every "
                    f"shard; compare it with a number (true is 1), e.g. {name} == 1."
                )


def unknown_column(name: str, known: Iterable[str], where: str) -> str:
    """Sentence about a column that is not there, with the nearest that is."""
    names = sorted(known)
    if not names:
        return (
            f"data.filter uses the column {name}, but there are no columns in {where}: neither json members "
            "nor a parquet with the samples' keys; remove the filter or correct the shards."
        )
    said = f"data.filter uses the column {name}, which is not in {where}"
    if spelling := _other_spelling(name, names):
        return f"{said}{spelling}."
    by_lower = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.0)
    nearest = by_lower[near[0]] if near else names[0]
    nearest = written(nearest)
    others = ", ".join(map(written, names[:20])) + (", ..." if len(names) > 20 else "")
    return f"{said}; the nearest is {nearest} (there are {others})."


def _other_spelling(name: str, known: Iterable[str]) -> str:
    """What is said of columns that differ in upper and lower case alone."""
    same = sorted(other for other in known if other != name and other.lower() == name.lower())
    return f"; {' and '.join(same)} is there: upper and lower case differ" if same else ""
