"""Run as a process of its own: every kernel as SD2's training launches it, compiled for an absent GPU.

A tile too large for a thread's registers spills to memory: nothing fails, and the kernel takes several times
as long. ptxas says what the machine code takes. Takes the compute capability (80: A100, 90: H100) and prints
one JSON list.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from trainer.config.io import load_config
from trainer.kernels.ahead import compile_launches
from trainer.kernels.softmax import softmax
from trainer.planning.kernels import compile_kernels

RANKS, THREADS = 64, 2


class AbsentGPU:
    """What Triton asks of a driver until it launches."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def softmax_of_rows() -> None:
    for cells in (4096, 16384, 32768):  # 512 px, 1024 px, the most
        softmax(torch.empty(1, 2, cells), 1.0, torch.bfloat16)


def machine_code(kernel: Any, capability: int) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, and how many of its accesses are of 16 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        target = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", target, str(source), "-o", str(source.with_suffix(".o"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) reg", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers, said
    assert spilled, said
    wide = re.findall(r"\b(?:ld|st)\.global[.\w:]*\.v4\.b32", kernel.asm["ptx"])
    return {"registers": int(registers[1]), "spilled": int(spilled[1]), "wide": len(wide)}


def main(capability: int) -> int:
    driver.set_active(AbsentGPU(capability))
    config = load_config("configs/sd/sd2_base_512.yaml", ["micro_batch_size=32"])
    kernels = compile_kernels(config, RANKS, THREADS)
    kernels += compile_launches(softmax_of_rows, THREADS)
    print(json.dumps([{"kernel": name, **machine_code(kernel, capability)} for name, kernel in kernels]))
    return 0


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing"
    sys.exit(main(int(sys.argv[1])))
