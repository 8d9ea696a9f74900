"""Hosts of one rank each: network namespaces with an address of their own, and a link that can misbehave."""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import secrets
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from data_pipeline.storage.local_s3 import find_rclone

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


def missing_sentence() -> str | None:
    """Why these tests cannot run, or None."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if os.geteuid() != 0 or shutil.which("ip", path=path) is None:
        return "network namespaces need iproute2 and root: `apt-get install iproute2`, and run these as root"
    probe = f"ldm-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"this machine does not allow network namespaces: {done.stderr.strip()}"
    ip("netns", "del", probe)
    return None


def ip(*arguments: str) -> None:
    """One `ip` command; fails loudly."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    done = subprocess.run(
        ["ip", *arguments], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


class Network:
    """Two hosts and a storage server on one switch (a bridge); each host's link can be cut and restored."""

    def __init__(self, s3_folder: Path) -> None:
        self.tag = secrets.token_hex(2)
        self.hosts = [f"ldm{self.tag}h{number}" for number in range(2)]
        self._s3_folder = s3_folder
        octet = random.SystemRandom().randrange(16, 250)
        self._prefix = f"10.{octet}.0"
        self._s3: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}

    def address(self, host: int) -> str:
        """Where other hosts reach this one."""
        return f"{self._prefix}.{host + 1}"

    def __enter__(self) -> Network:
        bridge = f"ldm{self.tag}br"
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{self._prefix}.254/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number, host in enumerate(self.hosts):
            ip("netns", "add", host)
            ip("link", "add", self._port(number), "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("link", "set", self._port(number), "master", bridge, "up")
            ip("-n", host, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        self._start_s3()
        return self

    def __exit__(self, *error: object) -> None:
        if self._s3 is not None:
            self._s3.kill()
            self._s3.wait()
        for host in self.hosts:
            ip("netns", "del", host)
        ip("link", "del", f"ldm{self.tag}br")

    def cut(self, host: int) -> None:
        """Nothing gets in or out, and nobody is told: no reset, no closed connection."""
        ip("link", "set", self._port(host), "nomaster")

    def restore(self, host: int) -> None:
        """Plug the cable back in."""
        ip("link", "set", self._port(host), "master", f"ldm{self.tag}br")

    def _port(self, host: int) -> str:
        return f"ldm{self.tag}v{host}"

    def _start_s3(self) -> None:
        key, secret = secrets.token_hex(10), secrets.token_hex(20)
        address = f"{self._prefix}.254:{9000 + os.getpid() % 1000}"
        self._s3 = subprocess.Popen(
            [find_rclone(), "serve", "s3", str(self._s3_folder), "--addr", address]
            + ["--config", os.devnull, "--no-checksum", "--log-level", "ERROR", "--dir-cache-time", "100ms"],
            env={**os.environ, "RCLONE_AUTH_KEY": f'"{key},{secret}"'},
            stdin=subprocess.DEVNULL,
        )
        self.environment = {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": f"http://{address}",
        }
        host, port = address.split(":")
        while True:
            assert self._s3.poll() is None, "the S3 server ended"
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) == 0:
                    return
            time.sleep(0.1)


class LossyLink:
    """A second, direct link between the two hosts that delays every packet and loses some of them.

    Two tun devices, one in each namespace, and a thread that carries packets between them: the kernel's
    own TCP on both sides then retransmits as over a bad line.
    """

    def __init__(self, network: Network, *, delay_s: float, loss: float, seed: int = 0) -> None:
        self._network = network
        self._delay_s, self._loss = delay_s, loss
        self._random = random.Random(seed)
        self._files: list[int] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="lossy-link", daemon=True)
        self.carried = self.lost = 0

    def address(self, host: int) -> str:
        """Where the other host reaches this one over this link."""
        return f"10.9.8.{host + 1}"

    def __enter__(self) -> LossyLink:
        for number, host in enumerate(self._network.hosts):
            name = f"ldm{self._network.tag}t{number}"
            file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _IFF_TUN | _IFF_NO_PI))
            self._files.append(file)
            ip("link", "set", name, "netns", host, "name", "line0")
            ip("-n", host, "addr", "add", f"{self.address(number)}/24", "dev", "line0")
            ip("-n", host, "link", "set", "line0", "mtu", "1400", "up")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._thread.join()
        for file in self._files:
            os.close(file)

    def _carry(self) -> None:
        other = {self._files[0]: self._files[1], self._files[1]: self._files[0]}
        flying: list[tuple[float, int, int, bytes]] = []
        while not self._closing.is_set():
            wait = max(0.0, flying[0][0] - time.monotonic()) if flying else 0.1
            for file in select.select(self._files, [], [], min(wait, 0.1))[0]:
                packet = os.read(file, 65_536)
                self.carried += 1
                if self._random.random() < self._loss:
                    self.lost += 1
                else:
                    due = time.monotonic() + self._delay_s
                    heapq.heappush(flying, (due, self.carried, other[file], packet))
            while flying and flying[0][0] <= time.monotonic():
                _, _, file, packet = heapq.heappop(flying)
                os.write(file, packet)


class HostRank:
    """`ldm train` as one rank on one host, started the way torchrun would."""

    def __init__(
        self,
        network: Network,
        number: int,
        arguments: list[str],
        log: Path,
        *,
        environment: dict[str, str],
        master: str,
        interface: str = "eth0",
    ) -> None:
        self.log = log
        place = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", network.hosts[number], sys.executable, "-m", "trainer", "train"]
                + arguments,
                env={
                    **os.environ,
                    **environment,
                    **network.environment,
                    **place,
                    "MASTER_ADDR": master,
                    "MASTER_PORT": "29611",
                    # The host's name resolves to nothing that is in this namespace.
                    "GLOO_SOCKET_IFNAME": interface,
                    "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
                },
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """What it wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")
