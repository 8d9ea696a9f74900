"""What the ranks do in test_network.py: meet, each as a node of its own, on hosts whose name is loopback."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv


def meet(env: DistributedEnv) -> dict[str, object]:
    """The interface, the limit, and the local addresses of this rank's connections once all have met."""
    met = collectives.all_gather_object(env.rank)
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    # Two connections of a rank go to the store; gloo's listen and connect where it was told to.
    addresses = sorted({line[1].split(":")[0] for line in lines if line[9] in inodes})
    collectives.barrier()
    return {
        "met": met,
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "soft": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "addresses": addresses,
    }
