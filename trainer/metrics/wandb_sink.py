"""W&B: sole importer of wandb. Everything is logged against samples_seen, so a rewind drops nothing.

    online     one run, under the id that checkpoints carry; W&B's server knows where it stands, and a
               restart goes on with it
    offline    a run of its own for each start, in one group that bears that id

Files of an offline run begin at step 0, whatever was logged before: two of them under one id would be two
beginnings of the same run, and synchronising the second may erase the first.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
import time
from typing import Any

from PIL import Image

from data_pipeline.storage.urls import is_local, local_path, without_secrets
from trainer.config.run import ConfigError
from trainer.config.training import LoggingConfig
from trainer.metrics.alerts import Level

logger = logging.getLogger(__name__)

_INIT_TIMEOUT_S = 30


class WandbSink:
    """A run, or a group of runs, that restarts continue; online without a network falls back to offline."""

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: str,
        resolved: dict[str, Any],
        run_id: str | None,
        group: str | None = None,
    ) -> None:
        """`group`: that of another run, which this one stands beside."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        elsewhere = os.environ.get("WANDB_DIR", os.path.join(tempfile.gettempdir(), "ldm-wandb"))
        folder = local_path(run_dir) if is_local(run_dir) else elsewhere
        os.makedirs(folder, exist_ok=True)
        self._wandb = wandb
        mode = config.wandb
        if mode == "online":
            check_key("logging.wandb=online", "use logging.wandb=offline")
        self._id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        arguments: dict[str, Any] = {
            "project": config.wandb_project,
            "entity": config.wandb_entity,
            "dir": folder,
            # The project may be shared with more people than the storage is.
            "config": json.loads(without_secrets(json.dumps(resolved))),
            "group": os.environ.get("WANDB_RUN_GROUP") or group or self._id,
        }
        whole: dict[str, Any] = {"id": self._id, "resume": "allow" if run_id else None}
        segment: dict[str, Any] = {
            "id": f"{self._id}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        }
        settings = wandb.Settings(init_timeout=_INIT_TIMEOUT_S, console="off", silent=True)
        try:
            which = whole if mode == "online" else segment
            self._run = wandb.init(mode=mode, settings=settings, **arguments, **which)
        except wandb.errors.AuthenticationError as error:
            raise ConfigError(_wrong_key(error)) from error
        except wandb.errors.CommError as error:
            if "401" in str(error) or "permission" in str(error).lower():
                raise ConfigError(_wrong_key(error)) from error
            logger.warning("W&B cannot be reached (%s); this run is logged offline.", error)
            self._run = wandb.init(mode="offline", settings=settings, **arguments, **segment)
        self._run.define_metric("samples_seen")
        self._run.define_metric("*", step_metric="samples_seen")

    @property
    def run_id(self) -> str:
        """Stored in checkpoints, so that a restart goes on with the same run, or in the same group."""
        return self._id

    def log(self, samples_seen: int, record: dict[str, Any]) -> None:
        """Scalars of one log interval."""
        self._run.log({**record, "samples_seen": samples_seen})

    def image(self, samples_seen: int, name: str, picture: Image.Image) -> None:
        """One grid, captions drawn in."""
        self._run.log({name: self._wandb.Image(picture), "samples_seen": samples_seen})

    def alert(self, title: str, text: str, level: Level) -> None:
        """A message to the people who watch the project, by mail or chat as they have set it up in W&B."""
        self._run.alert(title=title, text=text, level=level)

    def close(self) -> None:
        """Finish without waiting for a network that is not there."""
        self._run.finish()


def check_key(what: str, instead: str) -> None:
    """Raises ConfigError: `what` needs a key, and there is none, or no key at all; `instead`: another way."""
    key = os.environ.get("WANDB_API_KEY", "")
    has_netrc = os.path.exists(os.path.expanduser(os.environ.get("NETRC", "~/.netrc")))
    if not key and not has_netrc:
        raise ConfigError(
            f"{what} needs WANDB_API_KEY in the environment (or `wandb login`); set it, or {instead}."
        )
    if key and len(key.rpartition("-")[2]) < 40:
        raise ConfigError(
            f"WANDB_API_KEY has {len(key)} characters where W&B keys have at least 40; copy it again from "
            f"wandb.ai/authorize, or {instead}."
        )


def _wrong_key(error: Exception) -> str:
    return (
        f"W&B refused the key in WANDB_API_KEY ({type(error).__name__}); copy it again from "
        "wandb.ai/authorize, or use logging.wandb=offline."
    )
