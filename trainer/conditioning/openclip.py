"""Frozen OpenCLIP text tower as cross-attention context."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trainer.conditioning.base import (
    Condition,
    Conditioning,
    Source,
    TrainedPart,
    freeze,
    replace_dropped,
    upload,
)
from trainer.conditioning.open_clip_towers import TextTransformer, architecture, build_tower
from trainer.conditioning.tokenizers import ClipTokenizer
from trainer.config.checks import require_tower
from trainer.config.models import TOWERS, FirstStageConfig, OpenCLIPConfig

logger = logging.getLogger(__name__)

GRAPH_SHAPES = 4
"""Shapes of which a CUDA graph is captured at most; each holds memory of its own."""
Outputs = dict[str, Tensor]


class OpenCLIP(Condition):
    """Hidden states of the text tower, [B, L, width] (L = 77 unless shrunk); pooled embedding for SDXL."""

    joins_width: ClassVar[bool] = True

    def __init__(self, config: OpenCLIPConfig, first_stage: FirstStageConfig, index: int) -> None:
        self.config = config
        model = architecture(config)
        if torch.get_default_device().type != "meta":  # where parameters are counted alone
            require_tower(TOWERS[index], config)
        self.tower = build_tower(config, model, seed=index)
        self.frozen = freeze(self.tower)
        self.tokenize = ClipTokenizer(self.tower.context_length, config.padding)
        self.trained = DroppedText()
        self.drop_probability = config.drop_probability
        self.context_dim = self.tower.width
        self.vector_dim = _pooled_width(self.tower) if config.pooled else 0
        self._empty: dict[str, Tensor] | None = None
        self._replayed = Replayed(self._forward)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Move the tower, and forget the empty prompt encoded before."""
        super().to(device, dtype)
        self._empty = None
        self._replayed = Replayed(self._forward)

    def text_tokens(self, caption: str) -> tuple[int, int]:
        """See Condition."""
        return len(self.tokenize.encode(caption)), self.tokenize.max_tokens - 2

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Encode each different caption once, and pass the null form along as a view, without memory.

        With source.text_chunks = n the context is n times as long: the n parts of a caption, each encoded for
        itself, one after the other; the pooled embedding is that of the first.
        """
        chunks = source.text_chunks
        distinct = list(dict.fromkeys(source.captions))
        missing = len(source) - len(distinct) if source.device.type == "cuda" else 0
        inputs = self.encode(
            [*distinct, *[""] * missing], chunks
        )  # always the same shape, which replays need
        if len(distinct) < len(source):
            row = {caption: i for i, caption in enumerate(distinct)}
            rows = upload([row[caption] for caption in source.captions], source.device)
            inputs = {name: value[rows] for name, value in inputs.items()}
        for name, value in self.null().items():
            value = value.repeat(1, chunks, 1) if name == "context" and chunks > 1 else value
            inputs[f"null_{name}"] = value.expand(len(source), *value.shape[1:])
        return inputs

    def null(self) -> dict[str, Tensor]:
        """The unconditional form, first axis 1."""
        if self._empty is None:
            empty = self.encode([""])
            if self.config.null == "zeros":
                empty = {name: torch.zeros_like(value) for name, value in empty.items()}
            self._empty = empty
        return self._empty

    @torch.no_grad()
    def encode(self, captions: Sequence[str], chunks: int = 1) -> dict[str, Tensor]:
        """Captions -> {"context": [B, chunks L, D], and with config.pooled "pooled": [B, V]}."""
        device = self.tower.positional_embedding.device
        encoded = self.encode_tokens(self.tokenize(captions, chunks).to(device, non_blocking=True))
        if chunks == 1:
            return encoded
        shaped = {"context": encoded["context"].reshape(len(captions), -1, encoded["context"].shape[2])}
        return shaped | ({"pooled": encoded["pooled"][::chunks]} if "pooled" in encoded else {})

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> dict[str, Tensor]:
        """The same from token ids, int64 [B, L]."""
        return self._replayed(tokens)

    def _forward(self, tokens: Tensor) -> dict[str, Tensor]:
        output = self.tower.forward_intermediates(
            tokens,
            indices=[_context_layer(self.config, self.tower)],
            intermediates_only=not self.config.pooled,
            output_fmt="NLC",
        )
        context = output["text_intermediates"][0]
        if self.config.layer == "last" or self.config.final_norm:
            context = self.tower.ln_final(context)
        if not self.config.pooled:
            return {"context": context}
        return {"context": context, "pooled": output["text_features"]}


def stored_tower(
    config: OpenCLIPConfig, index: int, keep: Literal["read", "blocks", "all"]
) -> dict[str, Tensor]:
    """The tower's weights under open_clip's names, for programs that build one of their own.

    Args:
        index: place among the conditions; it seeds a random tower.
        keep: what the chosen output reads; with it all blocks; or all blocks and the projection.

    Raises:
        ConfigError: nothing says which weights, or they lack what is wanted.
    """
    require_tower(TOWERS[index], config)
    if keep != "read":
        config = dataclasses.replace(config, layer="last", pooled=config.pooled or keep == "all")
    state = build_tower(config, architecture(config), seed=index).state_dict()
    return {name: value for name, value in state.items() if name != "attn_mask"}


class DroppedText(TrainedPart):
    """Frozen text features with dropped rows replaced; nothing to train."""

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        context = replace_dropped(inputs["context"], inputs["null_context"], drop)
        vector = None
        if "pooled" in inputs:
            vector = replace_dropped(inputs["pooled"], inputs["null_pooled"], drop)
        return Conditioning(context=context, vector=vector)


def _context_layer(config: OpenCLIPConfig, tower: TextTransformer) -> int:
    """Index of the block whose output becomes the context."""
    blocks = len(tower.transformer.resblocks)
    # Without pooling the tower was cut behind the penultimate block, so its last one is the right one.
    return blocks - 2 if config.layer == "penultimate" and config.pooled else blocks - 1


def _pooled_width(tower: TextTransformer) -> int:
    projection = tower.text_projection
    if projection is None:
        return int(tower.width)
    return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])


class Replayed:
    """A frozen network replayed as one CUDA graph, where launching kernels takes longer than running them.

    A function of one tensor, without gradients or randomness; captured when a shape comes again.
    """

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
            if x.shape not in self._seen or len(self._captured) == GRAPH_SHAPES or not self._may_capture:
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
