"""The memory that a checkpoint is copied to: made ready in the background, in pieces, large enough."""

from __future__ import annotations

import os
import threading
import time
from typing import Literal

import pytest
import torch

from trainer.checkpoint import host_buffer
from trainer.checkpoint.contents import Contents, share_bytes
from trainer.checkpoint.host_buffer import HostBuffer
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.training import OptimizerConfig
from trainer.distributed.env import DistributedEnv
from trainer.distributed.replicas import owned_shares

from .conftest import MakeRun
from .small_run import small_network

CPU = torch.device("cpu")


def test_vectors_lie_end_to_end_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_buffer, "PIECE_BYTES", 4096)
    vectors = [torch.arange(n, dtype=torch.float32) for n in (1500, 3, 700, 2048)]
    buffer = HostBuffer(4 * 5000, CPU)
    buffer.fill(vectors)
    found = torch.frombuffer(buffer.view, dtype=torch.float32)[: 1500 + 3 + 700 + 2048]
    assert torch.equal(found, torch.cat(vectors))
    buffer.close()


def test_making_it_ready_holds_nobody_up_and_every_page_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_buffer, "PIECE_BYTES", 16 << 20)
    threads: set[int] = set()
    prepare = HostBuffer._prepare

    def recorded(self: HostBuffer, start: int) -> None:
        threads.add(threading.get_ident())
        prepare(self, start)

    monkeypatch.setattr(HostBuffer, "_prepare", recorded)
    buffer = HostBuffer(64 << 20, CPU)
    buffer.wait()
    assert threads
    assert threading.get_ident() not in threads
    assert os.fstat(buffer.descriptor).st_blocks * 512 >= 64 << 20
    buffer.close()


def test_what_goes_wrong_is_raised_by_the_first_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: HostBuffer, start: int) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(HostBuffer, "_prepare", refuse)
    buffer = HostBuffer(4096, CPU)
    with pytest.raises(RuntimeError, match="out of memory"):
        buffer.fill([torch.zeros(4)])
    buffer.close()


def test_closing_before_the_first_save_waits_for_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_buffer, "PIECE_BYTES", 4096)
    running = []

    def slow(self: HostBuffer, start: int) -> None:
        running.append(start)
        time.sleep(0.2)
        running.remove(start)

    monkeypatch.setattr(HostBuffer, "_prepare", slow)
    buffer = HostBuffer(3 * 4096, CPU)
    buffer.close()
    assert not running
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(buffer.descriptor)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_buffer_begun_early_is_the_one_that_is_used(
    make_run: MakeRun, optimizer: Literal["adamw", "adafactor"]
) -> None:
    run = make_run(asynchronous=True, optimizer=OptimizerConfig(name=optimizer))
    network = small_network()
    wanted = share_bytes({"unet": network}, "unet", run.config, 1)
    buffer = HostBuffer(wanted, CPU)
    run.manager = CheckpointManager(run.config, DistributedEnv.detect({}), buffer)
    run.train(1)
    run.save()
    assert run.manager._buffer is buffer
    contents = Contents.of_checkpoint(1, {"unet": run.engine}, run.ema, state={}, tensors={}, loss=None)
    # Beside masters and averages, and not more than a rank's partition is padded.
    kept = {"adamw": 2 * 26, "adafactor": (3 + 4) + (4 + 2) + 6}[optimizer]
    assert contents.plan().data_bytes == 4 * (3 * 26 + kept)
    assert 0 <= wanted - contents.plan().data_bytes <= 5 * 4 * 1024
    handle = run.manager.latest_good()
    assert handle is not None
    assert handle.step == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_a_share_is_never_larger(make_run: MakeRun, world_size: int) -> None:
    network = small_network(width=50)
    sizes = [p.numel() for p in network.parameters()]
    run = make_run()
    stored = 1 + 2 + len(run.ema.profiles)
    bound = share_bytes({"unet": network}, "unet", run.config, world_size)
    largest = max(
        sum(share.stop - share.start for share in owned_shares(sizes, rank, world_size))
        for rank in range(world_size)
    )
    assert 4 * stored * largest <= bound
    assert bound <= 4 * stored * (largest + len(sizes) + 1024)
