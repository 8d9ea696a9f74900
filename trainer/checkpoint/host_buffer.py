"""Host memory that takes a copy of the state and that a writer process can read."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.processes import unnamed_file

_POPULATE_WRITE = 23  # madvise(2) MADV_POPULATE_WRITE, Linux 5.14


class HostBuffer:
    """Unnamed memory behind a file descriptor, pinned when a GPU copies into it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = num_bytes
        self.descriptor = unnamed_file("ldm-checkpoint")
        os.ftruncate(self.descriptor, max(num_bytes, 1))
        self._memory = mmap.mmap(self.descriptor, max(num_bytes, 1))
        if hasattr(self._memory, "madvise") and sys.platform == "linux":
            # Otherwise the first save would pay for a page fault on every page. Older kernels refuse.
            with contextlib.suppress(OSError):
                self._memory.madvise(_POPULATE_WRITE)
        self._flat = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._pinned = device.type == "cuda" and num_bytes > 0
        if self._pinned:
            torch.cuda.check_error(
                int(torch.cuda.cudart().cudaHostRegister(self._flat.data_ptr(), num_bytes, 0))
            )

    @property
    def view(self) -> memoryview:
        """All bytes."""
        return memoryview(self._memory)[: self.num_bytes]

    @torch.no_grad()
    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Lay the fp32 vectors end to end from the start; returns when the copy is complete."""
        sources = adjoining_views(tensors)
        target = self._flat[: 4 * sum(source.numel() for source in sources)].view(torch.float32)
        offset = 0
        for source in sources:
            target[offset : offset + source.numel()].copy_(source, non_blocking=self._pinned)
            offset += source.numel()
        if self._pinned:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Unpin and close; the memory goes when the last view does."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._flat.data_ptr())
            self._pinned = False
        os.close(self.descriptor)


def adjoining_views(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same elements in the same order as fewer vectors: neighbours in one storage become one.

    ZeRO keeps a rank's share of all parameters in one flat tensor, so hundreds of views become one.
    """
    merged: list[Tensor] = []
    for tensor in tensors:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            and last.dtype == tensor.dtype
            and last.storage_offset() + last.numel() == tensor.storage_offset()
        ):
            merged[-1] = last.as_strided((last.numel() + tensor.numel(),), (1,))
        else:
            assert tensor.dim() == 1
            assert tensor.is_contiguous()
            merged.append(tensor)
    return merged
