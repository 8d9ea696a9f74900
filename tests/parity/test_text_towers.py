"""Text features against open_clip's whole CLIP, transformers' CLIP and diffusers' LDMBert, same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import open_clip.model
import pytest
import torch
from torch import Tensor, nn

from trainer.conditioning.open_clip_towers import architecture, load_tower
from trainer.conditioning.openclip import OpenCLIP
from trainer.conditioning.tokenizers import ClipTokenizer
from trainer.conditioning.transformer import TextEncoder
from trainer.config.io import load_config
from trainer.config.models import FirstStageConfig, OpenCLIPConfig, TextTransformerConfig
from trainer.interop.convert import import_weights
from trainer.interop.export import export_weights
from trainer.interop.unet_names import UNetSizes
from trainer.model import build_trainable
from trainer.weights import read_weights, write_weights

CAPTIONS = ["a red circle above a blue square", "!", "", "two words " * 60]
TOWER = OpenCLIPConfig(model="ViT-B-32", pretrained="random", width=32, layers=3, heads=4)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def randomise(module: nn.Module) -> None:
    """Weights, biases and norms that are all different from their neutral start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            offset = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + offset)


def condition(weights: str, **changes: Any) -> OpenCLIP:
    built = OpenCLIP(dataclasses.replace(TOWER, **changes), FirstStageConfig(), 0)
    load_tower(built.tower, weights)
    return built


