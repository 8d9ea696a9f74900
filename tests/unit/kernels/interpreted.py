"""Run as a process of its own with TRITON_INTERPRET=1: every kernel against plain torch in float64."""

from __future__ import annotations

import contextlib
import sys

import torch
from torch import Tensor

from trainer import rng
from trainer.config.models import FirstStageConfig, UNetConfig
from trainer.first_stage.autoencoders import AutoencoderKL
from trainer.kernels.accumulate import CHUNK, TILE, FlatGradients
from trainer.kernels.geglu import geglu
from trainer.kernels.group_norm import GroupNorm
from trainer.kernels.language import INTERPRETED, fused, plain
from trainer.kernels.layer_norm import LayerNorm
from trainer.kernels.residual import add_residual, concatenate
from trainer.kernels.softmax import softmax, wide_attention
from trainer.models.attention import SpatialTransformer
from trainer.models.layers import ResBlock
from trainer.models.unet import UNet

DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 6e-3}


def compare(name: str, dtype: torch.dtype, function, inputs: list[Tensor]) -> None:
    """Outputs and gradients of `function(*inputs)`, fused in `dtype` against plain in float64."""
    results = []
    for kind in (dtype, torch.float64):
        own = [x.detach().to(kind).requires_grad_() for x in inputs]
        if kind == torch.float64:
            with plain():
                outputs = function(*own)
        else:
            assert fused(own[0])
            outputs = function(*own)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.linspace(-1, 1, o.numel(), device=DEVICE).view(o.shape).cos() for o in outputs]
        total = sum((o.double() * w.double()).sum() for o, w in zip(outputs, weights, strict=True))
        results.append([*outputs, *torch.autograd.grad(total, own)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert got.shape == want.shape, (name, i, got.shape, want.shape)
        error = float(((got.double() - want).norm() / want.norm().clamp_min(1e-30)).detach())
        assert error < TOLERANCE[dtype], f"{name} {dtype} value {i}: relative error {error:.2e}"


def random(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator).add_(mean)
    # What bf16 can hold, or the comparison would measure the rounding of the inputs.
    x = x.bfloat16().float().to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def group_norms() -> None:
    # Channels per group that are no power of two, odd sizes, one sample, one cell, a mean far from zero.
    shapes = [(3, 40, 4, 7, 8, 0.0), (1, 320, 32, 5, 3, 2.0), (2, 96, 8, 9, 9, 30.0), (2, 64, 1, 4, 4, 0.0)]
    shapes += [(1, 120, 2, 1, 1, 1.0), (2, 240, 6, 3, 11, 0.0), (1, 160, 2, 33, 31, 0.0)]
    shapes += [(1, 40, 2, 5, 2, 1.0), (2, 60, 2, 2, 7, 0.0)]
    if not INTERPRETED:  # SD2's first, deepest and widest maps, and its first stage's
        shapes += [(4, 320, 32, 64, 64, 0.5), (4, 1280, 32, 8, 8, 0.0), (2, 2560, 32, 16, 16, 0.0)]
        shapes += [(1, 128, 32, 512, 512, 1.0)]
    for batch, channels, groups, height, width, mean in shapes:
        x = random(batch, channels, height, width, mean=mean)
        shift, weight, bias = (
            random(batch, channels, seed=1),
            random(channels, seed=2),
            random(channels, seed=3),
        )
        norm = GroupNorm(groups, channels, eps=1e-5).to(DEVICE)

        def run(x, weight, bias, *shift, silu, norm=norm):
            norm._parameters.clear()
            norm.weight, norm.bias = weight, bias
            x, y = norm(x, *shift, silu=silu, fork=True)
            assert not fused(x) or y.is_contiguous(memory_format=torch.channels_last)
            return x * 0.5, y

        for dtype in TOLERANCE:
            name = f"group norm {tuple(x.shape)} / {groups}"
            compare(name, dtype, lambda *a: run(*a, silu=False), [x, weight, bias])
            compare(name + " silu shift", dtype, lambda *a: run(*a, silu=True), [x, weight, bias, shift])


def layer_norms() -> None:
    shapes = [(7, 40), (130, 320), (1, 96)]
    for rows, channels in shapes if INTERPRETED else [*shapes, (4096, 320), (1024, 1280)]:
        x, branch = random(1, rows, channels, mean=1.0), random(1, rows, channels, seed=4)
        weight, bias, pending = (random(channels, seed=s) for s in (5, 6, 7))
        norm = LayerNorm(channels).to(DEVICE)

        def run(x, weight, offset, *rest, norm=norm):
            norm._parameters.clear()
            norm.weight, norm.bias = weight, offset
            x, y = norm(x, *rest)
            return x * 0.5, y

        for dtype in TOLERANCE:
            compare("layer norm", dtype, run, [x, weight, bias])
            compare("branch", dtype, run, [x, weight, bias, branch])
            compare("branch and bias", dtype, run, [x, weight, bias, branch, pending])


def others() -> None:
    for dtype in TOLERANCE:
        shapes = [(5, 40), (67, 320)]
        for rows, width in shapes if INTERPRETED else [*shapes, (4096, 1280), (256, 5120)]:
            compare("geglu", dtype, geglu, [random(2, rows, 2 * width), random(2 * width, seed=1)])
            compare(
                "add",
                dtype,
                add_residual,
                [random(2, rows, width), random(2, rows, width, seed=1), random(width, seed=2)],
            )
        shape = (2, 40, 5, 7) if INTERPRETED else (4, 640, 32, 32)
        compare("add maps", dtype, add_residual, [random(*shape), random(*shape, seed=1), random(shape[1])])
        wide = (shape[0], 96, *shape[2:])
        compare("concatenate", dtype, concatenate, [random(*shape), random(*wide, seed=1)])


def random_numbers() -> None:
    """The same bits, at counts that are no multiple of four and ordinals and seeds above 32 bits."""
    for seed in (0, 1, 2**40 + 7, 2**63 - 1):
        for ordinals in ([5], [0, 1, 2**33 + 5, 2**62 - 1]):
            where = torch.tensor(ordinals, device=DEVICE)
            for shape in ((), (1,), (3, 7), (4, 33, 9)):
                for draw in (rng.normal, rng.uniform):
                    made = draw(seed, where, 1, shape)
                    with plain():
                        want = draw(seed, where, 1, shape)
                    assert made.shape == want.shape
                    assert torch.equal(made, want), f"{draw.__name__} {seed} {ordinals} {shape}"


def softmaxes() -> None:
    scores = random(3, 5, 70, mean=2.0) * 4
    want = torch.softmax(0.3 * scores.double(), dim=-1)
    assert float((softmax(scores, 0.3, torch.float32) - want).abs().max()) < 1e-6
    assert float((softmax(scores, 0.3, torch.bfloat16) - want).abs().max()) < 4e-3
    if not INTERPRETED:  # the product with fp32 results is there on GPUs alone
        q, k, v = (random(3, 96, 512, seed=i).bfloat16() for i in range(3))
        with torch.no_grad():
            got = wide_attention(q, k, v)
            with plain():
                want = wide_attention(q.double(), k.double(), v.double())
        assert float((got - want).norm() / want.norm()) < 1e-2


def flat_gradients() -> None:
    """Parameters larger than a chunk, smaller ones, one without a gradient, and padding left alone."""
    for sizes in ([5, CHUNK + 3, 1, 2 * CHUNK, 40], [8, CHUNK + TILE + 20, 4, 2 * CHUNK, 3 * TILE]):
        flat = torch.arange(sum(sizes) + 9, dtype=torch.float32, device=DEVICE)
        for dtype in (torch.bfloat16, torch.float32):
            gradients = [random(size, seed=i).to(dtype) for i, size in enumerate(sizes)]
            gradients[2] = None
            want = flat.clone()
            with plain():
                FlatGradients(want, sizes).add(gradients)
            got = flat.clone()
            FlatGradients(got, sizes).add(gradients)
            assert torch.equal(got, want)
            assert not torch.equal(got, flat)
            assert torch.equal(got[-9:], flat[-9:])


def flat_gradients_of_kernels() -> None:
    """Channels-last kernels of convolutions, larger than a chunk and smaller, added in logical order."""
    shapes = [(40, 96, 3, 3), (5,), (3, 7, 2, 3), (6, 5, 1, 1), (1, 3, 4, 4), (30, 3, 3, 3)]
    gradients = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    gradients[-1] = gradients[-1].transpose(0, 1).contiguous().transpose(0, 1)  # neither layout
    sizes = [gradient.numel() for gradient in gradients]
    assert sizes[0] > CHUNK
    for dtype in (torch.bfloat16, torch.float32):
        flat = torch.linspace(0, 1, sum(sizes), device=DEVICE)
        want = flat + torch.cat([g.to(dtype).float().flatten() for g in gradients])
        FlatGradients(flat, sizes).add([gradient.to(dtype) for gradient in gradients])
        assert torch.equal(flat, want)


def whole_networks() -> None:
    """A UNet with every kind of block, and an autoencoder: outputs and all gradients, fused against plain."""
    configs = [
        UNetConfig(model_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, head_dim=8, num_groups=4),
        UNetConfig(
            model_channels=16,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_factors=(2,),
            attention="plain",
            head_dim=8,
            num_groups=4,
            scale_shift_norm=True,
            resblock_updown=True,
        ),
    ]
    networks = [UNet(c, in_channels=4, out_channels=4, context_dim=6) for c in configs]
    x, context, pixels = random(2, 4, 7, 5), random(2, 3, 6, seed=1), random(1, 3, 16, 16, seed=2)
    calls = [lambda n: n(x, torch.tensor([3, 500], device=DEVICE), context)] * 2
    stage = AutoencoderKL(FirstStageConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1))
    calls.append(lambda n: torch.cat([v.flatten() for v in n(pixels, None).values()]))
    for network, call in zip([*networks, stage], calls, strict=True):
        network.to(DEVICE)
        for i, parameter in enumerate(network.parameters()):
            parameter.data = random(*parameter.shape, seed=i).mul_(0.2)
        results = []
        for context_manager in (contextlib.nullcontext, plain):
            with context_manager():
                y = call(network)
                loss = y.double().square().mean()
                results.append([y, *torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)])
        names = ["output", *(name for name, _ in network.named_parameters())]
        for name, got, want in zip(names, *results, strict=True):
            if want is None:
                assert got is None, name
                continue
            error = float((got - want).detach().norm() / want.detach().norm().clamp_min(1e-12))
            assert error < 1e-4 or float(want.detach().abs().max()) < 1e-6, f"{name}: {error:.2e}"


def compiled_blocks() -> None:
    """torch.compile sees our operators as nodes: one graph without a break, the same values and gradients."""
    context = random(2, 3, 6, seed=5)
    blocks = [
        (ResBlock(16, 32, 24, groups=4), random(2, 24, seed=4)),
        (SpatialTransformer(16, 2, 6, depth=1, groups=4), context),
    ]
    for block, condition in blocks:
        block.to(DEVICE)
        for i, parameter in enumerate(block.parameters()):
            parameter.data = random(*parameter.shape, seed=i).mul_(0.2)
        inputs = [random(2, 16, 6, 5).requires_grad_(), condition.requires_grad_()]
        results = []
        for call in (block, torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)):
            y = call(*inputs)
            results.append(
                [y, *torch.autograd.grad(y.square().sum(), [*inputs, *block.parameters()], allow_unused=True)]
            )
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # or convolutions would be what the comparison sees
    group_norms()
    layer_norms()
    others()
    random_numbers()
    flat_gradients()
    flat_gradients_of_kernels()
    softmaxes()
    whole_networks()
    compiled_blocks()
    print("all kernels agree")
    sys.exit(0)
