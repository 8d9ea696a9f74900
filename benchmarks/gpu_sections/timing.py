"""Times on a device without stopping it, and where its time goes by kind of kernel."""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from trainer.metrics.step_profile import ANNOTATIONS, kind_of


def measure(
    run: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int = 3
) -> dict[str, float]:
    """Median, quickest and slowest milliseconds of `run` back to back, without waiting in between.

    On CUDA the times lie between events on the stream, so that work the host queued ahead counts as it does
    in training; `wall_ms` is the host's clock over all repeats, and `alone_ms` one call that is waited for.
    """
    for _ in range(warm_up):
        run()
    if device.type != "cuda":
        return _on_the_clock(run, repeats)
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    begun = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    times = [a.elapsed_time(b) for a, b in pairwise(events)]
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    alone = time.perf_counter() - begun
    return {**_summary(times), "wall_ms": 1e3 * wall / repeats, "alone_ms": 1e3 * alone}


def _on_the_clock(run: Callable[[], object], repeats: int) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begun))
    return {**_summary(times), "wall_ms": statistics.mean(times), "alone_ms": times[-1]}


def _summary(times: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}


def in_turns(
    arms: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int, turns: int = 3
) -> dict[str, dict[str, float]]:
    """`measure` each arm in turns (A, B, A, B ...) and keep each arm's median turn."""
    measured: dict[str, list[dict[str, float]]] = defaultdict(list)
    for turn in range(turns):
        for name, run in arms.items():
            measured[name].append(measure(run, device, repeats=repeats, warm_up=3 if turn == 0 else 1))
    return {name: sorted(rounds, key=lambda m: m["ms"])[turns // 2] for name, rounds in measured.items()}


def profile_kinds(run: Callable[[], object], device: torch.device, *, top: int = 30) -> dict[str, Any]:
    """Milliseconds and launches of one call by kind of kernel, and its `top` kernels (operators on a CPU)."""
    run()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    rows, host = [], {}
    for event in profiler.key_averages():
        if event.key.startswith(ANNOTATIONS):
            continue
        if on_gpu and event.device_type == DeviceType.CPU and event.key.startswith(("cuda", "cu")):
            host[event.key] = event.count
        if event.device_type != wanted:
            continue
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        kind = kind_of(event.key)
        kinds[kind][0] += spent
        kinds[kind][1] += event.count
        rows.append({"name": event.key[:160], "kind": kind, "ms": spent, "count": event.count})
    rows.sort(key=lambda row: -float(row["ms"]))
    ordered = sorted(kinds.items(), key=lambda item: -item[1][0])
    return {
        "total_ms": sum(ms for _, (ms, _) in ordered),
        "launches": int(sum(count for _, (_, count) in ordered)),
        "kinds": {kind: {"ms": ms, "launches": int(count)} for kind, (ms, count) in ordered},
        "host_calls": {name: count for name, count in sorted(host.items()) if _waits_or_launches(name)},
        "top": rows[:top],
    }


def _waits_or_launches(name: str) -> bool:
    return re.search(r"launch|synchronize|memcpy|memset|malloc|hostalloc|free", name.lower()) is not None


def forget() -> None:
    """Give memory of deleted tensors back, and start counting its peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Most device memory allocated since `forget`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
