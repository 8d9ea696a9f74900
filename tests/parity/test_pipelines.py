"""What `ldm export` writes, drawn with by the pipelines of diffusers: the pictures of `ldm sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.__main__ import main
from trainer.conditioning.low_resolution import noise_level_alphas_cumprod
from trainer.conditioning.tokenizers import ClipTokenizer
from trainer.config.io import config_to_dict, load_config
from trainer.config.models import LowResolutionConfig
from trainer.config.run import Config
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.interop.diffusers_export import tokenizer_files
from trainer.model import build_model, load_model
from trainer.rng import Purpose, normal
from trainer.sample import Request, generate
from trainer.weights import write_weights

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ("a red circle!! it's 42 - or (more)?", "")
SEED = 3
BASE = [
    "data.image_size=16",
    "first_stage={base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 4}",
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2], "
    "head_dim: 8, num_groups: 4}",
    "sampling={sampler: ddim, steps: 10, guidance_scale: 3.0}",
]
SMALL = "model: ViT-B-32, pretrained: random, width: 16, layers: 3, heads: 2"
TEXT = f"conditioning.openclip={{{SMALL}}}"
SDXL = (
    f"conditioning={{openclip: {{{SMALL}, final_norm: false, padding: end, null: zeros}}, openclip_second: "
    "{model: ViT-B-32, pretrained: random, width: 24, layers: 3, heads: 2, final_norm: false, pooled: true, "
    "null: zeros}, image_size: {width: 8}}"
)


def run_file(folder: Path, *settings: str, metadata: dict[str, str] | None = None) -> str:
    """An exported run of random weights, with its first stage, whose statistics differ by channel."""
    weights = str(folder / "first_stage.safetensors")
    config = load_config(None, [*BASE, f"first_stage.weights={weights}", *settings])
    torch.manual_seed(0)
    stage = build_first_stage(config.first_stage)
    z = config.first_stage.channels
    if config.first_stage.name == "kl":
        stage.set_latent_statistics(torch.linspace(-1, 2, z), torch.linspace(0.5, 3, z))
    else:
        stage.set_latent_statistics(
            torch.zeros(z), torch.full((z,), 1.0 if config.first_stage.name == "identity" else 2.0)
        )
    write_weights(weights, *first_stage_tensors(stage))
    network: nn.Module = build_model(config).network
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    source = str(folder / "run.safetensors")
    about = {"config": json.dumps(config_to_dict(config)), "network": "unet", "profile": "decay"}
    write_weights(source, network.state_dict(), about | (metadata or {}))
    return source


def ours(source: str, n: int, **request: Any) -> tuple[Tensor, Config]:
    """Pictures of `ldm sample`, uint8 [n, 3, H, W]."""
    trained = load_model(source, device=torch.device("cpu"))
    captions = (*PROMPTS, *[""] * n)[:n]
    return generate(trained.config, trained.model, Request(captions, **request), seed=SEED), trained.config


def start(n: int, *shape: int) -> Tensor:
    """The noise that our pictures start from."""
    return normal(SEED, torch.arange(n), Purpose.INITIAL, shape)


def exported(folder: Path, source: str, *options: str) -> Path:
    assert main(["export", source, str(folder / "there"), "--layout", "diffusers", *options]) == 0
    return folder / "there"


def assert_same_pictures(made: Tensor, theirs: np.ndarray) -> None:
    """Both to a level of 8 bits, and not grey."""
    expected = torch.from_numpy(np.asarray(theirs)).permute(0, 3, 1, 2) * 255
    assert made.float().std() > 5
    assert (made.float() - expected).abs().max() <= 1


@pytest.mark.parametrize(
    "settings",
    [
        [TEXT],
        [f"conditioning.openclip={{{SMALL}, padding: end, layer: last, context_length: 12}}"],
        [TEXT, "diffusion={prediction: v, zero_terminal_snr: true}", "sampling.spacing=trailing"],
        [
            TEXT,
            "diffusion={process: edm, prediction: edm, density: log_normal}",
            "sampling={sampler: euler, steps: 10, guidance_scale: 3.0, spacing: karras}",
        ],
        [
            TEXT,
            "diffusion={process: edm, prediction: edm, density: log_normal}",
            "sampling={sampler: ddim, steps: 10, guidance_scale: 3.0}",
        ],
        [TEXT, "first_stage.latent_scale=0.7", "sampling.spacing=trailing", "unet.projection=conv"],
    ],
    ids=["penultimate", "last-padded-short", "v-zero-snr", "edm", "edm-leading", "one-scale"],
)
def test_stable_diffusion_draws_the_same_pictures(settings: list[str], tmp_path: Path) -> None:
    source = run_file(tmp_path, *settings)
    made, _ = ours(source, 2)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(exported(tmp_path, source))
    drawn = pipe(
        list(PROMPTS), num_inference_steps=10, guidance_scale=3.0, latents=start(2, 4, 8, 8),
        output_type="np", height=16, width=16,
    ).images  # fmt: skip
    assert_same_pictures(made, drawn)


def test_sdxl_draws_the_same_pictures(tmp_path: Path) -> None:
    source = run_file(tmp_path, SDXL)
    made, _ = ours(source, 2)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        exported(tmp_path, source), add_watermarker=False
    )
    drawn = pipe(
        list(PROMPTS), num_inference_steps=10, guidance_scale=3.0, latents=start(2, 4, 8, 8),
        output_type="np", height=16, width=16,
    ).images  # fmt: skip
    assert_same_pictures(made, drawn)


EDM = ["diffusion={process: edm, prediction: edm, density: log_normal}", "sampling.spacing=karras"]


@pytest.mark.parametrize(
    ("stage", "kind", "settings"),
    [
        ("name: kl", "LDMPipeline", []),
        ("name: kl", "LDMPipeline", EDM),
        ("name: vq, codebook_size: 32", "LDMPipeline", []),
        ("name: identity", "DDIMPipeline", []),
    ],
)
def test_pipelines_without_conditions_draw_the_same_pictures(
    stage: str, kind: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = f"{stage}, base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 4"
    source = run_file(
        tmp_path,
        f"first_stage={{{fields}, weights: {tmp_path}/first_stage.safetensors}}",
        "unet.attention=plain",
        *settings,
    )
    made, config = ours(source, 1)
    pipe = diffusers.DiffusionPipeline.from_pretrained(exported(tmp_path, source))
    assert type(pipe).__name__ == kind
    cells = 16 // config.first_stage.downsampling
    noise = start(1, config.first_stage.channels, cells, cells)
    # These pipelines take no latents.
    monkeypatch.setattr(f"{type(pipe).__module__}.randn_tensor", lambda *args, **options: noise)
    assert_same_pictures(made, pipe(num_inference_steps=10, output_type="np").images)


def test_pixels_by_edm_have_no_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DDIMPipeline would take any scheduler for DDIM's, and draw something else."""
    stage = f"first_stage={{name: identity, weights: {tmp_path}/first_stage.safetensors}}"
    folder = exported(tmp_path, run_file(tmp_path, stage, "unet.attention=plain", *EDM))
    assert not (folder / "model_index.json").exists()
    assert "DDIMPipeline draws by DDIM, not by diffusion.process=edm" in "".join(capsys.readouterr())


