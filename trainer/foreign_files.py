"""Weight files that others wrote: what a file is by its first bytes, and what torch files nest.

A download that failed is a file all the same: a web page, a pointer of git-lfs, half of an archive. It is
told by what it begins with, never by its name. Torch files are read without running what they contain.
"""

from __future__ import annotations

import io
import logging
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.errors import in_a_line
from trainer.config.run import ConfigError

logger = logging.getLogger(__name__)

HEAD_BYTES = 512
"""Of a file's beginning, as much as tells what it is."""
MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file; longer ones are another kind of file."""

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that torch.compile, FSDP and activation checkpointing put in."""
_DATA_PARALLEL = "module."
_AVERAGED_MODEL = "n_averaged"
"""What torch's AveragedModel keeps beside `module.*`."""

_WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
"""Where training programs keep the weights, the most common first."""
_AVERAGE = re.compile(r"(^|_)ema(_|$)|average|shadow", re.IGNORECASE)
_DEEPEST = 3
_MAX_NAMED = 8

_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of git-lfs and not the file itself; run `git lfs pull`"),
    (b"/annex/objects/", "a pointer of git-annex and not the file itself; run `git annex get`"),
    (b"<!doctype", "a web page; download the file itself (Hugging Face: `resolve` instead of `blob`)"),
    (b"<html", "a web page; download the file itself (Hugging Face: `resolve` instead of `blob`)"),
    (b"<?xml", "an XML text, most likely a server's error; download the file again"),
    (b"\x1f\x8b", "compressed by gzip; unpack it"),
    (b"GGUF", "a GGUF file, whose weights are quantised; take the safetensors file"),
    (b"\x89HDF", "an HDF5 file (Keras); take the safetensors file"),
    (b"{", "a JSON text; name the weights beside it"),
)


class _InertCallback:
    """Stands for the Lightning class that old checkpoints use as a dictionary key; never instantiated."""


_INERT_NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)


def kind_of(head: bytes, url: str) -> Literal["safetensors", "torch"]:
    """Which of the two kinds a file is, by its first HEAD_BYTES.

    Raises:
        ConfigError: neither; what it is instead, where that is known.
    """
    if 2 <= int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES and head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        return "torch"
    if not head.strip(b"\0 \t\r\n"):
        what = "empty; copy or download it again"
    else:
        start = head.lstrip().lower() if head.lstrip()[:1] in b"<v{" else head
        known = (sentence for mark, sentence in _KINDS if start.startswith(mark))
        what = next(known, f"no weights file (it begins with {head[:40]!r})")
    raise ConfigError(f"{url} is {what}.")


def read_torch(source: str | io.BytesIO, url: str, *, mapped: bool) -> dict[str, Tensor]:
    """The tensors of a torch file, out of whatever dictionaries it nests; nothing in it runs.

    Raises:
        ConfigError: damaged, wants to run code, or holds no dictionary of tensors, or several.
    """
    try:
        with torch.serialization.safe_globals([(_InertCallback, name) for name in _INERT_NAMES]):
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{url} holds more than tensors and was not read, since unpickling it could run code; "
            "convert it to safetensors on a machine that trusts it."
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{url} is no torch file of weights, or cut short ({in_a_line(error)}).") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{url} holds no dictionary of tensors but a {type(content).__name__}.")
    chosen = _chosen(dict(_dictionaries(content)), content, url)
    return {name: _strided(tensor, name, url) for name, tensor in chosen.items()}


def _strided(tensor: Tensor, name: str, url: str) -> Tensor:
    """As safetensors have them: sparse ones written out."""
    if tensor.is_meta or tensor.is_quantized:
        what = "no values (it was saved on the meta device)" if tensor.is_meta else "quantised values"
        raise ConfigError(f"{url} has {what} in {name}; save the weights themselves.")
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Names without what wrappers of a model put before them or in between -> names in the file."""
    names = list(names)
    cleaned = {".".join(part for part in n.split(".") if part not in _WRAPPERS): n for n in names}
    while any(n != _AVERAGED_MODEL for n in cleaned) and all(
        n.startswith(_DATA_PARALLEL) or n == _AVERAGED_MODEL for n in cleaned
    ):
        inner = {n.removeprefix(_DATA_PARALLEL): theirs for n, theirs in cleaned.items()}
        inner.pop(_AVERAGED_MODEL, None)
        names = [n for n in names if n != _AVERAGED_MODEL]
        cleaned = inner
    return cleaned if len(cleaned) == len(names) else {name: name for name in names}


def _dictionaries(
    content: Mapping[Any, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every dictionary that holds tensors by name, with the keys that lead to it."""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    several = any(tensor.dim() for tensor in tensors.values())  # not the step or the scale of a loss alone
    if several and all(isinstance(name, str) for name in content):
        yield path, tensors
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping) and len(path) < _DEEPEST:
            yield from _dictionaries(value, (*path, name))


def _chosen(
    found: Mapping[tuple[str, ...], dict[str, Tensor]], content: Mapping[Any, Any], url: str
) -> dict[str, Tensor]:
    weights = [path for path in found if path and all(part in _WEIGHTS for part in path)]
    weights.sort(key=lambda path: [_WEIGHTS.index(part) for part in path])
    averages = [path for path in found if path and _AVERAGE.search(path[-1])]
    others = [path for path in found if path and path not in averages]
    order = (weights[:1], [()] if () in found else [], others, averages)
    choice = next((paths for paths in order if paths), [])
    if len(choice) != 1:
        if choice:
            raise ConfigError(
                f"{url} holds several dictionaries of tensors, {_named(choice, found)}; save the one that is "
                "meant in a file of its own."
            )
        entries = ", ".join(str(name) for name in list(content)[:_MAX_NAMED]) or "none"
        raise ConfigError(f"{url} holds no dictionary of tensors; its entries are {entries}.")
    left = [path for path in found if path and path != choice[0]]
    if choice[0] in averages or left:
        beside = f"; left: {_named(left, found)}" if left else ", which is an average (EMA)"
        logger.warning("%s: read %s%s", url, _named(choice, found), beside)
    return found[choice[0]]


def _named(paths: Sequence[tuple[str, ...]], found: Mapping[tuple[str, ...], dict[str, Tensor]]) -> str:
    names = [f"{'.'.join(path) or 'the file itself'} ({len(found[path])} tensors)" for path in paths]
    more = [f"{len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else []
    return ", ".join([*names[:_MAX_NAMED], *more])
