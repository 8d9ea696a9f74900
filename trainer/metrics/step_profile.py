"""A torch profile of a few steps of a running job, taken when somebody asks for it (`ldm profile`).

    rank 0 hears of the request          ask(request); `asked` goes into the ranks' agreement of the step
    all ranks, same step boundary        turn(): the request is told to all, chosen ranks begin to record
    steps later, same boundary again     turn(): they end; a thread writes what they have

Nothing that training computes is touched, and nothing is done at all while nobody asks.
"""

from __future__ import annotations

import logging
import re
import socket
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from data_pipeline.errors import Failure
from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.urls import join
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.reliability.requests import ProfileRequest, profiles_url

logger = logging.getLogger(__name__)

KINDS = (
    # The first pattern that a kernel's name matches decides, so special names stand before general ones.
    ("communication", r"nccl|c10d::|gloo"),
    ("convolution", r"triton_tem_\w*conv"),
    ("matmul", r"triton_tem_"),
    ("compiled", r"^triton_(poi|red|per|for|spl)_"),
    ("group norm", r"^_(forward|backward)_(sums|lines|apply)"),
    ("layer norm and GEGLU", r"^_(layer_norm|geglu)_"),
    ("attention", r"fmha|flash|sdpa|attention|softmax"),
    ("layout conversion", r"nchwtonhwc|nhwctonchw|transpose|permute"),
    ("group norm", r"group_?norm|rowwisemoments|computefusedparams|computeinternalgradients"),
    ("layer norm and GEGLU", r"layer_?norm|gammabeta|computegradinput"),
    ("convolution", r"conv|fprop|dgrad|wgrad|implicit_gemm"),
    ("optimizer", r"adam|multi_tensor|foreach|lerp|lpnorm|^_accumulate"),
    ("matmul", r"gemm|cutlass|nvjet|cublas|splitk|addmm|bmm|aten::mm|linear"),
    ("random", r"philox|random|distribution|^_draw"),
    ("activations", r"silu|gelu|sigmoid|glu"),
    ("reductions", r"reduce|sum|mean|norm"),
    ("copies and concatenation", r"memcpy|memset|copy|cat|fill|clone|index|gather|upsample"),
    ("adds", r"add"),
)
"""(kind, pattern of the lower-case name of a kernel or, on a CPU, of an operator)"""

ANNOTATIONS = ("ProfilerStep", "## ", "nccl:")
_LARGEST = 30
_NAME_WIDTH = 100


def kind_of(name: str) -> str:
    """Kind of a kernel by its name, `other` where nothing fits."""
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), "other")


@dataclass(frozen=True)
class Spent:
    """What one kernel, or one operator on a CPU, took in all recorded steps."""

    name: str
    ms: float
    calls: int


