"""What makes a run itself: every setting is compared or free, older configurations mean what they meant."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from trainer.config.identity import changes, check_resume, differences
from trainer.config.io import config_to_dict, load_config
from trainer.config.run import Config, ConfigError

ALL_CONDITIONS = [
    "conditioning={openclip: {}, openclip_second: {}, text_transformer: {}, class_label: {}, layout: {}, "
    "semantic_map: {}, low_resolution: {factor: 8}, masked_image: {}, depth: {}, image_size: {}}"
]
FREE = {
    *("run_dir", "steps", "global_batch_size", "micro_batch_size", "seed", "init_from", "resume_changed"),
    "phases",  # each compared with what was trained, at its steps
    *("optimizer", "ema", "distributed", "checkpoint", "healing", "logging", "sampling", "validation"),
    "unet.activation_checkpointing",
    "diffusion.timesteps",
    *("diffusion.sigma_min", "diffusion.sigma_max"),
    *("first_stage.weights", "first_stage.tile_pixels", "first_stage.encode_chunk"),
    *("first_stage.cache", "first_stage.cache_dtype", "first_stage.cache_bytes"),
    "autoencoder_loss.latent_statistics",
}
"""Sections and settings that may change without a word."""
COMPARED_DATA = {
    *(
        "picture",
        "image_size",
        "crop",
        "allow_enlarging",
        "horizontal_flip",
        "buckets",
        "filter",
        "require_caption",
        "captions",
        "caption_weights",
        "shorten_captions",
        "validation.share",
    ),
}


def settings(config: Config) -> dict[str, Any]:
    """As a checkpoint stores it."""
    values: dict[str, Any] = json.loads(json.dumps(config_to_dict(config)))
    return values


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of all values that are no sections."""
    keys: list[str] = []
    for name, value in values.items():
        keys += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return keys


def section(values: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """The dictionary that holds a key, and the key in it."""
    *parents, leaf = dotted.split(".")
    for name in parents:
        values = values[name]
    return values, leaf


def another(value: Any) -> Any:
    """Something else of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return [another(item) for item in value] if value else [1]
    return f"{value}x"


DIFFUSION = settings(
    load_config(
        None,
        [*ALL_CONDITIONS, "first_stage.name=vq", "diffusion.loss=huber", "data.horizontal_flip=true"],
    )
)
AUTOENCODER = settings(
    load_config(
        None, ["stage=autoencoder", "first_stage.name=vq", "autoencoder_loss.perceptual_weights=vgg16.pth"]
    )
)
FLOW = ["diffusion.process=flow", "diffusion.prediction=velocity", "diffusion.density=logit_normal"]
EDM = ["diffusion.process=edm", "diffusion.prediction=edm", "diffusion.density=log_normal"]
BY_OBJECTIVE = {
    "flow": settings(load_config(None, FLOW)),
    "flow, mode": settings(load_config(None, [*FLOW[:2], "diffusion.density=mode"])),
    "edm": settings(load_config(None, [*EDM, "diffusion.density_mean=-0.4"])),
}
ONLY_IN = {
    **dict.fromkeys(("beta_schedule", "beta_start", "beta_end", "zero_terminal_snr", "min_snr_gamma"), ("",)),
    **dict.fromkeys(("shift", "shift_pixels", "weighting"), ("flow", "flow, mode")),
    **dict.fromkeys(("density_mean", "density_std"), ("flow", "edm")),
    "mode_scale": ("flow, mode",),
    "sigma_data": ("edm",),
    "num_timesteps": ("", "flow", "flow, mode"),
    "huber_delta": ("",),
}
"""Settings of `diffusion` -> the objectives in which they do something; "" is DIFFUSION's."""
AUTOENCODER_IDLE = {
    *("first_stage.latent_scale", "first_stage.input_range", "first_stage.cache_variants"),
    *("data.captions", "data.caption_weights", "data.shorten_captions"),
}
"""Settings that only a second stage has."""


def is_compared(key: str, stage: str) -> bool:
    """The promise of this module, in the words of the test."""
    top, _, rest = key.partition(".")
    if top in ("trainable", "lora"):
        return False  # refused before, without a word that would allow it
    if top == "data":
        return rest in COMPARED_DATA and not (stage == "autoencoder" and key in AUTOENCODER_IDLE)
    if key in FREE or top in FREE:
        return False
    if top == "diffusion" and "" not in ONLY_IN.get(rest, ("",)):
        return False
    if stage == "autoencoder":
        return top in ("first_stage", "autoencoder_loss") and key not in AUTOENCODER_IDLE
    return top != "autoencoder_loss" and key != "first_stage.dropout"


@pytest.mark.parametrize("now", [DIFFUSION, AUTOENCODER], ids=["diffusion", "autoencoder"])
def test_every_setting_is_compared_or_free(now: dict[str, Any]) -> None:
    wrong = []
    for key in leaves(now):
        if key in ("stage", "first_stage.name", "diffusion.loss"):
            continue  # other settings count with them: below
        stored = copy.deepcopy(now)
        holder, leaf = section(stored, key)
        holder[leaf] = another(holder[leaf])
        found = [difference.key for difference in differences(stored, now)]
        if (key in found) != is_compared(key, now["stage"]):
            wrong.append(key)
    assert wrong == []


@pytest.mark.parametrize("objective", BY_OBJECTIVE)
def test_of_an_objective_is_compared_what_it_reads(objective: str) -> None:
    now = BY_OBJECTIVE[objective]
    wrong = []
    for name in now["diffusion"]:
        if name in ("process", "density"):
            continue  # other settings count with them: below
        stored = copy.deepcopy(now)
        stored["diffusion"][name] = another(now["diffusion"][name])
        found = [difference.key for difference in differences(stored, now)]
        expected = objective in ONLY_IN.get(name, (objective,)) and f"diffusion.{name}" not in FREE
        if found != [f"diffusion.{name}"] * expected:
            wrong.append((name, found))
    assert wrong == []


def test_nothing_differs_from_itself() -> None:
    for now in (DIFFUSION, AUTOENCODER, *BY_OBJECTIVE.values(), settings(Config())):
        assert differences(now, now) == ()
        assert differences(json.loads(json.dumps(now)), now) == ()


@pytest.mark.parametrize("now", [DIFFUSION, AUTOENCODER], ids=["diffusion", "autoencoder"])
def test_keys_that_an_older_configuration_lacks_have_their_defaults(now: dict[str, Any]) -> None:
    changed = {
        *("stage", "first_stage.name", "diffusion.loss", "conditioning.low_resolution.factor"),
        "data.horizontal_flip",
    }
    assert not changed - {*leaves(DIFFUSION)}  # these are not the defaults here
    for key in set(leaves(now)) - changed:
        stored = copy.deepcopy(now)
        holder, leaf = section(stored, key)
        del holder[leaf]
        assert differences(stored, now) == (), key
    assert differences({}, settings(Config())) == ()


def test_a_default_that_is_missing_is_compared_like_any_value() -> None:
    now = settings(load_config(None, ["conditioning.openclip={}", "conditioning.openclip.layer=last"]))
    stored = copy.deepcopy(now)
    del stored["conditioning"]["openclip"]["layer"]
    assert [str(found) for found in differences(stored, now)] == [
        "conditioning.openclip.layer was penultimate, is last"
    ]


def test_keys_that_are_unknown_by_now_are_ignored() -> None:
    stored = copy.deepcopy(DIFFUSION)
    stored["unet"]["gone"] = 3
    stored["gone"] = {"a": 1}
    assert differences(stored, DIFFUSION) == ()


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        (
            [],
            ["diffusion.prediction=v", "diffusion.beta_end=0.02"],
            ["diffusion.beta_end was 0.012, is 0.02", "diffusion.prediction was eps, is v"],
        ),
        ([], ["stage=autoencoder", "data.crop=random"], ["stage was diffusion, is autoencoder"]),
        ([], ["conditioning.depth={}"], ["conditioning.depth was null, is there"]),
        (["conditioning.depth={}"], [], ["conditioning.depth was there, is null"]),
        (
            ["conditioning.openclip.pretrained=laion2b_s32b_b79k"],
            ["conditioning.openclip.pretrained=random"],
            ["conditioning.openclip.pretrained was laion2b_s32b_b79k, is random"],
        ),
        ([], ["data.filter=punsafe < 0.1"], ["data.filter was empty, is punsafe < 0.1"]),
        (
            ["stage=autoencoder", "autoencoder_loss.perceptual_weights=random"],
            ["stage=autoencoder", "autoencoder_loss.perceptual_weights=vgg16.pth"],
            ["autoencoder_loss.perceptual_weights was random, is vgg16.pth"],
        ),
        (["diffusion.loss=huber"], ["diffusion.huber_delta=1"], ["diffusion.loss was huber, is l2"]),
        (
            [],
            [*FLOW, "diffusion.shift=3"],
            [
                "diffusion.prediction was eps, is velocity",
                "diffusion.process was discrete, is flow",
                "diffusion.density was uniform, is logit_normal",
            ],
        ),
        (FLOW, FLOW[:2], ["diffusion.density was logit_normal, is uniform"]),
        (FLOW, [*FLOW, "diffusion.shift=3"], ["diffusion.shift was 1.0, is 3.0"]),
        (FLOW, [*FLOW, "diffusion.density_mean=1"], ["diffusion.density_mean was 0.0, is 1.0"]),
        (EDM, [*EDM, "diffusion.density_std=1"], ["diffusion.density_std was 1.2, is 1.0"]),
        ([], ["data.buckets=true", "data.bucket_step=32"], ["data.buckets was false, is true"]),
        (
            ["data.buckets=true"],
            ["data.buckets=true", "data.bucket_step=32"],
            ["data.bucket_step was 64, is 32"],
        ),
        (
            ["unet.transformer_depth=[1, 1, 1, 10]"],
            [],
            [
                "unet.transformer_depth was [1, 1, 1, 10], is [1, 1, 1, 1]",
                "unet.middle_transformer_depth was 10, is 1",
            ],
        ),
        (
            ["first_stage.latent_scale=0.18215", "first_stage.weights=a.safetensors"],
            ["first_stage.latent_scale=0.18215", "first_stage.weights=b.safetensors"],
            ["first_stage.weights was a.safetensors, is b.safetensors"],
        ),
        (
            ["data.picture=[original.jpg]"],
            ["data.picture=[jpg]"],
            ["data.picture was [original.jpg], is [jpg]"],
        ),
    ],
)
def test_differences_are_named(was: list[str], now: list[str], expected: list[str]) -> None:
    stored, present = settings(load_config(None, was)), settings(load_config(None, now))
    assert [str(found) for found in differences(stored, present)] == expected


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (["unet.transformer_depth=[1]"], ["unet.transformer_depth=[1, 1, 1, 1]"]),
        ([], ["unet.middle_transformer_depth=1", "unet.res_block_groups=32"]),
        ([], ["unet.cross_attention_only=[false, false, false, false]"]),
        ([], ["first_stage.num_groups=32"]),
        ([], ["first_stage.codebook_size=7"]),
        (["first_stage.name=identity"], ["first_stage={name: identity, base_channels: 7}"]),
        ([], ["diffusion.huber_delta=1"]),
        ([], ["diffusion.mode_scale=1", "diffusion.sigma_data=0.5"]),
        (FLOW, [*FLOW, "diffusion.density_mean=0", "diffusion.density_std=1", "diffusion.beta_end=0.1"]),
        (EDM, [*EDM, "diffusion.density_std=1.2", "diffusion.sigma_max=100", "diffusion.num_timesteps=500"]),
        ([], ["data.bucket_step=32"]),
        (["data.filter=punsafe < 0.1"], ["data.filter= punsafe < 0.1 "]),
        ([], ["data.removal_lists=[optout.txt]", "data.shards=/elsewhere/*.tar"]),
        (["stage=autoencoder"], ["stage=autoencoder", "diffusion.beta_end=0.02", "unet.dropout=0.1"]),
        (["first_stage.weights=a.safetensors"], ["first_stage.weights=b.safetensors"]),
        (["diffusion.min_snr_gamma=5"], ["diffusion.min_snr_gamma=5.0"]),
        (
            ["conditioning.openclip={}"],
            ["conditioning.openclip.pretrained=random"],
        ),  # as it was before the word
        (["stage=autoencoder"], ["stage=autoencoder", "autoencoder_loss.perceptual_weights=random"]),
        (["stage=autoencoder"], ["stage=autoencoder", "autoencoder_loss.perceptual_weights=vgg16.pth"]),
    ],
)
def test_other_words_for_the_same_are_equal(was: list[str], now: list[str]) -> None:
    assert differences(settings(load_config(None, was)), settings(load_config(None, now))) == ()


