"""Values of YAML that remember how they were written, with the numbers of YAML 1.2.

PyYAML follows YAML 1.1, where 010 is 8, 12:30 is 750, 2024-01-01 a date and 1e-3 a text. Here a number is
what it looks like, a date is a text, and whoever wants a text gets the characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

_KNOWN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
_QUOTED = ("'", '"')
_MOST_VALUES = 100_000


@dataclass(frozen=True)
class Written:
    """A value, and the characters that stand for it."""

    value: Any
    text: str


class BadValue(ValueError):
    """A value that cannot be one of a configuration; `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _SettingsLoader(yaml.SafeLoader):
    """Resolves plain scalars by YAML 1.2, but keeps yes, no, on and off, and underscores in numbers."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's way


for _tag, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _SettingsLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 0 if text.startswith(("0x", "0o")) else 10)


def _real(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_SettingsLoader.add_constructor("tag:yaml.org,2002:int", _integer)
_SettingsLoader.add_constructor("tag:yaml.org,2002:float", _real)


def compose(text: str) -> yaml.Node | None:
    """The nodes of a document, checked; None when it is empty.

    Raises:
        BadValue: not YAML, a tag that we do not know, a key twice, or anchors that go round in circles or
            grow beyond all bounds.
    """
    try:
        node = yaml.compose(text, Loader=_SettingsLoader)
        if node is not None:
            _check(node, (), {})
    except yaml.YAMLError as error:
        raise _invalid(error) from error
    except RecursionError as error:
        raise BadValue("nested too deeply", 1) from error
    return node


def value_of(node: yaml.Node) -> Any:
    """Lists and dictionaries of texts and, for all that is not a text, `Written`.

    Raises:
        BadValue: a value that is not what its tag says.
    """
    if isinstance(node, yaml.SequenceNode):
        return [value_of(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key.value: value_of(value) for key, value in node.value}
    assert isinstance(node, yaml.ScalarNode)
    value = _scalar(node)
    return value if isinstance(value, str) else Written(value, node.value)


def parse_argument(text: str) -> Any:
    """The value of `key=text` on a command line.

    A text field takes all characters as they are, unless they are quoted as a whole, also those that YAML
    would not read (`*.tar`, `{00000..00009}.tar`), or would cut (`a #b`); so these are no mistake here.
    """
    try:
        node = compose(text)
        if node is None:
            return text.strip()
        value = value_of(node)
    except BadValue:
        return text.strip()
    if isinstance(node, yaml.ScalarNode) and node.style in _QUOTED:
        return value
    return Written(value.value if isinstance(value, Written) else value, text.strip())


def why_a_text(value: Any) -> str:
    """Why an argument that begins like a list or a mapping was read as a text, to go behind a sentence."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        try:
            node = compose(value)
            assert node is not None
            value_of(node)
        except BadValue as error:
            return f" ({error}; put texts with braces, wildcards, colons or # in quotes)"
    return ""


def bare(value: Any) -> Any:
    """The value without the memory of how it was written, at its top."""
    return value.value if isinstance(value, Written) else value


def shown(value: Any, depth: int = 3) -> str:
    """A value as a sentence shows it."""
    if isinstance(value, Written):
        return repr(value.text) if isinstance(value.value, str) else value.text
    if isinstance(value, (list, tuple)):
        items = [shown(item, depth - 1) if depth else "..." for item in value[:8]]
        return f"[{', '.join(items)}{', ...' if len(value) > 8 else ''}]"
    if isinstance(value, dict):
        return "{...}"
    return repr(value)


def _invalid(error: yaml.YAMLError) -> BadValue:
    line, what = 1, " ".join(str(error).split())
    if isinstance(error, yaml.MarkedYAMLError):
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        what = ", ".join(filter(None, [error.context, error.problem]))
    return BadValue(f"not valid YAML: {what}", line)


def _check(node: yaml.Node, within: tuple[yaml.Node, ...], sizes: dict[int, int]) -> int:
    """How many values the node stands for, aliases written out; `sizes` remembers those of other nodes."""
    line = node.start_mark.line + 1
    if any(node is outer for outer in within):
        raise BadValue("this anchor contains itself", line)
    if id(node) in sizes:
        return sizes[id(node)]
    if node.tag not in _KNOWN_TAGS:
        raise BadValue(f"the tag {node.tag!r} means nothing here", line)
    size = 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        size += sum(_check(value, (*within, node), sizes) for _, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(item, (*within, node), sizes) for item in node.value)
    if size > _MOST_VALUES:
        raise BadValue(f"aliases make this more than {_MOST_VALUES} values", line)
    sizes[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    known = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise BadValue("a key must be a text", line)
        if key.value in known:
            raise BadValue(f"`{key.value}` is given twice", line)
        known.add(key.value)


def _scalar(node: yaml.ScalarNode) -> Any:
    loader = _SettingsLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, KeyError, OverflowError) as error:
        kind = node.tag.rpartition(":")[2]
        raise BadValue(f"{node.value[:80]!r} is no {kind}", node.start_mark.line + 1) from error
    finally:
        loader.dispose()
