"""`ldm export` to other programs: what is in the files, what is said to be left out, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer.__main__ import main
from trainer.config.io import config_to_dict, load_config
from trainer.first_stage.build import build_first_stage, first_stage_tensors, load_first_stage
from trainer.interop.export import export_weights
from trainer.model import build_model
from trainer.weights import read_metadata, read_weights, write_weights

SMALL = "model: ViT-B-32, pretrained: random, width: 16, layers: 3, heads: 2"
CLIP_L = SMALL.replace("ViT-B-32", "ViT-L-14-quickgelu")
TEXT = f"conditioning.openclip={{{SMALL}}}"
BASE = [
    "data.image_size=16",
    "first_stage={base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 4}",
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2], "
    "head_dim: 8, num_groups: 4}",
]


def run_file(folder: Path, *settings: str, profile: str = "decay") -> str:
    """An exported run of random weights, with its first stage of one latent scale, 0.5."""
    weights = str(folder / "first_stage.safetensors")
    config = load_config(None, [*BASE, f"first_stage.weights={weights}", *settings])
    torch.manual_seed(0)
    stage = build_first_stage(config.first_stage)
    z = config.first_stage.channels
    stage.set_latent_statistics(torch.zeros(z), torch.full((z,), 0.5))
    write_weights(weights, *first_stage_tensors(stage))
    network: nn.Module = build_model(config).network
    tensors = network.state_dict() | {"latent_shift": torch.zeros(z), "latent_scale": torch.full((z,), 0.5)}
    source = str(folder / "run.safetensors")
    about = {"config": json.dumps(config_to_dict(config)), "network": "unet", "profile": profile}
    write_weights(source, tensors, about)
    return source


def compvis(folder: Path, source: str, *options: str) -> dict[str, Tensor]:
    target = str(folder / "model.safetensors")
    assert main(["export", source, target, "--layout", "compvis", *options]) == 0
    return read_weights(target)[0]


def test_the_original_layout_holds_the_whole_tower_and_the_average(tmp_path: Path) -> None:
    stored = compvis(tmp_path, run_file(tmp_path, TEXT))
    tower = "cond_stage_model.model."
    # All three blocks and the projection, which the penultimate layer never reads but readers of files want.
    wanted = [f"transformer.resblocks.{i}.ln_1.weight" for i in range(3)]
    wanted += ["text_projection", "ln_final.weight", "positional_embedding"]
    assert {f"{tower}{name}" for name in wanted} <= set(stored)
    assert f"{tower}attn_mask" not in stored
    mine = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(stored["model_ema.diffusion_modelinput_blocks00weight"], stored[mine])
    assert stored[mine].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ([], 0.18215),
        ([TEXT], 0.18215),
        ([TEXT, "conditioning.low_resolution={factor: 2}"], 0.08333),
        ([f"conditioning={{openclip: {{{CLIP_L}}}, openclip_second: {{{SMALL}}}}}"], 0.13025),
    ],
)
def test_the_first_stage_of_the_original_layout_has_the_scale_that_readers_assume(
    settings: list[str], factor: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None of them looks at scale_factor: the latents are ours by the kind of model alone."""
    source = run_file(tmp_path, *settings)
    stored = compvis(tmp_path, source)
    assert float(stored["scale_factor"]) == pytest.approx(factor)
    config = load_config(None, [*BASE, *settings])
    (tmp_path / "run.yaml").write_text(json.dumps(config_to_dict(config)))
    command = ["import", f"{tmp_path}/model.safetensors", f"{tmp_path}/back", "--config"]
    assert main([*command, f"{tmp_path}/run.yaml"]) == 0
    picture, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    before, after = (
        load_first_stage(replace(config.first_stage, weights=f"{tmp_path}/{name}.safetensors"))
        for name in ("first_stage", "back/first_stage")
    )
    assert after.latent_scale.tolist() == pytest.approx([factor] * 4)
    latents = before.latents(picture, noise)
    torch.testing.assert_close(after.latents(picture, noise), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.decode(latents), before.decode(latents), rtol=1e-4, atol=1e-4)
    other = replace(config, first_stage=replace(config.first_stage, latent_scale=0.5))
    (tmp_path / "run.yaml").write_text(json.dumps(config_to_dict(other)))
    assert main([*command, f"{tmp_path}/run.yaml"]) == 2
    assert f"set first_stage.latent_scale={factor}." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([TEXT], ""),
        ([f"conditioning.openclip={{{CLIP_L}, layer: last, padding: end}}"], ""),
        ([TEXT, "diffusion.prediction=x0"], "diffusion.prediction=x0"),
        (
            [TEXT, "diffusion={prediction: v, zero_terminal_snr: true}", "sampling.spacing=trailing"],
            "diffusion.prediction=v, diffusion.zero_terminal_snr=true",
        ),
        (
            [f"conditioning.openclip={{{SMALL}, layer: last, padding: end, null: zeros}}"],
            "conditioning.openclip.layer=last, conditioning.openclip.padding=end, "
            "conditioning.openclip.null=zeros",
        ),
        (
            [
                f"conditioning={{openclip: {{{CLIP_L}, padding: end}}, "
                f"openclip_second: {{{SMALL}, final_norm: false}}}}"
            ],
            "conditioning.openclip.final_norm=true",
        ),
    ],
)
def test_what_readers_of_the_original_layout_take_otherwise_is_said(
    settings: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compvis(tmp_path, run_file(tmp_path, *settings))
    notes = [line for line in capsys.readouterr().out.splitlines() if "the file does not say" in line]
    assert notes == (
        [f"the file does not say {said}; programs must be told, such as by their YAML"] if said else []
    )


def test_pixels_that_readers_of_the_original_layout_show_otherwise_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = run_file(tmp_path, TEXT, "first_stage.input_range=0..1"), tmp_path / "model.safetensors"
    assert main(["export", source, str(target), "--layout", "compvis"]) == 2
    assert "not first_stage.input_range=0..1" in capsys.readouterr().err
    assert not target.exists()


def test_readers_must_be_told_the_scale_of_a_quantised_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run_file(tmp_path, "unet.attention=plain", "first_stage.name=vq", "first_stage.codebook_size=16")
    assert compvis(tmp_path, source)["scale_factor"] == 0.5
    assert "the scale factor of the first stage is 0.5; programs that" in capsys.readouterr().out


def test_trained_weights_have_no_average_beside_them_unless_the_run_has(tmp_path: Path) -> None:
    stored = compvis(tmp_path, run_file(tmp_path, TEXT, profile="weights"))
    assert not [name for name in stored if name.startswith("model_ema.")]


def test_the_dtype_is_that_of_every_layout(tmp_path: Path) -> None:
    source = run_file(tmp_path, TEXT)
    stored = compvis(tmp_path, source, "--dtype", "fp16")
    networks = ("model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model.")
    assert {t.dtype for n, t in stored.items() if n.startswith(networks)} == {torch.float16}
    assert stored["scale_factor"].dtype == stored["betas"].dtype == torch.float32
    there = tmp_path / "there"
    assert main(["export", source, str(there), "--layout", "diffusers", "--dtype", "bf16"]) == 0
    for file in there.rglob("*.safetensors"):
        assert {t.dtype for t in read_weights(str(file))[0].values()} == {torch.bfloat16}, file
    assert json.loads((there / "text_encoder/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([f"conditioning.openclip={{{SMALL}, pooled: true}}"], "conditioning.openclip.pooled alone"),
        ([TEXT, "conditioning.image_size={width: 8}"], "conditioning.image_size alone"),
    ],
)
def test_a_vector_that_no_unet_of_diffusers_takes_is_refused(
    settings: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, there = run_file(tmp_path, *settings), tmp_path / "there"
    assert main(["export", source, str(there), "--layout", "diffusers"]) == 2
    assert said in capsys.readouterr().err
    assert not there.exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([f"conditioning.openclip={{{SMALL}, final_norm: false}}"], "applies the final norm"),
        ([f"conditioning.openclip={{{SMALL}, null: zeros}}"], "not null=zeros"),
        ([TEXT, "first_stage.name=vq", "first_stage.codebook_size=16"], "not first_stage.name=vq"),
        ([TEXT, "first_stage.input_range=0..1"], "input_range=0..1"),
        ([TEXT, "conditioning.depth={}"], "is told depth, openclip and nothing else"),
        ([TEXT, "conditioning.masked_image={drop_probability: 0.1}"], "masked_image.drop_probability"),
        (["conditioning.class_label={num_classes: 3, width: 16}"], "is told class_label and nothing else"),
        (["unet.attention=plain", "first_stage.input_range=0..1"], "input_range=0..1"),
    ],
)
def test_without_a_pipeline_that_draws_the_same_there_is_no_index(
    settings: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, there = run_file(tmp_path, *settings), tmp_path / "there"
    assert main(["export", source, str(there), "--layout", "diffusers"]) == 0
    said = capsys.readouterr().out
    assert "no pipeline: " in said
    assert reason in said
    assert not (there / "model_index.json").exists()
    assert (there / "unet/config.json").exists()
    if "class_label" in reason:
        assert "left: 1 tensors: conditions.parts.class_label.embedding.weight" in said
    assert main(["import", str(there), str(tmp_path / "back")]) == 0  # a folder of diffusers all the same


def test_a_pipeline_that_lacks_a_network_is_no_pipeline(tmp_path: Path) -> None:
    tensors = read_weights(run_file(tmp_path, TEXT))[0]
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("unet.")}
    report = export_weights(unet, str(tmp_path / "there"), load_config(None, [*BASE, TEXT]), "diffusers")
    assert "needs vae, text_encoder, which this export does not hold" in report.describe()
    assert not (tmp_path / "there/model_index.json").exists()


