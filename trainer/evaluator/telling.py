"""W&B beside a run's own: in its group, under an id that is neither the run's nor another evaluator's."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from trainer.config.io import config_to_dict
from trainer.config.run import Config
from trainer.metrics.wandb_sink import WandbSink

_RUNS_OWN = "WANDB_RUN_ID"
"""Where a launcher says the id of the run: two processes must not write to one."""


class Teller:
    """Figures and grids against samples_seen, as the run logs its own; nothing where the run has no W&B."""

    def __init__(self, config: Config, out: str, group: str | None, name: str) -> None:
        """Begin to tell.

        Args:
            config: of the run; its `logging` says whether and where to.
            out: folder of the evaluator.
            group: id of the run, by which W&B shows the two together.
            name: of the evaluator, the same after a restart.
        """
        self._sink: WandbSink | None = None
        if config.logging.wandb == "disabled":
            return
        os.environ.pop(_RUNS_OWN, None)
        run_id = f"{group}-{name}" if group else None
        resolved = config_to_dict(config) | {"evaluator": out}
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
