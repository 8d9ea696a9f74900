"""What a rank leaves in run_dir/faults about its end, for whoever looks for the reason.

    collectives-rank-0003.json    the newest collectives of a rank that may hang, with those that wait
    memory-rank-0003.txt          what held a GPU's memory when it was full, as torch sums it up
    memory-rank-0003.pickle       the same block by block, for https://pytorch.org/memory_viz

A hang shows in the files of several ranks: which of them is at which collective, and who never came to it.
So every rank writes its own while it still only suspects one (`Watchdog`), before any of them is ended; a
later suspicion replaces the file. Nothing here may delay an end or change how it is told: files are bounded,
written once, and what does not work is a line in the log.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.urls import join

FOLDER = "faults"
MOST_BYTES = 32 << 20
"""Of one file; a snapshot beyond it is left out."""
MOST_ENTRIES = 2000
"""Collectives that a rank remembers, about half a kilobyte each."""

_SIZES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""Variables that say how many, the newer name first."""
_RECORDERS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}

logger = logging.getLogger(__name__)


def recorder_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What switches on torch's flight recorder, unless somebody chose its size. Before a group is made."""
    if any(name in environ for name in _SIZES):
        return {}
    return {_SIZES[0] if hasattr(_c10d(), _RECORDERS["gloo"]) else _SIZES[1]: str(MOST_ENTRIES)}


def recorded_collectives() -> dict[str, Any]:
    """{"nccl": ..., "gloo": ...}, each as torch's flight recorder tells it, for what this torch has."""
    found = {}
    for backend, name in _RECORDERS.items():
        dump = getattr(_c10d(), name, None)
        if dump is not None:
            found[backend] = json.loads(dump(includeCollectives=True, onlyActive=False))
    return found


def waiting(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of a recorder's entries that have begun and not ended, in their order.

    >>> waiting([{"profiling_name": "gloo:broadcast", "collective_seq_id": 7, "retired": False}])
    ['gloo:broadcast, number 7 of its group']
    """
    return [
        f"{entry['profiling_name']}, number {entry['collective_seq_id']} of its group"
        for entry in entries
        if not entry["retired"]
    ]


def leave_collectives(run_dir: str, rank: int) -> None:
    """Write down the newest collectives of this rank."""
    try:
        recorders = recorded_collectives()
        stuck = {name: waiting(found.get("entries", ())) for name, found in recorders.items()}
        about = {"rank": rank, "host": socket.gethostname(), "time": time.time(), "waiting": stuck}
        _write(run_dir, f"collectives-rank-{rank:04d}.json", json.dumps({**about, **recorders}).encode())
    except Exception as error:  # noqa: BLE001 - a fault must be told as what it is
        logger.warning("the collectives of rank %d are not written down: %s", rank, error)


def leave_memory(run_dir: str, rank: int, device: torch.device) -> None:
    """Write down what holds the memory of a GPU. Does nothing without one."""
    if device.type != "cuda":
        return
    try:
        name = f"memory-rank-{rank:04d}"
        summary = torch.cuda.memory_summary(device)
        where = _write(run_dir, f"{name}.txt", summary.encode())
        snapshot = pickle.dumps(torch.cuda.memory._snapshot(device))
        if len(snapshot) <= MOST_BYTES:
            _write(run_dir, f"{name}.pickle", snapshot)
        logger.error("out of memory; what held it is in %s", where)
    except Exception as error:  # noqa: BLE001 - a fault must be told as what it is
        logger.warning("what held the memory of rank %d is not written down: %s", rank, error)


def _write(run_dir: str, name: str, data: bytes) -> str:
    url = join(run_dir, FOLDER, name)
    write_bytes(url, data[:MOST_BYTES], tries=1)
    return url


def _c10d() -> Any:
    return torch._C._distributed_c10d