class StepProfiler:
    """Takes the profiles that rank 0 is asked for; one at a time, others wait."""

    def __init__(self, run_dir: str, env: DistributedEnv) -> None:
        self._run_dir = run_dir
        self._env = env
        self._request: ProfileRequest | None = None
        self._left = 0  # steps that are still to be recorded, the same on every rank
        self._first = 0
        self._folder = ""
        self._recording: torch_profile | None = None
        # A thread: a trace is megabytes, and writing it takes seconds.
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="profile")

    def ask(self, request: ProfileRequest | None) -> None:
        """Remember a request, on rank 0; of two that wait, the newer one."""
        self._request = request or self._request

    @property
    def asked(self) -> bool:
        """Whether this rank has a request whose turn it is."""
        return self._request is not None and self._left == 0

    def turn(self, step: int, agreed: bool, *, busy: Callable[[], None] = lambda: None) -> None:
        """At each step boundary: begin what the ranks have agreed on, or end it after its last step.

        Args:
            step: optimizer steps made. agreed: whether rank 0 was `asked`, the same on every rank.
            busy: called before what takes seconds.
        """
        if self._left:
            self._left -= 1
            if self._left == 0:
                busy()
                self._end(step)
        elif agreed:
            busy()
            self._begin(step, collectives.broadcast_object(self._request))

    def close(self, step: int) -> None:
        """Write what was recorded until here; waits for it."""
        try:
            self._end(step)
        except RuntimeError as error:  # of a device that is lost: whatever ends the run has its own words
            logger.warning("the profile is lost: %s", error)
        self._writing.shutdown()

    def _begin(self, step: int, request: ProfileRequest) -> None:
        self._request = None
        ranks = [rank for rank in request.ranks if rank < self._env.world_size]
        if self._env.is_main:
            absent = sorted(set(request.ranks) - set(ranks))
            if absent:
                logger.warning("no profile of ranks %s: there are %d", absent, self._env.world_size)
            logger.info("profiling %d steps after step %d on ranks %s", request.steps, step, ranks)
        self._left = request.steps if ranks else 0
        self._folder = join(profiles_url(self._run_dir), f"step_{step:09d}_{request.name}")
        if self._env.rank in ranks:
            activities = [ProfilerActivity.CPU]
            if self._env.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._recording = torch_profile(activities=activities)
            self._recording.start()
        self._first = step + 1

    def _end(self, step: int) -> None:
        recorded, self._recording = self._recording, None
        if recorded is None:
            return
        if self._env.device.type == "cuda":
            torch.cuda.synchronize(self._env.device)
        recorded.stop()
        about = (
            f"rank {self._env.rank} ({socket.gethostname()}, {self._env.device}) of {self._env.world_size}"
        )
        title = f"steps {self._first} to {step}, {about}"
        self._writing.submit(self._write, recorded, title, max(1, step - self._first + 1))

    def _write(self, recorded: torch_profile, title: str, steps: int) -> None:
        place = join(self._folder, f"rank_{self._env.rank:05d}")
        try:
            spent = spent_by_name(recorded, on_gpu=self._env.device.type == "cuda")
            with tempfile.TemporaryDirectory(prefix="ldm-profile-") as folder:
                trace = Path(folder) / "trace.json.gz"
                recorded.export_chrome_trace(str(trace))
                write_bytes(f"{place}.trace.json.gz", trace.read_bytes())
            # Last: who waits for this file finds the trace, too.
            write_bytes(f"{place}.txt", format_profile(spent, title, steps).encode())
            logger.info("profile of %s: %s.{txt,trace.json.gz}", title, place)
        except (Failure, OSError, RuntimeError) as error:  # no reason to stop training
            logger.warning("the profile of %s is not stored: %s", title, error)


def spent_by_name(recorded: torch_profile, *, on_gpu: bool) -> list[Spent]:
    """Self time of every kernel, or of every operator where there is no GPU; largest first."""
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = []
    for event in recorded.key_averages():
        # Annotations are named ranges around kernels that are counted themselves.
        if event.device_type != wanted or event.key.startswith(ANNOTATIONS) or event.is_user_annotation:
            continue
        self_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append(Spent(event.key, self_us / 1e3, event.count))
    return sorted(found, key=lambda spent: -spent.ms)


def by_kind(spent: Iterable[Spent]) -> list[Spent]:
    """The same added up by kind of operation; largest first."""
    sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for each in spent:
        ms, calls = sums[kind_of(each.name)]
        sums[kind_of(each.name)] = ms + each.ms, calls + each.calls
    return sorted((Spent(kind, *both) for kind, both in sums.items()), key=lambda kind: -kind.ms)


def format_profile(spent: list[Spent], title: str, steps: int) -> str:
    """Two tables in milliseconds and calls per step: kinds of operation, and the largest operations."""
    total = sum(each.ms for each in spent) or 1.0

    def table(rows: Iterable[Spent], head: str) -> list[str]:
        lines = [f"{'ms/step':>10}  {'share':>7}  {'calls/step':>10}  {head}"]
        for row in rows:
            share, calls = 100 * row.ms / total, row.calls / steps
            lines.append(f"{row.ms / steps:>10.3f}  {share:>6.1f}%  {calls:>10.1f}  {row.name[:_NAME_WIDTH]}")
        return lines

    together = f"{total / steps:.3f} ms per step in all"
    lines = [title, together, "", *table(by_kind(spent), "kind"), ""]
    return "\n".join([*lines, *table(spent[:_LARGEST], "operation"), ""])
