"""Strict loading: every mistake is one sentence that names the key, the place and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from trainer.config.checks_diffusion import check_guidance, guidance_note
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
        ("distributed.ranks=2049", "2049 ranks cannot share"),
        ("unet.num_heads=8", "exactly one"),
        ("unet.model_channels=100", "num_groups"),
        ("unet.transformer_depth=[1,2]", "2 entries for 4 levels"),
        ("data.image_size=100", "multiple"),
        ("data={buckets: true, bucket_step: 12}", "data.bucket_step=12 must be a multiple"),
        ("unet={model_channels: 96, channel_multipliers: [1, 3], attention_factors: []}", "head_dim=64"),
        ("first_stage.base_channels=130", "not a multiple of 32 groups"),
        ("conditioning.image_size.width=7", "even"),
        ("sampling.steps=2000", "num_timesteps"),
        ("checkpoint.keep_best=-1", "checkpoint.keep_best=-1 must be at least 0 and at most 1000000"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last=0 must be at least 1"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay=nan must be at least 0"),
        ("diffusion.zero_terminal_snr=true", "prediction"),
        ("data.caption_weights=[1, 3]", "one number for each of"),
        ("data.caption_weights=[0]", "data.caption_weights"),
        ("data.shorten_captions=1.5", "data.shorten_captions"),
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


@pytest.mark.parametrize(
    "text",
    [
        "0123",
        "007",
        "12:30",
        "1e-3",
        "1_000",
        "0x1F",
        "2024-01-31",
        "2024-13-45",
        "yes",
        "3.10",
        "=",
        "s3://a/b",
    ],
)
def test_a_text_keeps_its_characters(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {text}\ndata:\n  captions: [txt, {text}]\n")
    config = load_config(str(path))
    assert config.run_dir == text
    assert config.data.captions == ("txt", text)
    assert load_config(None, [f"run_dir={text}"]).run_dir == text
    dumped = tmp_path / "again.yaml"
    dumped.write_text(dump_yaml(config))
    assert load_config(str(dumped)) == config


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/data/*.tar", "/data/*.tar"),
        ("*.tar", "*.tar"),
        ("{00000..00009}.tar", "{00000..00009}.tar"),
        ("{a,b}", "{a,b}"),
        ("a #b", "a #b"),
        ("[x]/y", "[x]/y"),
        ("a: b", "a: b"),
        ("@x", "@x"),
        ("'0123'", "0123"),
        ('"a #b"', "a #b"),
        ("", ""),
    ],
)
def test_an_argument_keeps_what_yaml_would_cut_or_refuse(text: str, kept: str) -> None:
    assert load_config(None, [f"data.shards={text}"]).data.shards == kept


@pytest.mark.parametrize(
    ("text", "number"),
    [("010", 10), ("0o10", 8), ("0x10", 16), ("1_000", 1000), ("+7", 7), ("-3", -3)],
)
def test_whole_numbers_are_those_of_yaml_1_2(tmp_path: Path, text: str, number: int) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"seed: {text}\n")
    assert load_config(str(path)).seed == number
    assert load_config(None, [f"seed={text}"]).seed == number


@pytest.mark.parametrize(("text", "number"), [("1e-3", 0.001), ("1.5E-2", 0.015), (".5", 0.5), ("0", 0.0)])
def test_numbers_are_those_of_yaml_1_2(text: str, number: float) -> None:
    assert load_config(None, [f"optimizer.weight_decay={text}"]).optimizer.weight_decay == number


def test_null_and_booleans_are_as_before() -> None:
    config = load_config(None, ["init_from=null", "distributed.doctor=off", "data.index=~"])
    assert (config.init_from, config.distributed.doctor, config.data.index) == (None, False, None)
    with pytest.raises(ConfigError, match="`run_dir` must be a text, not null"):
        load_config(None, ["run_dir=null"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 12:30\n", "run.yaml:1: `seed` must be a whole number, not '12:30'"),
        ("steps: 5\nseed: !!int abc\n", "run.yaml:2: 'abc' is no int"),
        ("seed: !!float x\n", "run.yaml:1: 'x' is no float"),
        ("run_dir: !!python/object:os.system x\n", "run.yaml:1: the tag .* means nothing here"),
        ("run_dir: !mine x\n", "run.yaml:1: the tag '!mine' means nothing here"),
        ("run_dir: !!binary aGk=\n", "run.yaml:1: the tag"),
        ("data: !!set {a}\n", "run.yaml:1: the tag"),
        ("data: &x {shards: *x}\n", "run.yaml:1: this anchor contains itself"),
        ("data: &x\n  sources: [*x]\n", "this anchor contains itself"),
        ("ema: {power_stds: &x [*x]}\n", "this anchor contains itself"),
        ("steps: 5\n? [a]\n: 3\n", "run.yaml:2: a key must be a text"),
        ("data: {sources: [{shards: a, shards: b}]}\n", "`shards` is given twice"),
        ("run_dir: *unknown\n", "run.yaml:1: not valid YAML"),
        ("seed: " + "1" * 5000 + "\n", "run.yaml:1: .* is no int"),
        (
            "steps: 5\n---\nseed: 1\n",
            "run.yaml:2: not valid YAML: expected a single document in the stream, but",
        ),
        ("run_dir: a\0b\n", "run.yaml:1: not valid YAML"),
        ("run_dir: " + "[" * 3000 + "\n", "run.yaml:1"),
        ("a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(2)), "unknown key `a`"),
    ],
)
def test_yaml_that_cannot_be_meant_is_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["!!int abc", "2024-13-45", "!!python/name:os.system", "[", "&x [*x]", "*y", "{"]
)
def test_arguments_that_cannot_be_meant_are_one_sentence(value: str) -> None:
    with pytest.raises(ConfigError, match="command line: `seed` must be a whole number"):
        load_config(None, [f"seed={value}"])


def test_a_section_on_the_command_line_and_a_key_of_it() -> None:
    config = load_config(None, ["data={shards: 0123, image_size: 64}", "data.workers=3"])
    assert (config.data.shards, config.data.image_size, config.data.workers) == ("0123", 64, 3)


def test_a_section_on_the_command_line_leaves_what_it_does_not_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "optimizer: {learning_rate: 1e-3, warmup_steps: 5}\n"
        "conditioning:\n  openclip: {model: ViT-B-32, width: 16}\n"
    )
    config = load_config(str(path), ["optimizer={warmup_steps: 7}", "conditioning={openclip: {width: 8}}"])
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (1e-3, 7)
    assert config.conditioning.openclip is not None
    assert (config.conditioning.openclip.model, config.conditioning.openclip.width) == ("ViT-B-32", 8)
    twice = load_config(None, ["optimizer={warmup_steps: 7}", "optimizer={eps: 1e-6}"])
    assert (twice.optimizer.warmup_steps, twice.optimizer.eps) == (7, 1e-6)
    assert load_config(str(path), ["conditioning=null"]).conditioning.openclip is None


def test_aliases_of_aliases_do_not_explode(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = ["x0: &x0 [a, a]", *(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 40))]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:16: aliases make this more than 100000 values"):
        load_config(str(path))


@pytest.mark.parametrize("written", ["=", "= ", "=''", "=' '"])
@pytest.mark.parametrize(
    "key",
    ["run_dir", "init_from", "first_stage.weights", "conditioning.openclip.pretrained", "data.index"]
    + ["data.cache_dir", "autoencoder_loss.perceptual_weights"],
)
def test_a_name_from_a_variable_that_is_not_set_is_refused(key: str, written: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} is empty .a variable that is not set"):
        load_config(None, [key + written])
    assert config_from_dict({"logging": {"wandb_entity": ""}}).logging.wandb_entity == "", "older runs go on"


def test_texts_that_may_be_empty_stay_so() -> None:
    config = load_config(None, ["data.filter=", "data.shards=", "sampling.prompts=['']"])
    assert (config.data.filter, config.data.shards, config.sampling.prompts) == ("", "", ("",))


def test_a_choice_has_the_type_of_its_options() -> None:
    """1.0 equals 1, and was handed on as what it is not."""
    assert type(load_config(None, ["distributed.zero_stage=1"]).distributed.zero_stage) is int
    for value in ("1.0", "true"):
        with pytest.raises(ConfigError, match="zero_stage` must be one of 0, 1, 2, 3"):
            load_config(None, [f"distributed.zero_stage={value}"])
    with pytest.raises(ConfigError, match="write 1 without quotes"):
        load_config(None, ["distributed.zero_stage='1'"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["unet.attention_factors=[3]"], r"unet.attention_factors=.* has 3, which no level .* 1, 2, 4, 8"),
        (["unet.attention_factors=[2, 48]"], "has 48, which no level has"),
        (
            ["unet={channel_multipliers: [1, 2], attention_factors: [4]}"],
            "factors that no level .* are 1, 2 ",
        ),
        (
            ["first_stage.attention_factors=[32]"],
            "first_stage.attention_factors=.* factors that no level has",
        ),
    ],
)
def test_attention_where_there_is_no_level_is_refused(settings: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(None, settings)


def test_attention_at_some_levels_or_none() -> None:
    for settings in (["unet.attention_factors=[8, 1]"], ["unet.attention_factors=[]"]):
        load_config(None, [*settings, "first_stage.attention_factors=[8]"])
    load_config(None, ["unet.channel_multipliers=[1, 2]"])  # with the default's factor 4
    load_config(None, ["first_stage={name: identity, attention_factors: [32]}"])  # of no meaning there


@pytest.mark.parametrize("setting", ["data.sources", "first_stage", "sampling.prompts"])
def test_a_list_or_section_that_is_no_yaml_says_where_it_breaks(setting: str) -> None:
    """On a command line it would be a text, where one is wanted."""
    with pytest.raises(ConfigError, match=rf"`{setting}` .*not valid YAML: .*in quotes") as refused:
        load_config(None, [setting + "=[{shards: /a/{0..1}.tar, weight: 0.5}]"])
    assert ("{shards, repeat, weight, " in str(refused.value)) == (setting == "data.sources")


def test_guidance_by_an_untrained_empty_caption_is_said_and_by_any_other_null_refused() -> None:
    """SD 1.1 and MLPerf's models were trained so, and are drawn with guidance."""
    for name in ("configs/mlperf_sd2.yaml", "configs/sd/sd1_256.yaml"):
        config = load_config(str(Path(__file__).parents[3] / name))
        check_guidance(config)
        assert "compares with the empty caption" in guidance_note(config)
    assert guidance_note(load_config(None, ["conditioning.openclip={}"])) == ""
    for section in ("openclip: {drop_probability: 0, null: zeros}", "class_label: {drop_probability: 0}"):
        with pytest.raises(ConfigError, match="drop_probability=0 never trains"):
            check_guidance(load_config(None, [f"conditioning={{{section}}}"]))
