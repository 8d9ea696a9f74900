"""Where records go: console bar, JSONL and W&B, on rank 0 only."""

from __future__ import annotations

import dataclasses
import io
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from data_pipeline.errors import Failure
from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.urls import join
from trainer.config.identity import SETTINGS, changes, stored_settings
from trainer.config.io import config_to_dict, dump_yaml
from trainer.config.run import Config
from trainer.console import progress_bar
from trainer.metrics.alerts import ALERTS, Trends
from trainer.metrics.jsonl import JSONLWriter
from trainer.metrics.wandb_sink import WandbSink

logger = logging.getLogger(__name__)


class Sinks:
    """Fans records out. On other ranks than 0 it does nothing."""

    def __init__(self, config: Config, *, main_rank: bool, resolved: dict[str, Any]) -> None:
        """`resolved` is the configuration as it goes to W&B, with facts such as the git commit."""
        self._config = config
        self._main_rank = main_rank
        self._resolved = resolved
        self._run_dir = config.run_dir.rstrip("/")
        self._jsonl: JSONLWriter | None = None
        self._wandb: WandbSink | None = None
        self._bar: Any = None
        self._trends = Trends()
        # A thread, because storage that hangs on this rank must not keep the others waiting.
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="pictures")

    def open(self, *, start_step: int, samples_seen: int, run_id: str | None) -> None:
        """Begin to write, now that it is known where the run stands."""
        if not self._main_rank:
            return
        config, before = self._config, stored_settings(self._run_dir)
        changed = changes(before, config_to_dict(config)) if before is not None else ()
        self._jsonl = JSONLWriter(config.run_dir)
        if config.logging.wandb != "disabled":
            self._wandb = WandbSink(config.logging, config.run_dir, self._resolved, run_id)
        if config.logging.progress_bar:
            self._bar = progress_bar(config.steps, "step", config.stage, initial=start_step, smoothing=0.1)
        if changed:
            told = [dataclasses.asdict(each) for each in changed]
            self.event(start_step, samples_seen, "settings changed", changed=told)
            # Before what tells them is gone: a start may die in its first minute.
            self._jsonl.flush()
            self._jsonl.settle()
        write_bytes(join(self._run_dir, SETTINGS), dump_yaml(config).encode())

    @property
    def run_id(self) -> str | None:
        """W&B run id, None when W&B is disabled."""
        return self._wandb.run_id if self._wandb else None

    def advance(self, step: int) -> None:
        """Move the console bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(
        self, step: int, samples_seen: int, record: dict[str, float], about: Mapping[str, Any] | None = None
    ) -> None:
        """Scalars of one log interval; `about`: what else JSONL says of them."""
        if self._jsonl is None:
            return
        place = {"step": step, "samples_seen": samples_seen, "time": time.time()}
        self._jsonl.write({**place, **record, **(about or {})})
        if self._wandb:
            self._wandb.log(samples_seen, {"step": step, **record})
        if self._bar is not None and "loss" in record:
            shown = {
                "loss": f"{record['loss']:.4f}",
                "img/s": f"{record.get('images_per_s', 0):.1f}",
                "data wait": f"{100 * record.get('data_wait', 0):.0f}%",
            }
            self._bar.set_postfix(shown, refresh=False)
        for name, details in self._trends.observe(record).items():
            logger.warning("step %d: %s (%s)", step, name, _told(details))
            self.event(step, samples_seen, name, **details)

    def event(self, step: int, samples_seen: int, name: str, **details: Any) -> None:
        """Something that happened once: a rewind, a resume, a slow rank."""
        if self._jsonl is None:
            return
        record = {"step": step, "samples_seen": samples_seen, "event": name, "time": time.time(), **details}
        self._jsonl.write(record)
        if self._wandb:
            self._wandb.log(samples_seen, {"event": name, **{f"event/{k}": v for k, v in details.items()}})
            if name in ALERTS:
                self._wandb.alert(name, f"step {step:,}: {_told(details)}", ALERTS[name])

    def picture(self, step: int, samples_seen: int, name: str, picture: Image.Image) -> None:
        """A grid: into the run folder, beside training, and W&B."""
        if self._jsonl is None:
            return
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        url = join(self._run_dir, "samples", f"{name}-{step:08d}.png")
        self._uploads.submit(_store, url, buffer.getvalue())
        if self._wandb:
            self._wandb.image(samples_seen, name, picture)

    def flush(self) -> None:
        """Send records that are not stored yet (called at checkpoints)."""
        if self._jsonl:
            self._jsonl.flush()

    def close(self) -> None:
        """Finish all of them; waits for pictures that are on their way."""
        self._uploads.shutdown()
        if self._jsonl:
            self._jsonl.close()
        if self._bar is not None:
            self._bar.close()
        if self._wandb:
            self._wandb.close()


def _store(url: str, data: bytes) -> None:
    try:
        write_bytes(url, data)
    except (Failure, OSError) as error:
        logger.warning("a picture is not stored: %s", error)  # no reason to stop training


def _told(details: Mapping[str, Any]) -> str:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v)[:200] for k, v in details.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
