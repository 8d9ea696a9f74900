"""Calls of torch.distributed, counted from inside a rank: how often, how many bytes, how many messages."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

IDEAL_BYTES = 2 + 2
"""Of each parameter in a step: its gradient in bf16 to the rank that updates it, and the weight back."""
CALLS = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"),
    *("all_gather_single", "reduce_scatter_single"),  # what torch 2.14 calls these two
    *("all_gather_object", "gather_object", "broadcast_object_list", "barrier", "isend", "recv", "send"),
)


def count_calls(calls: Counter[str]) -> None:
    """From now on, add this process' collectives and messages to `calls`, and to "bytes" what they send."""
    for name in CALLS:
        setattr(dist, name, _counted(getattr(dist, name), name, calls))


def messages(calls: dict[str, int], ranks: int) -> int:
    """Messages one after another that these calls take: a ring of N ranks passes 2 (N - 1) or N - 1 times."""
    tree = max(1, math.ceil(math.log2(ranks)))
    hops = {
        **dict.fromkeys(("all_reduce",), 2 * (ranks - 1)),
        **dict.fromkeys(("all_gather", "all_gather_into_tensor", "all_gather_single"), ranks - 1),
        **dict.fromkeys(("reduce_scatter_tensor", "reduce_scatter_single"), ranks - 1),
        # Each of its two collectives, of the sizes and of the objects.
        **{
            "all_gather_object": 2 * (ranks - 1),
            "gather_object": 2 * (ranks - 1),
            "broadcast_object_list": 2 * tree,
        },
        **{"broadcast": tree, "reduce": tree, "barrier": 2 * tree, "isend": 1, "send": 1, "recv": 0},
    }
    return sum(hops[name] * count for name, count in calls.items() if name != "bytes")


def _counted(function: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    """The function, whose calls and bytes are added to `calls`."""
    signature = inspect.signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        calls["bytes"] += _sent(name, signature.bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    return call


def _sent(name: str, arguments: dict[str, Any]) -> int:
    """Bytes that each rank of a ring sends for a collective of tensors; 0 for what ranks tell each other."""
    whole = {
        **dict.fromkeys(("all_reduce", "reduce", "broadcast"), "tensor"),
        **dict.fromkeys(("all_gather_into_tensor", "all_gather_single"), "output_tensor"),
        **dict.fromkeys(("reduce_scatter_tensor", "reduce_scatter_single"), "input"),
        "all_gather": "tensor_list",
    }
    if name not in whole:
        return 0
    ranks = dist.get_world_size(arguments.get("group"))
    tensors = arguments[whole[name]]
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return (2 if name == "all_reduce" else 1) * size * (ranks - 1) // ranks
