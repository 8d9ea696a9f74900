"""Start ranks as processes with gloo between them, run one function in each, collect the results."""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class RanksFailed(AssertionError):
    """At least one rank ended with an error; carries what all of them printed."""


def run_ranks(
    function: str,
    world_size: int,
    kwargs: dict[str, Any] | None = None,
    *,
    environ: dict[str, str] | None = None,
    timeout_s: float = 600.0,
) -> list[Any]:
    """Call `path/to/file.py:name` as name(env, **kwargs) in `world_size` processes.

    Args:
        function: the file is relative to the repository; the function gets a DistributedEnv whose
            process group is initialised and returns something JSON-able.
        kwargs: JSON-able.

    Returns:
        What the ranks returned, by rank.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _start(function, rank, world_size, kwargs or {}, Path(folder), environ or {}, port)
            for rank in range(world_size)
        ]
        try:
            in_time = _wait(ranks, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if not in_time or any(process.returncode for process in ranks):
            codes = [process.returncode for process in ranks]
            logs = [(Path(folder) / f"{rank}.log").read_text(errors="replace") for rank in range(world_size)]
            shown = "\n".join(f"--- rank {rank}\n{log[-6000:]}" for rank, log in enumerate(logs))
            raise RanksFailed(f"{function} ended with {codes}{'' if in_time else ', late'}\n{shown}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]


def _start(
    function: str,
    rank: int,
    world_size: int,
    kwargs: dict[str, Any],
    folder: Path,
    environ: dict[str, str],
    port: int,
) -> subprocess.Popen[bytes]:
    variables = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **environ,
    }
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, function, json.dumps(kwargs), str(folder / f"{rank}.json")],
            cwd=ROOT,
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_s: float) -> bool:
    """Until all have ended or one has failed; False, with all stacks in the logs, when time is over."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            time.sleep(1.0)  # let the others say what they saw
            return True
        if time.monotonic() > deadline:
            for process in ranks:
                process.send_signal(signal.SIGABRT)
            time.sleep(1.0)
            return False
        time.sleep(0.02)
    return True


def _main(function: str, kwargs: str, result: str) -> None:
    from trainer.distributed.env import DistributedEnv, initialise, shutdown

    faulthandler.enable()  # stacks at SIGABRT

    ours = ModuleType("tests")  # not the package of that name which torch-fidelity installs
    ours.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = ours
    path, _, name = function.partition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    env = DistributedEnv.detect()
    initialise(env, timeout_s=120.0)
    returned = getattr(module, name)(env, **json.loads(kwargs))
    Path(result).write_text(json.dumps(returned))
    shutdown()


if __name__ == "__main__":
    _main(*sys.argv[1:])
    # As the real ranks end (trainer/launch/rank.py): the result is written and the group left, and a thread
    # of a process group that DeepSpeed still holds would abort in Python's tear-down now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
