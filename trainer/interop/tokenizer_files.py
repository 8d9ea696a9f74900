"""CLIP's tokenizer in the files that transformers reads, made from the vocabulary that open_clip ships."""

from __future__ import annotations

import json
from typing import Any, Literal

from trainer.conditioning.tokenizers import SPECIAL_TOKENS, ClipTokenizer

START, END, PADDING = "<|startoftext|>", "<|endoftext|>", "<|padding|>"
"""Start and end as transformers writes them; padding with 0 has a name of its own, because that id is also
the exclamation mark's: as a special token "!" would be cut out of every text."""


def tokenizer_files(max_tokens: int, padding: Literal["zero", "end"]) -> dict[str, bytes]:
    """Contents by name of a CLIPTokenizer's folder: the ids are those of our ClipTokenizer.

    Except where that repairs text as open_clip does (broken encodings, HTML entities), which transformers
    leaves as it is.
    """
    ours = ClipTokenizer(max_tokens, padding)
    spelled = dict(zip(SPECIAL_TOKENS, (START, END), strict=True))
    vocabulary = {spelled.get(piece, piece): number for piece, number in ours.pieces.items()}
    pad = END
    if padding == "zero":
        vocabulary[PADDING], pad = 0, PADDING
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    settings: dict[str, Any] = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_tokens,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
        **special,
    }
    merges = "".join(f"{first} {second}\n" for first, second in ours.merges)
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False).encode(),
        "merges.txt": f"#version: 0.2\n{merges}".encode(),
        "special_tokens_map.json": json.dumps(special, indent=2).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }
