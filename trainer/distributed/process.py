"""What a rank's process has once: how fp32 is rounded, on which cores it runs, when garbage is collected.

Set here, once, and told in the log of the start; nothing else in training touches these switches.

- TF32 and cuDNN's choice of algorithms are switches of libraries, whose defaults moved between versions. The
  allocator's are PyTorch's own variables, which must be there before a process first uses its GPU: told here,
  set by whoever starts the run.
- A GPU hangs on one of a machine's memory nodes. A process on the other one sends every launch and every
  batch through the link between the two.
- Python collects garbage when enough objects have been made, which is at another step on each rank, and all
  others wait for that one. So all do it at the same step, and what exists since the start is left alone.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from trainer.config.training import DistributedConfig
from trainer.kernels.language import use_kernels

SYSFS = Path("/sys")

logger = logging.getLogger(__name__)


def configure_process(config: DistributedConfig) -> None:
    """The switches that decide speed and rounding: kernels, TF32, and cuDNN's algorithms."""
    use_kernels(config.fuses)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = config.tf32 != "off"
    torch.backends.cuda.matmul.allow_tf32 = config.tf32 == "all"


def describe_process(config: DistributedConfig, device: torch.device) -> str:
    """How this process computes, as the switches stand now: one line for the log."""
    about = [f"torch {torch.__version__}", f"{config.precision} compute"]
    if device.type != "cuda":
        return ", ".join([*about, f"{torch.get_num_threads()} threads of a CPU"])
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    rounded = {(True, True): "all products", (True, False): "convolutions"}.get((convolutions, products))
    about += [
        f"TF32 for {rounded or 'nothing'}",
        f"cuDNN {torch.backends.cudnn.version()}, which "
        f"{'times' if torch.backends.cudnn.benchmark else 'chooses'} its algorithms",
        f"deterministic {'on' if torch.are_deterministic_algorithms_enabled() else 'off'}",
        f"fused kernels {'on' if config.fuses else 'off'}",
        f"allocator {allocator_settings() or 'as PyTorch has it'}",
    ]
    return ", ".join(about)


def allocator_settings() -> str | None:
    """What the environment asks of PyTorch's caching allocator: its newer variable, or else the older one."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return next((value for name in names if (value := os.environ.get(name))), None)


def bind_to_node(device: torch.device, sysfs: Path = SYSFS) -> str:
    """Let this process, and whatever it starts later, run on the cores beside its GPU alone.

    Cores that a launcher has taken away stay away; where none beside the GPU is left, nothing changes.

    Returns:
        What was done, for the log.
    """
    if device.type != "cuda":
        return "cores as given"
    properties: Any = torch.cuda.get_device_properties(device)  # the stubs know no PCI addresses
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    allowed = os.sched_getaffinity(0)
    near = cores_beside(address, sysfs)
    chosen = allowed & near
    if not chosen or chosen == allowed:
        return f"cores as given ({len(allowed)}, of which {len(chosen)} beside the GPU)"
    for thread in Path("/proc/self/task").iterdir():  # those that run already do not follow this one
        try:
            os.sched_setaffinity(int(thread.name), chosen)
        except ProcessLookupError:
            continue
    return f"{len(chosen)} of {len(allowed)} cores, those beside the GPU {address}"


def cores_beside(address: str, sysfs: Path = SYSFS) -> Set[int]:
    """Cores of the memory node that a PCI device hangs on; none where the machine does not say.

    Args:
        address: domain:bus:device.function, in lower-case hexadecimal digits.
    """
    try:
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
        if node < 0:  # one node alone, or a virtual machine that hides them
            return frozenset()
        return listed_cores((sysfs / f"devices/system/node/node{node}/cpulist").read_text())
    except (OSError, ValueError) as error:
        logger.debug("nothing says on which memory node %s is: %s", address, error)
        return frozenset()


def listed_cores(text: str) -> Set[int]:
    """Numbers of a list as the kernel writes it.

    >>> sorted(listed_cores("0-2,8,10-11"))
    [0, 1, 2, 8, 10, 11]
    """
    cores: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    return cores


class GarbageCollection:
    """Python's, at the same steps on all ranks."""

    def __init__(self, every: int) -> None:
        """`every`: steps between collections; 0 leaves them to Python."""
        self._every = every
        self._begun = False

    def turn(self, step: int) -> None:
        """A step is over. The first call takes what there is by now out of all later collections."""
        if not self._every:
            return
        if not self._begun:
            self._begun = True
            gc.disable()
            gc.collect()
            gc.freeze()
        elif step % self._every == 0:
            gc.collect()

    def close(self) -> None:
        """Leave it to Python again."""
        if self._begun:
            self._begun = False
            gc.unfreeze()
            gc.enable()