def test_derived_settings_follow_and_are_not_compared() -> None:
    now = settings(load_config(None, ["conditioning.layout.max_boxes=10"]))
    stored = copy.deepcopy(now)
    stored["data"] |= {"conditions": [], "max_layout_boxes": 30}
    assert differences(stored, now) == ()


CHANGES = ["diffusion.prediction=v", "diffusion.beta_end=0.02", "run_dir=runs/mine"]


def test_the_refusal_is_one_sentence_with_every_difference_and_the_word_for_it() -> None:
    with pytest.raises(ConfigError) as caught:
        check_resume(settings(Config()), load_config(None, CHANGES), "runs/mine/checkpoints/step_000000004")
    assert str(caught.value) == (
        "the checkpoint runs/mine/checkpoints/step_000000004 was trained with other settings: "
        "diffusion.beta_end was 0.012, is 0.02; diffusion.prediction was eps, is v; set them back, name "
        "another run_dir (init_from=runs/mine starts it from these weights), or go on with the change by "
        "'resume_changed=[diffusion.beta_end,diffusion.prediction]'."
    )


@pytest.mark.parametrize("word", ["[diffusion.beta_end,diffusion.prediction]", "[diffusion]"])
def test_the_word_lets_what_it_names_change(word: str) -> None:
    config = load_config(None, [*CHANGES, f"resume_changed={word}"])
    found = check_resume(settings(Config()), config, "x")
    assert [difference.key for difference in found] == ["diffusion.beta_end", "diffusion.prediction"]


