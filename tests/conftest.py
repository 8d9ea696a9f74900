"""Shared by all tests: quiet libraries, few threads, no network, and a word about what was left out."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.integration.hosts import network
from tests.integration.ray import ray_cluster
from tests.integration.slurm import slurm_cluster

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

# A shell that starts the tests in its background lets them, and every child, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def environment_as_found() -> Iterator[None]:
    """A rank's variables, left behind, would make every later `ldm train` believe to be that rank."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


_modules = 0
_thaws = 0


def pytest_runtest_setup() -> None:
    """Take six thousand tests and what they import out of reach of the garbage collector.

    It needs a second to look at them, and a run in the tests' process calls it once or twice, each engine of
    DeepSpeed a dozen times. At its end a run gives back all that is out of reach.
    """
    global _modules, _thaws
    grown = len(sys.modules) > _modules + 200
    if not grown and gc.get_freeze_count():
        return
    _thaws += 1
    if grown or _thaws % 20 == 0:  # else the garbage of a test waits for the next time
        gc.collect()
    gc.freeze()
    _modules = len(sys.modules)


CLUSTERS = {"slurm": slurm_cluster, "ray": ray_cluster, "hosts": network}
_left_out: Counter[str] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Remember what `-m "not slow"` takes away, by folder."""
    _left_out.update(item.path.parent.name for item in items if item.get_closest_marker("slow"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist tells the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker leaves out the same tests."""
    _left_out.clear()
    _left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests were left out, and what those on real clusters need."""
    for name, cluster in CLUSTERS.items():
        if count := _left_out.pop(name, 0):
            missing = cluster.missing_sentence()
            how = f"first: {missing}" if missing else "run them with `make test-cluster`"
            terminalreporter.write_line(f"left out: {count} tests on real {name}; {how}")
    if others := _left_out.total():
        terminalreporter.write_line(f"left out: {others} other long tests; run all with `make test-all`")
