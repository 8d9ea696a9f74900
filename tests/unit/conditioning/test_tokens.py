"""Class labels, layouts, captions: which tokens they become."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.conditioning.base import Source
from trainer.conditioning.build import build_conditioner
from trainer.conditioning.tokenizers import WordPiece, read_vocabulary, split_words
from trainer.conditioning.transformer import Layout, LayoutEncoder, TextTransformer
from trainer.config.models import (
    ClassLabelConfig,
    ConditioningConfig,
    FirstStageConfig,
    LayoutConfig,
    TextTransformerConfig,
)
from trainer.config.run import ConfigError

LAYOUT = LayoutConfig(num_labels=5, max_boxes=3, grid=8, width=16, layers=1, heads=2, head_dim=8)
KEEP = torch.zeros(1, dtype=torch.bool)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##believ", "##able", "cafe", "!", "a"]


def test_corners_are_the_nearest_grid_points() -> None:
    boxes = torch.tensor([[[2.0, 0.0, 0.0, 1.0, 1.0], [4.0, 0.5, 0.25, 0.99, 1.4], [-1.0, 0, 0, 0, 0]]])
    labels, corners = LayoutEncoder(LAYOUT).tokens(boxes, KEEP)
    assert labels.tolist() == [[2, 4, 5]]
    # 0.5 * 7 = 3.5 rounds to 4, 0.25 * 7 = 1.75 to 2; outside is clamped.
    assert corners.tolist() == [[[0, 63], [2 * 8 + 4, 7 * 8 + 7], [64, 64]]]


def test_captions_become_tokens_on_the_cpu_whatever_device_a_model_is_built_on(tmp_path: Path) -> None:
    """Models are built where they train; pinned memory is the host's."""
    file = tmp_path / "vocabulary.txt"
    file.write_text("\n".join(VOCABULARY))
    for settings in ({}, {"vocabulary": str(file), "tokenizer": "wordpiece"}):
        config = TextTransformerConfig(width=16, layers=1, heads=1, head_dim=8, max_tokens=8, **settings)
        with torch.device("meta"):
            condition = TextTransformer(config, FirstStageConfig(), 0)
            assert condition.tokenize(["a café"]).device.type == "cpu", settings
        assert condition.trained.empty.device.type == "meta"


def test_labels_outside_the_table_are_no_boxes() -> None:
    boxes = torch.tensor([[[5.0, 0.1, 0.1, 0.2, 0.2], [99.0, 0.1, 0.1, 0.2, 0.2]]])
    labels, corners = LayoutEncoder(LAYOUT).tokens(boxes, KEEP)
    assert labels.tolist() == [[5, 5]]
    assert (corners == 64).all()


@pytest.mark.parametrize("given", [1, 3, 7])
def test_any_number_of_boxes_becomes_max_boxes(given: int) -> None:
    condition = Layout(LAYOUT, FirstStageConfig(), 0)
    field = torch.arange(given).float().view(1, given, 1).expand(1, given, 5) * 0.1
    source = Source(captions=[""], ordinals=torch.arange(1), seed=0, conditions={"layout": field})
    boxes = condition.prepare(source)["boxes"]
    assert boxes.shape == (1, 3, 5)
    kept = min(given, 3)
    assert torch.equal(boxes[:, :kept], field[:, :kept])
    assert (boxes[:, kept:, 0] == -1).all()


def test_the_layout_sequence_has_the_length_of_the_paper_less_its_two_crop_tokens() -> None:
    with torch.device("meta"):
        positions = LayoutEncoder(LayoutConfig()).transformer.positions
    assert positions.shape == (90, 512)


def test_class_labels_reach_the_unet_as_labels_with_one_more_for_null() -> None:
    config = ConditioningConfig(class_label=ClassLabelConfig(num_classes=10, inject="timestep"))
    conditioner = build_conditioner(config, FirstStageConfig())
    assert (conditioner.num_classes, conditioner.context_dim) == (11, None)
    assert not list(conditioner.trained.parameters())  # the UNet owns the embedding
    inputs = {"class_label.label": torch.tensor([3, 9])}
    out = conditioner.trained(inputs, {"class_label": torch.tensor([False, True])})
    assert out.class_labels is not None
    assert out.class_labels.tolist() == [3, 10]


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY), encoding="utf-8")
    return str(path)


def test_words_are_split_as_bert_does() -> None:
    assert split_words("  Café,unBelievable\t中国!\u200b") == ["cafe", ",", "unbelievable", "中", "国", "!"]


def test_pieces_are_the_longest_matches_and_rows_have_one_length(vocabulary: str) -> None:
    tokenize = WordPiece(read_vocabulary(vocabulary), max_tokens=6)
    rows = tokenize(["Unbelievable!", "unbeliev zebra", "", "a a a a a a a a"])
    assert rows.tolist() == [[2, 4, 5, 6, 8, 3], [2, 4, 5, 1, 3, 0], [2, 3, 0, 0, 0, 0], [2, 9, 9, 9, 9, 3]]


def test_a_vocabulary_without_special_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("a\nb\n[PAD]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"\[CLS\], \[SEP\], \[UNK\]"):
        read_vocabulary(str(path))
    with pytest.raises(ConfigError, match=r"absent\.txt"):
        read_vocabulary(str(tmp_path / "absent.txt"))


def test_wordpiece_needs_its_vocabulary_except_to_count_parameters(vocabulary: str) -> None:
    config = TextTransformerConfig(
        width=8, layers=1, heads=1, head_dim=8, max_tokens=6, tokenizer="wordpiece"
    )
    with pytest.raises(ConfigError, match="vocabulary"):
        TextTransformer(config, FirstStageConfig(), 0)
    with torch.device("meta"):
        assert TextTransformer(config, FirstStageConfig(), 0).trained.embedding.num_embeddings == 30_522
    named = TextTransformerConfig(8, 1, 1, 8, 6, tokenizer="wordpiece", vocabulary=vocabulary)
    assert TextTransformer(named, FirstStageConfig(), 0).trained.embedding.num_embeddings == len(VOCABULARY)


def test_a_dropped_caption_is_the_empty_caption(vocabulary: str) -> None:
    config = TextTransformerConfig(8, 1, 1, 8, 6, tokenizer="wordpiece", vocabulary=vocabulary)
    condition = TextTransformer(config, FirstStageConfig(), 0)
    inputs = condition.prepare(Source(captions=["a", ""], ordinals=torch.arange(2), seed=0))
    kept = condition.trained(inputs, torch.tensor([False, False])).context
    dropped = condition.trained(inputs, torch.tensor([True, False])).context
    assert not torch.allclose(kept[0], kept[1])
    torch.testing.assert_close(dropped[0], kept[1])