def test_networks_that_moved_are_named_and_others_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, there = run_file(tmp_path, TEXT), str(tmp_path / "there")
    (tmp_path / "first_stage.safetensors").rename(tmp_path / "moved.safetensors")
    command = ["export", source, there, "--layout", "diffusers"]
    assert main(command) == 2
    assert "there is no weights file" in capsys.readouterr().err
    assert main([*command, "--first-stage", str(tmp_path / "moved.safetensors")]) == 0
    assert main([*command, "--text-encoder-2", "x.safetensors"]) == 2
    assert "no text tower conditioning.openclip_second" in capsys.readouterr().err
    tensors, metadata = read_weights(str(tmp_path / "moved.safetensors"))
    write_weights(
        str(tmp_path / "other.safetensors"), tensors | {"latent_scale": torch.full((4,), 2.0)}, metadata
    )
    assert main([*command, "--first-stage", str(tmp_path / "other.safetensors")]) == 2
    assert "trained with latent_scale=[0.5" in capsys.readouterr().err


def test_two_towers_that_the_original_layout_cannot_hold_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    towers = f"conditioning={{openclip: {{{SMALL}}}, openclip_second: {{{SMALL}}}}}"
    target = tmp_path / "model.safetensors"
    assert main(["export", run_file(tmp_path, towers), str(target), "--layout", "compvis"]) == 2
    assert "these are ViT-B-32 and ViT-B-32" in capsys.readouterr().err
    assert not target.exists()


