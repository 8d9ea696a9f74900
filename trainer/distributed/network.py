"""What gloo has to be told of a host: the interface by which its peers reach it, and room for its sockets.

Gloo takes the address that the host's own name resolves to. On Debian that is 127.0.1.1, and ranks of several
nodes then wait for each other on their own loopback until the collective's timeout. The kernel knows better:
whatever interface carries packets to the master is the one by which the peers can be met.
"""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import resource
import socket
import struct
from pathlib import Path

_ELSEWHERE = "192.0.2.1"  # for documentation, RFC 5737: no packet is sent, only its route is asked for
_GET_ADDRESS = 0x8915  # SIOCGIFADDR
_DESCRIPTORS = 65_536

logger = logging.getLogger(__name__)


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
