"""Strict loading: every mistake is one sentence that names the key, the place and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from trainer.config.io import config_from_dict, config_to_dict, dump_yaml, load_config
from trainer.config.run import Config, ConfigError


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 10\noptimizer:\n  learning_rate: 1e-3\n  warmup_steps: 5\n")
    config = load_config(str(path), ["optimizer.warmup_steps=7"])
    assert config.steps == 10
    assert config.optimizer.learning_rate == 1e-3  # YAML 1.1 reads 1e-3 as a text
    assert config.optimizer.warmup_steps == 7
    assert config.optimizer.eps == Config().optimizer.eps


def test_optional_sections_appear_and_disappear() -> None:
    config = load_config(None, ["conditioning.openclip.width=128"])
    assert config.conditioning.openclip is not None
    assert config.conditioning.openclip.width == 128
    assert load_config(None, ["conditioning.openclip=null"]).conditioning.openclip is None


def test_lists_become_tuples_and_nested_sections() -> None:
    config = load_config(None, ["data.sources=[{shards: a.tar, repeat: 2}, {shards: b.tar}]"])
    assert [s.repeat for s in config.data.sources] == [2, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stepz: 1\n", ["run.yaml:1", "`stepz`", "`steps`"]),
        ("steps: 1\noptimizer:\n  learning_rat: 1\n", ["run.yaml:3", "`optimizer.learning_rate`"]),
        ("learning_rate: 1\n", ["`optimizer.learning_rate`"]),
        ("steps: many\n", ["run.yaml:1", "`steps`", "whole number", "'many'"]),
        ("steps: true\n", ["whole number"]),
        ("steps: 1.5\n", ["whole number"]),
        ("unet:\n  projection: lineer\n", ["run.yaml:2", "'linear'"]),
        ("unet: 3\n", ["`unet` is a section"]),
        ("steps:\n  a: 1\n", ["not a section"]),
        ("steps: 1\nsteps: 2\n", ["run.yaml:2", "twice"]),
        ("unet:\n  channel_multipliers: 3\n", ["list"]),
        ("a: [\n", ["not valid YAML"]),
        ("- 1\n", ["mapping"]),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    for part in expected:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "section.key=value"),
        ("micro_batch_size=7", "multiple"),
        ("unet.num_heads=8", "exactly one"),
        ("unet.model_channels=100", "num_groups"),
        ("unet.transformer_depth=[1,2]", "2 entries for 4 levels"),
        ("data.image_size=100", "multiple"),
        ("unet={model_channels: 96, channel_multipliers: [1, 3], attention_factors: []}", "head_dim=64"),
        ("conditioning.image_size.width=7", "even"),
        ("sampling.steps=2000", "num_timesteps"),
        ("checkpoint.keep_best=-1", "checkpoint.keep_best=-1 must be at least 0 and at most 1000000"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last=0 must be at least 1"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay=nan must be at least 0"),
        ("diffusion.zero_terminal_snr=true", "prediction"),
    ],
)
def test_impossible_combinations(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(None, [override])


def test_fields_of_the_samples_follow_from_the_conditions() -> None:
    config = load_config(None, ["conditioning={depth: {}, layout: {max_boxes: 7}, openclip: {}}"])
    assert config.data.conditions == ("layout", "depth")
    assert config.data.max_layout_boxes == 7
    written = load_config(
        None,
        ["conditioning={layout: {max_boxes: 7}}", "data={conditions: [layout], max_layout_boxes: 7}"],
    )
    assert written.data == load_config(None, ["conditioning={layout: {max_boxes: 7}}"]).data
    first_stage = ["stage=autoencoder", "conditioning.depth={}", "data.max_layout_boxes=3"]
    assert load_config(None, first_stage).data.conditions == ()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["conditioning.class_label={}", "data.conditions=[]"], "class_label"),
        (["conditioning={class_label: {}, depth: {}}", "data.conditions=[class_label]"], "depth"),
        (["data.conditions=[depth]"], "no section conditioning.depth"),
        (["conditioning.layout={}", "data.max_layout_boxes=10"], "max_boxes=30"),
        (["conditioning.layout.max_boxes=10", "data.max_layout_boxes=30"], "max_boxes=10"),
    ],
)
def test_contradicting_fields_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(None, overrides)
    assert "data." in str(caught.value)


def test_missing_file_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    with pytest.raises(ConfigError, match=r"did you mean configs/sd/sd2_base_256\.yaml"):
        load_config("configs/sd2_base_256.yaml")


def test_round_trips() -> None:
    config = load_config(None, ["conditioning.openclip.width=128", "ema.power_stds=[0.05,0.1]"])
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    assert config_from_dict(yaml.safe_load(dump_yaml(config))) == config


def test_accumulation_lists_valid_ranks() -> None:
    config = load_config(None, ["global_batch_size=64", "micro_batch_size=8"])
    assert config.accumulation(2) == 4
    with pytest.raises(ConfigError, match="1, 2, 4, 8"):
        config.accumulation(3)
