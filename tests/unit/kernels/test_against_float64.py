"""The fused operators in Triton's interpreter against float64, and what torch.compile is told about them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.kernels import geglu, group_norm, layer_norm, residual
from trainer.kernels.language import fused

AGREEMENT = Path(__file__).with_name("interpreted.py")


def run_agreement(**environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[3])
    return subprocess.run(
        [sys.executable, str(AGREEMENT)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_every_kernel_and_gradient_equals_plain_torch_in_the_interpreter() -> None:
    """Triton reads the switch when it is imported, so this takes a process of its own."""
    pytest.importorskip("triton")
    ended = run_agreement(TRITON_INTERPRET="1")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "all kernels agree" in ended.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kernel_and_gradient_equals_plain_torch_on_the_gpu() -> None:
    ended = run_agreement(TRITON_INTERPRET="0")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "all kernels agree" in ended.stdout


def test_a_cpu_takes_the_plain_form() -> None:
    assert not fused(torch.zeros(1))


def test_results_without_data_have_the_right_shapes_and_layout() -> None:
    """What torch.compile believes: no data, no launch, channels-last stays channels-last."""
    with FakeTensorMode():
        x = torch.empty(2, 64, 5, 7, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        weight = torch.empty(64, device="cuda", dtype=torch.bfloat16)
        y, lines, deviations = group_norm.group_norm_forward(x, None, weight, weight, 8, 1e-5, True)
        assert y.shape == x.shape
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (lines.shape, deviations.shape) == ((2, 4, 64), (2, 8))
        dx, gradients = group_norm.group_norm_backward(x, y, None, weight, lines, deviations, 8, True)
        assert dx.is_contiguous(memory_format=torch.channels_last)
        assert gradients.shape == (2, 3, 64)
        both = residual.concatenate_forward(x, x)
        assert both.shape == (2, 128, 5, 7)
        assert both.is_contiguous(memory_format=torch.channels_last)
        tokens = torch.empty(2, 35, 64, device="cuda", dtype=torch.bfloat16)
        stream, normed, moments = layer_norm.add_layer_norm_forward(
            tokens, tokens, None, weight, weight, 1e-5
        )
        assert stream.shape == normed.shape == tokens.shape
        assert moments.shape == (70, 2)
        assert geglu.geglu_forward(tokens, weight).shape == (2, 35, 32)
