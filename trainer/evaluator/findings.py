"""What an evaluator has found out: its JSONL, a line per measured checkpoint; which are the best; and W&B.

The file is rewritten whole with each line (a few hundred bytes each), which is atomic on disk and on S3: so
a kill leaves it as it was, a line is never there twice, and storage that cannot append is no other case.
Where a run was rewound, a step may have two lines; the later one counts.
"""

from __future__ import annotations

import io
import json
import logging
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import read_text, write_bytes
from data_pipeline.storage.urls import join
from trainer.config.io import config_to_dict
from trainer.config.run import Config, ConfigError
from trainer.metrics.jsonl import MEASURED_BY, RECORDS, line_of
from trainer.metrics.wandb_sink import WandbSink

logger = logging.getLogger(__name__)

FOLDER = "evaluation"
"""Of an evaluator, in that of the run, unless another is named."""
PREFIX = "eval/"
"""Of figures, as W&B groups them."""
_SAID_LATER = ("fit", "reference_content")
"""Of what measures, what the lines of earlier versions do not have."""
_HIGHER_IS_BETTER = ("is", "precision", "recall", "density", "coverage", "clip_score")
_RUNS_OWN = "WANDB_RUN_ID"
"""Where a launcher says the id of the run: two processes must not write to one."""


class EvaluatorFindings:
    """The lines of one evaluator's folder."""

    def __init__(self, out: str) -> None:
        """Read what an earlier start has found. Raises ConfigError: the file is not ours."""
        self.url = join(out, RECORDS)
        self._records: list[dict[str, Any]] = []
        try:
            lines = read_text(self.url).splitlines()
        except NotFound:
            return
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                _ = record["step"], record["checkpoint"], record["samples_seen"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"line {number} of {self.url} is not an evaluator's; remove the file, or choose another "
                    "--out."
                ) from error
            self._records.append(record)

    @property
    def records(self) -> list[dict[str, Any]]:
        """All lines, in the order in which they were written."""
        return list(self._records)

    @property
    def measured(self) -> set[tuple[int, str]]:
        """Steps and checksums of all that has been measured, snapshots beside checkpoints among it."""
        names = ("checkpoint", "beside")  # earlier versions did not write the second
        return {
            (record["step"], record[name]) for record in self._records for name in names if record.get(name)
        }

    @property
    def first_figure(self) -> str | None:
        """The one that a measurement names first; None before any."""
        names = (key for record in self._records for key in record if key.startswith(PREFIX))
        return next((name.removeprefix(PREFIX) for name in names), None)

    def require_same(
        self, measured_by: Mapping[str, Any], same_pictures: Callable[[str, str], bool] = operator.eq
    ) -> None:
        """Raises ConfigError: the newest line is measured by something else; the best would be no best.

        same_pictures: whether two texts of `sample` come to the same.
        """
        former = self._records[-1].get(MEASURED_BY) if self._records else None  # earlier versions did not say
        if former is None:
            return
        wanted = json.loads(json.dumps(measured_by))
        unsaid = [name for name in _SAID_LATER if name not in former]
        if unsaid:
            logger.warning(
                "%s is of an earlier version, which did not write %s: whether that is the same is not known.",
                self.url,
                " and ".join(unsaid),
            )
        names = (former.keys() | wanted.keys()).difference(unsaid)
        differing = sorted(n for n in names if former.get(n) != wanted.get(n))
        if "sample" in differing and same_pictures(str(former.get("sample")), str(wanted.get("sample"))):
            differing.remove("sample")
        if differing:
            raise ConfigError(
                f"{self.url} holds figures by other {', '.join(differing)}, which do not compare with those "
                "to come; choose another --out, or the options of before."
            )

    def add(self, record: Mapping[str, Any]) -> None:
        """Store a line; once it returns, the checkpoint counts as measured."""
        lines = [*map(line_of, self._records), line_of(record)]
        write_bytes(self.url, "".join(line + "\n" for line in lines).encode())
        self._records.append(json.loads(lines[-1]))

    def best(self, metric: str, count: int) -> list[int]:
        """Steps of whole checkpoints with the best figures, the best first; of equal ones the newer.

        Raises:
            ConfigError: there is no such figure.
        """
        latest = {record["step"]: record for record in self._records if not record.get("snapshot")}
        name = PREFIX + metric
        known = sorted(
            {key[len(PREFIX) :] for record in latest.values() for key in record if key.startswith(PREFIX)}
        )
        if latest and metric not in known:
            raise ConfigError(
                f"there is no figure {metric!r} to keep the best by; choose of {', '.join(known)}."
            )
        sign = -1.0 if higher_is_better(metric) else 1.0
        ranked = sorted(
            (sign * record[name], -step)
            for step, record in latest.items()
            if isinstance(record.get(name), (int, float))
        )
        return [-negative for _, negative in ranked[:count]]


def higher_is_better(metric: str) -> bool:
    """Of a figure by name; features other than Inception's are named behind it."""
    return any(metric == name or metric.startswith(f"{name}_") for name in _HIGHER_IS_BETTER)


class Teller:
    """Figures and grids against samples_seen, as the run logs its own; nothing where the run has no W&B."""

    def __init__(
        self, config: Config, out: str, measured_by: Mapping[str, Any], group: str | None, name: str
    ) -> None:
        """Begin to tell.

        Args:
            config: of the run; its `logging` says whether and where to.
            out: folder of the evaluator.
            measured_by: what all its figures share.
            group: id of the run, by which W&B shows the two together.
            name: of the evaluator, the same after a restart.
        """
        self._sink: WandbSink | None = None
        if config.logging.wandb == "disabled":
            return
        os.environ.pop(_RUNS_OWN, None)
        run_id = f"{group}-{name}" if group else None
        resolved = config_to_dict(config) | {"evaluator": out, MEASURED_BY: dict(measured_by)}
        self._sink = WandbSink(config.logging, out, resolved, run_id, group)

    def tell(self, samples_seen: int, record: Mapping[str, Any], sheet: bytes | None) -> None:
        """The figures of a checkpoint, and a PNG of its first pictures."""
        if self._sink is None:
            return
        self._sink.log(samples_seen, dict(record))
        if sheet is not None:
            with Image.open(io.BytesIO(sheet)) as picture:
                picture.load()
                self._sink.image(samples_seen, "eval/samples", picture)

    def close(self) -> None:
        """Finish without waiting for a network that is not there."""
        if self._sink is not None:
            self._sink.close()
