"""What the driver says about a GPU while it trains (NVML): heat, throttling, memory errors, XIDs.

A GPU that fails seldom says so to CUDA first. The driver counts what its memory could not correct, which rows
it has replaced, why its clock is low, and reports critical errors by number. Each rank reads its own GPU's at
every log interval, rank 0 records them, and a GPU with a symptom of a sick machine is an event with its host:
a person, or a launcher, leaves the node out. Nothing is decided here: a sick GPU that computes goes on.

The only importer of pynvml (nvidia-ml-py, extra `nvml`). Without it, or without a driver, nothing is read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

XIDS: Mapping[int, str] = {
    48: "memory error that could not be corrected",
    62: "internal micro-controller halted",
    64: "row remapping failed",
    74: "NVLink error",
    79: "fell off the bus",
    92: "many corrected memory errors",
    94: "memory error, contained",
    95: "memory error, not contained",
    119: "system processor does not answer",
    120: "system processor failed",
    136: "NVLink training failed",
    140: "memory error that was not recovered",
}
"""Critical errors that are the machine's (NVIDIA, "XID Errors"); others may be a program's own."""

BRAKES: Mapping[int, str] = {
    0x8: "hardware slowdown",
    0x40: "too hot",
    0x80: "power brake",
}
"""Reasons for a low clock that a healthy machine does not have, by NVML's bit."""
PATIENCE = 3
"""Readings running in which a GPU must be braked to count as sick."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuReading:
    """What the driver says of one GPU at one moment; what a card does not know is zero."""

    temperature_c: int = 0
    braked: tuple[str, ...] = ()
    """Reasons among BRAKES for which its clock is low now."""
    remapped_rows: int = 0
    """Of its memory, replaced since it was made, for errors of any kind."""
    remap_pending: bool = False
    """Rows wait for a reset to be replaced."""
    remap_failed: bool = False
    """No row was left to replace one."""
    uncorrected: int = 0
    """Memory errors that could not be corrected, since the driver was loaded."""
    xids: tuple[int, ...] = ()
    """Critical errors since the last reading."""


@dataclass(frozen=True)
class Health:
    """What a rank tells of its GPU."""

    reading: GpuReading
    symptoms: tuple[str, ...] = ()
    """Of a sick machine, each told once."""
    node: str = ""
    """Its machine, by the name that the scheduler has for it where there is one."""


class Examiner:
    """Judges the readings of one GPU, one after the other. Pure."""

    def __init__(self) -> None:
        self._before: GpuReading | None = None
        self._braked = 0

    def judge(self, now: GpuReading) -> Health:
        """What is new and a sign of a sick machine. The first reading tells of what lasts alone."""
        before = self._before or GpuReading(uncorrected=now.uncorrected)
        self._before = now
        found = [f"XID {xid} ({XIDS[xid]})" for xid in dict.fromkeys(now.xids) if xid in XIDS]
        if now.remap_failed and not before.remap_failed:
            found.append("no spare row is left for its memory")
        if now.remap_pending and not before.remap_pending:
            found.append("rows of its memory wait for a reset to be replaced")
        errors = now.uncorrected - before.uncorrected
        if errors > 0:
            found.append(f"{errors} memory errors that could not be corrected")
        self._braked = self._braked + 1 if now.braked else 0
        if self._braked == PATIENCE:
            found.append(f"braked ({', '.join(now.braked)}) for {PATIENCE} reports running")
        return Health(now, tuple(found))


class GpuHealth:
    """One GPU through NVML. Reading takes about a millisecond and does not wait for the GPU."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        """See `open_health`."""
        self._nvml, self._handle = nvml, handle
        self._examiner = Examiner()
        self._events: Any = None
        with contextlib.suppress(nvml.NVMLError):  # a card, or a container, that reports none
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            self._events = events

    def examine(self) -> Health:
        """A reading, and what it is a sign of."""
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        return replace(self._examiner.judge(self._read()), node=node)

    def _read(self) -> GpuReading:
        nvml, ask = self._nvml, self._ask
        reasons = ask(0, "nvmlDeviceGetCurrentClocksThrottleReasons")
        correctable, uncorrectable, pending, failed = ask((0, 0, 0, 0), "nvmlDeviceGetRemappedRows")
        kinds = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
        return GpuReading(
            temperature_c=int(ask(0, "nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)),
            braked=tuple(name for bit, name in BRAKES.items() if reasons & bit),
            remapped_rows=correctable + uncorrectable,
            remap_pending=bool(pending),
            remap_failed=bool(failed),
            uncorrected=int(ask(0, "nvmlDeviceGetTotalEccErrors", *kinds)),
            xids=tuple(self._new_xids()),
        )

    def _ask(self, otherwise: Any, name: str, *args: Any) -> Any:
        try:
            return getattr(self._nvml, name)(self._handle, *args)
        except self._nvml.NVMLError:  # not every card has every sensor
            return otherwise

    def _new_xids(self) -> list[int]:
        found: list[int] = []
        while self._events is not None:
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except self._nvml.NVMLError:  # none is waiting
                break
            found.append(int(event.eventData))
        return found


def open_health(device: torch.device) -> GpuHealth | None:
    """The GPU of this rank; None without one, or where NVML is not there."""
    if device.type != "cuda":
        return None
    try:
        import pynvml as nvml
    except ImportError:
        logger.info("the health of GPUs is not recorded: nvidia-ml-py is not installed (extra `nvml`)")
        return None
    try:
        nvml.nvmlInit()
        # By its own name: a rank may see its GPU under another number than the driver.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return GpuHealth(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode()))
    except nvml.NVMLError as error:
        logger.warning("the health of this GPU is not recorded: %s", error)
        return None


def health_record(health: Sequence[Health | None]) -> dict[str, float]:
    """What a record has of all ranks' GPUs; nothing where none is watched."""
    readings = [each.reading for each in health if each is not None]
    if not readings:
        return {}
    return {
        "gpu/hottest_c": float(max(reading.temperature_c for reading in readings)),
        "gpu/braked": float(sum(bool(reading.braked) for reading in readings)),
        "gpu/remapped_rows": float(sum(reading.remapped_rows for reading in readings)),
        "gpu/uncorrected_errors": float(sum(reading.uncorrected for reading in readings)),
        "gpu/xids": float(sum(len(reading.xids) for reading in readings)),
    }
