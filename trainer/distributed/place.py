"""Who a rank is and where the ranks meet, in the variables that torchrun made customary. Needs no torch."""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The place of one rank among its peers."""

    rank: int
    """0 .. world_size - 1."""
    local_rank: int
    """0 .. local_world_size - 1."""
    world_size: int
    """Ranks of the job."""
    local_world_size: int
    """Ranks on this node."""
    master_addr: str
    """Host of rank 0."""
    master_port: int
    """Rendezvous port on that host."""

    def variables(self) -> dict[str, str]:
        """The environment by which a launcher tells a rank, and DeepSpeed is told, all of this."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def free_port() -> int:
    """A TCP port that nothing listens on, outside the range the kernel hands out by itself.

    It is used only seconds later, when rank 0 has imported torch; a kernel-chosen port could be
    given to somebody's outgoing connection by then.
    """
    system = random.SystemRandom()
    for _ in range(100):
        port = system.randrange(15_000, 32_000)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("found no free TCP port between 15000 and 32000")
