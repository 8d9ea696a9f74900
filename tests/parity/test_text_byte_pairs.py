"""CLIP's tokenizer against open_clip's own, on ordinary and on hostile text."""

from __future__ import annotations

import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.conditioning import tokenizers
from trainer.conditioning.tokenizers import ClipTokenizer

TEXT = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(max_codepoint=0x7F), max_size=60),
    st.text(st.sampled_from("aB'sdt&;lgmp#x3 \t\x1b[m!<>_end of text"), max_size=60),
)


@given(TEXT)
@example("Don't &amp;amp; \u201cquote\u201d caf\u00c3\u00a9 \u00c3\u00a9")
@example("<end_of_text> in <start_of_text> the middle")
@example("two words " * 60)
@example("\x1b[31mred\x1b[0m line\r\nbreak \x00")
@settings(max_examples=300, deadline=None)
def test_ids_equal_open_clip(caption: str) -> None:
    assert torch.equal(ClipTokenizer(77)([caption]), open_clip.tokenize([caption]))


def test_end_padding_repeats_the_end_token() -> None:
    captions = ["a red circle", "!", "", "two words " * 60]
    zero, end = ClipTokenizer(20)(captions), ClipTokenizer(20, "end")(captions)
    stop = open_clip.SimpleTokenizer().eot_token_id
    assert zero.shape == end.shape == (4, 20)
    for plain, padded in zip(zero.tolist(), end.tolist(), strict=True):
        length = plain.index(stop) + 1
        assert padded[:length] == plain[:length]
        assert set(padded[length:]) <= {stop}
        assert set(plain[length:]) <= {0}


def test_the_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "REMEMBERED_WORDS", 50)
    tokenizer = ClipTokenizer(77)
    expected = tokenizer(["a <end_of_text> zebra"])
    for i in range(0, 400, 10):
        tokenizer([" ".join(f"word{chr(97 + j % 26)}{chr(97 + j // 26)}" for j in range(i, i + 10))])
        assert len(tokenizer._words) <= 60
    assert len(tokenizer._encoder.cache) < 100
    assert torch.equal(tokenizer(["a <end_of_text> zebra"]), expected)
