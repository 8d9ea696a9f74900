"""An evaluator beside a run: whatever the run commits is drawn from and measured, by processes of its own.

    look       every poll_s: what is new? (lookout)            rank 0
    keep       mark it, so that the run does not remove it     rank 0
    draw       pictures of it, going on where a kill was       all ranks
    measure    figures against the reference                   all ranks
    tell       a line (findings), W&B, the best are marked     rank 0

It knows of the run what lies in its folder, and changes nothing there but its own mark. Whatever fails at the
storage is tried again for as long as it takes; what it was at is found again after a kill of its own.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import (
    Failure,
    NotFound,
    RetryableFault,
    RunTaken,
    StorageOutage,
    Unreachable,
    UserError,
)
from data_pipeline.storage.files import (
    check_writable,
    list_names,
    list_tree,
    read_bytes,
    remove_names,
    write_bytes,
)
from data_pipeline.storage.urls import join
from data_pipeline.tools.picture_sets import GRID
from trainer.checkpoint.catalogue import checkpoints_url, folder_name, open_checkpoint
from trainer.checkpoint.commands import find_checkpoint
from trainer.checkpoint.export import read_state
from trainer.checkpoint.manifest import BadManifest
from trainer.checkpoint.marks import mark
from trainer.config.identity import SETTINGS, stored_settings
from trainer.config.io import config_from_dict
from trainer.config.run import Config, ConfigError
from trainer.distributed import collectives
from trainer.evaluation.fidelity import Comparison
from trainer.evaluator.findings import PREFIX, EvaluatorFindings, Teller
from trainer.evaluator.lookout import Lookout, Rule, Sighting
from trainer.generation.store import PICTURES
from trainer.metrics.jsonl import MEASURED_BY
from trainer.reliability.lease import Lease, acquire

logger = logging.getLogger(__name__)

SAMPLES = "samples"
_MAX_FAULTS = 5
"""In a row, of others than storage that is away."""
_GOES_ON_S = 300.0
"""For a run that has ended, and may be about to go on, to say so: a start writes its settings late."""
_REPORT_S = 600.0
"""Between two words about waiting."""


@dataclass(frozen=True)
class WatchOptions:
    """What is watched, and how."""

    run_dir: str
    out: str
    """Folder of findings and pictures."""
    rule: Rule = "newest"
    every: int = 1
    """Only steps that are multiples of it, and the run's last."""
    snapshots: bool = True
    """Stored averages without a checkpoint, too."""
    best: int = 1
    """Checkpoints that are kept for their figures."""
    best_metric: str | None = None
    """By which; None: the first figure."""
    keep_pictures: bool = False
    poll_s: float = 60.0
    once: bool = False
    """End when nothing is left to measure, instead of at the run's last step."""
    measured_by: Mapping[str, Any] = field(default_factory=dict)
    """What figures have to share to be compared, networks by name and hash among it; JSON-able."""
    same_pictures: Callable[[str, str], bool] = operator.eq
    """Whether two texts of its `sample` come to the same."""


@dataclass(frozen=True)
class Committed:
    """Where the run stood when something was committed, from its state file."""

    config: Config
    samples_seen: int
    wandb_group: str | None


