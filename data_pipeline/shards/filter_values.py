"""Values of the filter language: what a column's content means, and the nodes that compute with it.

One meaning, whichever shard stores a column as what:

    None, NaN, a null            missing: comparisons with it are unknown
    int, float, bool, Decimal    a number; true is 1, false is 0
    text                         a text; where a number is wanted, the number that it spells ("0.3", "true")
    anything else                neither (a list, a date): no comparison can read it

A value that is there but cannot be read as what a comparison wants is *unreadable*. It is unknown as a
missing one is, but never replaced by `default`, and a row that fails because of it is counted under a reason
of its own. A text constant meets a number as the number that it spells; one that spells none is not equal
to it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

OTHER: Any = type("Other", (), {"__repr__": lambda self: "OTHER"})()
"""Stands for a value that is neither a number nor a text, or a text that the index does not keep."""
Mask: TypeAlias = "NDArray[np.bool_]"
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


class Column(NamedTuple):
    """n values: float64, or objects that are a float, a str, None or OTHER."""

    values: NDArray[Any]
    known: Mask
    """[n] False: missing, or unreadable."""
    unreadable: Mask
    """[n] There is a value, but not of the kind that is wanted."""


class Node(NamedTuple):
    """A part of an expression."""

    kind: str
    """number, text (a constant) or any (as the column has it)."""
    run: Callable[[Mapping[str, Column], int], Column]
    names: frozenset[str] = frozenset()
    """Columns whose values an `any` node hands on."""
    text: str = ""
    """The constant of a text node."""


def plain(value: object) -> Any:
    """A float, a str, None (missing; NaN too) or OTHER, for any value of a json or parquet."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float, Decimal, np.number, np.bool_)):
        try:
            number = float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
        except (ValueError, TypeError):  # Decimal's signalling NaN, a complex number
            return None if isinstance(value, Decimal) else OTHER
        return None if math.isnan(number) else number
    return OTHER


def spelled_number(text: str) -> float | None:
    """The number that a text spells: 0.3, -1e5, true, False; None when it spells none ("nan" does not)."""
    word = text.strip().lower()
    if word in ("true", "false"):
        return float(word == "true")
    try:
        number = math.nan if "_" in word else float(word)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def as_column(values: NDArray[Any]) -> Column:
    """Column of an array: float64 with NaN, or objects of any kind."""
    nothing = np.zeros(len(values), np.bool_)
    if values.dtype != object:
        numbers = values.astype(np.float64)
        return Column(numbers, ~np.isnan(numbers), nothing)
    read = np.empty(len(values), dtype=object)
    read[:] = [plain(v) for v in values]
    return Column(read, np.asarray([v is not None for v in read], np.bool_), nothing)


def to_numbers(column: Column) -> Column:
    """The same as float64: texts by the number that they spell, else unreadable."""
    if column.values.dtype != object:
        return column
    n = len(column.values)
    numbers, unreadable = np.full(n, np.nan), column.unreadable.copy()
    for i in np.flatnonzero(column.known):
        value = column.values[i]
        number = spelled_number(value) if isinstance(value, str) else value
        if isinstance(number, float):
            numbers[i] = number
        else:
            unreadable[i] = True
    return Column(numbers, ~np.isnan(numbers), unreadable)


def truth(column: Column) -> tuple[Mask, Mask, Mask]:
    """Where a number column is true, known, unreadable."""
    return column.values.astype(np.bool_) & column.known, column.known, column.unreadable


def numeric(node: Node) -> Node:
    """The node, read as numbers."""
    return node if node.kind == "number" else Node("number", lambda c, n: to_numbers(node.run(c, n)))


def constant(value: float | str) -> Node:
    """A node that is the same in every row."""
    kind = object if isinstance(value, str) else np.float64

    def run(columns: Mapping[str, Column], n: int) -> Column:
        return Column(np.full(n, value, dtype=kind), np.ones(n, np.bool_), np.zeros(n, np.bool_))

    return Node("text", run, text=value) if isinstance(value, str) else Node("number", run)


def named(name: str) -> Node:
    """A column as it is."""
    return Node("any", lambda columns, n: columns[name], frozenset({name}))


def negation(inner: Node) -> Node:
    """`not` of a number node."""

    def run(columns: Mapping[str, Column], n: int) -> Column:
        true, known, unreadable = truth(inner.run(columns, n))
        return Column((~true).astype(np.float64), known, unreadable)

    return Node("number", run)


