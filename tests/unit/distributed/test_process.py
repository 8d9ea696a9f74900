"""What is one for a rank's process: cores beside a device, garbage at set steps, rounding as configured."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trainer.config.training import DistributedConfig
from trainer.distributed.process import (
    GarbageCollection,
    bind_to_node,
    configure_process,
    cores_beside,
    describe_process,
    listed_cores,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """As they were before."""
    before = (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32)
    products = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before
    torch.backends.cuda.matmul.allow_tf32 = products


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("0-3\n", {0, 1, 2, 3}),
        ("0,2,4", {0, 2, 4}),
        ("0-1,64-65\n", {0, 1, 64, 65}),
        ("7", {7}),
        ("\n", set()),  # a node of memory alone
    ],
)
def test_lists_of_cores(text: str, cores: set[int]) -> None:
    assert listed_cores(text) == cores


def machine(sysfs: Path, *, node: str, cores: str | None) -> None:
    """A GPU and one memory node as a kernel shows them."""
    device = sysfs / "bus/pci/devices/0000:c1:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text(node)
    if cores is not None:
        folder = sysfs / "devices/system/node/node1"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores)


@pytest.mark.parametrize(
    ("node", "cores", "found"),
    [
        ("1\n", "8-15,24-31\n", {*range(8, 16), *range(24, 32)}),
        ("-1\n", "8-15\n", set()),  # the machine does not say
        ("1\n", None, set()),
        ("what\n", "8-15\n", set()),
    ],
)
def test_cores_beside_a_device(tmp_path: Path, node: str, cores: str | None, found: set[int]) -> None:
    machine(tmp_path, node=node, cores=cores)
    assert cores_beside("0000:c1:00.0", tmp_path) == found
    assert cores_beside("0000:c2:00.0", tmp_path) == set()  # no such device


def test_without_a_gpu_no_core_is_given_up(tmp_path: Path) -> None:
    assert bind_to_node(CPU, tmp_path) == "cores as given"


@pytest.mark.parametrize(
    ("tf32", "convolutions", "products"),
    [("off", False, False), ("convolutions", True, False), ("all", True, True)],
)
def test_rounding_is_what_the_configuration_says(tf32: str, convolutions: bool, products: bool) -> None:
    configure_process(DistributedConfig(tf32=tf32, cudnn_benchmark=True))  # type: ignore[arg-type]
    assert torch.backends.cudnn.allow_tf32 is convolutions
    assert torch.backends.cuda.matmul.allow_tf32 is products
    assert torch.backends.cudnn.benchmark is True


def test_the_default_rounds_as_torch_does_by_itself() -> None:
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    configure_process(DistributedConfig())
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_the_log_tells_how_a_process_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    configure_process(DistributedConfig(tf32="off"))
    told = describe_process(DistributedConfig(tf32="off"), CPU)
    assert torch.__version__ in told
    assert "bf16 compute" in told
    on_gpu = describe_process(DistributedConfig(tf32="off"), torch.device("cuda"))
    assert "TF32 for nothing" in on_gpu
    assert "which chooses its algorithms" in on_gpu
    assert "allocator as PyTorch has it" in on_gpu
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    on_gpu = describe_process(DistributedConfig(), torch.device("cuda"))
    assert "allocator expandable_segments:True" in on_gpu


class Knot:
    """Holds on to itself, so that only a collection lets go of it."""

    def __init__(self) -> None:
        self.me = self


def test_garbage_goes_at_the_named_steps_alone() -> None:
    garbage = GarbageCollection(every=4)
    try:
        garbage.turn(1)
        assert not gc.isenabled()
        gone = weakref.ref(Knot())
        garbage.turn(2)
        garbage.turn(3)
        assert gone() is not None
        garbage.turn(4)
        assert gone() is None
    finally:
        garbage.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_there_was_at_the_first_step_is_not_looked_at_again() -> None:
    old = Knot()
    garbage = GarbageCollection(every=1)
    try:
        garbage.turn(1)
        gone = weakref.ref(old)
        del old
        garbage.turn(2)
        assert gone() is not None
    finally:
        garbage.close()
    gc.collect()
    assert gone() is None


def test_python_may_collect_where_nobody_says_when() -> None:
    garbage = GarbageCollection(every=0)
    garbage.turn(1)
    garbage.turn(2)
    assert gc.isenabled()
    garbage.close()