def test_inpainting_and_upscaling_have_everything_they_need(tmp_path: Path) -> None:
    picture, mask = torch.rand(1, 3, 16, 16) * 2 - 1, torch.ones(1, 1, 16, 16)
    how: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    fill, enlarge = (tmp_path / name for name in ("fill", "enlarge"))
    fill.mkdir()
    enlarge.mkdir()
    folder = exported(fill, run_file(fill, TEXT, "conditioning.masked_image={}"))
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder)
    assert pipe("red", image=(picture + 1) / 2, mask_image=mask, height=16, width=16, **how).images.shape == (
        1,
        16,
        16,
        3,
    )

    source = run_file(enlarge, TEXT, "conditioning.low_resolution={factor: 2, max_noise_level: 350}")
    pipe = diffusers.StableDiffusionUpscalePipeline.from_pretrained(exported(enlarge, source))
    assert pipe("red", image=(picture[..., :8, :8] + 1) / 2, **how).images.shape == (1, 16, 16, 3)
    assert pipe.config.max_noise_level == 350
    levels = noise_level_alphas_cumprod(LowResolutionConfig())
    torch.testing.assert_close(pipe.low_res_scheduler.alphas_cumprod, levels, rtol=1e-4, atol=1e-7)
    # The pipeline knows one scale factor; ours is a part of the autoencoder.
    assert pipe.vae.config.scaling_factor == 0.08333
    stage = load_model(source, device=torch.device("cpu")).model.first_stage
    expected = stage.latents(picture, None)
    latents = pipe.vae.encode(picture).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        pipe.vae.decode(expected / 0.08333).sample, stage.decode(expected), rtol=1e-4, atol=1e-4
    )


