"""Progress of a run: everything about where it stands that is not a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class TrainState:
    """Advanced once per optimizer step, after the batch has been consumed."""

    step: int = 0
    """Optimizer steps made."""
    samples_seen: int = 0
    """Images consumed by those steps; the x axis of W&B."""
    position: dict[str, Any] | None = None
    """Loader position of this rank's lanes (all lanes' once merged for a checkpoint)."""
    wandb_run_id: str | None = None
    """W&B run that a restart continues; offline, the group of its runs."""

    def advance(self, global_batch_size: int, position: dict[str, Any]) -> None:
        """Commit one consumed batch."""
        self.step += 1
        self.samples_seen += global_batch_size
        self.position = position

    def state_dict(self, position: dict[str, Any] | None) -> dict[str, Any]:
        """JSON-able; `position` is the merged one of all ranks."""
        return {**vars(self), "position": position}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """The inverse of `state_dict`; what earlier versions stored besides is passed over."""
        for name in vars(self):
            setattr(self, name, values[name])
