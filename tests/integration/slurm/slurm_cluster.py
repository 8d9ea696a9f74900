"""A real SLURM cluster on this machine: munged, slurmctld, three slurmd, without systemd; and jobs on it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
_HOW = (
    "no SLURM here: `apt-get install slurm-wlm munge` as root (or run .ci/packages.sh), then run "
    "these tests as root"
)
NODES = ("n1", "n2", "n3")
SCRIPT = Path(__file__).parents[3] / "slurm" / "train_ldm.sh"
# This cluster has no GPUs and shares its nodes; everything else is the script as it stands.
HERE = ("--gpus-per-node=0", "--ntasks-per-node=1", "--oversubscribe", "--nodes=2")
LIMIT_S = 1500.0


def missing_sentence() -> str | None:
    """Why these tests cannot run, or None."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if any(shutil.which(program, path=path) is None for program in _PROGRAMS) or os.geteuid() != 0:
        return _HOW
    return None


class SlurmCluster:
    """Starts its own daemons in its own folder on its own ports, and ends exactly those."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root = root
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_"))
            },
            **environment,
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
        }

    def start(self) -> None:
        """Munge first, then the controller, then the nodes; returns once all nodes are idle."""
        for name in ("munge", "state", "log", *(f"spool-{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        ports = _free_ports(1 + len(NODES))
        (self.root / "slurm.conf").write_text(self._configuration(ports), encoding="ascii")
        munge = self.root / "munge"
        self._spawn(
            "munged",
            ["munged", "--foreground", "--force"]
            + [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
            + [f"--socket={munge / 'socket'}"],
        )
        self._await(lambda: (munge / "socket").exists(), "munged")
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", self.environment["SLURM_CONF"]])
        for node in NODES:
            self.start_node(node)
        self._await(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(NODES)), "nodes")

    def start_node(self, node: str) -> None:
        """Start (or bring back) one slurmd."""
        self._spawn(node, ["slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"]])

    def stop(self) -> None:
        """Cancel jobs so that their processes are gone, then end the daemons."""
        jobs = self.run("squeue", "-h", "-o", "%A").split()
        if jobs:
            self.run("scancel", *jobs)
            self.run("scancel", "--signal=KILL", "--full", *jobs, check=False)
            self._await(lambda: not self.run("squeue", "-h", "-o", "%A"), "end of jobs")
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """Standard output of one command on the login node."""
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        found = re.search(rf"(?:^| ){name}=(\S*)", text)
        assert found, text
        return found[1]

    def wait_state(self, job: str, *states: str, timeout_s: float = 120.0) -> str:
        """Block until the job is in one of these states."""
        state = ""

        def reached() -> bool:
            nonlocal state
            state = self.field(job, "JobState")
            return state in states

        self._await(reached, f"job {job} to be {' or '.join(states)}", timeout_s, lambda: state)
        return state

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _await(
        self,
        condition: Callable[[], bool],
        what: str,
        timeout_s: float = 300.0,
        detail: Callable[[], str] = lambda: "",
    ) -> None:
        limit = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < limit, f"waited {timeout_s} s for {what}: {detail()}"
            time.sleep(0.2)

    def lose_node(self, node: str, *, noticed: bool) -> None:
        """All processes of one node are gone, as when it loses power.

        noticed: whether SLURM knows at once, which otherwise takes it SlurmdTimeout.
        """
        daemon = self._daemons.pop(node)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        for process in self._steps_of(node):
            process.send(signal.SIGKILL)
        if noticed:
            self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def bring_back(self) -> None:
        """Start the nodes that were lost; returns once all are idle."""
        for node in NODES:
            if node not in self._daemons:
                # Else SLURM waits for it to say that its part of a job that has ended is over.
                self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
                self.start_node(node)
        self._await(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(NODES)), "nodes")

    def _steps_of(self, node: str) -> list[Process]:
        """Processes of job steps on one node, and the slurmstepd that started them."""
        named = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.environment['SLURM_CONF']}"}
        found = [process for process in processes() if named <= process.environment]
        return [*found, *(process.parent() for process in found if process.parent().name == "slurmstepd")]

    def _configuration(self, ports: list[int]) -> str:
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        return f"""\
ClusterName=ldmtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it is eligible again (default 120 s, least 5).
AuthInfo=socket={self.root}/munge/socket,cred_expire=6
SlurmctldPidFile={self.root}/slurmctld.pid
SlurmdPidFile={self.root}/slurmd-%n.pid
SlurmdSpoolDir={self.root}/spool-%n
StateSaveLocation={self.root}/state
SlurmctldLogFile={self.root}/log/slurmctld.log
SlurmdLogFile={self.root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=600
MessageTimeout=90
SlurmdTimeout=300
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SwitchType=switch/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Process:
    """One process, as /proc shows it."""

    pid: int

    @property
    def environment(self) -> set[str]:
        """NAME=VALUE, as it was started with; empty once it is gone."""
        return set(self._read("environ").split("\0"))

    @property
    def words(self) -> list[str]:
        """Its command line."""
        return self._read("cmdline").split("\0")

    @property
    def name(self) -> str:
        """Of its program."""
        return self._read("comm").strip()

    def parent(self) -> Process:
        """Who started it."""
        return Process(int(re.search(r"PPid:\s+(\d+)", self._read("status") + "PPid: 0")[1]))

    def send(self, number: int) -> None:
        """A signal, if it still lives."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _read(self, name: str) -> str:
        try:
            return Path(f"/proc/{self.pid}/{name}").read_bytes().decode("utf-8", "replace")
        except OSError:
            return ""


def processes() -> list[Process]:
    """All processes of this machine."""
    return [Process(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()]


class Job:
    """One submitted job: its state, its folder, its log."""

    def __init__(self, slurm: Any, submit_dir: Path, *arguments: str, **environment: str) -> None:
        submit_dir.mkdir(parents=True, exist_ok=True)
        self.slurm, self.submit_dir = slurm, submit_dir
        command = ["sbatch", "--parsable", *HERE, *arguments]
        self.number = slurm.run(*command, cwd=submit_dir, **environment)
        self.folder = submit_dir / "runs" / "slurm" / self.number

    @property
    def log(self) -> str:
        path = self.submit_dir / f"ldm-{self.number}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def attempts(self) -> list[dict[str, Any]]:
        path = self.folder / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rank_log(self, attempt: int, rank: int = 0) -> str:
        path = self.folder / f"attempt-{attempt}" / f"rank-{rank:04d}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def ldm(self, *arguments: str) -> str:
        """What `ldm slurm ...` says in the folder of the submission."""
        command = [sys.executable, "-m", "trainer", "slurm", *arguments]
        return str(self.slurm.run(*command, cwd=self.submit_dir))

    def until(self, condition: Callable[[], bool], what: str) -> None:
        limit = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < limit, f"never saw {what}:\n{self.log[-4000:]}"
            state = self.slurm.field(self.number, "JobState")
            over = state in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert not over or condition(), f"{state} before {what}:\n{self.log[-6000:]}"
            time.sleep(0.1)

    def rank_pids(self, rank: int, task: int | None = None) -> list[int]:
        """Processes that SLURM started as this rank (of a task of a job array): one, or none yet."""
        # The configuration as well: another cluster of these tests may count its jobs at the same time.
        cluster = self.slurm.environment["SLURM_CONF"]
        named = {"SLURM_CONF": cluster, "SLURM_PROCID": rank}
        if task is None:
            named["SLURM_JOB_ID"] = self.number
        else:
            named |= {"SLURM_ARRAY_JOB_ID": self.number, "SLURM_ARRAY_TASK_ID": task}
        wanted = {f"{name}={value}" for name, value in named.items()}
        return [
            process.pid
            for process in processes()
            if process.name != "srun"
            and {"trainer", "train"} <= set(process.words)
            and wanted <= process.environment
        ]

    def rank_pid(self, rank: int) -> int:
        """The process of a running rank."""
        found = self.rank_pids(rank)
        assert found, f"rank {rank} of job {self.number} is not running"
        return found[0]

    def finish(self, state: str = "COMPLETED") -> None:
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        reached = self.slurm.wait_state(self.number, *final, timeout_s=LIMIT_S)
        assert reached == state, self.log[-6000:]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