def test_a_tower_that_readers_compute_otherwise_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands where OpenAI's CLIP ViT-L does is read with QuickGELU."""
    gelu = run_file(tmp_path, f"conditioning.openclip={{{SMALL.replace('ViT-B-32', 'ViT-L-14')}}}")
    target = tmp_path / "model.safetensors"
    assert main(["export", gelu, str(target), "--layout", "compvis"]) == 2
    assert "conditioning.openclip.model=ViT-L-14 has GELU" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_a_tower_of_another_activation_is_not_imported(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run_file(tmp_path, f"conditioning.openclip={{{CLIP_L}}}")
    there = str(tmp_path / ("model.safetensors" if layout == "compvis" else "model"))
    assert main(["export", source, there, "--layout", layout]) == 0
    for model, code in (("ViT-L-14-quickgelu", 0), ("ViT-L-14", 2)):
        config = load_config(None, [*BASE, f"conditioning.openclip={{model: {model}, pretrained: random}}"])
        (tmp_path / "run.yaml").write_text(json.dumps(config_to_dict(config)))
        back = str(tmp_path / model)
        assert main(["import", there, back, "--config", f"{tmp_path}/run.yaml"]) == code
    assert "hidden_act=quick_gelu and conditioning.openclip.model=ViT-L-14 does" in capsys.readouterr().err
    assert not (tmp_path / "ViT-L-14").exists()


INPAINTING = ["unet.attention=plain", "first_stage.name=vq", "first_stage.codebook_size=16"]


def test_ldms_inpainting_models_order_latents_picture_mask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*INPAINTING, "first_stage.latent_channels=3", "conditioning.masked_image={form: ldm}"]
    source = run_file(tmp_path, *settings)
    ours = read_weights(source)[0]["unet.conv_in.weight"]  # latents 0-2, mask 3, masked picture 4-6
    first = "model.diffusion_model.input_blocks.0.0.weight"
    stored = compvis(tmp_path, source)
    assert torch.equal(stored[first], ours[:, [0, 1, 2, 4, 5, 6, 3]])
    assert torch.equal(stored["model_ema.diffusion_modelinput_blocks00weight"], stored[first])
    for form, expected in (("ldm", ours), ("sd", stored[first])):
        config = load_config(None, [*BASE, *settings, f"conditioning.masked_image.form={form}"])
        (tmp_path / "run.yaml").write_text(json.dumps(config_to_dict(config)))
        capsys.readouterr()
        back = str(tmp_path / form)
        assert (
            main(["import", f"{tmp_path}/model.safetensors", back, "--config", f"{tmp_path}/run.yaml"]) == 0
        )
        assert torch.equal(read_weights(f"{back}/unet.safetensors")[0]["unet.conv_in.weight"], expected)
        assert torch.equal(read_weights(f"{back}/unet_ema.safetensors")[0]["unet.conv_in.weight"], expected)
        said = "ordered from LDM's" if form == "ldm" else "needs conditioning.masked_image.form=ldm"
        assert said in capsys.readouterr().out


