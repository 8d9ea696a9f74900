"""The autoencoder stage gives the same weights on any number of ranks and at every ZeRO stage."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.weights import read_weights

SCRIPT = Path(__file__).with_name("autoencoder_ranks.py")
ROOT = Path(__file__).resolve().parents[3]


def run_ranks(
    folder: Path, world_size: int, engine: str, zero_stage: int, name: str
) -> dict[str, torch.Tensor]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = folder / f"{engine}{zero_stage}{name}{world_size}.safetensors"
    processes = []
    for rank in range(world_size):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        environment = {
            **os.environ,
            **{key: str(value) for key, value in places.items()},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, str(SCRIPT), engine, str(zero_stage), name, str(output)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    logs = [process.communicate()[0].decode() for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * world_size, "\n".join(log[-3000:] for log in logs)
    return read_weights(str(output))[0]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """One rank, two micro-batches, plain torch."""
    folder = tmp_path_factory.mktemp("reference")
    return {name: run_ranks(folder, 1, "torch", 0, name) for name in ("kl", "vq")}


def assert_same(made: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert made.keys() == expected.keys()
    assert any(name.startswith("discriminator.") for name in made)
    assert "autoencoder.logvar" in made
    for name, value in expected.items():
        # Steps are up to 1e-3 long, so a gradient that is wrong by a percent is well above 5e-6. What
        # stays below is rounding, which ReLU and the codebook's choices amplify from step to step.
        torch.testing.assert_close(made[name], value, rtol=2e-3, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_two_ranks_equal_one_with_accumulation(
    tmp_path: Path, reference: dict[str, dict[str, torch.Tensor]]
) -> None:
    assert_same(run_ranks(tmp_path, 2, "torch", 0, "vq"), reference["vq"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero_stage"), [("vq", 0), ("kl", 1), ("vq", 2), ("kl", 3)])
def test_zero_stages_equal_plain_torch(
    tmp_path: Path, reference: dict[str, dict[str, torch.Tensor]], name: str, zero_stage: int
) -> None:
    assert_same(run_ranks(tmp_path, 2, "deepspeed", zero_stage, name), reference[name])
