"""Phases that peers are in, told through the store at which the ranks met: who waits for them is not hung.

A rank in a collective cannot see what it waits for. What it may wait for is long: a loader whose storage is
away, a checkpoint, a preview. Two numbers of the store carry all that it has to know, whatever the number of
ranks:

    rank 3, in `data` for more than a second        set who = "rank 3 (gpu7): data of step 900"; add busy 1
                                                    again every few seconds, for as long as the phase may last
    rank 0, past the time that its step may take    add busy 0: another number than before?
                                                    then some rank lives, is busy, and has time left

Nobody asks or tells while steps take what they usually take. A phase ends, overruns, or its rank dies: the
number stands still, and whoever waits gives up `watchdog_s` later.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.distributed.env import DistributedEnv

_BUSY, _WHO = "ldm/busy", "ldm/busy/who"
_CONNECT_S = 10.0

logger = logging.getLogger(__name__)


class PeerPhases:
    """Implements watchdog.Peers on the ranks' rendezvous store. Connects once it is first needed.

    The store may hang with the rank that holds it: a thread of its own talks to it, and nobody waits for
    that.
    """

    def __init__(self, env: DistributedEnv) -> None:
        self._name = f"rank {env.rank} ({socket.gethostname()})"
        self._address = (env.master_addr, env.master_port)
        self._store: Any = None  # a TCPStore
        self._wanted = threading.Event()
        self._said: str | None = None
        self._count: int | None = None
        self._heard = 0.0
        self._who = ""
        self._thread: threading.Thread | None = None

    @property
    def heard(self) -> tuple[float, str]:
        """When (time.monotonic) the newest sign of a busy peer was seen, 0 for never, and whose it was."""
        return self._heard, self._who

    def tell(self, what: str) -> None:
        """This rank is busy with `what`, and has time left for it. Returns at once."""
        self._said = what
        self._wake()

    def ask(self) -> None:
        """Look whether a peer is busy; `heard` has the answer later. Returns at once."""
        self._wake()

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._talk, name="peers", daemon=True)
            self._thread.start()
        self._wanted.set()

    def _talk(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            said, self._said = self._said, None
            try:
                self._exchange(said)
            except Exception as error:  # noqa: BLE001 - any trouble with the store is silence of the peers
                logger.debug("the ranks' store does not answer: %s", error)
                self._store = None
                time.sleep(1.0)

    def _exchange(self, said: str | None) -> None:
        if self._store is None:
            host, port = self._address
            timeout = timedelta(seconds=_CONNECT_S)
            make = dist.TCPStore  # type: ignore[attr-defined]  # not in the stubs
            self._store = make(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        if said is not None:
            self._store.set(_WHO, f"{self._name}: {said}")
            # What this rank says of itself is no sign of a peer.
            self._count = int(self._store.add(_BUSY, 1))
            return
        count = int(self._store.add(_BUSY, 0))
        if self._count is not None and count != self._count:
            self._who = self._store.get(_WHO).decode("utf-8", "replace")
            self._heard = time.monotonic()
        self._count = count


def peer_phases(env: DistributedEnv) -> PeerPhases | None:
    """What the ranks of a group tell each other; None for a rank alone."""
    return PeerPhases(env) if env.world_size > 1 else None
