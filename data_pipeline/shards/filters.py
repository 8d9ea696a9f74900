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

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.shards.filter_values import (
    Node,
    arithmetic,
    as_column,
    combined,
    comparison,
    constant,
    default,
    logic,
    missing,
    named,
    negation,
    numeric,
    spelled_number,
    truth,
)

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<text>'[^']*'|\"[^\"]*\")"
    r"|(?P<name>[^\W\d]\w*)|(?P<quoted>`[^`]+`)|(?P<op><=|>=|==|!=|[-<>+*/(),]))"
)
_KEYWORDS = {"and", "or", "not", "in", "true", "false"}
_FUNCTIONS = {"min": 2, "max": 2, "abs": 1, "missing": 1, "default": 2}
_MAX_DEPTH = 50
_WORD = re.compile(r"(?!(?:and|or|not|in|true|false|none|null|nan)$)[^\W\d]\w*", re.IGNORECASE)
_OTHER_SIGNS = {"=": "==", "&": "and", "|": "or", "!": "not"}
"""What other languages write, and this one instead."""


@dataclass(frozen=True)
class Clause:
    """One part of the top-level conjunction."""

    text: str
    """As written; a rejected row is counted under `filter: <text>`."""
    node: Node
    columns: frozenset[str]
    asked: frozenset[tuple[str, str]] = frozenset()
    """(column, "number" or "text"): what the columns' values must be readable as."""


def written(column: str) -> str:
    """A column's name as a filter has it: in backticks, unless it is a word of letters, digits and _."""
    return column if _WORD.fullmatch(column) else f"`{column}`"


class Filter:
    """Rows to keep. Three-valued: a comparison with a missing or NaN value is unknown.

    `and`, `or` and `not` follow Kleene's logic and a row is kept only if the result is true. To keep
    rows whose value is missing say so: `missing(punsafe) or punsafe < 0.1`, `default(punsafe, 0) < 0.1`.
    A value that is there but cannot be read (see filter_values) rejects under a reason of its own.
    """

    def __init__(self, text: str) -> None:
        """Parse. Raises DataError that shows the place of a mistake."""
        self.text = text
        self.clauses = _ExpressionParser(text).clauses() if text.strip() else []
        self._given: Mapping[str, Any] = {}

    @property
    def columns(self) -> frozenset[str]:
        """Columns that are used."""
        return frozenset().union(*(c.columns for c in self.clauses)) if self.clauses else frozenset()

    def part(self, clauses: Sequence[Clause]) -> Filter:
        """Filter of some of the clauses."""
        some = Filter("")
        some.text, some.clauses = self.text, list(clauses)
        return some

    def given(self, values: Mapping[str, Any]) -> Filter:
        """The same for one row: what `values` has is known already, `check` asks its record for the rest."""
        with_values = self.part(self.clauses)
        with_values._given = values
        return with_values

    def reasons(self) -> list[str]:
        """Names of rejections: of each clause, then of each clause for a value that cannot be read."""
        names = [f"filter: {c.text}" for c in self.clauses]
        return names + [f"{name} (unreadable value)" for name in names]

    def first_failing(self, columns: Mapping[str, NDArray[Any]], n: int) -> NDArray[np.int32]:
        """[n] position in `reasons` of the first clause that is not true, -1 where all are.

        `columns` maps every used column to n values; a numeric NaN or a None is missing.
        """
        known = {name: as_column(columns[name]) for name in self.columns}
        result = np.full(n, -1, np.int32)
        with np.errstate(all="ignore"):
            # Backwards, so that the first failing clause is written last.
            for i, clause in reversed(list(enumerate(self.clauses))):
                true, _, unreadable = truth(clause.node.run(known, n))
                result[~true] = i
                result[~true & unreadable] = i + len(self.clauses)
        return result

    def check(self, record: Mapping[str, Any]) -> str | None:
        """Reason one json record is rejected for, or None."""
        columns = {}
        for name in self.columns:
            columns[name] = np.empty(1, dtype=object)
            columns[name][0] = self._given[name] if name in self._given else record.get(name)
        failing = int(self.first_failing(columns, 1)[0])
        return None if failing < 0 else self.reasons()[failing]


