"""Captions to token ids: CLIP's byte pairs and BERT's WordPiece.

CLIP's are open_clip's rules and vocabulary, several times faster and in bounded memory; BERT's are the
uncased pieces of a vocabulary file (Devlin et al. 2018).
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.storage.files import read_text
from trainer.config.run import ConfigError

if TYPE_CHECKING:
    from trainer.conditioning.open_clip_towers import SimpleTokenizer

REMEMBERED_WORDS = 200_000
"""Words whose ids are kept; beyond that all are forgotten. Billions of captions hold endless rare words."""
SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")
PADDING, START, END, UNKNOWN = "[PAD]", "[CLS]", "[SEP]", "[UNK]"
"""BERT's special tokens."""
LONGEST_WORD = 100
"""Characters; what is longer is unknown to BERT as a whole."""
# Ideographs are words of their own, since these scripts put no spaces between words.
IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


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
        """Tokenize a batch, on the CPU; of several chunks each is a row, [B chunks, max_tokens]."""
        start, end = self._encoder.sot_token_id, self._encoder.eot_token_id
        rows, step = [], self.max_tokens - 2
        for caption in captions:
            ids = self.encode(caption)
            for chunk in range(chunks):
                row = [start, *ids[chunk * step : (chunk + 1) * step], end]
                rows.append(row + [self._padding] * (self.max_tokens - len(row)))
        tokens = torch.tensor(rows, device="cpu")
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


def read_vocabulary(url: str) -> dict[str, int]:
    """Token -> id (its line, from 0) of a vocabulary file with one token per line.

    Raises:
        ConfigError: the file is absent, is not text, or lacks one of the special tokens.
    """
    try:
        tokens = read_text(url).removesuffix("\n").split("\n")
    except DataError as error:
        raise ConfigError(
            f"cannot read the vocabulary {url} ({error}); name bert-base-uncased's vocab.txt or a file "
            "with one token per line."
        ) from error
    vocabulary = {token: i for i, token in enumerate(tokens)}
    absent = [token for token in (PADDING, START, END, UNKNOWN) if token not in vocabulary]
    if absent:
        raise ConfigError(f"the vocabulary {url} lacks the special tokens {', '.join(absent)}.")
    return vocabulary


class WordPiece:
    """Captions -> int64 [B, max_tokens]: start, pieces (cut to fit), end, padding."""

    def __init__(self, vocabulary: dict[str, int], max_tokens: int) -> None:
        self.vocabulary = vocabulary
        self.max_tokens = max_tokens
        self._pieces: dict[str, list[int]] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Tokenize a batch, on the CPU."""
        tokens = torch.full((len(captions), self.max_tokens), self.vocabulary[PADDING], device="cpu")
        for i, caption in enumerate(captions):
            ids = [self.vocabulary[START], *self.encode(caption)[: self.max_tokens - 2], self.vocabulary[END]]
            tokens[i, : len(ids)] = torch.tensor(ids, device="cpu")
        return tokens

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption's pieces, without start and end."""
        return [piece for word in split_words(caption) for piece in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        """Greedy longest match from the left; a word with an unmatched rest is unknown as a whole."""
        if word not in self._pieces:
            pieces: list[int] | None = [] if len(word) <= LONGEST_WORD else None
            start = 0
            while pieces is not None and start < len(word):
                found = next(
                    (
                        (self.vocabulary[piece], end)
                        for end in range(len(word), start, -1)
                        if (piece := ("##" if start else "") + word[start:end]) in self.vocabulary
                    ),
                    None,
                )
                if found is None:
                    pieces = None
                else:
                    pieces.append(found[0])
                    start = found[1]
            if len(self._pieces) > 100_000:  # captions of billions of images hold endless rare words
                self._pieces.clear()
            self._pieces[word] = [self.vocabulary[UNKNOWN]] if pieces is None else pieces
        return self._pieces[word]


def split_words(caption: str) -> list[str]:
    """Lower-case words without accents; each punctuation mark and ideograph is a word of its own."""
    spaced: list[str] = []
    for char in unicodedata.normalize("NFD", _spaced_and_clean(caption).lower()):
        if unicodedata.category(char) == "Mn":
            continue
        spaced.append(f" {char} " if _is_punctuation(char) else char)
    return "".join(spaced).split()


@functools.cache
def _shared_encoder() -> SimpleTokenizer:
    # Takes seconds, and only CLIP's vocabulary needs it.
    from trainer.conditioning.open_clip_towers import SimpleTokenizer

    return SimpleTokenizer()


def _spaced_and_clean(caption: str) -> str:
    cleaned: list[str] = []
    for char in caption:
        code = ord(char)
        if char in "\t\n\r" or unicodedata.category(char) == "Zs":
            cleaned.append(" ")
        elif code in (0, 0xFFFD) or unicodedata.category(char).startswith("C"):
            continue
        elif any(low <= code <= high for low, high in IDEOGRAPHS):
            cleaned.append(f" {char} ")
        else:
            cleaned.append(char)
    return "".join(cleaned)


def _is_punctuation(char: str) -> bool:
    code = ord(char)
    if 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126:
        return True  # ASCII symbols such as $ and ^ count, though Unicode says otherwise
    return unicodedata.category(char).startswith("P")
