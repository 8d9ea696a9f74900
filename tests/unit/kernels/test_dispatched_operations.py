"""What one micro-batch of SD2 asks of a GPU, counted without one: operations, layout copies, host reads.

Tensors are on the meta device (shapes and strides, no data) and the fused operators are told to take them, so
the whole UNet and VAE run in seconds, and what is dispatched is what a GPU would be given. A count cannot say
how fast a kernel is; it says that nobody has put back the conversions, copies and synchronisations that made
half of the step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.io import load_config
from trainer.first_stage.build import build_first_stage
from trainer.first_stage.losses import PatchDiscriminator
from trainer.first_stage.perceptual import LAYERS, PerceptualDistance, VGG16Features
from trainer.kernels import language
from trainer.kernels.language import plain
from trainer.models.unet import UNet

from .whole_step import LayoutWatch, lies_channels_last

CONFIG = load_config("configs/sd/sd2_base_512.yaml", [])
BATCH, HEIGHT, WIDTH = 2, 40, 24  # no level has the size of a kernel, no head that of a level
VIEWS = ("view", "reshape", "permute", "transpose", "t.", "expand", "slice", "split", "unsqueeze", "detach")
VIEWS += ("prim", "alias", "as_strided", "select", "squeeze", "unbind", "empty", "chunk", "_unsafe_view")


class Recorder(LayoutWatch):
    """Counts what is dispatched, and notes what must not be."""

    def __init__(self) -> None:
        super().__init__(is_feature_map)
        self.launches: Counter[str] = Counter()
        self.forward = 0
        """Of them, those until the loss was there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result, name = func(*args, **(kwargs or {})), str(func)
        if name == "aten.convolution.default" and lies_channels_last(args[0]):
            result = channels_last(result)
        if name == "aten.convolution_backward.default" and lies_channels_last(args[1]):
            result = (channels_last(result[0]), *result[1:])
        if not any(name.removeprefix("aten.").startswith(view) for view in VIEWS):
            self.launches[name] += 1
        self.look(name, args, result)
        return result


def channels_last(value: Tensor | None) -> Tensor | None:
    """cuDNN answers in the layout of its input, which the meta device does not know."""
    return None if value is None else torch.empty_like(value, memory_format=torch.channels_last)