class _ExpressionParser:
    """Recursive descent: or < and < not < comparison < sum < product < unary < atom."""

    def __init__(self, text: str) -> None:
        self.source = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while position < len(text.rstrip()):
            match = _TOKEN.match(text, position)
            if match is None or match.lastgroup is None:
                rest = text[position:].lstrip()
                meant = next((word for sign, word in _OTHER_SIGNS.items() if rest.startswith(sign)), None)
                hint = f"; write {meant}" if meant else ""
                raise self._wrong(position, f"this character has no meaning here{hint}")
            kind = match.lastgroup
            self.tokens.append((kind, match.group(kind), match.start(kind)))
            position = match.end()
        self.tokens.append(("end", "", len(text)))
        self.at = 0
        self.depth = 0
        self.used: set[str] = set()
        self.asked: set[tuple[str, str]] = set()

    def clauses(self) -> list[Clause]:
        parts = []
        while True:
            # Where an `or` binds the top level, the whole rest is one clause.
            start, self.used, self.asked = self.tokens[self.at][2], set(), set()
            node = self._number(self._or() if not self._and_follows() else self._not(), start)
            stop = self.tokens[self.at][2]
            text = self.source[start:stop].strip()
            parts.append(Clause(text, node, frozenset(self.used), frozenset(self.asked)))
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
        place, node = self._peek()[2], self._and()
        while self._take("or"):
            node = self._number(node, place)
            place = self._peek()[2]
            node = logic(node, self._number(self._and(), place), any_true=True)
        return node

    def _and(self) -> Node:
        place, node = self._peek()[2], self._not()
        while self._take("and"):
            node = self._number(node, place)
            place = self._peek()[2]
            node = logic(node, self._number(self._not(), place), any_true=False)
        return node

    def _not(self) -> Node:
        if self._take("not"):
            self._deeper()
            place, inner = self._peek()[2], self._not()
            self.depth -= 1
            return negation(self._number(inner, place))
        return self._comparison()

    def _comparison(self) -> Node:
        place, node = self._peek()[2], self._sum()
        if self._take("in"):
            self._expect("(")
            options = [self._sum()]
            while self._take(","):
                options.append(self._sum())
            self._expect(")")
            result = self._compare("==", node, options[0], place)
            for option in options[1:]:
                result = logic(result, self._compare("==", node, option, place), any_true=True)
            return result
        result_node: Node | None = None
        while self._peek()[1] in ("<", "<=", ">", ">=", "==", "!=") and self._peek()[0] == "op":
            symbol = self._next()[1]
            right = self._sum()
            # a < b < c is (a < b) and (b < c), as in Python
            step = self._compare(symbol, node, right, place)
            result_node = step if result_node is None else logic(result_node, step, any_true=False)
            node = right
        return result_node or node

    def _sum(self) -> Node:
        place, node = self._peek()[2], self._product()
        while self._peek()[1] in ("+", "-") and self._peek()[0] == "op":
            node = self._arithmetic(node, place, self._product)
        return node

    def _product(self) -> Node:
        place, node = self._peek()[2], self._unary()
        while self._peek()[1] in ("*", "/") and self._peek()[0] == "op":
            node = self._arithmetic(node, place, self._unary)
        return node

    def _arithmetic(self, left: Node, place: int, operand: Callable[[], Node]) -> Node:
        left, symbol, after = self._number(left, place), self._next()[1], self._peek()[2]
        return arithmetic(symbol, left, self._number(operand(), after))

    def _unary(self) -> Node:
        if self._take("-"):
            self._deeper()
            place, inner = self._peek()[2], self._unary()
            self.depth -= 1
            return arithmetic("-", constant(0.0), self._number(inner, place))
        return self._atom()

    def _atom(self) -> Node:
        kind, text, place = self._next()
        if kind == "number":
            return constant(float(text))
        if kind == "text":
            return constant(text[1:-1])
        if kind == "name" and text.lower() in ("true", "false"):  # Python's and SQL's spellings too
            return constant(float(text.lower() == "true"))
        if kind == "name" and text.lower() in ("none", "null", "nan"):
            raise self._wrong(place, f"{text} equals nothing; write missing(column)")
        if kind == "quoted":
            self.used.add(text[1:-1])
            return named(text[1:-1])
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
            return named(text)
        raise self._wrong(place, "expected a column, a number, a 'text' or (")

    def _call(self, name: str, place: int) -> Node:
        if name not in _FUNCTIONS:
            raise self._wrong(place, f"{name} is not a function; there are {', '.join(_FUNCTIONS)}")
        self._expect("(")
        self._deeper()
        places, arguments = [self._peek()[2]], [self._sum()]
        while self._take(","):
            places.append(self._peek()[2])
            arguments.append(self._sum())
        self.depth -= 1
        self._expect(")")
        least = _FUNCTIONS[name]
        if len(arguments) < least or (name not in ("min", "max") and len(arguments) != least):
            raise self._wrong(place, f"{name} takes {least} value{'s' * (least > 1)}")
        if name == "missing":
            return missing(arguments[0])
        if name == "default":
            if "number" in (arguments[0].kind, arguments[1].kind):
                arguments = [self._number(a, p) for a, p in zip(arguments, places, strict=True)]
            return default(*arguments)
        return combined(name, [self._number(a, p) for a, p in zip(arguments, places, strict=True)])

    def _number(self, node: Node, place: int) -> Node:
        """The node as numbers; a text constant is refused, a column noted as wanted so."""
        if node.kind == "text":
            raise self._wrong(place, f"a number is wanted, '{node.text}' is a text")
        if node.kind == "any":
            self.asked |= {(name, "number") for name in node.names}
        return numeric(node)

    def _compare(self, symbol: str, left: Node, right: Node, place: int) -> Node:
        kinds = {left.kind, right.kind}
        if kinds == {"number", "text"}:
            text = left.text or right.text
            raise self._wrong(place, f"the text '{text}' is compared with a number; write it without quotes")
        if "number" in kinds:
            left, right = self._number(left, place), self._number(right, place)
        elif kinds == {"any", "text"} and spelled_number(left.text or right.text) is None:
            self.asked |= {(name, "text") for name in left.names | right.names}
        return comparison(symbol, left, right)

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
