"""Run as a process of its own: every kernel as SD2's training launches it, compiled for an absent GPU.

Networks run on the meta device, launches stop after compilation, and ptxas says what the machine code takes.
A tile too large for a thread's registers spills to memory: nothing fails, and the kernel takes several times
as long. Takes the compute capability (80: A100, 90: H100) and prints one JSON list.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from trainer.kernels import language

LAUNCHES: dict[str, Callable[..., Any]] = {}
"""Of operators, by their names."""
_register = language.register


def _recorded(schema: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    LAUNCHES[f"ldm::{schema.partition('(')[0]}"] = kernel
    return _register(schema, kernel, shapes)


language.register = _recorded  # before the operators are defined

from trainer.config.io import load_config  # noqa: E402
from trainer.first_stage.build import build_first_stage  # noqa: E402
from trainer.kernels import philox  # noqa: E402
from trainer.kernels.accumulate import FlatGradients  # noqa: E402
from trainer.kernels.softmax import softmax  # noqa: E402
from trainer.models.unet import UNet  # noqa: E402


class AbsentGPU:
    """What Triton asks of a driver until it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launching(TorchDispatchMode):
    """Operators go to their launches, instead of to what they say of tensors without data."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return LAUNCHES.get(func._schema.name, func)(*args, **(kwargs or {}))


def all_launches() -> None:
    """SD2 at 512 px: a micro-batch of 32 through encoder and UNet, its gradients, and draws."""
    config = load_config("configs/sd/sd2_base_512.yaml", [])
    last = torch.channels_last

    def empty(*shape: int) -> Tensor:
        x = torch.empty(shape, dtype=torch.bfloat16)
        return x.contiguous(memory_format=last) if x.dim() == 4 else x

    with torch.device("meta"), language.counted_on_meta(), Launching():
        unet = UNet(config.unet, in_channels=4, out_channels=4, context_dim=1024).bfloat16()
        output = unet(empty(32, 4, 64, 64), torch.empty(32, dtype=torch.int64), empty(32, 77, 1024))
        output.float().square().mean().backward()
        sizes = [parameter.numel() for parameter in unet.parameters()]
        sums = FlatGradients(torch.zeros(sum(sizes)), sizes)
        sums.add([parameter.grad for parameter in unet.parameters()])
        stage = build_first_stage(config.first_stage).bfloat16().to(memory_format=last)
        with torch.no_grad():
            stage.encode(empty(32, 3, 512, 512))
        for cells in (4096, 16384, 32768):  # 512 px, 1024 px, the most
            softmax(torch.empty(1, 2, cells), 1.0, torch.bfloat16)
        for normal in (True, False):
            philox.draw(torch.empty(32, dtype=torch.int64), 0, 0, 4 * 64 * 64, normal)


def machine_code(kernel: Any, capability: int) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, and how many of its accesses are of 16 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        target = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", target, str(source), "-o", str(source.with_suffix(".o"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        re.search(r"Used (\d+) registers", said),
        re.search(r"(\d+) bytes spill stores", said),
    )
    assert registers, said
    assert spilled, said
    wide = re.findall(r"\b(?:ld|st)\.global[.\w:]*\.v4\.b32", kernel.asm["ptx"])
    return {"registers": int(registers[1]), "spilled": int(spilled[1]), "wide": len(wide)}


def main(capability: int) -> int:
    # Not what is looked at, and taken apart on the meta device; gradients reach all three.
    F.scaled_dot_product_attention = lambda q, k, v: q + (k + v).mean(2, keepdim=True)
    compiled: dict[str, tuple[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, warmup=True, **options)
        compiled[kernel.hash] = (self.fn.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    driver.set_active(AbsentGPU(capability))
    all_launches()
    found = [{"kernel": name, **machine_code(kernel, capability)} for name, kernel in compiled.values()]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing"
    sys.exit(main(int(sys.argv[1])))
