"""Weight files of other programs: safetensors, and torch files without running what they contain."""

from __future__ import annotations

import io
import pickle

import fsspec
import torch
from torch import Tensor

from trainer.config.run import ConfigError
from trainer.weights import read_weights

TORCH_ENDINGS = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_ENDINGS = (".safetensors", *TORCH_ENDINGS)


class _InertCallback:
    """Stands for the Lightning class that old checkpoints use as a dictionary key; never instantiated."""


INERT_NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)


def read_tensors(url: str) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .ckpt, .pt or .pth file at any fsspec URL, on the CPU.

    Torch files are read with weights_only: tensors and plain containers, no code.

    Raises:
        ConfigError: no such file, not such a file, or a torch file that wants to run code.
    """
    if url.endswith(TORCH_ENDINGS):
        return _read_torch(url)
    return read_weights(url)[0]


def _read_torch(url: str) -> dict[str, Tensor]:
    try:
        with fsspec.open(url, "rb") as file:
            data = io.BytesIO(file.read())
    except FileNotFoundError as error:
        raise ConfigError(f"there is no weights file at {url}; check the path or URL.") from error
    try:
        with torch.serialization.safe_globals([(_InertCallback, name) for name in INERT_NAMES]):
            content = torch.load(data, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{url} holds more than tensors and was not read, since unpickling it could run code; "
            "convert it to safetensors on a machine that trusts it."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(f"{url} is not a torch weights file ({error}).") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ConfigError(f"{url} holds no dictionary of tensors.")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
