"""Captions and boxes as tokens of a transformer that is trained jointly with the UNet (LDM section 4.3.1).

The transformer is the paper's tau (table 17): bidirectional, normalised before each part. It reads the tokens
of a caption, or three tokens per box.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.conditioning.base import Condition, Conditioning, LabelCheck, Source, TrainedPart
from trainer.conditioning.tokenizers import ClipTokenizer, WordPiece, read_vocabulary
from trainer.config.models import FirstStageConfig, LayoutConfig, TextTransformerConfig
from trainer.config.run import ConfigError

BERT_VOCABULARY_SIZE = 30_522
"""Tokens of bert-base-uncased, which the paper's text model uses."""
EMPTY = -1
"""Label of a row that holds no box."""


class SelfAttention(nn.Module):
    """Multi-head self-attention whose inner width, heads * head_dim, may differ from the token width."""

    def __init__(self, width: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        inner = heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        query, key, value = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, head_dim]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Self-attention, then a feed-forward part four times as wide, each on normalised input."""

    def __init__(self, width: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, head_dim, dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class TokenTransformer(nn.Module):
    """Embedded tokens plus learned absolute positions -> context.

    Every position attends to every other one, padding included, as in the paper's text model: the
    padding is the same in all captions, so it carries no information but position.
    """

    def __init__(
        self,
        max_tokens: int,
        width: int,
        layers: int,
        heads: int,
        head_dim: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(max_tokens, width))
        self.blocks = nn.ModuleList([Block(width, heads, head_dim, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, embedded: Tensor) -> Tensor:
        """Token embeddings [B, L, D], L <= max_tokens -> [B, L, D]."""
        x = embedded + self.positions[: embedded.shape[1]]
        for block in self.blocks:
            x = block(x)
        normalised: Tensor = self.norm(x)
        return normalised


def token_embedding(size: int, width: int) -> nn.Embedding:
    """An embedding table as small at the start as the positions that are added to it."""
    embedding = nn.Embedding(size, width)
    nn.init.normal_(embedding.weight, std=0.02)
    return embedding


class TextTransformer(Condition):
    """The null form is the empty caption, replaced as tokens so that the transformer learns it."""

    def __init__(self, config: TextTransformerConfig, first_stage: FirstStageConfig, index: int) -> None:
        self.tokenize, size = _tokenizer(config)
        empty = None if self.tokenize is None else self.tokenize([""])[0]
        self.trained = TextEncoder(config, size, empty)
        self.drop_probability = config.drop_probability
        self.context_dim = config.width

    def text_tokens(self, caption: str) -> tuple[int, int]:
        """See Condition."""
        if self.tokenize is None:
            return 0, 0
        return len(self.tokenize.encode(caption)), self.tokenize.max_tokens - 2

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Captions -> token ids."""
        assert self.tokenize is not None, "built on the meta device, to count parameters only"
        tokens = self.tokenize(source.captions)
        return {"tokens": tokens.to(source.device, non_blocking=True)}


class TextEncoder(TrainedPart):
    """Token ids [B, L] -> context [B, L, D]."""

    empty: Tensor

    def __init__(self, config: TextTransformerConfig, vocabulary_size: int, empty: Tensor | None) -> None:
        super().__init__()
        self.embedding = token_embedding(vocabulary_size, config.width)
        self.transformer = TokenTransformer(
            config.max_tokens, config.width, config.layers, config.heads, config.head_dim
        )
        tokens = torch.zeros(config.max_tokens, dtype=torch.int64)  # where the model is built
        self.register_buffer("empty", tokens if empty is None else tokens.copy_(empty), persistent=False)

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        tokens = torch.where(drop.unsqueeze(1), self.empty, inputs["tokens"])
        return Conditioning(context=self.transformer(self.embedding(tokens)))


class Layout(Condition):
    """Each box is three tokens: label, top-left corner, bottom-right corner. Null form: no box at all."""

    def __init__(self, config: LayoutConfig, first_stage: FirstStageConfig, index: int) -> None:
        self.max_boxes = config.max_boxes
        self.check = LabelCheck("layout", "conditioning.layout.num_labels", config.num_labels)
        self.trained = LayoutEncoder(config)
        self.drop_probability = config.drop_probability
        self.context_dim = config.width

    def prepare(self, source: Source) -> dict[str, Tensor]:
        """Field layout: float [B, N, 5], rows (label, x0, y0, x1, y1), corners in [0, 1], label -1: empty.

        More than max_boxes rows are cut (the loader lists large boxes first), fewer are filled up.
        """
        boxes = source.require("layout").float()[:, : self.max_boxes]
        self.check(boxes[..., 0], none=EMPTY)
        return {"boxes": F.pad(boxes, (0, 0, 0, self.max_boxes - boxes.shape[1]), value=float(EMPTY))}


class LayoutEncoder(TrainedPart):
    """Boxes [B, N, 5] -> context [B, 3 N, D]."""

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__()
        self.num_labels = config.num_labels
        self.grid = config.grid
        # One more entry each stands for "no box".
        self.labels = token_embedding(config.num_labels + 1, config.width)
        self.corners = token_embedding(config.grid**2 + 1, config.width)
        self.transformer = TokenTransformer(
            3 * config.max_boxes, config.width, config.layers, config.heads, config.head_dim, config.dropout
        )

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        labels, corners = self.tokens(inputs["boxes"], drop)
        embedded = torch.cat([self.labels(labels).unsqueeze(2), self.corners(corners)], dim=2)  # [B, N, 3, D]
        return Conditioning(context=self.transformer(embedded.flatten(1, 2)))

    def tokens(self, boxes: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
        """Label ids [B, N] and corner ids [B, N, 2] (row * grid + column of the nearest grid point)."""
        labels = boxes[..., 0].round().to(torch.int64)
        points = (boxes[..., 1:].clamp(0, 1) * (self.grid - 1)).round().to(torch.int64)  # [B, N, 4]
        columns, rows = points[..., 0::2], points[..., 1::2]
        absent = (labels < 0) | (labels >= self.num_labels) | drop.unsqueeze(1)
        corners = (rows * self.grid + columns).masked_fill(absent.unsqueeze(2), self.grid**2)
        return labels.masked_fill(absent, self.num_labels), corners


def _tokenizer(
    config: TextTransformerConfig,
) -> tuple[ClipTokenizer | WordPiece | None, int]:
    """The tokenizer and its vocabulary's size; no tokenizer where only parameters are counted.

    Raises:
        ConfigError: WordPiece without a vocabulary file.
    """
    if config.tokenizer == "clip":
        tokenizer = ClipTokenizer(config.max_tokens)
        return tokenizer, tokenizer.vocabulary_size
    if config.vocabulary is not None:
        vocabulary = read_vocabulary(config.vocabulary)
        return WordPiece(vocabulary, config.max_tokens), len(vocabulary)
    if torch.get_default_device().type == "meta":
        return None, BERT_VOCABULARY_SIZE
    raise ConfigError(
        "conditioning.text_transformer.tokenizer=wordpiece needs a vocabulary file; set "
        "conditioning.text_transformer.vocabulary to bert-base-uncased's vocab.txt, or tokenizer=clip."
    )
