"""Weights are read by one rank for all: the same bits, the same mistakes, and nobody gives up waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.ranks import run_ranks
from tests.integration.shared_read_ranks import digest
from trainer.config.io import load_config
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.model import build_model
from trainer.weights import write_weights

RANKS = "tests/integration/shared_read_ranks.py"
TINY = [
    "data.image_size=16",
    "first_stage={name: kl, base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 4}",
    "first_stage.latent_scale=0.5",
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2]}",
    "unet={head_dim: 16, num_groups: 4}",
]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Rank 0's folder and that of everybody else, who find nothing there."""
    for name in ("main", "other"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_kind_of_tensor_arrives_bit_for_bit(ranks: int) -> None:
    for got, made, beside, word in run_ranks(f"{RANKS}:values", ranks):
        assert got == made
        assert (beside, word) == ({"step": 7}, "a word")


def test_networks_are_rank_0s_on_every_rank_though_only_it_has_the_files(folders: Path) -> None:
    torch.manual_seed(11)
    file = str(folders / "main/stage.safetensors")
    config = load_config(None, [*TINY, f"first_stage.weights={file}"])
    write_weights(file, *first_stage_tensors(build_first_stage(config.first_stage)))
    made = build_model(config)
    write_weights(str(folders / "main/start.safetensors"), made.network.state_dict(), {})
    expected = {
        "first stage": digest(made.first_stage.state_dict()),
        "network": digest(made.network.state_dict()),
    }
    given = {"path": str(folders), "settings": [*TINY, "first_stage.weights=stage.safetensors"]}
    assert run_ranks(f"{RANKS}:model", 2, given) == [expected] * 2


@pytest.mark.parametrize(
    ("content", "torch_file", "sentence"),
    [
        (None, False, "there is no weights file at weights.safetensors; check the path or URL."),
        (None, True, "there is no weights file at weights.safetensors; check the path or URL."),
        (b"<!doctype html>", False, "weights.safetensors is a web page"),
    ],
)
def test_rank_0s_mistake_is_everybodys(
    folders: Path, content: bytes | None, torch_file: bool, sentence: str
) -> None:
    if content is not None:
        (folders / "main/weights.safetensors").write_bytes(content)
    # What the others have does not count.
    write_weights(str(folders / "other/weights.safetensors"), {"a": torch.zeros(1)}, {})
    told = run_ranks(f"{RANKS}:failure", 2, {"path": str(folders), "torch_file": torch_file})
    assert told[0] == told[1]
    kind, words = told[0]
    assert kind == "ConfigError"
    assert sentence in words


def test_ranks_hear_that_rank_0_is_still_reading() -> None:
    assert min(run_ranks(f"{RANKS}:slow", 3)) >= 2