class Watcher:
    """One evaluator; the same on every rank, of which rank 0 looks, decides and writes."""

    def __init__(
        self,
        options: WatchOptions,
        draw: Callable[[Sighting, str], None],
        measure: Callable[[str], Comparison | None],
    ) -> None:
        """An evaluator that has not begun.

        Args:
            draw: makes the set of pictures of a checkpoint in a folder, or what is missing of it. Collective.
            measure: of the pictures in a folder figures by name, and what is to be said of them, on rank 0.
                Collective.
        """
        self._options = options
        self._out = options.out.rstrip("/")
        self._draw, self._measure = draw, measure
        self._lookout = Lookout(options.run_dir, snapshots=options.snapshots, every=options.every)
        self._name = "evaluator-" + hashlib.sha256(self._out.encode()).hexdigest()[:8]
        self._lease: Lease | None = None
        self._findings: EvaluatorFindings | None = None
        self._teller: Teller | None = None
        self._passed_over: set[tuple[int, str]] = set()
        self._begun = time.monotonic()
        self._worked = False
        self._at_the_end = False
        """Whether the run's last step is committed, as the last look has it."""
        self._kept: set[int] | None = None
        self._reported = -_REPORT_S
        self._said: set[str] = set()

    def run(self) -> None:
        """Until the run's last step is measured, or passed over. Collective.

        Raises:
            RunTaken: another evaluator is at work in the folder.
            UserError: what a person has to mend; what was measured before is stored.
        """
        collectives.from_main_rank(self._begin)
        faults = 0
        try:
            while True:
                try:
                    sighting = collectives.from_main_rank(self._next)
                    if sighting is not None:
                        self._evaluate(sighting)
                        faults = 0
                    elif collectives.from_main_rank(self._is_over):
                        return
                    else:
                        time.sleep(self._options.poll_s)
                except (Unreachable, StorageOutage) as error:
                    self._report("storage is away, tried again until it is back: %s", error)
                    time.sleep(self._options.poll_s)
                except RetryableFault as error:
                    faults += 1
                    if faults == _MAX_FAULTS:
                        raise
                    logger.warning("tried again after a fault: %s", error)
                    time.sleep(self._options.poll_s)
        finally:
            self._end()

    def _begin(self) -> None:
        check_writable(self._out)
        try:
            self._lease = acquire(self._out)
        except RunTaken as taken:
            raise RunTaken(f"{taken} The folder of an evaluator is --out.") from taken
        self._findings = EvaluatorFindings(self._out)
        self._findings.require_same(self._options.measured_by, self._options.same_pictures)

    def _end(self) -> None:
        if self._teller is not None:
            self._teller.close()
        if self._lease is not None:
            self._lease.release()

    def _next(self) -> Sighting | None:
        """On rank 0: look, decide, and keep what was chosen."""
        findings, run_dir = self._held(), self._options.run_dir
        steps = (stored_settings(run_dir) or {}).get("steps")
        found = self._lookout.look(steps)
        # A snapshot of that step may be there first.
        whole = (each.step for each in found if not each.snapshot)
        self._at_the_end = steps is not None and max(whole, default=-1) >= steps
        known = findings.measured | self._passed_over
        chosen, passed_over = self._lookout.due(found, known, self._options.rule)
        for each in passed_over:
            logger.info("step %d is passed over: newer ones are there", each.step)
            self._passed_over.add(each.key)
        if chosen is None:
            if not found:
                self._report("nothing is committed in %s yet", run_dir)
            elif steps is None:
                self._report("%s does not say how many steps the run has", join(run_dir, SETTINGS))
            self._mark(set())
            return None
        self._mark(set() if chosen.snapshot else {chosen.step})
        return chosen

    def _is_over(self) -> bool:
        """On rank 0, when nothing is due: whether nothing will be."""
        if self._options.once or not self._at_the_end:
            return self._options.once
        left = self._begun + _GOES_ON_S - time.monotonic()
        if not self._worked and left > 0:
            self._report("all of the run was measured before; it has %.0f s to say that it goes on", left)
            return False
        return True

    def _evaluate(self, sighting: Sighting) -> None:
        """Draw and measure; what is gone meanwhile is passed over. Collective."""
        self._worked = True
        folder = join(self._out, PICTURES, f"{folder_name(sighting.step)}-{sighting.checksum[:8]}")
        try:
            committed = collectives.from_main_rank(lambda: _committed(sighting))
            if committed is None:
                collectives.from_main_rank(lambda: self._pass_over(sighting, "its manifest is damaged"))
                return
            began = time.monotonic()
            self._draw(sighting, folder)
            drawn = time.monotonic()
            found = self._measure(join(folder, PICTURES))
        except UserError as error:
            told = str(error)
            reason = collectives.from_main_rank(lambda: self._excuse(sighting, told))
            if reason is None:
                raise
            collectives.from_main_rank(lambda: self._pass_over(sighting, reason))
            return
        times = {"draw_s": drawn - began, "measure_s": time.monotonic() - drawn}
        collectives.from_main_rank(lambda: self._tell(sighting, committed, found, times, folder))

    def _excuse(self, sighting: Sighting, error: str) -> str | None:
        """Why a checkpoint cannot be measured where that is its own fault; None where it is the command's."""
        if not self._lookout.is_there(sighting):
            return "it was removed, or replaced"
        # What has worked before is not a mistake in the command.
        return error if self._held().measured else None

    def _pass_over(self, sighting: Sighting, reason: str) -> None:
        logger.warning("step %d is not measured: %s", sighting.step, reason)
        self._passed_over.add(sighting.key)

    def _tell(
        self,
        sighting: Sighting,
        committed: Committed,
        found: Comparison | None,
        times: dict[str, float],
        folder: str,
    ) -> None:
        """On rank 0: the line first, with which the checkpoint counts as measured."""
        assert found is not None
        findings, figures = self._held(), found.figures
        named = {PREFIX + name: value for name, value in figures.items()}
        named |= {f"evaluator/{name}": value for name, value in times.items()}
        place = {"step": sighting.step, "samples_seen": committed.samples_seen, "time": time.time()}
        about = {"checkpoint": sighting.checksum, "snapshot": sighting.snapshot}
        # An evaluator that starts later may find that alone.
        about["beside"] = self._lookout.beside(sighting)
        by = {MEASURED_BY: dict(self._options.measured_by), "notes": found.notes}
        findings.add({**place, **about, **named, **by})
        for note in found.notes:
            if note not in self._said:  # most are of the command, and the same each time
                self._said.add(note)
                logger.warning("step %d: %s.", sighting.step, note)
        shown = "  ".join(f"{name} {value:.6g}" for name, value in figures.items())
        logger.info("step %d, %d samples: %s", sighting.step, committed.samples_seen, shown)
        self._mark(set(), metric=self._options.best_metric or next(iter(figures), None))
        sheet = _grid_of(folder)
        if sheet is not None:
            write_bytes(join(self._out, SAMPLES, f"{folder_name(sighting.step)}.png"), sheet)
        if self._teller is None:
            group = committed.wandb_group or _group_of(self._options.run_dir)
            self._teller = Teller(committed.config, self._out, self._options.measured_by, group, self._name)
        self._teller.tell(committed.samples_seen, {"step": sighting.step, **named}, sheet)
        if not self._options.keep_pictures:
            self._remove_pictures()

    def _remove_pictures(self) -> None:
        """Those of all checkpoints, tried once: what is left costs space alone, and goes with the next."""
        pictures = join(self._out, PICTURES)
        try:
            for name in list_names(pictures):
                remove_names(join(pictures, name), list_tree(join(pictures, name)), tries=1)
        except Failure as error:
            logger.warning("pictures in %s stay until the next are measured: %s", pictures, error)

    def _mark(self, current: set[int], metric: str | None = None) -> None:
        """Keep the best and the one at hand; a request only where that changes."""
        findings = self._held()
        metric = metric or self._options.best_metric or findings.first_figure
        best = findings.best(metric, self._options.best) if metric and self._options.best else []
        wanted = {*best, *current}
        if wanted != self._kept and (wanted or self._kept is not None):
            why = f"the best by {metric}, and what is being measured, of an evaluator in {self._out}"
            mark(checkpoints_url(self._options.run_dir), self._name, wanted, why)
            self._kept = wanted

    def _held(self) -> EvaluatorFindings:
        """The findings, as long as the folder is ours. Raises RunTaken."""
        assert self._findings is not None
        taken = self._lease.lost if self._lease is not None else None
        if taken is not None:
            raise taken
        return self._findings

    def _report(self, text: str, *values: object) -> None:
        if time.monotonic() - self._reported >= _REPORT_S:
            self._reported = time.monotonic()
            logger.warning(text, *values)


def _committed(sighting: Sighting) -> Committed | None:
    """None where the manifest is damaged."""
    try:
        handle = open_checkpoint(sighting.url)
    except BadManifest:
        return None
    stored = read_state(handle)
    config = config_from_dict(stored["config"])
    train: dict[str, Any] = stored["state"].get("train", {})  # a snapshot has none
    samples_seen = int(train.get("samples_seen", handle.step * config.global_batch_size))
    return Committed(config, samples_seen, train.get("wandb_run_id"))


def _group_of(run_dir: str) -> str | None:
    """W&B's id of a run, from its newest checkpoint: snapshots do not have it."""
    try:
        stored = read_state(find_checkpoint(run_dir))
    except ConfigError:
        return None
    found: str | None = stored["state"].get("train", {}).get("wandb_run_id")
    return found


def _grid_of(folder: str) -> bytes | None:
    try:
        return read_bytes(join(folder, GRID))
    except NotFound:
        return None
