"""Our first stages against diffusers' AutoencoderKL and VQModel with the same random weights, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.models import FirstStageConfig
from trainer.first_stage.base import FirstStage
from trainer.first_stage.build import build_first_stage
from trainer.interop.diffusers_stage import first_stage_from_diffusers, first_stage_to_diffusers
from trainer.interop.first_stage_names import first_stage_links, usual_attention
from trainer.interop.links import export_tensors, import_tensors
from trainer.weights import check_fit, shapes_of

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5
SD_JSON = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
UPSCALER_JSON = {
    **SD_JSON,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [128, 256, 512],
    "scaling_factor": 0.08333,
}
KL_F16_JSON = {
    **SD_JSON,
    "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 128, 256, 256, 512],
    "latent_channels": 16,
}
VQ_F4_JSON = {
    **UPSCALER_JSON,
    "_class_name": "VQModel",
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
    "vq_embed_dim": 3,
    "scaling_factor": 1.0,
}
VQ_F4_NOATTN_JSON = {**VQ_F4_JSON, "mid_block_add_attention": False}
STRUCTURES: dict[str, dict[str, Any]] = {
    "sd": SD_JSON,
    "x4-upscaler": UPSCALER_JSON,
    "kl-f16": KL_F16_JSON,
    "vq-f4": VQ_F4_JSON,
    "vq-f4-noattn": VQ_F4_NOATTN_JSON,
}


def reduced(json: dict[str, Any]) -> dict[str, Any]:
    small = {"block_out_channels": [c // 8 for c in json["block_out_channels"]], "norm_num_groups": 4}
    codebook = {"num_vq_embeddings": 32} if "num_vq_embeddings" in json else {}
    return {**json, **small, **codebook, "sample_size": 32}


def reference(json: dict[str, Any]) -> nn.Module:
    return getattr(diffusers, json["_class_name"])(**{k: v for k, v in json.items() if k != "_class_name"})


def pair(name: str) -> tuple[FirstStage, nn.Module, FirstStageConfig]:
    config, _, _ = first_stage_from_diffusers(reduced(STRUCTURES[name]))
    torch.manual_seed(0)
    ours, theirs = build_first_stage(config), reference(reduced(STRUCTURES[name]))
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if config.name == "vq":
            ours.quantize.embedding.weight.normal_()  # type: ignore[union-attr, operator]
    links = first_stage_links(config, ours.state_dict(), "diffusers")
    theirs.load_state_dict(export_tensors(links, ours.state_dict()), strict=True)
    return ours, theirs, config


def relative(ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> float:
    return float((ours - theirs).abs().max() / (theirs if scale is None else scale).abs().max())


def encoded_by(theirs: nn.Module, pixels: Tensor) -> Tensor:
    """Moments or latents as diffusers computes them."""
    result = theirs.encode(pixels)  # type: ignore[operator]
    return result.latent_dist.parameters if hasattr(result, "latent_dist") else result.latents


@pytest.mark.parametrize("name", STRUCTURES)
def test_encoding_decoding_and_gradients_equal_diffusers(name: str) -> None:
    ours, theirs, config = pair(name)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mine, wanted = ours.encode(pixels), encoded_by(theirs, pixels)
    assert relative(mine, wanted) < TOLERANCE
    z = torch.randn(2, config.latent_channels, 4, 6, generator=torch.Generator().manual_seed(2))
    decoded, expected = ours.decode(z), theirs.decode(z).sample  # type: ignore[operator]
    assert relative(decoded, expected) < TOLERANCE

    (mine.square().mean() + (decoded - 1).square().mean()).backward()
    (wanted.square().mean() + (expected - 1).square().mean()).backward()
    parameters = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        gradient = parameters[parameter_name].grad
        if gradient is None:  # the codebook: diffusers detaches it here, and so do we
            assert parameter.grad is None
            continue
        scale = parameters[parameter_name.replace("to_k.bias", "to_q.bias")].grad
        assert relative(parameter.grad, gradient, scale) < TOLERANCE, parameter_name  # type: ignore[arg-type]


def test_the_posterior_equals_diffusers() -> None:
    ours, theirs, _ = pair("sd")
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    posterior = theirs.encode(pixels).latent_dist  # type: ignore[operator]
    noise = torch.randn_like(posterior.mean)
    assert relative(ours.latents(pixels, None), posterior.mode()) < TOLERANCE
    assert relative(ours.latents(pixels, noise), posterior.mean + posterior.std * noise) < TOLERANCE
    kl = ours(pixels, noise)["kl"]
    torch.testing.assert_close(kl, posterior.kl(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_name_and_shape_at_full_size(name: str) -> None:
    json = STRUCTURES[name]
    config, _, _ = first_stage_from_diffusers(json)
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in reference(json).state_dict().items()}
        ours = build_first_stage(config).state_dict()
    exported = export_tensors(first_stage_links(config, ours, "diffusers"), ours)
    check_fit(wanted, shapes_of(exported), name, "")


@pytest.mark.parametrize("name", STRUCTURES)
def test_configuration_goes_both_ways(name: str) -> None:
    json = STRUCTURES[name]
    config, shift, scale = first_stage_from_diffusers(json)
    back = first_stage_to_diffusers(config, shift, scale, json["sample_size"], json["norm_num_groups"])
    assert {key: back[key] for key in json} == json
    assert first_stage_from_diffusers(back) == (config, shift, scale)


def test_statistics_per_channel_travel_as_mean_and_deviation() -> None:
    config, _, _ = first_stage_from_diffusers(SD_JSON)
    shift, scale = [0.5, -1.0, 0.0, 2.0], [0.5, 2.0, 1.0, 4.0]
    json = first_stage_to_diffusers(config, shift, scale, 512, 32)
    assert (json["latents_mean"], json["latents_std"]) == (shift, [2.0, 0.5, 1.0, 0.25])
    assert first_stage_from_diffusers(json)[1:] == (shift, scale)


def test_attention_names_of_old_files_are_read() -> None:
    config, _, _ = first_stage_from_diffusers(reduced(SD_JSON))
    ours = build_first_stage(config).state_dict()
    links = first_stage_links(config, ours, "diffusers")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        for modern, former in old.items():
            name = name.replace(f".{modern}.", f".{former}.")
        return name

    stored = {rename(name): tensor for name, tensor in export_tensors(links, ours).items()}
    assert any(".proj_attn." in name for name in stored)
    read = import_tensors(links, ours, usual_attention(stored, "diffusers"), "an old file")
    assert all(torch.equal(read[name], ours[name]) for name in read)
