"""How long a save stops training: this project against torch.save, DeepSpeed and DCP, on one state.

    python benchmarks/checkpoint.py                    # 1 GB of state on the CPU, a few minutes
    python benchmarks/checkpoint.py --megabytes 256 --repeats 3
    python benchmarks/checkpoint.py --arms ours_async,torch_save

One rank, fp32, ZeRO 1, the same engine for all arms: master weights and two Adam moments. Our arms save an
average besides, which no other arm has; all arms write to the same folder on the same disk, and take
turns. Per arm: seconds for which training stood still (median, and all values), seconds until the data was
stored, bytes, and the slow-down of a fixed piece of training work, repeated while the save went on in the
background; where nothing went on, 0.
The first save of each arm, which allocates buffers and starts processes, is reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from trainer.checkpoint.manager import CheckpointManager
from trainer.config.run import Config
from trainer.config.training import CheckpointConfig, DistributedConfig, EMAConfig
from trainer.distributed.deepspeed_engine import DeepSpeedEngine
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.ema import EMA

WIDTH = 1024


@dataclass
class Arm:
    """One way to save. `save` returns what waits until the data is stored."""

    save: Callable[[Path], Callable[[], object]]
    blocked_s: list[float] = field(default_factory=list)
    stored_s: list[float] = field(default_factory=list)
    slowdown: list[float] = field(default_factory=list)
    num_bytes: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1000, help="master weights and moments together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arms", default="ours_async,ours_sync,torch_save,deepspeed,dcp_thread,dcp_process")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    env = initialise(DistributedEnv.detect(), timeout_s=600.0)
    folder = Path(tempfile.mkdtemp(prefix="ldm-checkpoint-"))
    try:
        arms = build_arms(env, folder, args.megabytes, args.arms.split(","))
        for turn in range(args.repeats + 1):
            for name, arm in arms.items():
                measure(arm, folder / f"{name}-{turn}")
        report(arms, as_json=args.json)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutdown()


def build_arms(env: DistributedEnv, folder: Path, megabytes: int, names: list[str]) -> dict[str, Arm]:
    """The arms by name, around one engine that has made a step."""
    layers = max(1, megabytes * 1_000_000 // (12 * WIDTH * WIDTH))
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    config = Config(
        run_dir=str(folder / "run"),
        global_batch_size=1,
        micro_batch_size=1,
        distributed=DistributedConfig(zero_stage=1, precision="fp32"),
        checkpoint=CheckpointConfig(keep_last=1),
        ema=EMAConfig(decay=0.999),
    )
    engine = DeepSpeedEngine(network, config, env)
    engine.backward(engine(torch.ones(1, WIDTH)).square().mean())
    engine.step(1e-4)
    ema = EMA(config.ema, engine.fragments())
    tensors = {
        f"{f.name}.{k}": v for f in engine.fragments() for k, v in [("master", f.master), *f.moments.items()]
    }
    arms = {
        "torch_save": Arm(lambda path: save_with_torch(tensors, path)),
        "deepspeed": Arm(lambda path: save_with_deepspeed(engine, path)),
        "dcp_thread": Arm(lambda path: save_with_dcp(tensors, path, AsyncCheckpointerType.THREAD)),
        "dcp_process": Arm(lambda path: save_with_dcp(tensors, path, AsyncCheckpointerType.PROCESS)),
    }
    for name, asynchronous in (("ours_async", True), ("ours_sync", False)):
        if name in names:
            arms[name] = our_arm(config, env, engine, ema, folder / name, asynchronous=asynchronous)
    return {name: arms[name] for name in names}


def our_arm(
    config: Config,
    env: DistributedEnv,
    engine: DeepSpeedEngine,
    ema: EMA,
    folder: Path,
    *,
    asynchronous: bool,
) -> Arm:
    """CheckpointManager; `path` is not used, since it names its folders itself and retires old ones."""
    own = Config(
        run_dir=str(folder),
        global_batch_size=1,
        micro_batch_size=1,
        distributed=config.distributed,
        checkpoint=CheckpointConfig(keep_last=1, asynchronous=asynchronous),
        ema=config.ema,
    )
    manager = CheckpointManager(own, env)
    step = 0

    def save(_: Path) -> Callable[[], object]:
        nonlocal step
        step += 1
        manager.save(step, {"unet": engine}, ema, state={"step": step}, tensors={}, loss=None)
        assert manager.last_save is not None
        arm.num_bytes = manager.last_save.num_bytes
        return manager.wait

    arm = Arm(save)
    return arm


def save_with_torch(tensors: dict[str, torch.Tensor], path: Path) -> Callable[[], object]:
    """One torch.save, flushed to the disk as ours is."""
    path.mkdir()
    with (path / "state.pt").open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    return lambda: None


def save_with_deepspeed(engine: DeepSpeedEngine, path: Path) -> Callable[[], object]:
    """DeepSpeed's own save_checkpoint (it also writes the compute weights), left unflushed as it does."""
    engine._engine.save_checkpoint(str(path))
    return lambda: None


def save_with_dcp(
    tensors: dict[str, torch.Tensor], path: Path, kind: AsyncCheckpointerType
) -> Callable[[], object]:
    """torch.distributed.checkpoint.async_save."""
    future: Any = async_save(tensors, checkpoint_id=str(path), async_checkpointer_type=kind)
    waiting = getattr(future, "upload_completion", future)
    return waiting.result


def measure(arm: Arm, path: Path) -> None:
    """One save: how long it blocks, and how training work fares until it is stored."""
    quiet = statistics.median(work() for _ in range(3))
    begun = time.perf_counter()
    wait = arm.save(path)
    arm.blocked_s.append(time.perf_counter() - begun)
    with ThreadPoolExecutor(1) as waiting:
        stored = waiting.submit(wait)
        during = []
        while not stored.done():
            during.append(work())
        stored.result()
    arm.stored_s.append(time.perf_counter() - begun)
    arm.slowdown.append(statistics.fmean(during) / quiet - 1 if during else 0.0)
    if path.exists():
        arm.num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        shutil.rmtree(path)


def work() -> float:
    """Seconds for a fixed piece of training work."""
    begun = time.perf_counter()
    x = torch.ones(256, 512)
    for _ in range(20):
        x = torch.tanh(x @ torch.ones(512, 512))
    return time.perf_counter() - begun


def report(arms: dict[str, Arm], *, as_json: bool) -> None:
    """Table or JSON."""
    if as_json:
        found = {name: {k: v for k, v in vars(arm).items() if k != "save"} for name, arm in arms.items()}
        print(json.dumps({"torch": torch.__version__, "arms": found}))
        return
    print(f"torch {torch.__version__}; {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f}")
    print("arm           blocked s  all but the first                   first  stored s     GB    work")
    for name, arm in arms.items():
        later = arm.blocked_s[1:]
        values = " ".join(f"{value:.3f}" for value in later)
        print(
            f"{name:12} {statistics.median(later):10.3f} {values:34} {arm.blocked_s[0]:6.2f} "
            f"{statistics.median(arm.stored_s[1:]):9.2f} {arm.num_bytes / 1e9:6.2f} "
            f"{statistics.median(arm.slowdown[1:]):+7.0%}"
        )


if __name__ == "__main__":
    main()
