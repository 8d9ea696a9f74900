"""`ldm import` and `ldm export` end to end: files and folders written, read back, and read by diffusers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from torch import Tensor

from trainer.conditioning.openclip import OpenCLIP
from trainer.config.io import config_from_dict, load_config
from trainer.config.models import ConditioningConfig, FirstStageConfig, OpenCLIPConfig, UNetConfig
from trainer.config.run import Config, ConfigError
from trainer.config.training import DiffusionConfig
from trainer.first_stage.build import build_first_stage, load_first_stage
from trainer.interop.convert import import_weights
from trainer.interop.diffusers import read_json, write_json
from trainer.interop.export import export_weights
from trainer.interop.unet_names import UNetSizes
from trainer.weights import read_weights, write_weights

FIRST_STAGE = FirstStageConfig(
    base_channels=8, channel_multipliers=(1, 2), num_groups=4, latent_scale=0.18215
)
TOWER = OpenCLIPConfig(model="ViT-B-32", pretrained="random", width=16, layers=3, heads=2)
CONFIG = Config(
    unet=UNetConfig(
        model_channels=16, channel_multipliers=(1, 2), attention_factors=(2,), head_dim=8, num_groups=4
    ),
    first_stage=FIRST_STAGE,
    conditioning=ConditioningConfig(openclip=TOWER),
)


def own_weights(config: Config = CONFIG, context_dim: int | None = 16) -> dict[str, Tensor]:
    """All networks of a small run under our names."""
    torch.manual_seed(0)
    unet = UNetSizes(4, 4, context_dim).build(config.unet).state_dict()
    first_stage = build_first_stage(config.first_stage)
    tower = OpenCLIP(TOWER, config.first_stage, 0).tower
    return {
        **{f"unet.{name}": torch.randn(t.shape) for name, t in unet.items()},
        **{f"first_stage.{name}": t for name, t in first_stage.state_dict().items()},
        **{f"text_encoder.{name}": t for name, t in tower.state_dict().items()},
    }


def unet_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("unet.")}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("projection", ["linear", "conv"])
@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_export_then_import_gives_the_same_bits(layout: Any, projection: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, unet=replace(CONFIG.unet, projection=projection))
    tensors = own_weights(config)
    there = f"memory://{tmp_path}/model" + (".safetensors" if layout == "compvis" else "")
    exported = export_weights(tensors, there, config, layout)
    assert exported.left == ()
    report = import_weights(there, str(tmp_path / "back"), config)
    assert_same(read_weights(str(tmp_path / "back/unet.safetensors"))[0], unet_of(tensors))
    text = read_weights(str(tmp_path / "back/text_encoder.safetensors"))[0]
    assert_same(
        {f"text_encoder.{n}": t for n, t in text.items()}, {n: t for n, t in tensors.items() if "text_" in n}
    )
    back = load_first_stage(replace(FIRST_STAGE, weights=str(tmp_path / "back"), latent_scale=None))
    assert back.latent_scale.tolist() == pytest.approx([0.18215] * 4)
    mine = {f"first_stage.{name}": t for name, t in back.state_dict().items() if "latent_s" not in name}
    assert_same(mine, {n: t for n, t in tensors.items() if n.startswith("first_") and "latent_s" not in n})
    assert len(report.files) == 4
    assert not [name for name in report.left if not name.startswith("model_ema")]


def test_native_export_is_what_the_trainer_reads(tmp_path: Path) -> None:
    tensors = own_weights() | {"conditions.parts.class_label.embedding.weight": torch.ones(3, 16)}
    average = {name: 0.5 * tensor for name, tensor in unet_of(tensors).items()}
    export_weights(tensors, str(tmp_path), CONFIG, "native", average)
    written, metadata = read_weights(str(tmp_path / "unet.safetensors"))
    assert set(written) == {n for n in tensors if n.startswith(("unet.", "conditions."))}
    assert "unet" in metadata
    averaged = read_weights(str(tmp_path / "unet_ema.safetensors"))[0]
    assert torch.equal(averaged["unet.conv_in.weight"], average["unet.conv_in.weight"])
    load_first_stage(replace(FIRST_STAGE, weights=str(tmp_path)))


def test_averages_travel_in_the_original_layout(tmp_path: Path) -> None:
    tensors = own_weights()
    average = {name: 0.5 * tensor for name, tensor in unet_of(tensors).items()}
    file = str(tmp_path / "model.safetensors")
    export_weights(tensors, file, CONFIG, "compvis", average)
    names = read_weights(file)[0]
    assert "model_ema.diffusion_modeltime_embed0weight" in names
    assert {"betas", "alphas_cumprod", "scale_factor"} <= set(names)
    import_weights(file, str(tmp_path / "back"), CONFIG)
    assert_same(read_weights(str(tmp_path / "back/unet_ema.safetensors"))[0], average)
    assert_same(read_weights(str(tmp_path / "back/unet.safetensors"))[0], unet_of(tensors))


def test_a_diffusers_folder_describes_itself(tmp_path: Path) -> None:
    tensors = own_weights()
    export_weights(tensors, str(tmp_path / "there"), CONFIG, "diffusers")
    import_weights(str(tmp_path / "there"), str(tmp_path / "back"), None)
    assert_same(read_weights(str(tmp_path / "back/unet.safetensors"))[0], unet_of(tensors))
    lone = import_weights(str(tmp_path / "there/vae"), str(tmp_path / "vae"), None)
    assert lone.files[0] == str(tmp_path / "vae/first_stage.safetensors")
    (tmp_path / "run.yaml").write_text((tmp_path / "back/structure.yaml").read_text())
    described = load_config(str(tmp_path / "run.yaml"))
    assert described.unet == replace(CONFIG.unet, transformer_depth=(1, 1))
    assert described.first_stage == replace(FIRST_STAGE, latent_scale=None)


def test_diffusers_loads_what_we_wrote(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    tensors = own_weights()
    export_weights(tensors, str(tmp_path), CONFIG, "diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    assert torch.equal(unet.conv_in.weight, tensors["unet.conv_in.weight"])
    assert vae.config.scaling_factor == 0.18215
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.beta_schedule == "scaled_linear"
    index = read_json(str(tmp_path / "model_index.json"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    text = read_json(str(tmp_path / "text_encoder/config.json"))
    assert (text["num_hidden_layers"], text["hidden_size"], text["num_attention_heads"]) == (2, 16, 2)


@pytest.mark.parametrize(
    ("diffusion", "scheduler", "pipeline"),
    [
        (
            {"process": "flow", "prediction": "velocity", "shift": 4.0, "shift_pixels": 64},
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0, "num_train_timesteps": 1000},
            None,
        ),
        (
            {"process": "edm", "prediction": "edm", "density": "log_normal", "sigma_data": 0.5},
            {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
            "StableDiffusionPipeline",
        ),
    ],
)
def test_diffusers_loads_the_scheduler_of_every_process(
    diffusion: Any, scheduler: Any, pipeline: str | None, tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = replace(CONFIG, diffusion=DiffusionConfig(**diffusion), data=replace(CONFIG.data, image_size=32))
    export_weights(own_weights(), str(tmp_path), config, "diffusers")
    assert (tmp_path / "model_index.json").exists() == (pipeline is not None)
    if pipeline is not None:
        index = read_json(str(tmp_path / "model_index.json"))
        assert index["_class_name"] == pipeline
        assert index["scheduler"] == ["diffusers", scheduler["_class_name"]]
    loaded = getattr(diffusers, scheduler["_class_name"]).from_pretrained(tmp_path / "scheduler")
    assert {key: loaded.config[key] for key in scheduler if key != "_class_name"} == {
        key: value for key, value in scheduler.items() if key != "_class_name"
    }


@pytest.mark.parametrize(
    ("layout", "prediction", "remedy"),
    [("compvis", "velocity", "native or the diffusers"), ("diffusers", "x0", "native layout")],
)
def test_a_layout_that_has_no_word_for_a_flow_is_refused(
    layout: Any, prediction: Any, remedy: str, tmp_path: Path
) -> None:
    config = replace(CONFIG, diffusion=DiffusionConfig(process="flow", prediction=prediction))
    name = "folder" if layout == "diffusers" else "x.safetensors"
    with pytest.raises(ConfigError, match=remedy):
        export_weights(own_weights(), str(tmp_path / name), config, layout)
    assert not list(tmp_path.iterdir())


def test_sharded_diffusers_weights_are_read(tmp_path: Path) -> None:
    tensors = own_weights()
    export_weights(unet_of(tensors), str(tmp_path / "whole"), CONFIG, "diffusers")
    stored = safetensors.torch.load_file(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors")
    folder = tmp_path / "unet"
    folder.mkdir()
    halves = [dict(list(stored.items())[::2]), dict(list(stored.items())[1::2])]
    for i, half in enumerate(halves):
        write_weights(str(folder / f"part{i}.safetensors"), half, {})
    places = {name: f"part{i}.safetensors" for i, half in enumerate(halves) for name in half}
    index = str(folder / "diffusion_pytorch_model.safetensors.index.json")
    write_json(index, {"metadata": {}, "weight_map": places})
    write_json(str(folder / "config.json"), read_json(str(tmp_path / "whole/unet/config.json")))
    import_weights(str(folder), str(tmp_path / "back"), CONFIG)
    assert_same(read_weights(str(tmp_path / "back/unet.safetensors"))[0], unet_of(tensors))


def test_another_structure_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    tensors = own_weights()
    file = str(tmp_path / "model.safetensors")
    export_weights(tensors, file, CONFIG, "compvis")
    deeper = replace(CONFIG, unet=replace(CONFIG.unet, num_res_blocks=3))
    with pytest.raises(ConfigError, match=r"missing input_blocks\.\d+.* \(\d+") as caught:
        import_weights(file, str(tmp_path / "back"), deeper)
    assert "unexpected" in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_a_torn_file_is_refused_by_name(tmp_path: Path) -> None:
    file = str(tmp_path / "model.safetensors")
    export_weights(own_weights(), file, CONFIG, "compvis")
    content = safetensors.torch.load_file(file)
    lost = "model.diffusion_model.middle_block.1.norm.weight"
    del content[lost]
    content["first_stage_model.encoder.extra.weight"] = torch.zeros(3)
    safetensors.torch.save_file(content, file)
    with pytest.raises(
        ConfigError, match=r"1 tensors missing, 0 unexpected.*\n.*middle_block\.1\.norm\.weight"
    ):
        import_weights(file, str(tmp_path / "back"), CONFIG)
    content[lost] = torch.zeros(32)
    safetensors.torch.save_file(content, file)
    with pytest.raises(ConfigError, match=r"unexpected encoder\.extra\.weight \(3,\)"):
        import_weights(file, str(tmp_path / "back"), CONFIG)
    assert not (tmp_path / "back").exists()


def test_other_heads_have_equal_shapes_and_are_still_refused(tmp_path: Path) -> None:
    export_weights(own_weights(), str(tmp_path / "there"), CONFIG, "diffusers")
    other = replace(CONFIG, unet=replace(CONFIG.unet, head_dim=16))
    with pytest.raises(ConfigError, match="head_dim"):
        import_weights(str(tmp_path / "there"), str(tmp_path / "back"), other)


@pytest.mark.parametrize(
    ("file", "told", "said"),
    [
        ("unet", {"norm_num_groups": 2}, "the UNet of .* for 2 .* unet.num_groups=4; set unet.num_groups=2"),
        ("vae", {"norm_num_groups": 2}, "first_stage.num_groups=4; set first_stage.num_groups=2"),
        (
            "vae",
            {"scaling_factor": 0.9},
            "first_stage.latent_scale=0.18215; set first_stage.latent_scale=0.9",
        ),
        ("vae", {"latents_mean": [1, 0, 0, 0]}, "per channel, .* set first_stage.latent_scale=null"),
        ("text_encoder", {"hidden_act": "quick_gelu"}, "hidden_act=quick_gelu .* such as ViT-B-32-quickgelu"),
        ("scheduler", {"prediction_type": "v_prediction"}, "diffusion.prediction=eps; set .*=v"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "diffusion.zero_terminal_snr=false; set .*=true"),
        ("scheduler", {"beta_end": 0.02}, "diffusion.beta_end=0.012; set .*=0.02"),
        ("scheduler", {"beta_schedule": "linear"}, "diffusion.beta_schedule=scaled_linear; set .*=linear"),
        ("scheduler", {"num_train_timesteps": 500}, "diffusion.num_timesteps=1000; set .*=500"),
        ("scheduler", {"_class_name": "EDMEulerScheduler"}, "diffusion.process=discrete; set .*=edm"),
        ("scheduler", {"trained_betas": [0.1], "beta_end": 0.02}, None),
    ],
)
def test_what_a_folder_says_and_no_shape_shows_is_compared(
    file: str, told: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    there, back = str(tmp_path / "there"), tmp_path / "back"
    export_weights(own_weights(), there, CONFIG, "diffusers")
    place = f"{there}/{file}/{'scheduler_' if file == 'scheduler' else ''}config.json"
    write_json(place, read_json(place) | told)
    if said is None:
        import_weights(there, str(back), CONFIG)
        return
    with pytest.raises(ConfigError, match=said):
        import_weights(there, str(back), CONFIG)
    assert not back.exists()
    if "latents_mean" in told:
        measured = replace(CONFIG, first_stage=replace(FIRST_STAGE, latent_scale=None))
        import_weights(there, str(back), measured)


def test_a_folder_that_says_nothing_of_its_scale_takes_the_configurations(tmp_path: Path) -> None:
    """As the older ones of Stable Diffusion and LDM."""
    export_weights(own_weights(), str(tmp_path / "there"), CONFIG, "diffusers")
    place = str(tmp_path / "there/vae/config.json")
    write_json(place, {name: v for name, v in read_json(place).items() if name != "scaling_factor"})
    config = replace(CONFIG, first_stage=replace(FIRST_STAGE, latent_scale=1.0))
    import_weights(str(tmp_path / "there"), str(tmp_path / "back"), config)
    stored = read_weights(str(tmp_path / "back/first_stage.safetensors"))[0]
    assert stored["latent_scale"].tolist() == [1.0] * 4


def test_lone_networks_of_every_kind_are_recognised(tmp_path: Path) -> None:
    tensors = own_weights()
    file = str(tmp_path / "model.safetensors")
    export_weights(tensors, file, CONFIG, "compvis")
    stored = safetensors.torch.load_file(file)
    for prefix, made in (
        ("model.diffusion_model.", "unet.safetensors"),
        ("first_stage_model.", "first_stage.safetensors"),
        ("cond_stage_model.model.", "text_encoder.safetensors"),
    ):
        lone = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
        safetensors.torch.save_file(lone, tmp_path / "lone.safetensors")
        report = import_weights(str(tmp_path / "lone.safetensors"), str(tmp_path / "back"), CONFIG)
        assert [Path(name).name for name in report.files] == [made, "structure.yaml"]
    with pytest.raises(ConfigError, match="does not describe"):
        import_weights(file, str(tmp_path / "back"), None)


def test_impossible_exports_are_refused_before_writing() -> None:
    tensors = own_weights()
    updown = replace(CONFIG, unet=replace(CONFIG.unet, resblock_updown=True))
    with pytest.raises(ConfigError, match="resblock_updown"):
        export_weights(own_weights(updown), "memory://refused", updown, "diffusers")
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        export_weights(tensors, "memory://refused", CONFIG, "compvis")
    with pytest.raises(ConfigError, match="no network"):
        export_weights({"optimizer.step": torch.zeros(1)}, "memory://refused", CONFIG, "native")
    with pytest.raises(ConfigError, match="no weights"):
        export_weights({}, "memory://refused", CONFIG, "native")
    assert not fsspec.filesystem("memory").exists("/refused")


def test_conditions_that_a_layout_cannot_hold_are_reported(tmp_path: Path) -> None:
    tensors = unet_of(own_weights()) | {"conditions.parts.layout.table": torch.zeros(2)}
    report = export_weights(tensors, str(tmp_path / "m.safetensors"), CONFIG, "compvis")
    assert report.left == ("conditions.parts.layout.table",)


def test_class_tokens_of_the_ldm_models_travel(tmp_path: Path) -> None:
    tokens = "conditions.parts.class_label.embedding.weight"
    tensors = unet_of(own_weights()) | {tokens: torch.randn(5, 16)}
    file = str(tmp_path / "cin.safetensors")
    export_weights(tensors, file, CONFIG, "compvis")
    import_weights(file, str(tmp_path / "back"), CONFIG)
    assert_same(read_weights(str(tmp_path / "back/unet.safetensors"))[0], tensors)


def test_imported_weights_can_be_sampled_at_once(tmp_path: Path) -> None:
    file = str(tmp_path / "model.safetensors")
    export_weights(own_weights(), file, CONFIG, "compvis")
    tower = replace(TOWER, width=None, layers=None, heads=None)
    config = replace(CONFIG, conditioning=ConditioningConfig(openclip=tower))
    import_weights(file, str(tmp_path / "in"), config)
    metadata = read_weights(str(tmp_path / "in/unet.safetensors"))[1]
    described = config_from_dict(json.loads(metadata["config"]))
    assert described.first_stage.weights == str(tmp_path / "in/first_stage.safetensors")
    assert described.conditioning.openclip == replace(
        tower, pretrained=str(tmp_path / "in/text_encoder.safetensors")
    )
    assert described.unet == CONFIG.unet