@pytest.fixture(params=["ViT-B-32", "ViT-B-32-quickgelu"])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, nn.Module, str]:
    """A complete CLIP model with small towers, and its weights in a file."""
    model = architecture(dataclasses.replace(TOWER, model=request.param))
    clip = open_clip.model.CLIP(
        embed_dim=model["embed_dim"],
        vision_cfg={"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        text_cfg=model["text_cfg"],
        quick_gelu=model.get("quick_gelu", False),
    ).eval()
    randomise(clip)
    url = str(tmp_path / "clip.safetensors")
    write_weights(url, dict(clip.state_dict()), {})
    return request.param, clip, url


def hidden_states(clip: nn.Module, tokens: Tensor) -> list[Tensor]:
    """The residual stream after each block of open_clip's own text path."""
    states = []
    hooks = [
        block.register_forward_hook(lambda _module, _args, output: states.append(output))
        for block in clip.transformer.resblocks
    ]
    clip.encode_text(tokens)
    for hook in hooks:
        hook.remove()
    return states


@torch.no_grad()
def test_layers_and_pooling_equal_open_clip(whole: tuple[str, nn.Module, str]) -> None:
    name, clip, url = whole
    tokens = open_clip.tokenize(CAPTIONS)
    states = hidden_states(clip, tokens)
    assert len(states) == 3
    close = torch.testing.assert_close
    last = condition(url, model=name, layer="last").encode(CAPTIONS)
    close(last["context"], clip.ln_final(states[-1]), **TOLERANCE)
    penultimate = condition(url, model=name).encode(CAPTIONS)
    close(penultimate["context"], clip.ln_final(states[-2]), **TOLERANCE)
    raw = condition(url, model=name, final_norm=False, pooled=True).encode(CAPTIONS)
    close(raw["context"], states[-2], **TOLERANCE)
    close(raw["pooled"], clip.encode_text(tokens), **TOLERANCE)


def to_transformers(clip: nn.Module, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's text weights under transformers' names (peers' key map, written out anew)."""
    source = clip.state_dict()
    prefix = "text_model." if any(name.startswith("text_model.") for name in like) else ""
    out = {
        f"{prefix}embeddings.token_embedding.weight": source["token_embedding.weight"],
        f"{prefix}embeddings.position_embedding.weight": source["positional_embedding"],
    }
    for end in ("weight", "bias"):
        out[f"{prefix}final_layer_norm.{end}"] = source[f"ln_final.{end}"]
        for i in range(len(clip.transformer.resblocks)):
            ours, theirs = f"transformer.resblocks.{i}", f"{prefix}encoder.layers.{i}"
            stacked = source[f"{ours}.attn.in_proj_{end}"].chunk(3)
            for letter, part in zip("qkv", stacked, strict=True):
                out[f"{theirs}.self_attn.{letter}_proj.{end}"] = part
            for a, b in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                out[f"{theirs}.{b}.{end}"] = source[f"{ours}.{a}.{end}"]
    if "text_projection.weight" in like:
        out["text_projection.weight"] = source["text_projection"].T
    return out


@torch.no_grad()
def test_layers_and_pooling_equal_transformers(whole: tuple[str, nn.Module, str]) -> None:
    transformers = pytest.importorskip("transformers")
    name, clip, url = whole
    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=32,
            hidden_act="quick_gelu" if name.endswith("quickgelu") else "gelu",
        )
    ).eval()
    weights = to_transformers(clip, theirs.state_dict())
    result = theirs.load_state_dict(weights, strict=False)
    assert not [key for key in result.missing_keys if not key.endswith("position_ids")]
    assert not result.unexpected_keys
    for padding in ("zero", "end"):  # "end": how SD1 and SDXL's first tower pad
        tokens = ClipTokenizer(77, padding)(CAPTIONS)
        expected = theirs(tokens, output_hidden_states=True)
        ours = condition(url, model=name, padding=padding, final_norm=False, pooled=True).encode(CAPTIONS)
        torch.testing.assert_close(ours["context"], expected.hidden_states[-2], **TOLERANCE)
        torch.testing.assert_close(ours["pooled"], expected.text_embeds, **TOLERANCE)
        last = condition(url, model=name, padding=padding, layer="last").encode(CAPTIONS)
        torch.testing.assert_close(last["context"], expected.last_hidden_state, **TOLERANCE)


LDM_BERT_NAMES = {
    "attention_norm": "self_attn_layer_norm",
    "attention.to_q": "self_attn.q_proj",
    "attention.to_k": "self_attn.k_proj",
    "attention.to_v": "self_attn.v_proj",
    "attention.to_out": "self_attn.out_proj",
    "feed_forward_norm": "final_layer_norm",
    "feed_forward.0": "fc1",
    "feed_forward.3": "fc2",
}


@torch.no_grad()
def test_text_transformer_equals_ldm_bert() -> None:
    pytest.importorskip("transformers")
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = TextTransformerConfig(width=32, layers=3, heads=2, head_dim=8, max_tokens=16)
    ours = TextEncoder(config, 50, None).eval()
    randomise(ours)
    theirs = LDMBertModel(
        LDMBertConfig(
            vocab_size=50,
            max_position_embeddings=16,
            encoder_layers=3,
            encoder_ffn_dim=128,
            encoder_attention_heads=2,
            head_dim=8,
            d_model=32,
        )
    ).eval()
    renamed = {
        "model.embed_tokens.weight": ours.embedding.weight,
        "model.embed_positions.weight": ours.transformer.positions,
        "model.layer_norm.weight": ours.transformer.norm.weight,
        "model.layer_norm.bias": ours.transformer.norm.bias,
    }
    for name, value in ours.transformer.blocks.named_parameters():
        index, rest = name.split(".", 1)
        part, end = rest.rsplit(".", 1)
        renamed[f"model.layers.{index}.{LDM_BERT_NAMES[part]}.{end}"] = value
    result = theirs.load_state_dict(renamed, strict=False)
    assert result.missing_keys == ["to_logits.weight", "to_logits.bias"]
    assert not result.unexpected_keys
    tokens = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    context = ours({"tokens": tokens}, torch.zeros(3, dtype=torch.bool)).context
    torch.testing.assert_close(context, theirs(tokens)[0], **TOLERANCE)


class XTransformer(nn.Module):
    """The names of x-transformers' wrapper around an encoder, as LDM's BERTEmbedder has them."""

    def __init__(self, width: int, depth: int, inner: int, tokens: int, vocabulary: int) -> None:
        super().__init__()
        self.token_emb, self.pos_emb = nn.Embedding(vocabulary, width), nn.Module()
        self.pos_emb.emb = nn.Embedding(tokens, width)
        self.attn_layers = nn.Module()
        self.attn_layers.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), part, nn.Identity()])
            for _ in range(depth)
            for part in (self.attention(width, inner), self.feed_forward(width))
        )
        self.norm, self.to_logits = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    @staticmethod
    def attention(width: int, inner: int) -> nn.Module:
        made = nn.Module()
        made.to_q, made.to_k, made.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        made.to_out = nn.Linear(inner, width)
        return made

    @staticmethod
    def feed_forward(width: int) -> nn.Module:
        made = nn.Module()
        first = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        made.net = nn.Sequential(first, nn.Dropout(), nn.Linear(4 * width, width))
        return made


