"""Host memory that takes a copy of the state and that a writer process can read.

Gigabytes of it: zeroing the pages and pinning them takes seconds, so threads do it piece by piece while the
run is being built, and the first `fill` waits for what is left.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from data_pipeline.processes import unnamed_file

_POPULATE_WRITE = 23  # madvise(2) MADV_POPULATE_WRITE, Linux 5.14
PIECE_BYTES = 512 << 20
"""A thread's portion. Pinning holds the driver's lock, so pieces let the training's own calls in between."""
MAX_THREADS = 4
"""The kernel zeroes 2 to 4 GB/s per thread."""


class HostBuffer:
    """Unnamed memory behind a file descriptor, pinned when a GPU copies into it.

    Made ready by threads of its own; `fill` waits for them and raises what went wrong there.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = num_bytes
        self._device = device
        self.descriptor = unnamed_file("ldm-checkpoint")
        os.ftruncate(self.descriptor, max(num_bytes, 1))
        self._memory = mmap.mmap(self.descriptor, max(num_bytes, 1))
        self._flat = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._pinned: list[int] = []
        self._closing = threading.Event()
        starts = range(0, num_bytes, PIECE_BYTES)
        threads = ThreadPoolExecutor(max(1, min(MAX_THREADS, len(starts))), "checkpoint-memory")
        self._pieces: list[Future[None]] = [threads.submit(self._prepare, start) for start in starts]
        threads.shutdown(wait=False)

    @property
    def view(self) -> memoryview:
        """All bytes."""
        return memoryview(self._memory)[: self.num_bytes]

    def wait(self) -> None:
        """Return when all of it is ready, or raise what went wrong."""
        for piece in self._pieces:
            piece.result()

    @torch.no_grad()
    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Lay the fp32 vectors end to end from the start; returns when the copy is complete."""
        self.wait()
        target = self._flat[: self.num_bytes - self.num_bytes % 4].view(torch.float32)
        offset = 0
        for source in adjoining_views(tensors):
            # One copy may not cross from one pinned piece into the next.
            for start, stop in _within_pieces(offset, offset + source.numel(), PIECE_BYTES // 4):
                part = source[start - offset : stop - offset]
                target[start:stop].copy_(part, non_blocking=bool(self._pinned))
            offset += source.numel()
        if self._pinned:
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Unpin and close; the memory goes when the last view does."""
        self._closing.set()
        for piece in self._pieces:
            piece.exception()  # wait; `fill` has told of it, or nobody needs it
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())
        os.close(self.descriptor)

    def _prepare(self, start: int) -> None:
        """Give one piece its pages, and pin them."""
        if self._closing.is_set():
            return
        size = min(PIECE_BYTES, self.num_bytes - start)
        address = self._flat.data_ptr() + start
        if sys.platform == "linux":
            # Otherwise the first save would pay for a page fault on every page. Older kernels refuse.
            # Through ctypes, for mmap's own madvise keeps every other thread from running.
            _madvise()(address, size, _POPULATE_WRITE)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):  # or this thread would make a context on the first GPU
                torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, size, 0)))
            self._pinned.append(address)


def _madvise() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _within_pieces(start: int, stop: int, piece: int) -> Iterator[tuple[int, int]]:
    """start .. stop cut at the multiples of `piece`."""
    while start < stop:
        end = min(stop, (start // piece + 1) * piece)
        yield start, end
        start = end


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
