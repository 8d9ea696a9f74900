"""Seconds of a device that works behind its host, on a device that is made up."""

from __future__ import annotations

import pytest
import torch

from trainer.metrics.timer import StepTimer


class Device:
    """Work that the host queues is done in order; an event happens when it is that one's turn."""

    now = 0.0
    free_at = 0.0

    def work(self, seconds: float, *, queuing: float) -> None:
        self.free_at = max(self.free_at, self.now) + seconds
        self.now += queuing


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    class Event:
        at = 0.0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(made.now, made.free_at)

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


@pytest.mark.parametrize(
    ("loader_s", "idle_s"),
    [(0.40, 0.0), (0.60, 0.17), (2.0, 1.57)],  # 0.58 s of work, of which 0.43 are left when it is queued
)
def test_waiting_for_data_is_what_the_device_does_not_work_meanwhile(
    device: Device, loader_s: float, idle_s: float
) -> None:
    """A loader that is as fast as the device costs nothing, though the host waits for it most of the time."""
    timer = StepTimer(torch.device("cuda"))
    for _ in range(10):
        device.now = max(device.now, device.free_at)
        with timer("unet"):
            device.work(0.58, queuing=0.15)
        with timer("data"):
            device.now += loader_s
    taken = timer.take()
    assert taken["unet"] == pytest.approx(5.8)
    assert taken["data"] == pytest.approx(10 * idle_s, abs=1e-9)
