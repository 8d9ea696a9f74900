"""The plan of resolution levels, and the sentences for contradictions."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from trainer.config.models import UNetConfig
from trainer.config.network_plan import middle_depth, plan_levels
from trainer.config.run import ConfigError


def test_sd2_heads_follow_the_head_width() -> None:
    levels = plan_levels(UNetConfig())
    assert [level.heads for level in levels] == [5, 10, 20, 20]
    assert [level.channels for level in levels] == [320, 640, 1280, 1280]
    assert [level.attention for level in levels] == [True, True, True, False]
    assert [level.factor for level in levels] == [1, 2, 4, 8]


def test_sdxl_depths() -> None:
    config = UNetConfig(channel_multipliers=(1, 2, 4), attention_factors=(4, 2), transformer_depth=(1, 2, 10))
    assert [level.depth for level in plan_levels(config)] == [1, 2, 10]
    assert middle_depth(config) == 10
    assert middle_depth(replace(config, middle_transformer_depth=3)) == 3


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_heads": 8}, "exactly one"),
        ({"head_dim": None}, "exactly one"),
        ({"num_groups": 48}, "num_groups=48"),
        ({"res_block_groups": 48}, "res_block_groups=48"),
        ({"head_dim": 48}, "head_dim=48"),
        ({"transformer_depth": (1, 2)}, "transformer_depth has 2 entries for 4 levels"),
        ({"cross_attention_only": (True, False, True)}, "cross_attention_only"),
        ({"channel_multipliers": ()}, "channel_multipliers"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        plan_levels(replace(UNetConfig(), **change))


def test_planning_needs_no_torch() -> None:
    code = "import sys, trainer.config.network_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
