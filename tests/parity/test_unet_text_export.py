"""Our exported text tower in the CLIPTextModel of transformers, where that is installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.conditioning.openclip import OpenCLIP
from trainer.config.models import ConditioningConfig, FirstStageConfig, OpenCLIPConfig
from trainer.config.run import Config
from trainer.interop.export import export_weights

transformers = pytest.importorskip("transformers")

TOWER = OpenCLIPConfig(model="ViT-B-32", pretrained="random", width=32, layers=4, heads=4)


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-B-32-quickgelu"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_transformers_computes_our_text_features(
    model: str, pooled: bool, layer: str, tmp_path: Path
) -> None:
    config = replace(TOWER, model=model, pooled=pooled, layer=layer)  # type: ignore[arg-type]
    ours = OpenCLIP(config, FirstStageConfig(), 0)
    with torch.no_grad():
        for parameter in ours.tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    run = Config(conditioning=ConditioningConfig(openclip=config))
    tensors = {f"text_encoder.{name}": value for name, value in ours.tower.state_dict().items()}
    export_weights(tensors, str(tmp_path), run, "diffusers")

    kind = transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel
    theirs = kind.from_pretrained(tmp_path / "text_encoder").eval()
    tokens = ours.tokenize(["a red circle", "", "many words " * 50])
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True)
    got = ours.encode_tokens(tokens)
    if not pooled:  # the tower ends where its context is read, so their last state is our context
        torch.testing.assert_close(got["context"], expected.last_hidden_state, rtol=1e-5, atol=1e-5)
        return
    torch.testing.assert_close(got["pooled"], expected.text_embeds, rtol=1e-5, atol=1e-5)
    if layer == "last":
        torch.testing.assert_close(got["context"], expected.last_hidden_state, rtol=1e-5, atol=1e-5)
