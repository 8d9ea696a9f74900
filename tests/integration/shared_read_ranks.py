"""What the ranks of test_shared_reads.py run."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from data_pipeline.errors import Failure
from trainer.config.io import load_config
from trainer.distributed import shared_reads
from trainer.distributed.env import DistributedEnv
from trainer.distributed.shared_reads import read_together, tensors_from_main_rank
from trainer.interop.initialise import initialise
from trainer.model import build_model
from trainer.weights import read_tensors, read_weights


def digest(value: object) -> str:
    """Of shapes, types and bits of all tensors."""
    found = hashlib.sha256()
    for tensor in pytree.tree_leaves(value):
        if isinstance(tensor, Tensor):
            found.update(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device}".encode())
            found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def values(env: DistributedEnv) -> list[Any]:
    """Tensors of every kind, most of them larger than a bucket; what lies beside them, and their bits."""
    shared_reads.BUCKET_BYTES = 37

    def make() -> Any:
        with torch.device("cpu"):  # as files are read
            return made()

    def made() -> Any:
        torch.manual_seed(5)
        wide = torch.randn(7, 5)
        kinds = {
            str(kind): wide.to(kind) for kind in (torch.bfloat16, torch.float16, torch.float64, torch.int64)
        }
        return {
            "nested": [wide, (wide.t(), "a word")],  # whose columns do not lie one after the other
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(2.5),
            "bits": wide > 0,
            "nan": torch.full((3,), torch.nan),
            **kinds,
        }, {"step": 7}

    with torch.device("meta"):  # as where a module is being built; what is read is on the CPU all the same
        got, beside = tensors_from_main_rank(make, env.device)
    return [digest(got), digest(make()), beside, got["nested"][1][1]]


def failure(env: DistributedEnv, path: str, torch_file: bool) -> list[str]:
    """What a rank is told of a file that is not as it should be; only rank 0 has it, or has it not."""
    os.chdir(Path(path) / ("main" if env.is_main else "other"))
    try:
        with read_together(env.device):
            read_tensors("weights.safetensors") if torch_file else read_weights("weights.safetensors")
    except Failure as error:
        return [type(error).__name__, str(error)]
    return []


def slow(env: DistributedEnv) -> int:
    """Rank 0 reads until every rank has heard of it twice; how often this rank heard."""
    heard, twice = [], threading.Event()

    def alive() -> None:
        heard.append(1)
        if len(heard) == 2:
            twice.set()

    def read() -> None:
        assert twice.wait(300.0)

    tensors_from_main_rank(read, env.device, alive)
    return len(heard)


def model(env: DistributedEnv, path: str, settings: list[str]) -> dict[str, str]:
    """Every network of a second stage; only rank 0's folder has the files."""
    os.chdir(Path(path) / ("main" if env.is_main else "other"))
    torch.manual_seed(env.rank)  # what is not read from a file would differ
    config = load_config(None, settings)
    with read_together(env.device):
        built = build_model(config, env.device)
        initialise(built.network, read_weights("start.safetensors")[0])
    return {
        "first stage": digest(built.first_stage.state_dict()),
        "network": digest(built.network.state_dict()),
    }
