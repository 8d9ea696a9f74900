"""The local launcher, with small scripts in the place of ranks: death, silence, restarts, signals."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline.errors import FatalFault
from data_pipeline.processes import told_rank
from trainer.config.run import Config, ConfigError
from trainer.config.training import DistributedConfig
from trainer.distributed.env import DistributedEnv
from trainer.distributed.place import free_port
from trainer.exit_codes import ExitCode
from trainer.launch import local, rank
from trainer.launch.local import launch, ranks_are_given, supervise, visible_devices
from trainer.launch.rank import run_rank
from trainer.launch.rank_process import cpu_wait_s, describe

ROOT = Path(__file__).parents[3]
UNEXAMINED = Config(distributed=DistributedConfig(doctor=False))
PREAMBLE = """
import json, os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
here = Path(os.environ["SCRIPT_DIR"])
attempt = int(os.environ["LDM_RESTARTS"])
with (here / "started").open("a") as stream:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "OMP_NUM_THREADS", "LDM_RESTARTS")
    stream.write(json.dumps({"pid": os.getpid(), **{n: os.environ[n] for n in names}}) + "\\n")
"""


class Ranks:
    """Runs a script as ranks and remembers who was started."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("SCRIPT_DIR", str(folder))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def run(self, body: str, ranks: int = 2, *, max_restarts: int = 1, watchdog_s: float = 0.0) -> ExitCode:
        return supervise(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)],
            ranks,
            max_restarts=max_restarts,
            watchdog_s=watchdog_s,
            scratch=self.folder,
            log_dir=self.folder,
        )

    @property
    def started(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.folder / "started").read_text().splitlines()]

    def soon(self, condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
        """Do something from a thread once a condition holds."""

        def work() -> None:
            limit = time.monotonic() + 30
            while time.monotonic() < limit and not condition():
                time.sleep(0.02)
            action()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def all_dead(self) -> bool:
        return not any(alive(int(entry["pid"])) for entry in self.started)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(tmp_path, monkeypatch)


def test_all_ranks_done(ranks: Ranks) -> None:
    assert ranks.run("sys.exit(0)", ranks=2) is ExitCode.DONE
    entries = sorted(ranks.started, key=lambda entry: entry["RANK"])
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"]) for e in entries] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert len({e["MASTER_PORT"] for e in entries}) == 1
    cores = len(os.sched_getaffinity(0))
    assert {e["OMP_NUM_THREADS"] for e in entries} == {str(max(1, cores // 2))}


@pytest.mark.parametrize("code", [2, 78])
def test_what_must_not_be_restarted_is_not(ranks: Ranks, code: int) -> None:
    assert ranks.run(f"time.sleep(60) if rank else sys.exit({code})") == code
    assert len(ranks.started) == 2
    assert ranks.all_dead()


def test_a_stopped_run_stays_stopped(ranks: Ranks) -> None:
    assert ranks.run("sys.exit(77)", max_restarts=3) is ExitCode.STOPPED
    assert len(ranks.started) == 2


def test_preempted_ranks_are_left_to_the_scheduler(ranks: Ranks) -> None:
    assert ranks.run("sys.exit(75)", max_restarts=3) is ExitCode.PREEMPTED
    assert len(ranks.started) == 2


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(76)", "1 / 0"])
def test_a_retryable_end_restarts_all_ranks_at_a_fresh_port(ranks: Ranks, end: str) -> None:
    body = f"""
    if attempt == 0:
        {end} if rank == 1 else time.sleep(60)
    """
    assert ranks.run(body) is ExitCode.DONE
    assert [e["LDM_RESTARTS"] for e in ranks.started] == ["0", "0", "1", "1"]
    assert len({e["MASTER_PORT"] for e in ranks.started}) == 2


def test_restarts_are_bounded(ranks: Ranks) -> None:
    assert ranks.run("sys.exit(76)", ranks=1, max_restarts=2) is ExitCode.RETRYABLE
    assert len(ranks.started) == 3


def test_a_dead_rank_is_noticed_and_the_others_killed_within_two_seconds(ranks: Ranks) -> None:
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == 0:
        (here / "died").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    """
    assert ranks.run(body, max_restarts=0) is ExitCode.RETRYABLE
    died = float((ranks.folder / "died").read_text())
    # The bound is the product's promise; ten times as much is left to a loaded machine.
    assert time.monotonic() - died < 20
    assert ranks.all_dead()


def test_children_of_a_rank_die_with_it(ranks: Ranks) -> None:
    body = """
    child = os.fork()
    if child == 0:
        with (here / "started").open("a") as stream:
            stream.write(json.dumps({"pid": os.getpid()}) + "\\n")
        time.sleep(60)
    while len((here / "started").read_text().splitlines()) < 2:
        time.sleep(0.01)
    sys.exit(78)
    """
    assert ranks.run(body, ranks=1) is ExitCode.FATAL
    assert len(ranks.started) == 2
    limit = time.monotonic() + 10
    while not ranks.all_dead() and time.monotonic() < limit:
        time.sleep(0.05)
    assert ranks.all_dead()


BEATING = """
from trainer.reliability.watchdog import Watchdog
from trainer.reliability.heartbeat import board_from_environment
with Watchdog(1.0, local_rank=rank, board=board_from_environment(rank)) as watchdog:
    for step in range(3):
        watchdog.beat(step)
        time.sleep(0.05)
    if attempt == 0:
        HANG
"""


def test_a_stopped_rank_is_noticed_killed_and_its_stack_shown(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    hang = "os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else time.sleep(60)"
    assert ranks.run(BEATING.replace("HANG", hang), watchdog_s=1.0) is ExitCode.DONE
    assert len(ranks.started) == 4
    assert "rank 1 hangs: stopped" in caplog.text
    assert "rank 0 hangs" not in caplog.text
    assert "Current thread" in (ranks.folder / "rank_1.log").read_text()
    assert ranks.all_dead()


def test_a_stuck_gil_is_noticed(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    hang = "import ctypes; ctypes.PyDLL(None).sleep(60)"
    assert ranks.run(BEATING.replace("HANG", hang), ranks=1, watchdog_s=1.0) is ExitCode.DONE
    assert "rank 0 hangs: frozen" in caplog.text


def test_a_silent_loop_is_noticed(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    hang = "watchdog.beat(3); time.sleep(60)"
    assert ranks.run(BEATING.replace("HANG", hang), ranks=1, watchdog_s=1.0) is ExitCode.DONE
    assert "no progress for" in caplog.text
    assert "step of step 3" in caplog.text


def test_sigterm_is_passed_on_and_the_saved_run_is_not_restarted(ranks: Ranks) -> None:
    body = """
    def leave(number, frame):
        (here / f"saved_{rank}").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, leave)
    (here / f"ready_{rank}").touch()
    time.sleep(60)
    """
    ranks.soon(
        lambda: all((ranks.folder / f"ready_{rank}").exists() for rank in range(2)),
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    assert ranks.run(body, max_restarts=3) is ExitCode.PREEMPTED
    assert (ranks.folder / "saved_0").exists()
    assert (ranks.folder / "saved_1").exists()
    assert len(ranks.started) == 2


def test_a_signal_before_the_ranks_can_handle_it_preempts(ranks: Ranks) -> None:
    ranks.soon(
        lambda: (ranks.folder / "started").exists() and len(ranks.started) == 2,
        lambda: os.kill(os.getpid(), signal.SIGUSR1),
    )
    assert ranks.run("time.sleep(60)", max_restarts=3) is ExitCode.PREEMPTED
    assert len(ranks.started) == 2


def test_the_second_interrupt_aborts(ranks: Ranks) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    body = """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (here / "ready").touch()
    time.sleep(60)
    """
    ranks.soon(lambda: (ranks.folder / "ready").exists(), twice)
    assert ranks.run(body, ranks=1) is ExitCode.ABORTED
    assert ranks.all_dead()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_log_of_a_failed_rank_is_shown(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    body = "raise SystemExit(78 if rank == 1 and not print('what went wrong') else 0)"
    assert ranks.run(body) is ExitCode.FATAL
    assert "what went wrong" in caplog.text
    assert "rank 1 ended with exit code 78 (fatal)" in caplog.text


ORPHANS = """
import sys
from pathlib import Path
from trainer.launch.local import supervise
folder = Path(sys.argv[1])
supervise(
    [sys.executable, "-c", sys.argv[2]], 2,
    max_restarts=0, watchdog_s=0, scratch=folder, log_dir=folder,
)
"""
CHILD = """
import os, time
from pathlib import Path
from trainer.launch.rank import die_with_launcher
die_with_launcher()
Path(os.environ["SCRIPT_DIR"], "pid_" + os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(60)
"""


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, str(tmp_path), CHILD],
        env={**os.environ, "SCRIPT_DIR": str(tmp_path)},
    )
    files = [tmp_path / f"pid_{rank}" for rank in range(2)]
    limit = time.monotonic() + 30
    while time.monotonic() < limit and not all(f.exists() and f.read_text() for f in files):
        time.sleep(0.05)
    pids = [int(f.read_text()) for f in files]
    assert all(alive(pid) for pid in pids)
    launcher.kill()
    launcher.wait()
    while time.monotonic() < limit and any(alive(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ConfigError("steps must be at least 1."), 2, "steps must be at least 1."),
        (RuntimeError("connection reset"), 76, "RETRYABLE"),
        (FatalFault("loss is NaN at step 3"), 78, "loss is NaN at step 3"),
        (KeyboardInterrupt(), 130, "aborted"),
    ],
)
def test_a_rank_ends_with_the_code_of_its_error(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    code: int,
    shown: str,
) -> None:
    def run(config: Config, env: object) -> ExitCode:
        raise error

    monkeypatch.setitem(sys.modules, "trainer.train", SimpleNamespace(run=run))
    assert run_rank(UNEXAMINED) == code
    assert shown in caplog.text


@pytest.mark.parametrize("code", [ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.STOPPED])
def test_a_rank_returns_what_training_returns(monkeypatch: pytest.MonkeyPatch, code: ExitCode) -> None:
    monkeypatch.setitem(sys.modules, "trainer.train", SimpleNamespace(run=lambda config, env: code))
    assert run_rank(UNEXAMINED) is code


def test_a_failing_doctor_keeps_the_training_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    module = SimpleNamespace(run=lambda config, env: started.append("train") or ExitCode.DONE)
    monkeypatch.setitem(sys.modules, "trainer.train", module)
    monkeypatch.delenv("LDM_RESTARTS", raising=False)
    config = Config()
    statuses = iter([2, 0])

    def doctor(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return popen([sys.executable, "-c", f"raise SystemExit({next(statuses)})"])

    popen = subprocess.Popen
    monkeypatch.setattr(rank.subprocess, "Popen", doctor)
    monkeypatch.setattr(rank, "_driver_is_open", lambda: True)  # so it is no fork
    assert run_rank(config) is ExitCode.USER_ERROR
    assert started == []
    assert run_rank(config) is ExitCode.DONE
    assert started == ["train"]
    monkeypatch.setenv("LDM_RESTARTS", "1")  # a restart does not examine again
    assert run_rank(config) is ExitCode.DONE


def test_imports_that_fail_end_the_rank_before_a_doctor_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(rank.subprocess, "Popen", lambda *a, **k: begun.append("process"))
    monkeypatch.setattr(rank.os, "fork", lambda: begun.append("fork"))
    monkeypatch.setitem(sys.modules, "trainer.train", None)
    monkeypatch.delenv("LDM_RESTARTS", raising=False)
    assert run_rank(Config()) not in (ExitCode.DONE, ExitCode.PREEMPTED)
    assert begun == []


def test_given_ranks_are_recognised() -> None:
    assert ranks_are_given({"RANK": "0", "WORLD_SIZE": "8"})
    assert not ranks_are_given({})


def in_slurm(tasks_of_step: int | None, **more: str) -> dict[str, str]:
    """Variables of a job of two nodes with eight tasks each, in a step of so many tasks or in none."""
    job = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16", "SLURM_NNODES": "2", **more}
    if tasks_of_step is None:
        return job
    return {**job, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks_of_step)}


@pytest.mark.parametrize(
    ("environment", "given", "ranks"),
    [
        (in_slurm(16), True, 16),
        (in_slurm(None), False, 1),  # a batch script before srun
        (in_slurm(1), False, 1),  # a shell: srun --pty, or salloc with use_interactive_step
        (in_slurm(1, SLURM_NTASKS="1"), False, 1),
        (in_slurm(1, LDM_JOB_DIR="/job"), True, 1),  # slurm/train_ldm.sh on one GPU
        (in_slurm(None, LDM_JOB_DIR="/job"), False, 1),
    ],
)
def test_srun_gives_ranks_where_it_has_started_several(
    environment: dict[str, str], given: bool, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranks_are_given(environment) == given
    assert DistributedEnv.detect(environment).world_size == ranks
    monkeypatch.setattr(os, "environ", environment)
    assert told_rank() == (0, ranks)


def test_masked_devices_are_counted() -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "0,2,5"}) == 3
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "-1"}) == 0


def test_counting_devices_takes_no_torch() -> None:
    code = (
        "import sys\nfrom trainer.launch import local\n"
        "print(local.visible_devices({}) == (local._devices_by_driver() or 0), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_more_ranks_than_samples_are_refused_before_anything_is_spawned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "ranks_are_given", lambda environment: False)
    monkeypatch.setattr(local, "supervise", lambda *a, **k: pytest.fail("spawned"))
    config = Config(global_batch_size=8, micro_batch_size=4, distributed=DistributedConfig(ranks=9))
    with pytest.raises(ConfigError, match=r"9 ranks cannot share global_batch_size=8.*use 1 to 8 ranks"):
        launch(config)


def test_free_ports_lie_below_the_kernels_own_range() -> None:
    assert all(15_000 <= free_port() < 32_000 for _ in range(20))


def test_waiting_for_a_processor_is_measured() -> None:
    before = cpu_wait_s(os.getpid())
    sum(range(1_000_000))
    assert 0.0 <= before <= cpu_wait_s(os.getpid())
    assert cpu_wait_s(2**22 + 1) == 0.0


def test_the_launcher_stays_small() -> None:
    """What watches the ranks for weeks imports neither torch nor numpy, nor a storage library."""
    code = "import sys, trainer.launch.local; sys.exit(bool({'torch', 'numpy', 'fsspec'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_statuses_in_words() -> None:
    assert describe(-9) == "was ended by SIGKILL"
    assert describe(76) == "ended with exit code 76 (retryable)"
    assert describe(1) == "ended with exit code 1"
