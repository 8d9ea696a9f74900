"""BERT's uncased WordPiece tokenizer over a vocabulary file (Devlin et al. 2018)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.storage.files import read_text
from trainer.config.run import ConfigError

PADDING, START, END, UNKNOWN = "[PAD]", "[CLS]", "[SEP]", "[UNK]"
LONGEST_WORD = 100
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
        tokens = torch.full((len(captions), self.max_tokens), self.vocabulary[PADDING])
        for i, caption in enumerate(captions):
            ids = [self.vocabulary[START], *self.encode(caption)[: self.max_tokens - 2], self.vocabulary[END]]
            tokens[i, : len(ids)] = torch.tensor(ids)
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
