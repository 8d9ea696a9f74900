"""CLIP's byte-pair tokenizer: open_clip's rules and vocabulary, several times faster, bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.conditioning.open_clip_towers import SimpleTokenizer

REMEMBERED_WORDS = 200_000
"""Words whose ids are kept; beyond that all are forgotten. Billions of captions hold endless rare words."""
SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")


class ClipTokenizer:
    """Captions -> int64 [B, max_tokens] on the CPU: start, pieces (cut to fit), end, padding.

    With padding "zero" the ids equal open_clip.tokenize; "end" repeats the end token, as OpenAI's CLIP
    (SD1) was conditioned.
    """

    def __init__(self, max_tokens: int, padding: Literal["zero", "end"] = "zero") -> None:
        self.max_tokens = max_tokens
        self._encoder = _shared_encoder()
        self._padding = self._encoder.eot_token_id if padding == "end" else 0
        self._words: dict[str, list[int]] = {}

    @property
    def vocabulary_size(self) -> int:
        """Entries, start and end token included."""
        return int(self._encoder.vocab_size)

    @property
    def pieces(self) -> dict[str, int]:
        """Every entry of the vocabulary with its id; a word's last piece ends in </w>."""
        return dict(self._encoder.encoder)

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs of pieces that become one, in the order in which they are tried."""
        return sorted(self._encoder.bpe_ranks, key=self._encoder.bpe_ranks.__getitem__)

    def __call__(self, captions: Sequence[str], chunks: int = 1) -> Tensor:
        """Tokenize a batch; with several chunks a caption has as many rows, [B chunks, max_tokens]."""
        start, end = self._encoder.sot_token_id, self._encoder.eot_token_id
        rows, step = [], self.max_tokens - 2
        for caption in captions:
            ids = self.encode(caption)
            for chunk in range(chunks):
                row = [start, *ids[chunk * step : (chunk + 1) * step], end]
                rows.append(row + [self._padding] * (self.max_tokens - len(row)))
        tokens = torch.tensor(rows)
        return tokens.pin_memory() if torch.cuda.is_available() else tokens

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption's pieces, without start and end."""
        if len(self._words) > REMEMBERED_WORDS:
            self._words.clear()
            self._encoder.cache = {token: token for token in SPECIAL_TOKENS}
        ids: list[int] = []
        for word in self._encoder.pat.findall(self._clean(caption)):
            known = self._words.get(word)
            if known is None:
                known = self._words[word] = self._encode_word(word)
            ids += known
        return ids

    def _clean(self, caption: str) -> str:
        if caption.isascii() and caption.isprintable() and "&" not in caption:
            # Nothing in there that open_clip's repair of broken text (half of its time) could change.
            return " ".join(caption.split()).lower()
        cleaned: str = self._encoder.clean_fn(caption)
        return cleaned

    def _encode_word(self, word: str) -> list[int]:
        visible = "".join(self._encoder.byte_encoder[byte] for byte in word.encode("utf-8"))
        return [self._encoder.encoder[piece] for piece in self._encoder.bpe(visible).split(" ")]


@functools.cache
def _shared_encoder() -> SimpleTokenizer:
    # Takes seconds, and only CLIP's vocabulary needs it.
    from trainer.conditioning.open_clip_towers import SimpleTokenizer

    return SimpleTokenizer()
