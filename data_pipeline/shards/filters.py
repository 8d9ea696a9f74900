"""The filter language: comparisons over columns, parsed by hand, evaluated over whole columns.

A text becomes clauses, cut at the `and`s of the top level, so that each rejection has a name. A clause is a
tree of closures; a node maps columns to (values, known), where `known` is False for what is missing or NaN.
Nothing is ever evaluated as Python.

    punsafe < 0.1 and min(width, height) >= 512
    `----------'      `---------------------'
     clause 0            clause 1:   >=  --- min --- column width
                                      |          `-- column height
                                      `-- constant 512

Unknown is a truth value of its own, as in SQL, and only what is certainly true is kept:

>>> kept = Filter("punsafe < 0.1 and min(width, height) >= 512")
>>> kept.check({"punsafe": 0.05, "width": 640, "height": 480})
'filter: min(width, height) >= 512'
>>> kept.check({"width": 640, "height": 640})
'filter: punsafe < 0.1'
>>> Filter("not punsafe >= 0.1").check({})
'filter: not punsafe >= 0.1'
>>> Filter("punsafe < 0.1 or width > 100").check({"width": 640}) is None
True
>>> Filter("default(punsafe, 0) < 0.1").check({}) is None
True
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError

Column: TypeAlias = "tuple[NDArray[Any], NDArray[np.bool_]]"
"""Values and, per row, whether they are known (False: missing or NaN)."""
Node: TypeAlias = "Callable[[Mapping[str, Column], int], Column]"

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<text>'[^']*'|\"[^\"]*\")"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<op><=|>=|==|!=|[-<>+*/(),]))"
)
_KEYWORDS = {"and", "or", "not", "in", "true", "false"}
_FUNCTIONS = {"min": 2, "max": 2, "abs": 1, "missing": 1, "default": 2}
_MAX_DEPTH = 50
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


@dataclass(frozen=True)
class Clause:
    """One part of the top-level conjunction."""

    text: str
    """As written; a rejected row is counted under `filter: <text>`."""
    node: Node
    columns: frozenset[str]


class Filter:
    """Rows to keep. Three-valued: a comparison with a missing or NaN value is unknown.

    `and`, `or` and `not` follow Kleene's logic and a row is kept only if the result is true. To keep
    rows whose value is missing say so: `missing(punsafe) or punsafe < 0.1`, `default(punsafe, 0) < 0.1`.
    """

    def __init__(self, text: str) -> None:
        """Parse. Raises DataError that shows the place of a mistake."""
        self.text = text
        self.clauses = _Parser(text).clauses() if text.strip() else []

    @property
    def columns(self) -> frozenset[str]:
        """Columns that are used."""
        return frozenset().union(*(c.columns for c in self.clauses)) if self.clauses else frozenset()

    def reasons(self) -> list[str]:
        """Name of each clause's rejections."""
        return [f"filter: {c.text}" for c in self.clauses]

    def first_failing(self, columns: Mapping[str, NDArray[Any]], n: int) -> NDArray[np.int32]:
        """[n] position of the first clause that is not true, -1 where all are.

        `columns` maps every used column to n values; a numeric NaN or a None is missing.
        """
        known = {name: _known(columns[name]) for name in self.columns}
        result = np.full(n, -1, np.int32)
        with np.errstate(all="ignore"):
            # Backwards, so that the first failing clause is written last.
            for i, clause in reversed(list(enumerate(self.clauses))):
                value, certain = clause.node(known, n)
                result[~(_truth(value) & certain)] = i
        return result

    def check(self, record: Mapping[str, Any]) -> str | None:
        """Reason one json record is rejected for, or None."""
        columns = {name: _single(record.get(name)) for name in self.columns}
        failing = int(self.first_failing(columns, 1)[0])
        return None if failing < 0 else self.reasons()[failing]


def _single(value: object) -> NDArray[Any]:
    if isinstance(value, (int, float)):
        try:
            return np.asarray([float(value)])
        except OverflowError:
            return np.asarray([np.inf])
    return np.asarray([value if isinstance(value, str) else None], dtype=object)


def _known(values: NDArray[Any]) -> Column:
    if values.dtype == object:
        return values, np.asarray([isinstance(v, str) for v in values], dtype=np.bool_)
    return values, ~np.isnan(values)