def test_statistics_per_channel_are_in_the_weights(tmp_path: Path) -> None:
    """Posterior mean, its deviation and the decoder, of an autoencoder that knows nothing of statistics."""
    source = run_file(tmp_path, TEXT)
    stage = load_model(source, device=torch.device("cpu")).model.first_stage
    picture, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    expected = stage.latents(picture, noise)
    vae = diffusers.AutoencoderKL.from_pretrained(exported(tmp_path, source) / "vae")
    assert vae.config.scaling_factor == 1.0
    posterior = vae.encode(picture).latent_dist
    torch.testing.assert_close(posterior.mean + posterior.std * noise, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(expected).sample, stage.decode(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [None, 0.9])
def test_the_first_stage_of_a_single_file_has_the_latents_of_the_run(
    scale: float | None, tmp_path: Path
) -> None:
    """Read as Stable Diffusion's, by a program that never looks at the file's scale_factor."""
    wide = "first_stage={base_channels: 32, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 32}"
    source = run_file(tmp_path, TEXT, wide, f"first_stage.latent_scale={'null' if scale is None else scale}")
    stage = load_model(source, device=torch.device("cpu")).model.first_stage
    one = str(tmp_path / "one.safetensors")
    assert main(["export", source, one, "--layout", "compvis"]) == 0
    ddconfig = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "in_channels": 3, "out_ch": 3}
    params = {"first_stage_config": {"params": {"ddconfig": ddconfig | {"z_channels": 4}}}}
    (tmp_path / "v1.yaml").write_text(json.dumps({"model": {"params": params}}))
    vae = diffusers.AutoencoderKL.from_single_file(one, original_config=str(tmp_path / "v1.yaml"))
    factor = vae.config.scaling_factor
    assert factor == 0.18215
    picture, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    expected = stage.latents(picture, noise)
    posterior = vae.encode(picture).latent_dist
    made = (posterior.mean + posterior.std * noise) * factor
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    decoded = vae.decode(expected / factor).sample
    torch.testing.assert_close(decoded, stage.decode(expected), rtol=1e-4, atol=1e-4)


def test_the_tokenizer_is_ours(tmp_path: Path) -> None:
    texts = [
        "",
        "hi!!!a!a",
        "x !? a! b",
        "It's 42 DEGREES!! caf\u00e9 -- \u65e5\u672c\u8a9e",
        "wait... many " * 40,
    ]
    for padding in ("zero", "end"):
        for name, content in tokenizer_files(20, padding).items():  # type: ignore[arg-type]
            (tmp_path / name).write_bytes(content)
        theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
        ids = theirs(
            texts, padding="max_length", max_length=theirs.model_max_length, truncation=True
        ).input_ids
        assert ids == ClipTokenizer(20, padding)(texts).tolist()  # type: ignore[arg-type]
