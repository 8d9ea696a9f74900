"""Text transformer trained jointly with the UNet (the paper's tau, LDM section 4.3.1, table 17)."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.conditioning.base import Condition, Conditioning, Source, TrainedPart
from trainer.conditioning.tokenizers import ClipTokenizer, WordPiece, read_vocabulary
from trainer.conditioning.transformer import TokenTransformer, token_embedding
from trainer.config.models import FirstStageConfig, TextTransformerConfig
from trainer.config.run import ConfigError

BERT_VOCABULARY_SIZE = 30_522
"""Tokens of bert-base-uncased, which the paper's text model uses."""


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
        tokens = torch.zeros(config.max_tokens, dtype=torch.int64) if empty is None else empty
        self.register_buffer("empty", tokens, persistent=False)

    def forward(self, inputs: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """See TrainedPart."""
        tokens = torch.where(drop.unsqueeze(1), self.empty, inputs["tokens"])
        return Conditioning(context=self.transformer(self.embedding(tokens)))


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