def test_options_and_destinations_that_mean_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, there = run_file(tmp_path, TEXT), str(tmp_path / "there")
    plain = tmp_path / "plain"
    plain.mkdir()
    pixels = run_file(plain)
    metadata = read_metadata(pixels)
    config = json.loads(metadata["config"])
    config["first_stage"] = {"name": "identity"}
    write_weights(pixels, read_weights(pixels)[0], metadata | {"config": json.dumps(config)})
    cases = [
        ([source, there, "--first-stage", "x"], "holds no frozen networks; leave out --first-stage"),
        ([source, there, "--text-encoder", "x"], "leave out --text-encoder"),
        ([source, there, "--samples", "9"], "--samples 9 are pictures to measure on; give --measure SHARDS"),
        ([pixels, there, "--layout", "diffusers", "--first-stage", "x"], "leave out --first-stage"),
        ([source, "", "--layout", "diffusers"], "is a folder"),
        ([source, f"{there}.safetensors", "--layout", "diffusers"], "is a folder"),
        ([source, f"{there}.safetensors"], "is a file, not a run"),
        ([source, there, "--layout", "diffusers", "--weights", "weights"], "holds decay alone"),
    ]
    for arguments, sentence in cases:
        assert main(["export", *arguments]) == 2, arguments
        assert sentence in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "first_stage.safetensors",
        "plain",
        "run.safetensors",
    ]
    measure = ["evaluate", "reconstruction", pixels, "--shards", "x", "--perceptual-weights", "none"]
    assert main(measure) == 2
    assert "nothing to measure" in capsys.readouterr().err
    stage = str(tmp_path / "first_stage.safetensors")
    for option, value, sentence in (
        ("--image-size", "100000", "choose a smaller one"),
        ("--out", f"{stage}/figures.json", "cannot be written"),
    ):
        assert main([*measure[:2], stage, *measure[3:], option, value]) == 2
        assert sentence in capsys.readouterr().err
