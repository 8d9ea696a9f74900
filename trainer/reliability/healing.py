"""Healing: decide from the agreed loss of each step whether to go on, leave it out, rewind, or give up.

What a step showed, and what follows; the engine has left out every update whose gradient was not finite:

    loss or gradient not finite, weights are fine    the step is left out in place, and named
    the step after it is bad again, or weights       back to the newest good checkpoint, without the samples
      or averages are not finite themselves            of these steps
    a loss spike                                     noted: its update was made
    `spike_patience` spikes in a row                 back, without their samples
    more of it than the budget of 100,000 steps      left out -> back -> the end
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import read_bytes
from data_pipeline.storage.large import write_whole
from data_pipeline.storage.urls import join
from trainer.config.training import HealingConfig

# Scales the median absolute deviation to the standard deviation of a Gaussian.
_MAD_TO_SIGMA = 1.4826
_MIN_HISTORY = 16
_JOURNAL = "healing.json"
_BUDGET_STEPS = 100_000


Kind = Literal["nan", "inf", "spike", "gradient"]


@dataclass(frozen=True)
class Symptom:
    """What is wrong with a step."""

    step: int
    kind: Kind
    value: float
    """Loss or gradient norm."""
    zscore: float | None
    """Robust z-score of the loss (spike)."""

    def __str__(self) -> str:
        return f"{_DESCRIPTIONS[self.kind]} ({self.value:.6g}) at step {self.step}"


Action = Literal["skipped", "noted", "rewound", "dropped"]
"""skipped: the update was left out. noted: a spike that did not stay. rewound: the run went back. dropped: a
step before it whose samples went as well."""


@dataclass(frozen=True)
class Incident:
    """Something that went wrong at a step, as it goes into the ledger, JSONL and W&B."""

    step: int
    """The offending step."""
    kind: Kind
    """What was seen there."""
    value: str
    """Loss or gradient norm, as text (JSON has no NaN)."""
    zscore: float | None
    """Robust z-score of the loss (spike)."""
    ordinals: tuple[int, ...]
    """Samples of that step; where the run went back, never to be used again."""
    action: Action = "rewound"
    """What followed."""
    culprits: tuple[str, ...] = ()
    """Rank, host and sample keys of each rank whose own loss was not finite."""


@dataclass(frozen=True)
class HealingVerdict:
    """What to do after a step: go on, with a symptom to `record` or without; record and rewind; or give
    up."""

    action: Literal["continue", "rewind", "stop"]
    symptom: Symptom | None = None
    message: str = ""


def robust_zscore(value: float, history: Sequence[float]) -> float:
    """Distance of `value` from the median of `history` in robust standard deviations (MAD).

    A floor of a thousandth of the median keeps a flat history from making any change a spike.
    """
    median = statistics.median(history)
    deviation = _MAD_TO_SIGMA * statistics.median(abs(v - median) for v in history)
    return (value - median) / max(deviation, 1e-3 * abs(median), 1e-12)


class Healer:
    """Judges each step's loss and gradient norm, and keeps the list of samples to skip.

    Give it values that are the same on every rank (the mean loss over all ranks, the global gradient
    norm): the verdict follows from them and from `poisoned`, so all ranks decide alike. The state travels
    in every checkpoint, and the skip list is stored again the moment it grows (see `journal`), since a
    rewind goes back to a checkpoint that does not know it yet.
    """

    def __init__(self, config: HealingConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._incidents: list[Incident] = []

    @property
    def skipped(self) -> frozenset[int]:
        """Ordinals that the loader must leave out."""
        gone = [incident for incident in self._incidents if incident.action in ("rewound", "dropped")]
        return frozenset(o for incident in gone for o in incident.ordinals)

    @property
    def recent_loss(self) -> float | None:
        """Mean of the losses in the running window, the same on every rank; None while there are none."""
        return statistics.fmean(self._losses) if self._losses else None

    def forget_losses(self) -> None:
        """What follows is of other pictures: no loss so far is a measure of it."""
        self._losses.clear()

    def check(
        self,
        step: int,
        loss: float,
        grad_norm: float | None,
        *,
        poisoned: Callable[[], bool] = lambda: False,
    ) -> HealingVerdict:
        """The verdict on optimizer step `step`.

        Args:
            grad_norm: of all gradients of the step; not finite: the engine made no update.
            poisoned: whether weights or averages are not finite. It may be a collective, and is one in a run:
                it is asked on all ranks or on none, after a step without an update that would otherwise pass.
        """
        symptom = self._symptom(step, loss, grad_norm)
        if symptom is None:
            self._losses.append(loss)
            return HealingVerdict("continue")
        if not self._config.enabled:
            message = f"{symptom}; healing.enabled=true would leave it out, or rewind and skip its samples."
            return HealingVerdict("stop", symptom, message)
        left_out = grad_norm is not None and not math.isfinite(grad_norm)
        if symptom.kind == "spike":
            passes = len(self._streak(step)) + 1 < self._config.spike_patience
        else:
            known = self._recent("skipped", step)
            again = any(incident.kind != "spike" for incident in self._streak(step))
            passes = left_out and not again and known < self._config.max_skips and not poisoned()
        if passes:
            return HealingVerdict("continue", symptom)
        rewinds = self._recent("rewound", step)
        if rewinds >= self._config.max_rewinds:
            message = (
                f"{symptom}, after {rewinds} rewinds within {_BUDGET_STEPS} steps already "
                f"(healing.max_rewinds={self._config.max_rewinds}); lower optimizer.learning_rate "
                "or look at the samples of the incidents in the run's ledger."
            )
            return HealingVerdict("stop", symptom, message)
        return HealingVerdict("rewind", symptom)

    def record(
        self, verdict: HealingVerdict, ordinals: Iterable[int], culprits: Sequence[str] = ()
    ) -> Incident:
        """Remember the step: the global batch, gathered from all ranks.

        After a rewind its samples, and those of bad steps right before it, are never served again.
        """
        symptom = verdict.symptom
        assert symptom is not None
        action: Action = "noted" if symptom.kind == "spike" else "skipped"
        if verdict.action == "rewind":
            action = "rewound"
            for incident in self._streak(symptom.step):
                self._incidents[self._incidents.index(incident)] = replace(incident, action="dropped")
        incident = Incident(
            symptom.step,
            symptom.kind,
            repr(symptom.value),
            symptom.zscore,
            tuple(sorted(ordinals)),
            action,
            tuple(culprits),
        )
        self._add(incident)
        return incident

    def state(self) -> dict[str, Any]:
        """JSON-able; goes into the checkpoint."""
        return {"losses": list(self._losses), "incidents": self.journal()}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, also when rewinding: incidents known already are kept."""
        self._losses = deque(state["losses"], maxlen=self._config.spike_window)
        self.merge(state["incidents"])

    def journal(self) -> list[dict[str, Any]]:
        """The incidents alone, JSON-able, to be stored durably before a rewind."""
        return [asdict(incident) for incident in self._incidents]

    def merge(self, journal: list[dict[str, Any]]) -> None:
        """Add stored incidents that are not known yet (a restart after a rewind)."""
        for record in journal:
            lists = {name: tuple(record.get(name, ())) for name in ("ordinals", "culprits")}
            self._add(Incident(**{**record, **lists}))

    def _add(self, incident: Incident) -> None:
        """Once each: a step that is made again meets the same; that the run went back is never forgotten."""
        for index, known in enumerate(self._incidents):
            if (known.step, known.ordinals) == (incident.step, incident.ordinals):
                if known.action in ("skipped", "noted"):
                    self._incidents[index] = incident
                return
        self._incidents.append(incident)

    def _streak(self, step: int) -> list[Incident]:
        """Incidents of the steps right before this one, newest first, that the run did not go back for."""
        passed = {i.step: i for i in self._incidents if i.action in ("skipped", "noted")}
        found = []
        while step - 1 in passed:
            step -= 1
            found.append(passed[step])
        return found

    def _recent(self, action: Action, step: int) -> int:
        """How often this has followed within the steps of one budget."""
        return sum(i.action == action and i.step > step - _BUDGET_STEPS for i in self._incidents)

    def _symptom(self, step: int, loss: float, grad_norm: float | None) -> Symptom | None:
        if math.isnan(loss):
            return Symptom(step, "nan", loss, None)
        if math.isinf(loss):
            return Symptom(step, "inf", loss, None)
        if grad_norm is not None and not math.isfinite(grad_norm):
            return Symptom(step, "gradient", grad_norm, None)
        known = len(self._losses)
        if self._config.spike_zscore > 0 and known >= min(_MIN_HISTORY, self._config.spike_window):
            zscore = robust_zscore(loss, self._losses)
            if zscore > self._config.spike_zscore:
                return Symptom(step, "spike", loss, zscore)
        return None


_DESCRIPTIONS = {
    "nan": "loss is NaN",
    "inf": "loss is infinite",
    "spike": "loss spike",
    "gradient": "gradient norm is not finite",
}


def write_journal(run_dir: str, journal: list[dict[str, Any]]) -> None:
    """Store all incidents so far beside the checkpoints, whole or not at all: older ones do not know them.

    Raises:
        UserError, RetryableFault: it does not work; the run must not go back without it.
    """
    write_whole(join(run_dir, _JOURNAL), json.dumps(journal).encode())


def read_journal(run_dir: str) -> list[dict[str, Any]]:
    """Stored incidents; none when there is no file."""
    try:
        journal: list[dict[str, Any]] = json.loads(read_bytes(join(run_dir, _JOURNAL)))
    except NotFound:
        return []
    return journal
