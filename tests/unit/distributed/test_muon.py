"""Muon's pieces: the iteration, which parameters it takes, how large its steps are, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.config.io import load_config
from trainer.config.run import Config, ConfigError
from trainer.config.training import DistributedConfig, OptimizerConfig
from trainer.distributed.env import DistributedEnv
from trainer.distributed.muon import is_matrix, orthogonalised
from trainer.distributed.torch_engine import TorchEngine


@pytest.mark.parametrize("shape", [(4, 4), (6, 40), (40, 6), (2, 300)])
def test_singular_values_become_about_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    """Between 0.6 and 1.25 wherever they were above 1 % of the norm (Jordan et al. 2024)."""
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalised(1e3 * matrix)
    assert made.dtype == torch.bfloat16
    assert made.shape == shape
    in_their_basis = left.T @ made.float() @ right.T
    values = in_their_basis.diagonal()
    assert (values > 0.6).all()
    assert (values < 1.25).all()
    assert (in_their_basis - values.diag()).abs().max() < 0.05


def test_nothing_moves_without_a_gradient() -> None:
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "shape", "taken"),
    [
        ("unet.down_blocks.0.resnets.0.conv1.weight", (32, 16, 3, 3), True),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_qkv.weight", (96, 32), True),
        ("unet.time_embedding.linear_1.weight", (64, 16), True),
        ("unet.conv_in.weight", (16, 4, 3, 3), False),
        ("unet.conv_out.weight", (4, 16, 3, 3), False),
        ("unet.conv_norm_out.weight", (16,), False),
        ("conditions.parts.class_label.embedding.weight", (10, 16), False),
        ("unet.class_embedding.weight", (10, 16), False),
        ("conditions.parts.text_transformer.positional_embedding", (77, 16), False),
        ("uncertainty.linear.weight", (1, 128), False),
        ("unet.a.weight", (8, 1, 1, 1), False),
    ],
)
def test_hidden_matrices_are_taken(name: str, shape: tuple[int, ...], taken: bool) -> None:
    assert is_matrix(name, shape) == taken


def test_a_step_is_as_large_as_adamws() -> None:
    """0.2 times the rate, root mean square, whatever the gradient's size; vectors move by the rate."""
    config = Config(
        global_batch_size=2,
        micro_batch_size=2,
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.0, max_grad_norm=0.0),
        distributed=DistributedConfig(engine="torch", precision="fp32"),
    )
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    engine = TorchEngine(network, config, DistributedEnv.detect({}))
    engine.backward(1e-3 * engine(torch.randn(64, 64)).square().mean())
    engine.step(1e-2)
    for name, parameter in network.named_parameters():
        moved = (parameter.detach() - before[name]).square().mean().sqrt().item()
        expected = 2e-3 if name.endswith("weight") else 1e-2
        assert moved == pytest.approx(expected, rel=0.25), name
    assert engine.optimizer_steps == 1
    squares = {f.name: f.moments["exp_avg_sq"].any().item() for f in engine.fragments()}
    assert squares == {name: name.endswith("bias") for name in before}


def test_matrices_taken_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match="zero_stage to 2 or lower"):
        load_config(None, ["optimizer.name=muon", "distributed.zero_stage=3"])
    load_config(None, ["optimizer.name=muon", "distributed.zero_stage=3", "distributed.engine=torch"])