def logic(left: Node, right: Node, *, any_true: bool) -> Node:
    """`or` (any_true) or `and` of two number nodes."""

    def run(columns: Mapping[str, Column], n: int) -> Column:
        (a, a_known, a_bad), (b, b_known, b_bad) = truth(left.run(columns, n)), truth(right.run(columns, n))
        # Kleene: one certain decisive operand settles the result
        decisive = (a_known & (a == any_true)) | (b_known & (b == any_true))
        known = decisive | (a_known & b_known)
        value = np.where(decisive, any_true, not any_true).astype(np.float64)
        return Column(value, known, (a_bad | b_bad) & ~known)

    return Node("number", run)


def comparison(symbol: str, left: Node, right: Node) -> Node:
    """A comparison: of numbers if either side is one by itself, else row by row as the values are."""
    if "number" in (left.kind, right.kind):
        left, right = numeric(left), numeric(right)

    def run(columns: Mapping[str, Column], n: int) -> Column:
        a, b = left.run(columns, n), right.run(columns, n)
        known, unreadable = a.known & b.known, a.unreadable | b.unreadable
        result = np.zeros(n)
        if a.values.dtype != object and b.values.dtype != object:
            result[known] = _COMPARISONS[symbol](a.values[known], b.values[known])
            return Column(result, known, unreadable)
        strict = not (left.kind == "text" or right.kind == "text")
        for i in np.flatnonzero(known):
            outcome = _compare_values(symbol, a.values[i], b.values[i], strict)
            unreadable[i] = outcome is OTHER
            known[i] = outcome is not OTHER
            result[i] = known[i] and outcome
        return Column(result, known, unreadable)

    return Node("number", run)


def _compare_values(symbol: str, a: Any, b: Any, strict: bool) -> Any:
    """True or False, or OTHER for unreadable."""
    if a is OTHER or b is OTHER:
        return OTHER
    if isinstance(a, str) and isinstance(b, str):
        return _COMPARISONS[symbol](a, b)
    x, y = (spelled_number(v) if isinstance(v, str) else float(v) for v in (a, b))
    if x is None or y is None:  # a number and a text that spells none
        return OTHER if strict or symbol not in ("==", "!=") else symbol == "!="
    return _COMPARISONS[symbol](x, y)


def arithmetic(symbol: str, left: Node, right: Node) -> Node:
    """+ - * / of two number nodes; what is not a number (0 / 0) is missing."""
    operation = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}[symbol]

    def run(columns: Mapping[str, Column], n: int) -> Column:
        a, b = left.run(columns, n), right.run(columns, n)
        value = operation(a.values, b.values)
        return Column(value, a.known & b.known & ~np.isnan(value), a.unreadable | b.unreadable)

    return Node("number", run)


def missing(inner: Node) -> Node:
    """1 where there is no value. What is there but unreadable is not missing: that is unknown."""

    def run(columns: Mapping[str, Column], n: int) -> Column:
        _, known, unreadable = inner.run(columns, n)
        return Column((~known).astype(np.float64), ~unreadable, unreadable)

    return Node("number", run)


def default(value: Node, instead: Node) -> Node:
    """`value`, or `instead` where it is missing. With a number for either, both are read as numbers."""
    is_number = "number" in (value.kind, instead.kind)
    if is_number:
        value, instead = numeric(value), numeric(instead)

    def run(columns: Mapping[str, Column], n: int) -> Column:
        a, b = value.run(columns, n), instead.run(columns, n)
        kept = a.known | a.unreadable
        kind = np.result_type(a.values.dtype, b.values.dtype)
        chosen = np.where(kept, a.values.astype(kind), b.values.astype(kind))
        return Column(chosen, a.known | (b.known & ~a.unreadable), np.where(kept, a.unreadable, b.unreadable))

    return Node("number" if is_number else "any", run, value.names | instead.names)


def combined(name: str, parts: list[Node]) -> Node:
    """min, max or abs of number nodes."""

    def run(columns: Mapping[str, Column], n: int) -> Column:
        found = [part.run(columns, n) for part in parts]
        known = np.logical_and.reduce([c.known for c in found])
        unreadable = np.logical_or.reduce([c.unreadable for c in found])
        if name == "abs":
            return Column(np.abs(found[0].values), known, unreadable)
        combine = np.minimum if name == "min" else np.maximum
        return Column(combine.reduce([c.values for c in found]), known, unreadable)

    return Node("number", run)