def is_feature_map(value: object) -> TypeGuard[Tensor]:
    """Not a weight (a kernel of 3 x 3 or 1 x 1), and large enough to have a layout."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 4
        and value.shape[0] == BATCH
        and value.shape[1] > 16
        and tuple(value.shape[2:]) not in ((3, 3), (1, 1), (4, 4))
        and value.shape[2] * WIDTH == value.shape[3] * HEIGHT
    )


def record(run: Callable[[], object]) -> Recorder:
    with Recorder() as recorder:
        run()
    return recorder


@pytest.fixture(autouse=True)
def fused_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as one operation, too, which the meta device would take apart."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    monkeypatch.setattr(language, "_RUNS_ON", {"meta"})
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: flash(*qkv)[0])


def unet_step() -> Recorder:
    with torch.device("meta"):
        unet = UNet(CONFIG.unet, in_channels=4, out_channels=4, context_dim=1024).bfloat16()
        x = torch.empty(BATCH, 4, HEIGHT, WIDTH, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        context = torch.empty(BATCH, 77, 1024, dtype=torch.bfloat16)
        timesteps = torch.empty(BATCH, dtype=torch.int64)
    parameters = list(unet.parameters())

    with Recorder() as recorder:
        loss = unet(x, timesteps, context).float().square().mean()
        recorder.forward = recorder.launches.total()
        torch.autograd.grad(loss, parameters)
    return recorder


def vae_encode() -> Recorder:
    with torch.device("meta"):
        stage = build_first_stage(CONFIG.first_stage).bfloat16().eval().requires_grad_(False)
        stage.to(memory_format=torch.channels_last)
        pixels = torch.empty(BATCH, 3, 8 * HEIGHT, 8 * WIDTH)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    return record(lambda: stage.encode(pixels))


def test_a_step_of_the_unet_stays_in_one_layout_and_fuses_what_surrounds_products() -> None:
    fused = unet_step()
    with plain():
        before = unet_step()
    assert not fused.channels_first, fused.channels_first[:5]
    assert not fused.layout_copies, fused.layout_copies[:5]
    assert fused.launches["aten._local_scalar_dense.default"] == 0
    assert before.channels_first, "the plain form has what this test looks for"
    assert before.launches["aten.silu.default"] + before.launches["aten.gelu.default"] > 60
    assert fused.launches["aten.silu.default"] == 2, "of the timestep embedding alone"
    assert fused.launches["aten.gelu.default"] == 0
    assert fused.launches["aten.add.Tensor"] < 0.5 * before.launches["aten.add.Tensor"]
    # Products, convolutions and attention are 683 of them, which nothing fuses away, and sums of parameters'
    # gradients, small operations of their own, make backward longer than plain torch's. What takes launches
    # away is `distributed.cuda_graphs`. After DeepSpeed's engine has run in this process, 16 linear layers
    # are a product and a sum (527), else one operation (511).
    assert fused.forward < 530 < before.forward
    assert fused.launches.total() - fused.forward < 1150


def first_stage_step() -> Recorder:
    """Training of the first stage: encoder, decoder, LPIPS, discriminator, and all gradients."""
    with torch.device("meta"):
        stage = build_first_stage(CONFIG.first_stage).bfloat16().to(memory_format=torch.channels_last)
        judge = PatchDiscriminator(channels=64, num_layers=3).bfloat16().to(memory_format=torch.channels_last)
        weights = [torch.empty(widths[-1]) for widths in LAYERS]
        distance = PerceptualDistance(VGG16Features(), weights, "LPIPS", is_lpips=True)
        pixels = torch.empty(BATCH, 3, 8 * HEIGHT, 8 * WIDTH, dtype=torch.bfloat16)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        noise = torch.empty(BATCH, 4, HEIGHT, WIDTH)

    def run() -> None:
        made = stage(pixels, noise)
        picture = made["reconstruction"]
        error = (picture - pixels).abs().mean() + distance(picture, pixels).mean()
        (error + made["kl"].mean() - judge(picture).mean()).backward()

    return record(run)


def test_training_of_a_first_stage_stays_in_one_layout() -> None:
    fused = first_stage_step()
    with plain():
        before = first_stage_step()
    assert not fused.channels_first, fused.channels_first[:5]
    assert not fused.layout_copies, fused.layout_copies[:5]
    assert fused.launches["aten._local_scalar_dense.default"] == 0
    assert before.channels_first, "the plain form has what this test looks for"
    assert fused.launches.total() < 1000


def test_encoding_stays_in_one_layout_without_padded_copies() -> None:
    fused = vae_encode()
    assert not fused.channels_first, fused.channels_first[:5]
    assert not fused.layout_copies, fused.layout_copies[:5]
    assert fused.launches["aten._local_scalar_dense.default"] == 0
    assert fused.launches["aten.constant_pad_nd.default"] == 3, "kernels of the strided convolutions alone"
    assert fused.launches.total() < 110


def test_nothing_of_a_whole_step_waits_for_the_device_or_leaves_the_layout(tmp_path: Path) -> None:
    """Encoders, draws, noise, UNet, loss, sums of gradients, clipping, AdamW, averages: the parts of
    `ldm train`, on a CPU, with the kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    script, root = Path(__file__).with_name("whole_step.py"), str(Path(__file__).parents[3])
    variables = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["maps"] > 300
    assert found["channels_first"] == found["layout_copies"] == []
    launches = {phase: launched(Counter(names)) for phase, names in found["found"].items()}
    every = sum(launches.values(), Counter[str]())
    assert not [name for name in every if "_local_scalar_dense" in name or "nonzero" in name]
    # Posterior, timestep, noise and what is dropped, of each of two micro-batches; 802 operations once.
    assert every["ldm.draw.default"] == 4 * 2
    assert launches["optimizer"].total() < 25, launches["optimizer"]
    assert launches["optimizer"]["aten._fused_adamw_.default"] == 1
    assert launches["average"] == {"aten._foreach_lerp_.Scalar": 1}
    assert launches["rest"].total() < 10, launches["rest"]


def launched(names: Counter[str]) -> Counter[str]:
    """Without views and the profiler's marks."""
    silent = (*VIEWS, "lift")
    kept = {n: c for n, c in names.items() if not n.removeprefix("aten.").startswith(silent)}
    return Counter({name: count for name, count in kept.items() if not name.startswith("profiler")})
