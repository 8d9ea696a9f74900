"""Work that only rank 0 does, and that may take hours: what its ranks show, and why none is given up for it.

rank 0      indexes shard after shard, and says so to all ranks about once a second
            (`collectives.worked_on_main_rank`)
all ranks   `LongWork.told`: a bar on rank 0, a beat for the watchdog wherever the work got on
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.console import progress_bar
from trainer.distributed import collectives


class LongWork:
    """Work on shards that rank 0 does while all wait: a bar there, and a sign of life on every rank.

    To be closed; `told` is what `collectives.worked_on_main_rank` calls on every rank.

    alive: called on this rank whenever the work got on since it was last called, and only then: rank 0 that
    speaks without getting on for long counts as hung, as it would if it were silent.
    """

    def __init__(self, alive: Callable[[], object] = lambda: None) -> None:
        self._alive = alive
        self._last = ("", -1)
        self._bar: Any = None

    def told(self, what: str, done: int, total: int) -> None:
        """So many shards of so many have gone through `what`."""
        if (what, done) == self._last:
            return
        if what != self._last[0]:
            self.close()
            if done < total and collectives.rank() == 0:
                self._bar = progress_bar(total, "shard", what, initial=done)
        self._last = (what, done)
        self._alive()
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the line of the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
