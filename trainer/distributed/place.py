"""Who a rank is, where the ranks meet, and the interface by which its peers reach it. Needs no torch.

Gloo takes the address that the host's own name resolves to. On Debian that is 127.0.1.1, and ranks of several
nodes then wait for each other on their own loopback until the collective's timeout. The kernel knows better:
whatever interface carries packets to the master is the one by which the peers can be met.
"""

from __future__ import annotations

import fcntl
import ipaddress
import random
import resource
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NVIDIA_DRIVER = Path("/dev/nvidiactl")
"""There where the kernel has NVIDIA's driver, and in containers that were given GPUs."""
_ELSEWHERE = "192.0.2.1"  # for documentation, RFC 5737: no packet is sent, only its route is asked for
_GET_ADDRESS = 0x8915  # SIOCGIFADDR
_DESCRIPTORS = 65_536


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
        """All of this in the variables that torchrun made customary, for ranks and for DeepSpeed."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def tasks_of_step(environ: Mapping[str, str]) -> int:
    """Tasks that srun has started, of which this process is one; 0 where it is none.

    A batch script is none, though it finds the job's SLURM_NTASKS and the number 0 of a task. A shell of
    `salloc` or `srun --pty` is a step of a single task, whatever SLURM_NTASKS may say of the job.
    """
    if not {"SLURM_PROCID", "SLURM_STEP_ID"} <= environ.keys():
        return 0
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(tasks) if tasks.isdigit() else 0


def named_devices(environ: Mapping[str, str]) -> list[str] | None:
    """GPUs that CUDA_VISIBLE_DEVICES lets a process see, as it names them; None where it is not set."""
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return None
    return [name.strip() for name in mask.split(",") if name.strip() not in ("", "-1")]


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


def interface_to(host: str) -> str | None:
    """Name of the interface that leads to `host`, which may be this one; None where that is not known.

    A name that resolves to loopback here (the master's own, on the master) says nothing: then it is the
    interface of the default route.
    """
    source = _source_address(host)
    if source is None or ipaddress.ip_address(source).is_loopback:
        source = _source_address(_ELSEWHERE)
    return None if source is None else _interface_with(source)


def raise_descriptor_limit() -> int:
    """Let this process and its children open as many files and sockets as the system grants; how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def _source_address(host: str) -> str | None:
    """This host's address on the way to `host`."""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)
            except OSError:
                continue  # no route of this family
            return str(probe.getsockname()[0]).partition("%")[0]
    return None


def _interface_with(address: str) -> str | None:
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            if int(digits, 16) == int(wanted):
                return name
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
