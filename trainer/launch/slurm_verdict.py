"""What the end of an attempt on SLURM means: how it ended, which nodes are to blame, what follows. Pure.

An allocation holds the nodes that the run asked for and its spares. What is known of one decides its turn:

    clean      in the order in which SLURM names them                               first
    suspect    drained, or one of its ranks met a fault of its machine              only if clean ones are few
    worn out   at fault `node_strikes` times in this job, or its GPU is sick        never again
    gone       lost by SLURM, did not start or end its tasks, unfit in the check    never in this allocation

An attempt counts against the run unless a later step was committed than ever before: `max_faults` in a row
that brought nothing end the job, however long they took; any number that each got further do not.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.exit_codes import ExitCode, combine, normalize, should_restart

_SIGNALLED = {
    "Killed": 137,
    "Terminated": 143,
    "Segmentation fault": 139,
    "Bus error": 135,
    "Aborted": 134,
    "Out Of Memory": 137,
    "Hangup": 129,
    "User defined signal 1": 138,
    "User defined signal 2": 140,
    "Interrupt": 130,
}
_PREEMPTING = (138, 140, 143)
_TASK_LINE = re.compile(r"srun: error: (?P<nodes>[^\s:]+): tasks? (?P<tasks>[\d,\-\[\]]+): (?P<what>.+)")
_EXIT = re.compile(r"Exited with exit code (\d+)")
_TERMINATING = re.compile(r"Terminating StepId|Force Terminated|Job step aborted|CANCELLED AT")
_LOST = re.compile(r"srun: error: (?:Node failure on (\S+)|Task launch for .* failed on node (\S+?):)")

_FINAL = {
    ExitCode.USER_ERROR: "the sentence above says what to change",
    ExitCode.STOPPED: "a person asked for it",
    ExitCode.FATAL: "it would end there again",
    ExitCode.ABORTED: "it was aborted",
}

Action = Literal["done", "stop", "restart", "requeue"]


@dataclass(frozen=True)
class TaskEnd:
    """What srun said about the end of one or several of its tasks."""

    nodes: str
    """Node, or a SLURM host list such as n[1-2]."""
    status: int
    """Exit status in the shell's form (128 + signal number)."""
    terminated: bool
    """Ended by srun, or by the job's script, because another task was gone."""


@dataclass(frozen=True)
class Policy:
    """When to give up on a job or a node; from LDM_MAX_FAULTS, LDM_NODE_STRIKES and LDM_MIN_NODES."""

    max_faults: int = 5
    """Attempts in a row that ended with a fault and committed nothing new, after which the job ends."""
    node_strikes: int = 2
    """Faults of one node after which it is left out of this job."""
    min_nodes: int = 1
    """Fewest nodes to go on with in an allocation that has lost some."""


@dataclass(frozen=True)
class Allocation:
    """What the job holds when an attempt has ended."""

    number: int
    """How often the job was requeued before."""
    nodes: tuple[str, ...]
    """In SLURM's order, those that answer it."""
    wanted: int
    """Nodes of the whole run; the others are spares."""
    drained: frozenset[str] = frozenset()
    lasts: bool = True
    """Whether it is the job's for long enough to start again in it: not being taken back, time left."""


@dataclass(frozen=True)
class AttemptVerdict:
    """What follows an attempt."""

    action: Action
    code: ExitCode
    """How the attempt ended, and the job's exit code if it is the last."""
    reason: str
    """One sentence for the log."""
    exclude: tuple[str, ...] = ()
    """Nodes that a requeued job is not to get again."""
    candidates: tuple[str, ...] = ()
    """Of a restart: nodes in the order in which to take them."""
    count: int = 0
    """Of a restart: how many of them."""


def parse_srun(text: str) -> tuple[list[TaskEnd], list[str]]:
    """(ends of tasks in the order srun reported them, nodes that srun lost) from srun's stderr."""
    ends: list[TaskEnd] = []
    lost: list[str] = []
    terminating = False
    for line in text.splitlines():
        failure = _LOST.search(line)
        task = _TASK_LINE.search(line)
        if failure:
            lost += [node for node in expand(failure[1] or failure[2]) if node not in lost]
        elif task:
            code = _EXIT.search(task["what"])
            words = task["what"].partition(" (")[0].strip()
            status = int(code[1]) if code else _SIGNALLED.get(words, 137)
            ends.append(TaskEnd(task["nodes"], status, terminating))
        elif _TERMINATING.search(line):
            terminating = True
    return ends, lost


def expand(nodes: str) -> list[str]:
    """Names in a SLURM host list: "gpu[07-09,12],cpu1" -> gpu07 gpu08 gpu09 gpu12 cpu1."""
    found = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\]([^,\[\]]*))?", nodes):
        for part in ranges.split(",") if ranges else [""]:
            first, _, last = part.partition("-")
            if not last:
                found.append(f"{prefix}{first}{suffix}")
                continue
            found += [f"{prefix}{n:0{len(first)}}{suffix}" for n in range(int(first), int(last) + 1)]
    return found