def _truth(value: NDArray[Any]) -> NDArray[np.bool_]:
    if value.dtype == object:
        return np.zeros(len(value), np.bool_)
    return value.astype(np.bool_)


class _Parser:
    """Recursive descent: or < and < not < comparison < sum < product < unary < atom."""

    def __init__(self, text: str) -> None:
        self.source = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while position < len(text.rstrip()):
            match = _TOKEN.match(text, position)
            if match is None or match.lastgroup is None:
                raise self._wrong(position, "this character has no meaning here")
            kind = match.lastgroup
            self.tokens.append((kind, match.group(kind), match.start(kind)))
            position = match.end()
        self.tokens.append(("end", "", len(text)))
        self.at = 0
        self.depth = 0
        self.used: set[str] = set()

    def clauses(self) -> list[Clause]:
        parts = []
        while True:
            # Where an `or` binds the top level, the whole rest is one clause.
            start, self.used = self.tokens[self.at][2], set()
            node = self._or() if not self._and_follows() else self._not()
            stop = self.tokens[self.at][2]
            parts.append(Clause(self.source[start:stop].strip(), node, frozenset(self.used)))
            if not self._take("and"):
                break
        if self._peek()[0] != "end":
            raise self._wrong(self._peek()[2], "expected `and`, `or` or the end")
        return parts

    def _and_follows(self) -> bool:
        """Whether the rest is a pure conjunction at the top level, so that it can be cut at `and`."""
        depth = 0
        for _, text, _ in self.tokens[self.at :]:
            depth += (text == "(") - (text == ")")
            if depth == 0 and text == "or":
                return False
        return True

    def _or(self) -> Node:
        node = self._and()
        while self._take("or"):
            node = _logic(node, self._and(), any_true=True)
        return node

    def _and(self) -> Node:
        node = self._not()
        while self._take("and"):
            node = _logic(node, self._not(), any_true=False)
        return node

    def _not(self) -> Node:
        if self._take("not"):
            self._deeper()
            inner = self._not()
            self.depth -= 1
            return lambda c, n: (lambda v: (~_truth(v[0]), v[1]))(inner(c, n))
        return self._comparison()

    def _comparison(self) -> Node:
        node = self._sum()
        if self._take("in"):
            self._expect("(")
            options = [self._sum()]
            while self._take(","):
                options.append(self._sum())
            self._expect(")")
            result = _compare("==", node, options[0])
            for option in options[1:]:
                result = _logic(result, _compare("==", node, option), any_true=True)
            return result
        result_node: Node | None = None
        while self._peek()[1] in ("<", "<=", ">", ">=", "==", "!=") and self._peek()[0] == "op":
            symbol = self._next()[1]
            right = self._sum()
            # a < b < c is (a < b) and (b < c), as in Python
            step = _compare(symbol, node, right)
            result_node = step if result_node is None else _logic(result_node, step, any_true=False)
            node = right
        return result_node or node

    def _sum(self) -> Node:
        node = self._product()
        while self._peek()[1] in ("+", "-") and self._peek()[0] == "op":
            node = _arithmetic(self._next()[1], node, self._product())
        return node

    def _product(self) -> Node:
        node = self._unary()
        while self._peek()[1] in ("*", "/") and self._peek()[0] == "op":
            node = _arithmetic(self._next()[1], node, self._unary())
        return node

    def _unary(self) -> Node:
        if self._take("-"):
            self._deeper()
            inner = self._unary()
            self.depth -= 1
            return _arithmetic("-", _constant(0.0), inner)
        return self._atom()

    def _atom(self) -> Node:
        kind, text, place = self._next()
        if kind == "number":
            return _constant(float(text))
        if kind == "text":
            return _constant(text[1:-1])
        if text in ("true", "false"):
            return _constant(float(text == "true"))
        if text == "(":
            self._deeper()
            node = self._or()
            self.depth -= 1
            self._expect(")")
            return node
        if kind == "name" and text not in _KEYWORDS:
            if self._peek()[1] == "(":
                return self._call(text, place)
            self.used.add(text)
            return lambda columns, n: columns[text]
        raise self._wrong(place, "expected a column, a number, a 'text' or (")

    def _call(self, name: str, place: int) -> Node:
        if name not in _FUNCTIONS:
            raise self._wrong(place, f"{name} is not a function; there are {', '.join(_FUNCTIONS)}")
        self._expect("(")
        self._deeper()
        arguments = [self._sum()]
        while self._take(","):
            arguments.append(self._sum())
        self.depth -= 1
        self._expect(")")
        least = _FUNCTIONS[name]
        if len(arguments) < least or (name not in ("min", "max") and len(arguments) != least):
            raise self._wrong(place, f"{name} takes {least} value{'s' * (least > 1)}")
        return _function(name, arguments)

    def _deeper(self) -> None:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self._wrong(self._peek()[2], "nested too deeply")

    def _peek(self) -> tuple[str, str, int]:
        return self.tokens[self.at]

    def _next(self) -> tuple[str, str, int]:
        token = self.tokens[self.at]
        self.at = min(self.at + 1, len(self.tokens) - 1)
        return token

    def _take(self, text: str) -> bool:
        if self._peek()[1] == text and self._peek()[0] in ("op", "name"):
            self.at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise self._wrong(self._peek()[2], f"expected {text}")

    def _wrong(self, position: int, what: str) -> DataError:
        return DataError(
            f"data.filter is not valid at character {position + 1}: {what} "
            f"({self.source[:position]!s}>>>{self.source[position : position + 30]!s}); an example is "
            "punsafe < 0.1 and min(width, height) >= 512."
        )


