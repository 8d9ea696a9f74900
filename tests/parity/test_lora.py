"""Adapters that a run exports, in the hands of diffusers and peft: the same pictures, the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.parity.test_pipelines import (
    BASE,
    PROMPTS,
    TEXT,
    assert_same_pictures,
    exported,
    ours,
    run_file,
    start,
)
from tests.parity.test_unet import added_conditions, assert_close, make_inputs, pair, theirs_forward
from tests.unit.one_rank import one_rank, small_shards
from trainer.__main__ import main
from trainer.config.training import LoRAConfig
from trainer.distributed.lora import adapted, add_adapters
from trainer.exit_codes import ExitCode
from trainer.interop.export import LORA_FILE, write_lora
from trainer.interop.unet_names import unet_links

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

LORA = LoRAConfig(rank=4, alpha=6.0, targets=("unet.*.attn*.to_*", "unet.*.proj_in", "unet.*.ff.*"))


def test_the_pipeline_with_the_file_draws_the_pictures_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = run_file(tmp_path, TEXT)
    settings = [
        *BASE,
        TEXT,
        f"first_stage.weights={tmp_path}/first_stage.safetensors",
        f"init_from={base}",
        f"run_dir={tmp_path}/run",
        f"data.shards={small_shards(tmp_path / 'shards')}",
        "data.workers=0",
        "global_batch_size=2",
        "micro_batch_size=2",
        "steps=3",
        "optimizer.learning_rate=5e-2",
        "lora={rank: 4, alpha: 100, targets: ['unet.*']}",
        "logging={wandb: disabled, progress_bar: false}",
        "distributed={engine: torch, zero_stage: 0, precision: fp32, doctor: false, watchdog_s: 0}",
        "checkpoint.asynchronous=false",
    ]
    assert one_rank(monkeypatch, tmp_path, settings)() == ExitCode.DONE
    run = str(tmp_path / "run")
    made, _ = ours(run, 2)
    plain, _ = ours(base, 2)
    assert (
        made.float() - plain.float()
    ).abs().max() > 3  # the adapters are seen: assert_same_pictures allows 1

    folder = exported(tmp_path, base)  # of the base
    assert main(["export", run, str(tmp_path / "lora"), "--layout", "lora"]) == 0
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path / "lora")
    merged = diffusers.StableDiffusionPipeline.from_pretrained(exported(tmp_path / "whole", run))
    for each in (pipe, merged):
        drawn = each(
            list(PROMPTS), num_inference_steps=10, guidance_scale=3.0, latents=start(2, 4, 8, 8),
            output_type="np", height=16, width=16,
        ).images  # fmt: skip
        assert_same_pictures(made, drawn)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_outputs_and_gradients_are_those_of_peft_on_diffusers_unet(name: str, tmp_path: Path) -> None:
    """Where several projections share A, its gradient is the sum of theirs."""
    unet, theirs, config, sizes = pair(name)
    links = {f"unet.{link.ours}": link for link in unet_links(config, unet.state_dict(), "diffusers")}
    network = nn.Module()
    network.unet = unet
    add_adapters(network, LORA)
    named = dict(network.named_parameters())
    for _, up in adapted(named).values():
        nn.init.normal_(named[up], std=0.1)
    pairs = {
        key: (named[down].detach(), LORA.scale * named[up].detach())
        for key, (down, up) in adapted(named).items()
    }
    write_lora(pairs, str(tmp_path), config)
    theirs.load_lora_adapter(str(tmp_path), weight_name=LORA_FILE, prefix="unet", adapter_name="default")
    for key, parameter in theirs.named_parameters():
        parameter.requires_grad_(".lora_" in key)

    inputs = make_inputs(sizes, (16, 24))
    vector, added = added_conditions(sizes)
    expected = theirs_forward(theirs, inputs, added)
    ((expected - inputs["target"]) ** 2).mean().backward()
    got = unet(inputs["x"], inputs["timesteps"], inputs["context"], vector, None)
    ((got - inputs["target"]) ** 2).mean().backward()
    assert_close(got, expected, "prediction")

    gradients = {key: p.grad.flatten(1) for key, p in theirs.named_parameters() if p.grad is not None}
    used = set()
    for key, (down, up) in adapted(named).items():
        modules = [each.removesuffix(".weight") for each in links[key].theirs]
        into = [f"{module}.lora_A.default.weight" for module in modules]
        out = [f"{module}.lora_B.default.weight" for module in modules]
        assert_close(gradient(named[down]), sum((gradients[each] for each in into), torch.zeros(())), down)
        # In the file the scale is a part of B.
        rows = torch.cat([gradients[each] for each in out])
        assert_close(gradient(named[up]), LORA.scale * rows, up)
        used |= {*into, *out}
    assert used == gradients.keys()


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