def blame(ends: Iterable[TaskEnd], lost: Sequence[str]) -> list[str]:
    """Nodes at fault: lost ones; else where a signal ended a rank; else where ranks hung to the end.

    Ranks that stopped by themselves with an exit code only noticed a fault: they are witnesses. A line
    that covers several nodes at once names no culprit.
    """
    if lost:
        return list(lost)
    ends = [end for end in ends if "[" not in end.nodes and "," not in end.nodes]
    own = {end.nodes for end in ends if not end.terminated}
    struck = [end.nodes for end in ends if not end.terminated and end.status > 128]
    hung = [end.nodes for end in ends if end.terminated and end.nodes not in own]
    culprits = struck[:1] or (hung if len(set(hung)) == 1 and own else [])
    return sorted(set(culprits))


def exit_code(status: int, ends: Sequence[TaskEnd], lost: Sequence[str]) -> ExitCode:
    """How the run ended, from srun's own status and what it said about each task."""
    own = [end.status for end in ends if not end.terminated]
    if lost:
        return ExitCode.RETRYABLE
    if not own:
        return normalize(status)
    return combine(_as_process_status(code) for code in own)


def _as_process_status(code: int) -> int:
    """With a signal as `combine` knows it: negative."""
    if code in _PREEMPTING:  # a rank that dies of such a one was still importing, and had nothing to save yet
        return ExitCode.PREEMPTED
    return 128 - code if 128 < code <= 128 + signal.SIGRTMAX else code


def fruitless(attempts: Sequence[dict[str, Any]], baseline: int = 0) -> int:
    """Attempts that ended with a fault since the last one that committed a later step than ever before.

    Args:
        attempts: records; `committed` is the newest committed step at the attempt's end, None: unknown.
        baseline: the newest committed step before the first.
    """
    best, count = baseline, 0
    for attempt in attempts:
        committed = attempt.get("committed")
        if committed is not None and committed > best:
            best, count = committed, 0
        elif attempt["code"] == ExitCode.RETRYABLE:
            count += 1
    return count


def decide(
    attempts: Sequence[dict[str, Any]],
    policy: Policy,
    allocation: Allocation,
    *,
    holds: Callable[[int], bool],
    baseline: int = 0,
) -> AttemptVerdict:
    """What follows the last of `attempts`, which are the job's records, oldest first.

    Args:
        holds: whether the configuration can be trained on that many nodes.
        baseline: see `fruitless`.
    """
    code = ExitCode(attempts[-1]["code"])
    if code == ExitCode.DONE:
        return AttemptVerdict("done", code, "the run is done")
    if not should_restart(code):
        return AttemptVerdict("stop", code, _FINAL[code])
    count = fruitless(attempts, baseline)
    if code == ExitCode.RETRYABLE and count >= policy.max_faults:
        return AttemptVerdict(
            "stop",
            code,
            f"{count} attempts in a row committed no new step; look at their logs, mend the cause and submit "
            "the same again (LDM_MAX_FAULTS says how many are made)",
        )
    worn = _worn_out(attempts, policy)
    if code == ExitCode.PREEMPTED:
        return AttemptVerdict("requeue", code, "the machines were wanted back", worn)
    if not allocation.lasts:
        return AttemptVerdict("requeue", code, "the allocation is ending", worn)
    return _place(attempts, policy, allocation, holds, worn)


def _place(
    attempts: Sequence[dict[str, Any]],
    policy: Policy,
    allocation: Allocation,
    holds: Callable[[int], bool],
    worn: tuple[str, ...],
) -> AttemptVerdict:
    """Start again on what is left of the allocation, or give it back."""
    here = [attempt for attempt in attempts if attempt["allocation"] == allocation.number]
    gone = {node for attempt in here for node in attempt["gone"]}
    suspect = {node for attempt in here for node in attempt["suspect"]} | allocation.drained
    usable = [node for node in allocation.nodes if node not in gone and node not in worn]
    candidates = tuple(sorted(usable, key=lambda node: node in suspect))  # stable: SLURM's order otherwise
    code, wanted = ExitCode.RETRYABLE, allocation.wanted
    if len(candidates) >= wanted:
        spares = len(candidates) - wanted
        reason = f"{wanted} nodes again in this allocation, which keeps {spares} to spare"
        return AttemptVerdict("restart", code, reason, (), candidates, wanted)
    have = len(candidates)
    if not any(attempt["ran"] for attempt in here):
        return AttemptVerdict("requeue", code, f"{have} of {wanted} nodes are fit", worn)
    if have >= max(1, policy.min_nodes) and holds(have):
        reason = f"no spare node is left: going on with {have} of {wanted} nodes"
        return AttemptVerdict("restart", code, reason, (), candidates, have)
    exclude = tuple(sorted({*worn, *gone}))
    return AttemptVerdict(
        "requeue", code, f"{have} of {wanted} nodes are left, too few for this run", exclude
    )


def _worn_out(attempts: Sequence[dict[str, Any]], policy: Policy) -> tuple[str, ...]:
    strikes = Counter(node for attempt in attempts for node in attempt["blamed"])
    sick = {node for attempt in attempts for node in attempt["sick"]}
    return tuple(sorted(sick | {node for node, count in strikes.items() if count >= policy.node_strikes}))