@torch.no_grad()
def test_the_text_model_of_an_ldm_file_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
    from diffusers.pipelines.stable_diffusion.convert_from_ckpt import convert_ldm_bert_checkpoint

    small = "width: 32, layers: 3, heads: 2, head_dim: 8, max_tokens: 16"
    unet = "model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 4, head_dim: 8"
    config = load_config(None, [f"unet={{{unet}}}", f"conditioning.text_transformer={{{small}}}"])
    original = XTransformer(32, 3, 16, 16, 49408).eval()
    randomise(original)
    theirs = convert_ldm_bert_checkpoint(
        SimpleNamespace(transformer=original),
        LDMBertConfig(49408, 16, 3, 128, 2, 8, d_model=32, encoder_layerdrop=0.0),
    )
    unet_names = UNetSizes(4, 4, 32).build(config.unet).state_dict()
    network = {name: torch.randn(tensor.shape) for name, tensor in unet_names.items()}
    export_weights(
        {f"unet.{n}": t for n, t in network.items()}, f"{tmp_path}/u.safetensors", config, "compvis"
    )
    file = {f"cond_stage_model.transformer.{n}": t for n, t in original.state_dict().items()}
    write_weights(f"{tmp_path}/ldm.safetensors", read_weights(f"{tmp_path}/u.safetensors")[0] | file, {})

    report = import_weights(f"{tmp_path}/ldm.safetensors", f"{tmp_path}/back", config)
    assert sorted(report.left) == [
        f"cond_stage_model.transformer.to_logits.{end}" for end in ("bias", "weight")
    ]
    prefix = "conditions.parts.text_transformer."
    stored = read_weights(f"{tmp_path}/back/unet.safetensors")[0]
    ours = TextEncoder(
        TextTransformerConfig(width=32, layers=3, heads=2, head_dim=8, max_tokens=16), 49408, None
    )
    ours.load_state_dict({n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)})
    assert set(stored) == set(build_trainable(config)[0].state_dict())
    tokens = torch.randint(0, 49408, (3, 16), generator=torch.Generator().manual_seed(1))
    context = ours.eval()({"tokens": tokens}, torch.zeros(3, dtype=torch.bool)).context
    torch.testing.assert_close(context, theirs(tokens)[0], **TOLERANCE)

    # A configuration without a place for it takes the UNet alone.
    none = load_config(None, [f"unet={{{unet}}}"])
    report = import_weights(f"{tmp_path}/ldm.safetensors", f"{tmp_path}/alone", none)
    assert set(report.left) == set(file)
    assert set(read_weights(f"{tmp_path}/alone/unet.safetensors")[0]) == {f"unet.{n}" for n in network}


def test_text_transformer_has_the_published_size() -> None:
    with torch.device("meta"):
        tau = TextEncoder(TextTransformerConfig(), 30_522, None)
    parameters = sum(p.numel() for p in tau.parameters())
    assert parameters == 542_895_360
    # 1.45 B in the paper counts the UNet (872.3 M) and a head over the vocabulary that tau never uses.
    unused_head = 30_522 * 1280 + 30_522
    assert round((872.30e6 + parameters + unused_head) / 1e9, 2) == 1.45
