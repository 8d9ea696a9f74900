"""Kernels compiled before anything needs them, and side by side.

Triton compiles a kernel, for the kinds of its arguments, when it is first launched: some seventy times one
after the other in the first step of SD2, half a minute on a machine that has not trained it before. What will
be launched follows from shapes alone:

    meta device       networks run on tensors without data, and operators go to their launches all the same
    a launch          ends with the question for machine code; threads compile it, mostly outside of Python
    cache on disk     where whoever launches it later, in whatever process, finds it
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.kernels.language import LAUNCHES, counted_on_meta, triton


class _Launching(TorchDispatchMode):
    """Our operators go to their launches, instead of to what they say of tensors without data."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return LAUNCHES.get(func._schema.name, func)(*args, **(kwargs or {}))


def compile_launches(work: Callable[[], object], threads: int) -> list[tuple[str, Any]]:
    """Do the `work`, whose tensors are made on the meta device, and compile what it would launch.

    Returns:
        Name and Triton's compiled form of each machine code, for the GPU that Triton's driver names.
    """
    kernels: list[tuple[str, Any]] = []
    launch = triton.JITFunction.run

    def compiled(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, warmup=True, **options)
        kernels.append((self.fn.__name__, kernel))
        return kernel

    triton.JITFunction.run = compiled
    try:
        with (
            ThreadPoolExecutor(threads) as pool,
            triton.AsyncCompileMode(pool),
            torch.device("meta"),
            counted_on_meta(),
            _Launching(),
        ):
            work()
    finally:
        triton.JITFunction.run = launch
    return list({kernel.hash: (name, kernel) for name, kernel in kernels}.values())
