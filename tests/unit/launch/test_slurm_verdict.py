"""What is made of srun's words, of attempts in a row and of the nodes of an allocation."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.exit_codes import ExitCode
from trainer.launch.slurm_verdict import (
    Allocation,
    AttemptVerdict,
    Policy,
    TaskEnd,
    blame,
    decide,
    exit_code,
    expand,
    fruitless,
    parse_srun,
)

# As a real srun 22.05 wrote them.
KILLED = """\
srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=4.0
slurmstepd-n1: error: *** STEP 4.0 ON n1 CANCELLED AT 2026-11-21T08:09:34 ***
srun: error: n1: task 0: Exited with exit code 76
srun: Force Terminated StepId=4.0
"""
CANCELLED = """\
srun: Job step aborted: Waiting up to 17 seconds for job step to finish.
slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-21T08:11:12 ***
srun: error: n2: task 1: Exited with exit code 75
srun: error: n1: task 0: Exited with exit code 75
"""
NODE_LOST = """\
srun: error: Node failure on n3
srun: error: n1: task 0: Killed
srun: error: n2: task 1: Killed
srun: Force Terminated StepId=1.0
"""
UNREACHABLE = """\
srun: error: Task launch for StepId=5.3 failed on node n3: Communication connection failure
srun: error: Application launch failed: Communication connection failure
srun: Job step aborted: Waiting up to 602 seconds for job step to finish.
"""


def test_srun_words() -> None:
    ends, lost = parse_srun(KILLED)
    assert ends == [TaskEnd("n2", 137, False), TaskEnd("n1", 76, True)]
    assert lost == []
    text = "srun: error: n[1-2]: tasks 0-1: Exited with exit code 2\nsrun: error: Node failure on n7\n"
    assert parse_srun(text) == ([TaskEnd("n[1-2]", 2, False)], ["n7"])
    ends, _ = parse_srun("srun: error: gpu-03: task 9: Segmentation fault (core dumped)\n")
    assert ends == [TaskEnd("gpu-03", 139, False)]
    assert parse_srun(UNREACHABLE) == ([], ["n3"])
    assert blame(*parse_srun(NODE_LOST)) == ["n3"]


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n1", ["n1"]),
        ("gpu[07-09,12],cpu1", ["gpu07", "gpu08", "gpu09", "gpu12", "cpu1"]),
        ("r1n[1-2]-ib", ["r1n1-ib", "r1n2-ib"]),
    ],
)
def test_host_lists(text: str, nodes: list[str]) -> None:
    assert expand(text) == nodes


@pytest.mark.parametrize(
    ("status", "text", "code"),
    [
        (0, "", ExitCode.DONE),
        (137, KILLED, ExitCode.RETRYABLE),
        (75, CANCELLED, ExitCode.PREEMPTED),
        (2, "srun: error: n[1-2]: tasks 0-1: Exited with exit code 2", ExitCode.USER_ERROR),
        # One rank says that the configuration is wrong; the others were waiting and were killed for it.
        (137, "srun: error: n1: task 0: Exited with exit code 2\nsrun: launch/slurm: "
         "_step_signal: Terminating StepId=1.0\nsrun: error: n2: task 1: Killed", ExitCode.USER_ERROR),
        (143, "srun: error: n1: task 0: Terminated", ExitCode.PREEMPTED),
        (138, "srun: error: n1: task 0: User defined signal 1", ExitCode.PREEMPTED),
        (1, "srun: error: Node failure on n2", ExitCode.RETRYABLE),
        (1, UNREACHABLE, ExitCode.RETRYABLE),
        (1, "srun: error: Unable to create step for job 5: Memory required by task is not available",
         ExitCode.RETRYABLE),
        # What its peers end with follows from the death of a rank; Ctrl-C is nobody's death.
        (137, "srun: error: n1: task 0: Killed\nsrun: error: n2: task 1: Exited with exit code 78",
         ExitCode.RETRYABLE),
        (135, "srun: error: n2: task 1: Exited with exit code 2\n"
         "srun: error: n1: task 0: Exited with exit code 135", ExitCode.RETRYABLE),
        (130, "srun: error: n1: task 0: Interrupt\nsrun: error: n2: task 1: Exited with exit code 78",
         ExitCode.ABORTED),
        (255, "srun: error: n1: task 0: Exited with exit code 255\n"
         "srun: error: n2: task 1: Exited with exit code 78", ExitCode.FATAL),
        (77, "srun: error: n[1-2]: tasks 0-1: Exited with exit code 77", ExitCode.STOPPED),
    ],
)  # fmt: skip
def test_exit_code(status: int, text: str, code: ExitCode) -> None:
    assert exit_code(status, *parse_srun(text)) is code


@pytest.mark.parametrize(
    ("ends", "lost", "nodes"),
    [
        ([TaskEnd("n2", 137, False), TaskEnd("n1", 76, False)], [], ["n2"]),
        ([TaskEnd("n1", 76, False), TaskEnd("n2", 137, False)], [], ["n2"]),  # the witness spoke first
        ([TaskEnd("n1", 76, False), TaskEnd("n2", 137, True)], [], ["n2"]),  # hung until it was ended
        ([TaskEnd("n1", 76, False), TaskEnd("n2", 137, True), TaskEnd("n3", 137, True)], [], []),
        ([TaskEnd("n1", 76, False), TaskEnd("n2", 76, False)], [], []),
        ([TaskEnd("n[1-2]", 137, False)], [], []),
        ([TaskEnd("n1", 137, True)], [], []),
        ([TaskEnd("n1", 76, False)], ["n9"], ["n9"]),
    ],
)
def test_blame(ends: list[TaskEnd], lost: list[str], nodes: list[str]) -> None:
    assert blame(ends, lost) == nodes


FAULT, PREEMPTED = ExitCode.RETRYABLE, ExitCode.PREEMPTED


def attempt(code: ExitCode = FAULT, **facts: Any) -> dict[str, Any]:
    """A record of an attempt that committed nothing new, unless `facts` say otherwise."""
    nodes: dict[str, Any] = {"blamed": [], "gone": [], "suspect": [], "sick": []}
    known = {"committed": 0, "ran": True, "allocation": 0, **nodes}
    return {"code": int(code), **known, **facts}


def verdict(attempts: list[dict[str, Any]], nodes: str = "n1 n2 n3", **options: Any) -> AttemptVerdict:
    """Of a run on two nodes with a spare, unless told otherwise."""
    holds = options.pop("holds", lambda nodes: True)
    policy = options.pop("policy", Policy())
    allocation = Allocation(**{"number": 0, "nodes": tuple(nodes.split()), "wanted": 2, **options})
    return decide(attempts, policy, allocation, holds=holds)


@pytest.mark.parametrize(
    ("attempts", "action"),
    [
        ([attempt(ExitCode.DONE)], "done"),
        ([attempt(ExitCode.USER_ERROR)], "stop"),
        ([attempt(ExitCode.STOPPED)], "stop"),
        ([attempt(ExitCode.FATAL)], "stop"),
        ([attempt(PREEMPTED)] * 100, "requeue"),
        ([attempt()] * 4, "restart"),
        ([attempt()] * 5, "stop"),
        ([attempt(committed=step) for step in range(1, 201)], "restart"),
        ([attempt(committed=step) for step in range(1, 201)] + [attempt(committed=200)] * 4, "restart"),
        ([attempt(committed=step) for step in range(1, 201)] + [attempt(committed=200)] * 5, "stop"),
        ([attempt()] * 4 + [attempt(PREEMPTED, committed=1)] + [attempt(committed=1)] * 4, "restart"),
        ([attempt()] * 4 + [attempt(PREEMPTED)] + [attempt()], "stop"),  # nothing was saved in between
        ([attempt(committed=None)] * 5, "stop"),  # storage did not say
        (
            [attempt(committed=9), attempt(committed=None), attempt(committed=10)] * 9,
            "stop",
        ),  # 9 again: rewound
    ],
)
def test_only_attempts_that_committed_nothing_new_are_bounded(
    attempts: list[dict[str, Any]], action: str
) -> None:
    assert verdict(attempts).action == action


def test_what_an_earlier_job_committed_is_no_progress() -> None:
    attempts = [attempt(committed=500)] * 5
    assert fruitless(attempts) == 4
    assert fruitless(attempts, baseline=500) == 5


def restart(nodes: str, count: int) -> tuple[str, tuple[str, ...], int]:
    return "restart", tuple(nodes.split()), count


@pytest.mark.parametrize(
    ("attempts", "nodes", "expected"),
    [
        ([attempt(blamed=["n2"])], "n1 n2 n3", restart("n1 n2 n3", 2)),  # once is no habit
        ([attempt(blamed=["n2"])] * 2, "n1 n2 n3", restart("n1 n3", 2)),
        ([attempt(gone=["n1"], blamed=["n1"])], "n1 n2 n3", restart("n2 n3", 2)),
        ([attempt(sick=["n1"])], "n1 n2 n3", restart("n2 n3", 2)),
        ([attempt()], "n1 n3", restart("n1 n3", 2)),  # SLURM took n2 out of the allocation
        ([attempt(suspect=["n1"])], "n1 n2 n3", restart("n2 n3 n1", 2)),
        ([attempt(suspect=["n1"])], "n1 n2", restart("n2 n1", 2)),  # there is no other
        ([attempt(gone=["n2"]), attempt(gone=["n3"])], "n1 n2 n3", restart("n1", 1)),
        (
            [attempt(gone=["n2"]), attempt(allocation=1)],
            "n1 n2 n3",
            ("requeue", (), 0),
        ),  # of the last allocation
    ],
)
def test_which_nodes_come_next(
    attempts: list[dict[str, Any]], nodes: str, expected: tuple[str, tuple[str, ...], int]
) -> None:
    found = verdict(attempts, nodes, lasts=attempts[-1]["allocation"] == 0)
    assert (found.action, found.candidates, found.count) == expected


def test_a_drained_node_comes_last() -> None:
    assert verdict([attempt()], drained=frozenset({"n1"})).candidates == ("n2", "n3", "n1")


def test_too_few_nodes_are_given_back_and_the_lost_ones_excluded() -> None:
    lost = [attempt(gone=["n2"]), attempt(gone=["n3"])]
    asked = []
    found = verdict(lost, holds=lambda nodes: bool(asked.append(nodes)))
    assert (found.action, found.exclude, asked) == ("requeue", ("n2", "n3"), [1])
    assert "1 of 2 nodes are left" in found.reason
    assert verdict(lost, policy=Policy(min_nodes=2)).action == "requeue"


def test_an_allocation_that_was_never_large_enough_is_given_back() -> None:
    unfit = attempt(gone=["n1"], blamed=["n1"], ran=False)
    assert verdict([unfit], "n1 n2") == AttemptVerdict("requeue", FAULT, "1 of 2 nodes are fit", ())
    assert verdict([unfit, {**unfit, "allocation": 1}], "n1 n2", number=1).exclude == ("n1",)


def test_what_ends_anyway_is_requeued() -> None:
    assert verdict([attempt()], lasts=False).action == "requeue"
    assert verdict([attempt(PREEMPTED)]).action == "requeue"