def test_the_word_lets_nothing_else_change() -> None:
    config = load_config(None, [*CHANGES, "resume_changed=[diffusion.beta_end, unet]"])
    with pytest.raises(ConfigError, match=r"settings: diffusion\.prediction was eps, is v; set") as caught:
        check_resume(settings(Config()), config, "x")
    assert "'resume_changed=[diffusion.beta_end,unet,diffusion.prediction]'" in str(caught.value)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("diffusion.predicton", "did you mean diffusion.prediction"),
        ("qqq", "write section.key, or a section"),
    ],
)
def test_a_word_that_is_no_setting_is_refused(word: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"resume_changed names '{word}', which is no setting; {hint}"):
        load_config(None, [f"resume_changed=[{word}]"])


def test_what_a_source_has_of_its_own_is_compared_and_one_that_joins_is_not() -> None:
    first = "{shards: a.tar, weight: 0.7, filter: score > 1}"
    stored = settings(load_config(None, [f"data.sources=[{first}]"]))
    joined = load_config(None, [f"data.sources=[{first}, {{shards: b.tar, weight: 0.3, crop: random}}]"])
    assert differences(stored, settings(joined)) == ()
    other = ["data.sources=[{shards: z.tar, weight: 0.6, filter: score > 1}]"]
    with pytest.raises(
        ConfigError, match=r"data.sources.0.weight was 0.7, is 0.6;.*resume_changed=\[data.sources\]"
    ):
        check_resume(stored, load_config(None, other), "run/1")
    allowed = load_config(None, [*other, "resume_changed=[data.sources]"])
    assert [found.key for found in check_resume(stored, allowed, "run/1")] == ["data.sources.0.weight"]
    older = copy.deepcopy(stored)
    older["data"]["sources"] = [{"shards": "a.tar", "repeat": 2}]  # before sources had anything of their own
    assert (
        differences(older, settings(load_config(None, ["data.sources=[{shards: a.tar, repeat: 2}]"]))) == ()
    )


def test_every_change_is_told_in_words_of_older_configurations_too() -> None:
    """A setting that came since has its default, one that went says nothing; mixtures have numbers."""
    sources = "[{shards: a.tar, weight: 1}, {shards: b.tar, weight: 2}]"
    then = config_to_dict(load_config(None, [f"data.sources={sources}", "lora={rank: 4}", "init_from=x"]))
    del then["validation"], then["data"]["lanes"]
    then["gone_since"] = 1
    more = sources.replace("weight: 2", "weight: 3, crop: random").replace(
        "]", ", {shards: c.tar, weight: 1}]"
    )
    now = config_to_dict(load_config(None, [f"data.sources={more}", "optimizer.learning_rate=3e-5"]))
    found = {each.key: (each.was, each.now) for each in changes(then, now)}
    assert found.pop("data.sources.2.shards") == (None, "c.tar")
    lora = {key: found.pop(key) for key in list(found) if key.startswith("lora")}
    assert (lora["lora"], lora["lora.rank"]) == ((None, "null"), ("4", None))
    assert {key: value for key, value in found.items() if not key.startswith("data.sources.2.")} == {
        "init_from": ("x", "null"),
        "data.sources.1.weight": ("2.0", "3.0"),
        "data.sources.1.crop": ("null", "random"),
        "optimizer.learning_rate": ("0.0001", "3e-05"),
    }
    assert changes(now, now) == ()


def test_a_recorded_change_stays_small() -> None:
    names = [f"unet.block_{i}.*" for i in range(400)]
    then = config_to_dict(load_config(None, ["init_from=x", f"trainable={json.dumps(names)}"]))
    now = config_to_dict(
        load_config(None, ["init_from=x", f"trainable={json.dumps([*names, 'unet.last.*'])}"])
    )
    (found,) = changes(then, now)
    assert found.key == "trainable"
    assert max(len(found.was), len(found.now)) < 340
    assert found.was.endswith("characters)")
    assert found.was != found.now, "their lengths tell them apart"
