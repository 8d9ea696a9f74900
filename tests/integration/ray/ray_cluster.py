"""A real Ray cluster on this machine: a head and two more raylets, each a host of its own to Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[3]
NODES = {"r1": "127.0.0.2", "r2": "127.0.0.3"}


def missing_sentence() -> str | None:
    """Why these tests cannot run, or None."""
    try:
        import ray
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        return 'no Ray with job submission here: pip install "ray[default,train]"'
    del ray, JobSubmissionClient
    return None


class RayCluster:
    """The head takes jobs but no ranks; each node has room for one rank."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root = root
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._gcs, self._dashboard, self._agent = _free_ports(3)
        self.environment = {
            **os.environ,
            **environment,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
            # With a token in the home folder Ray would ask for it; the cluster is on loopback and ours.
            "RAY_AUTH_MODE": "disabled",
            # A lost node is declared dead after some seconds instead of half a minute.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "8",
            "RAY_raylet_start_wait_time_s": "600",
            "PYTHONPATH": str(REPOSITORY),
        }
        self.environment.pop("RAY_ADDRESS", None)

    @property
    def address(self) -> str:
        """URL of the jobs API and dashboard."""
        return f"http://127.0.0.1:{self._dashboard}"

    def start(self) -> None:
        """Head first; returns once the jobs API answers and every node is in."""
        self._spawn(
            "head",
            "--head",
            f"--port={self._gcs}",
            "--node-ip-address=127.0.0.1",
            f"--dashboard-port={self._dashboard}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-agent-listen-port={self._agent}",  # Ray's own is another cluster's on this machine
            f"--temp-dir={self.root}",
            "--num-cpus=0",
        )
        self._await(lambda: self._get("/api/version") is not None, "the dashboard", detail=self._start_logs)
        self.wait_nodes(1)  # a raylet that comes before the head's own gives up
        for count, node in enumerate(NODES, start=2):
            self.start_node(node)
            self.wait_nodes(count)

    def start_node(self, node: str) -> None:
        """Start (or bring back) one raylet."""
        self._spawn(
            node,
            f"--address=127.0.0.1:{self._gcs}",
            f"--node-ip-address={NODES[node]}",
            "--num-cpus=1",
            f"--dashboard-agent-listen-port={_free_ports(1)[0]}",
        )

    def kill_node(self, node: str) -> None:
        """SIGKILL a raylet, its agents and workers at once, as when a host loses power."""
        process = self._processes.pop(node)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End every process group that was started here."""
        for process in self._processes.values():
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self._processes.values():
            process.wait()

    def wait_nodes(self, count: int) -> None:
        """Block until the head believes in exactly this many nodes, itself included."""
        self._await(lambda: self.alive_nodes() == count, f"{count} nodes", detail=self._start_logs)

    def alive_nodes(self) -> int:
        """Nodes that the head believes in."""
        answer = self._get("/nodes?view=summary")
        summary = answer["data"]["summary"] if answer else []
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)

    def submit(self, *arguments: str, module: str = "trainer.launch.ray", **environment: str) -> str:
        """`ray job submit --no-wait` of a module of ours; returns the job's id."""
        runtime = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120", **environment}}
        text = self.run(
            "job",
            "submit",
            f"--address={self.address}",
            "--no-wait",
            "--runtime-env-json",
            json.dumps(runtime),
            "--",
            sys.executable,
            "-m",
            module,
            *arguments,
        )
        found = re.search(r"'(raysubmit_\w+)'", text)
        assert found, text
        return found[1]

    def status(self, job: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        answer = self._get(f"/api/jobs/{job}")
        return str(answer["status"]) if answer else "UNKNOWN"

    def logs(self, job: str) -> str:
        """What the driver wrote."""
        answer = self._get(f"/api/jobs/{job}/logs")
        return str(answer["logs"]) if answer else ""

    def wait_for(self, job: str, what: str, condition: Callable[[], bool], timeout_s: float = 1500) -> None:
        """Block until the condition holds; fails with the job's log."""
        self._await(condition, what, timeout_s, lambda: self.logs(job)[-6000:])

    def run(self, *arguments: str) -> str:
        """One `ray` command."""
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(self.address + path, timeout=10) as answer:
                return json.loads(answer.read())
        except OSError:
            return None

    def _spawn(self, name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        with (self.root.parent / f"{self.root.name}-{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*command, "--object-store-memory=100000000", *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _start_logs(self) -> str:
        logs = self.root.parent.glob(f"{self.root.name}-*.log")
        return "\n".join(f"{log.name}: {log.read_text(encoding='utf-8')[-1500:]}" for log in logs)

    def _await(
        self,
        condition: Callable[[], bool],
        what: str,
        timeout_s: float = 600.0,
        detail: Callable[[], str] = lambda: "",
    ) -> None:
        limit = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < limit, f"waited {timeout_s} s for {what}: {detail()}"
            time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
