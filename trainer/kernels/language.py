"""Triton, where it can be had: its only importer. Elsewhere every operator takes its plain torch form."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "LAUNCHES",
    "cdiv",
    "channel_block",
    "counted_on_meta",
    "fused",
    "plain",
    "power_of_two",
    "register",
    "tl",
    "triton",
]

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows

    class _NoTriton:
        """Lets modules with kernels in them be imported."""

        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return function or (lambda decorated: decorated)

    triton, tl = _NoTriton(), None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run as Python on the CPU: slow, for tests of their arithmetic."""

OPERATORS = torch.library.Library("ldm", "DEF")
"""Namespace of our operators: torch.compile sees each as one node and does not look inside."""

LAUNCHES: dict[str, Callable[..., Any]] = {}
"""Of these operators, by their full names."""

_RUNS_ON = {"cuda", "cpu"} if INTERPRETED else {"cuda"}
_switched_on = tl is not None


def fused(x: Tensor) -> bool:
    """Whether kernels take this tensor; otherwise the plain torch form, which is also their reference."""
    # Kernels compute in fp32, which float64 did not ask for.
    return _switched_on and x.device.type in _RUNS_ON and x.dtype != torch.float64


@contextmanager
def plain() -> Generator[None]:
    """Inside, nothing is fused: what benchmarks and tests compare with."""
    global _switched_on
    before, _switched_on = _switched_on, False
    try:
        yield
    finally:
        _switched_on = before


@contextmanager
def counted_on_meta() -> Generator[None]:
    """Inside, tensors of the meta device are taken as a GPU's: what kernels would be given can be counted."""
    global _RUNS_ON
    before, _RUNS_ON = _RUNS_ON, {"meta"}
    try:
        yield
    finally:
        _RUNS_ON = before


def use_kernels(wanted: bool) -> None:
    """`distributed.fused_kernels` of this process."""
    global _switched_on
    _switched_on = wanted and tl is not None


def register(schema: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operator `ldm::<schema>` with its launch and its result for tensors without data."""
    name = OPERATORS.define(schema)
    for device in ("CUDA", "CPU"):
        OPERATORS.impl(name, kernel, device)
    torch.library.register_fake(f"ldm::{name}", shapes, lib=OPERATORS)
    LAUNCHES[f"ldm::{name}"] = kernel
    operator: Callable[..., Any] = getattr(torch.ops.ldm, name).default
    return operator


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def channel_block(channels: int, most: int = 128) -> int:
    """Channels per tile: the largest power of two that divides them, or else 64 with a mask."""
    divisor = channels & -channels
    return min(divisor, most) if divisor >= 32 else min(64, power_of_two(channels))
