"""A frozen network replayed as one CUDA graph, where launching kernels takes longer than running them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SHAPES = 4
"""Shapes that are captured at most; each holds memory of its own."""
Outputs = dict[str, Tensor]


class Replayed:
    """A function of one tensor, without gradients or randomness; captured when a shape comes again."""

    def __init__(self, function: Callable[[Tensor], Outputs]) -> None:
        self._function = function
        self._seen: set[torch.Size] = set()
        self._may_capture = True
        self._captured: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Outputs]] = {}

    def __call__(self, x: Tensor) -> Outputs:
        """As the function's own, results in memory of their own."""
        if not x.is_cuda or torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
            return self._function(x)
        if x.shape not in self._captured:
            if x.shape not in self._seen or len(self._captured) == SHAPES or not self._may_capture:
                self._seen.add(x.shape)
                return self._function(x)
            before = torch.cuda.current_stream()
            try:
                self._captured[x.shape] = self._capture(x)
            except RuntimeError as error:  # slower, and no reason to end a run
                torch.cuda.set_stream(before)
                self._may_capture = False
                logger.warning("a frozen network runs without its CUDA graph: %s", error)
                return self._function(x)
        graph, static, outputs = self._captured[x.shape]
        static.copy_(x)
        graph.replay()
        return {name: value.clone() for name, value in outputs.items()}

    def _capture(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Outputs]:
        static, graph = x.clone(), torch.cuda.CUDAGraph()
        # Capture must not meet first-call work such as workspaces of matrix products, on its stream.
        with torch.cuda.stream(side := torch.cuda.Stream()):
            side.wait_stream(torch.cuda.default_stream(x.device))
            self._function(static)
        torch.cuda.current_stream().wait_stream(side)
        # Other threads (pinned memory for checkpoints and batches) may go on calling CUDA.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self._function(static)
        return graph, static, outputs
