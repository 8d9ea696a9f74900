"""Ranks as processes with gloo between them: run one function in each, collect the results.

the tests' process
  template         imports once what ranks import, seconds of work; waits for calls of `run_ranks`
    rank 0 ...     forks of it, each with the environment of a rank and a log of its own; what rank 0 has
                   imported beyond that, the template imports after it
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from trainer.distributed.place import Place, free_port
from trainer.launch.rank import leave

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
    global _template
    if _template is None or not _template.alive():
        _template = _Template()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        places = [Place(rank, rank, world_size, world_size, "127.0.0.1", port) for rank in range(world_size)]
        by_rank = [{**os.environ, **_OF_TEMPLATE, **place.variables(), **(environ or {})} for place in places]
        codes, in_time = _template.ask([function, kwargs or {}, by_rank, folder, timeout_s])
        if not in_time or any(codes):
            logs = [(Path(folder) / f"{rank}.log").read_text(errors="replace") for rank in range(world_size)]
            shown = "\n".join(f"--- rank {rank}\n{log[-6000:]}" for rank, log in enumerate(logs))
            raise RanksFailed(f"{function} ended with {codes}{'' if in_time else ', late'}\n{shown}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]


_SHARED = {"torch", "deepspeed", "peft", "transformers", "trainer", "data_pipeline"}
_OF_TEMPLATE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class _Template:
    """The process whose forks are ranks; it ends with this one."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the template
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            cwd=ROOT,
            env={**os.environ, **_OF_TEMPLATE},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._answers = self._ours.makefile()

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, call: list[Any]) -> tuple[list[int], bool]:
        """Exit codes of the ranks, and whether they ended in time."""
        try:
            self._ours.sendall(json.dumps(call).encode() + b"\n")
            answer = self._answers.readline()
        except BaseException:
            self._process.kill()  # its ranks end with it
            self._process.wait()
            raise
        if not answer:
            self._log.seek(0)
            raise RanksFailed(f"the ranks' template ended:\n{self._log.read().decode(errors='replace')}")
        codes, in_time = json.loads(answer)
        return codes, in_time


_template: _Template | None = None


def _serve(connection: socket.socket) -> None:
    """As the template: start the ranks of one call after another, until nobody asks any more."""
    importlib.import_module("trainer.train")
    for line in connection.makefile():
        gc.collect()
        gc.freeze()  # a collection in a rank would copy the pages that all of them share
        function, kwargs, by_rank, folder, timeout_s = json.loads(line)
        ranks: dict[int, int] = {}
        for rank, variables in enumerate(by_rank):
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                os.environ.clear()
                os.environ.update(variables)
                _be_rank(function, kwargs, Path(folder), rank)
            ranks[child] = rank
        codes, in_time = _wait(ranks, timeout_s)
        answer = [[codes[rank] for rank in range(len(by_rank))], in_time]
        learned = Path(folder) / "modules.json"
        names = json.loads(learned.read_text()) if learned.exists() else []
        connection.sendall(json.dumps(answer).encode() + b"\n")
        for name in names:
            with contextlib.suppress(Exception):  # what was made while it ran, and is no file
                importlib.import_module(name)


def _wait(ranks: dict[int, int], timeout_s: float) -> tuple[dict[int, int], bool]:
    """Until all have ended or one has failed: their exit codes; late, False and stacks in the logs."""
    codes: dict[int, int] = {}
    deadline, in_time = time.monotonic() + timeout_s, True

    def reap(options: int) -> None:
        for process, rank in ranks.items():
            if rank not in codes and (ended := os.waitpid(process, options))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])

    def send(number: signal.Signals) -> None:
        for process, rank in ranks.items():
            if rank not in codes:
                os.kill(process, number)

    while len(codes) < len(ranks) and not any(codes.values()) and in_time:
        time.sleep(0.02)
        reap(os.WNOHANG)
        in_time = time.monotonic() < deadline
    if len(codes) < len(ranks):
        if not in_time:
            send(signal.SIGABRT)
        time.sleep(1.0)  # let the others say what they saw
        reap(os.WNOHANG)
        send(signal.SIGKILL)
        reap(0)
    return codes, in_time


def _be_rank(function: str, kwargs: dict[str, Any], folder: Path, rank: int) -> NoReturn:
    """As a fork of the template."""
    from data_pipeline.processes import die_with_parent
    from trainer.distributed.env import DistributedEnv, initialise, shutdown

    status = 1
    try:
        die_with_parent()
        with (folder / f"{rank}.log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
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
        env = initialise(DistributedEnv.detect(), timeout_s=120.0)
        returned = getattr(module, name)(env, **kwargs)
        (folder / f"{rank}.json").write_text(json.dumps(returned))
        if rank == 0:
            names = [name for name in [*sys.modules] if name.partition(".")[0] in _SHARED]
            (folder / "modules.json").write_text(json.dumps(names))
        shutdown()
        status = 0
    except BaseException:  # noqa: BLE001 - a rank must not go on as the template
        traceback.print_exc()
    finally:
        leave(status)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
