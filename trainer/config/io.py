"""YAML and `a.b=c` overrides into frozen dataclasses, strictly, and back."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.storage.urls import local_path, without_secrets
from trainer.config import yaml_values
from trainer.config.checks import check, check_networks
from trainer.config.derived import derive
from trainer.config.ranges import check_names, check_ranges, types_of
from trainer.config.run import Config, ConfigError
from trainer.config.yaml_values import Written, bare, shown, why_a_text


@dataclasses.dataclass(frozen=True)
class _Given:
    """A value somebody wrote, and where."""

    value: Any
    origin: str


_NAMED_KEYS = 6
_Tree = dict[str, "_Tree | _Given"]


def load_config(path: str | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Defaults < YAML file < overrides (`section.key=value`), checked as a whole.

    Raises:
        ConfigError: unknown key, wrong type or impossible combination, naming file and line.
    """
    tree: _Tree = {}
    if path is not None:
        tree = _read_yaml(path)
    _refuse_expanded(overrides)
    for override in overrides:
        _apply_override(tree, override)
    config: Config = _build(Config, tree, "")
    check_ranges(config)
    check_names(config)
    data = tree.get("data")
    config = derive(config, given=data if isinstance(data, dict) else ())
    for first in config.phase_starts:
        check(config.at(first))
    _check_words(config)
    return config