def _constant(value: float | str) -> Node:
    kind = object if isinstance(value, str) else np.float64
    return lambda columns, n: (np.full(n, value, dtype=kind), np.ones(n, np.bool_))


def _logic(left: Node, right: Node, *, any_true: bool) -> Node:
    def node(columns: Mapping[str, Column], n: int) -> Column:
        (a, a_known), (b, b_known) = left(columns, n), right(columns, n)
        a, b = _truth(a), _truth(b)
        # Kleene: one certain decisive operand settles the result
        decisive = (a_known & (a == any_true)) | (b_known & (b == any_true))
        return np.where(decisive, any_true, not any_true), decisive | (a_known & b_known)

    return node


def _compare(symbol: str, left: Node, right: Node) -> Node:
    def node(columns: Mapping[str, Column], n: int) -> Column:
        (a, a_known), (b, b_known) = left(columns, n), right(columns, n)
        known = a_known & b_known
        if (a.dtype == object) != (b.dtype == object):  # a text is never equal to a number
            return np.full(n, symbol == "!="), known
        result = np.zeros(n, np.bool_)
        x, y = a[known], b[known]
        result[known] = _COMPARISONS[symbol](x, y)
        return result, known

    return node


def _arithmetic(symbol: str, left: Node, right: Node) -> Node:
    def node(columns: Mapping[str, Column], n: int) -> Column:
        (a, a_known), (b, b_known) = _numeric(left(columns, n)), _numeric(right(columns, n))
        if symbol == "+":
            value = a + b
        elif symbol == "-":
            value = a - b
        elif symbol == "*":
            value = a * b
        else:
            value = np.divide(a, b)
        return value, a_known & b_known & ~np.isnan(value)

    return node


def _function(name: str, arguments: list[Node]) -> Node:
    def node(columns: Mapping[str, Column], n: int) -> Column:
        values = [argument(columns, n) for argument in arguments]
        if name == "missing":
            return ~values[0][1], np.ones(n, np.bool_)
        if name == "default":
            (a, a_known), (b, b_known) = values
            mixed = a.dtype != b.dtype
            chosen = (
                np.where(a_known, a.astype(object), b.astype(object)) if mixed else np.where(a_known, a, b)
            )
            if mixed and all(isinstance(v, (int, float)) for v in chosen):
                chosen = chosen.astype(np.float64)
            return chosen, a_known | b_known
        numbers = [_numeric(v) for v in values]
        known = np.logical_and.reduce([k for _, k in numbers])
        if name == "abs":
            return np.abs(numbers[0][0]), known
        combine = np.minimum if name == "min" else np.maximum
        return combine.reduce([v for v, _ in numbers]), known

    return node


def _numeric(column: Column) -> Column:
    values, known = column
    if values.dtype == object:
        return np.full(len(values), np.nan), np.zeros(len(values), np.bool_)
    return values.astype(np.float64), known
