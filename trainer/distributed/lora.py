"""Low-rank adapters on linear layers of the UNet (LoRA, Hu et al. 2021): the only file that imports peft.

peft wraps itself around a layer W [out, in] and adds s B A x to what it gives, A [r, in] drawn and B [out, r]
zero at first, so that the network begins as it was. Of unet.mid_block...attn2.to_q.weight it makes

    unet.mid_block...attn2.to_q.base_layer.weight          frozen
    unet.mid_block...attn2.to_q.lora_A.default.weight      trained
    unet.mid_block...attn2.to_q.lora_B.default.weight      trained

Engines, averages and checkpoints know the last two as they know any parameter. A checkpoint keeps W under its
first name (frozen.py), and whoever reads the network gets W + s B A (`checkpoint.reader.NetworkReader`):
sampling, exports and runs that begin from it know nothing of adapters.

q, k and v are one product here (to_qkv, to_kv): they share A, and each has rows of B for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from trainer.config.run import ConfigError
from trainer.config.training import LoRAConfig
from trainer.distributed.frozen import hint, is_named

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(network: nn.Module, config: LoRAConfig | None) -> None:
    """Freeze `network` and wrap trained adapters around the layers that are named; None: nothing.

    A is drawn from torch's global generator.

    Args:
        network: with its UNet as `unet`.

    Raises:
        ConfigError: a pattern names no linear layer of the UNet, or peft is not installed.
    """
    if config is None:
        return
    modules = network.named_modules()
    layers = [name for name, m in modules if name.startswith("unet.") and isinstance(m, nn.Linear)]
    for pattern in config.targets:
        if not any(is_named(pattern, name) for name in layers):
            near = hint(pattern, layers)
            raise ConfigError(f"lora.targets names {pattern!r}, which is no linear layer of the UNet; {near}")
    peft = _import_peft()
    network.requires_grad_(False)
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.rank * config.scale,
        lora_dropout=config.dropout,
        target_modules=[name for name in layers if any(is_named(p, name) for p in config.targets)],
    )
    peft.inject_adapter_in_model(wanted, network)


def adapted(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Names of A and B by that of the weight that they adapt, of all adapters among the named parameters."""
    downs = [name for name in names if name.endswith(_A)]
    return {f"{down.removesuffix(_A)}.weight": (down, f"{down.removesuffix(_A)}{_B}") for down in downs}


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + scale B A, [out, in] fp32; computed in fp64, so that it is rounded once."""
    return (weight.double() + scale * (up.double() @ down.double())).float()


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"lora needs peft, which cannot be imported ({error}); install it with pip install "
            "'latent-diffusion-trainer[lora]', or remove lora."
        ) from error
    return peft