def load_run(path: str, overrides: typing.Sequence[str] = ()) -> Config:
    """`load_config` for what is about to run: the trained networks that it needs are named, too.

    Raises:
        ConfigError: as `load_config`, or a network without weights that is not said to be random.
    """
    config = load_config(path, overrides)
    check_networks(config)
    return config


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `config_to_dict`."""
    config: Config = _build(Config, _tree_of(values, "stored configuration"), "")
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries and lists, as YAML and JSON want them."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return typing.cast(dict[str, Any], plain(config))


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, width=110)


def section_of(hint: Any) -> type | None:
    """The dataclass behind `Section` or `Section | None`."""
    for option in typing.get_args(hint) if _is_union(hint) else (hint,):
        if dataclasses.is_dataclass(option):
            return typing.cast(type, option)
    return None


def _check_words(config: Config) -> None:
    """A key of `resume_changed` that does not exist would allow nothing."""
    known = _all_keys(Config, "")
    for key in config.resume_changed:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "write section.key, or a section."
            raise ConfigError(f"resume_changed names {key!r}, which is no setting; {hint}")


def _read_yaml(path: str) -> _Tree:
    try:
        text = Path(local_path(path)).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        known = sorted(str(p) for p in Path("configs").rglob("*.yaml"))
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"there is no configuration file {path}{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}.") from error
    try:
        node = yaml_values.compose(text)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:1 must be a mapping of keys to values.")
        return _from_mapping(node, path)
    except yaml_values.BadValue as error:
        raise ConfigError(f"{path}:{error.line}: {error}.") from error


def _from_mapping(node: yaml.MappingNode, path: str) -> _Tree:
    tree: _Tree = {}
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            tree[key.value] = _from_mapping(value, path)
        else:
            tree[key.value] = _Given(yaml_values.value_of(value), f"{path}:{key.start_mark.line + 1}")
    return tree


def _tree_of(values: dict[str, Any], origin: str) -> _Tree:
    return {
        key: _tree_of(value, origin) if isinstance(value, dict) else _Given(value, origin)
        for key, value in values.items()
    }


def _refuse_expanded(overrides: typing.Sequence[str]) -> None:
    """Raise ConfigError where a shell has made many words of one, of which the last alone would count."""
    words = [override.partition("=") for override in overrides]
    for (name, _, first), (next_name, _, second) in pairwise(words):
        if name == next_name and first != second and "/" in first and "/" in second:
            raise ConfigError(
                f"{name} is given several times in a row, as {without_secrets(first)} and "
                f"{without_secrets(second)}, and one alone can count; put braces and wildcards in quotes, "
                "so that the shell leaves them alone."
            )


def _apply_override(tree: _Tree, override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"`{override}` is not an override; write section.key=value.")
    *parents, leaf = dotted.split(".")
    for name in parents:
        child = _opened(tree, name)
        if not isinstance(child, dict):
            child = tree[name] = {}
        tree = child
    value = yaml_values.parse_argument(text)
    there = _opened(tree, leaf)
    if isinstance(there, dict) and isinstance(bare(value), dict):
        _merge(there, _tree_of(bare(value), "command line"))
    else:
        tree[leaf] = _Given(value, "command line")


def _opened(tree: _Tree, name: str) -> _Tree | _Given | None:
    """What stands there so far; a section that was given as one value, key by key."""
    there = tree.get(name)
    if isinstance(there, _Given) and isinstance(bare(there.value), dict):
        there = tree[name] = _tree_of(bare(there.value), there.origin)
    return there


def _merge(tree: _Tree, over: _Tree) -> None:
    """`section={key: value}` says something of the keys that it names, and nothing of the others."""
    for key, value in over.items():
        mine = tree.get(key)
        if isinstance(value, dict) and isinstance(mine, dict):
            _merge(mine, value)
        else:
            tree[key] = value


def _build(cls: type, tree: _Tree, prefix: str) -> Any:
    hints = types_of(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    arguments = {}
    for key, given in tree.items():
        if key not in names:
            raise ConfigError(_unknown_key(prefix + key, key, names, _origin(given), prefix))
        arguments[key] = _value(hints[key], given, prefix + key)
    return cls(**arguments)


def _origin(given: _Tree | _Given) -> str:
    while isinstance(given, dict):
        if not given:
            return "configuration"
        given = next(iter(given.values()))
    return given.origin


def _unknown_key(dotted: str, key: str, names: list[str], origin: str, prefix: str) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return f"{origin}: unknown key `{dotted}`; did you mean `{prefix}{near[0]}`?"
    everywhere = {path.rpartition(".")[2]: path for path in reversed(_all_keys(Config, ""))}
    elsewhere = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75)
    if elsewhere:
        return f"{origin}: unknown key `{dotted}`; did you mean `{everywhere[elsewhere[0]]}`?"
    where = f"`{prefix[:-1]}`" if prefix else "the top level"
    return f"{origin}: unknown key `{dotted}`; {where} has {', '.join(names)}."


def _all_keys(cls: type, prefix: str) -> list[str]:
    keys: list[str] = []
    for name, hint in types_of(cls).items():
        section = section_of(hint)
        keys.append(prefix + name)
        if section is not None:
            keys += _all_keys(section, f"{prefix}{name}.")
    return keys


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _value(hint: Any, given: _Tree | _Given, dotted: str) -> Any:
    section = section_of(hint)
    if section is not None:
        if isinstance(given, dict):
            return _build(section, given, f"{dotted}.")
        value = bare(given.value)
        if value is None and _is_union(hint):
            return None
        if value is None:
            return section()
        if isinstance(value, dict):
            return _build(section, _tree_of(value, given.origin), f"{dotted}.")
        raise ConfigError(
            f"{given.origin}: `{dotted}` is a section; give it keys, not a value{why_a_text(value)}."
        )
    if isinstance(given, dict):
        raise ConfigError(f"{_origin(given)}: `{dotted}` is {_words(hint)}, not a section.")
    found, value = _coerce(hint, given.value, given.origin, dotted)
    if not found:
        raise ConfigError(
            f"{given.origin}: `{dotted}` must be {_words(hint)}, not {shown(given.value)}"
            f"{why_a_text(bare(given.value))}{_nearest_choice(hint, bare(given.value))}"
        )
    return value


def _coerce(hint: Any, value: Any, origin: str, dotted: str) -> tuple[bool, Any]:
    """(fits, converted): ints become floats, lists become tuples, and texts are what was written."""
    if _is_union(hint):
        for option in typing.get_args(hint):
            fits, converted = _coerce(option, value, origin, dotted)
            if fits:
                return True, converted
        return False, None
    kind = typing.get_origin(hint)
    if kind is typing.Literal:
        written = value.text if isinstance(value, Written) else value
        value = written if written in typing.get_args(hint) else bare(value)
        # By type, too: 1.0 and true equal 1.
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint)), value
    if hint is str and isinstance(value, Written):
        return value.value is not None, value.text
    value = bare(value)
    if kind is tuple:
        return _coerce_tuple(typing.get_args(hint), value, origin, dotted)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return True, _build(typing.cast(type, hint), _tree_of(value, origin), f"{dotted}.")
        return False, None
    if hint is type(None):
        return value is None, None
    if hint is float and not isinstance(value, bool):
        try:
            return isinstance(value, (int, float, str)), float(value)
        except (TypeError, ValueError):
            return False, None
    return type(value) is hint, value


def _coerce_tuple(item_hints: tuple[Any, ...], value: Any, origin: str, dotted: str) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple)):
        return False, None
    variadic = len(item_hints) == 2 and item_hints[1] is Ellipsis
    hints = [item_hints[0]] * len(value) if variadic else list(item_hints)
    if len(hints) != len(value):
        return False, None
    pairs = [_coerce(h, v, origin, dotted) for h, v in zip(hints, value, strict=True)]
    return all(fits for fits, _ in pairs), tuple(converted for _, converted in pairs)


def _nearest_choice(hint: Any, value: Any) -> str:
    options = [
        str(choice)
        for option in (typing.get_args(hint) if _is_union(hint) else (hint,))
        if typing.get_origin(option) is typing.Literal
        for choice in typing.get_args(option)
    ]
    near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
    if near == [str(value)]:  # a number that was quoted
        return f"; write {value} without quotes."
    return f"; did you mean {near[0]!r}?" if near else "."


def _words(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_words(option) for option in typing.get_args(hint))
    kind = typing.get_origin(hint)
    if kind is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if kind is tuple:
        items = typing.get_args(hint)
        if len(items) == 2 and items[1] is Ellipsis:
            return f"a list, each item {_words(items[0])}"
        return "a list of " + " and ".join(_words(item) for item in items)
    if (section := section_of(hint)) is not None:
        keys = list(types_of(section))
        return f"{{{', '.join(keys[:_NAMED_KEYS])}{', ...' if len(keys) > _NAMED_KEYS else ''}}}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, "null" if hint is type(None) else str(getattr(hint, "__name__", hint)))
