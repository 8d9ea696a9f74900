"""Gloo over several nodes takes the interface that leads to the master, and finds room for its sockets."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.integration.ranks import ROOT, run_ranks
from trainer.distributed.env import DistributedEnv, gloo_variables
from trainer.distributed.place import interface_to

TWO_NODES = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.fixture
def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network but loopback")
        return str(probe.getsockname()[0])


@pytest.fixture
def low_limit() -> Iterator[None]:
    """A soft limit as login shells have it, inherited by the ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_master_itself_and_a_name_that_is_loopback_give_the_interface_of_the_network(
    own_address: str,
) -> None:
    interface = interface_to(own_address)
    assert interface is not None
    assert interface != "lo"
    assert interface_to("127.0.0.1") == interface
    assert interface_to("a-name-that-nobody-has.invalid") == interface


def test_ranks_of_two_nodes_meet_there(own_address: str, low_limit: None) -> None:
    """The rendezvous is on loopback, as where the master's name resolves to it; the peers' sockets are
    not."""
    found = run_ranks("tests/integration/network_ranks.py:meet", 2, environ=TWO_NODES)
    number = ipv4_of_proc(own_address)
    for rank in found:
        assert rank["met"] == [0, 1]
        assert rank["interface"] == interface_to(own_address)
        assert number in rank["addresses"]
        assert (
            rank["soft"] == min(65_536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
            or rank["soft"] > 65_536
        )


def ipv4_of_proc(address: str) -> str:
    """As /proc/net/tcp writes it."""
    return socket.inet_aton(address)[::-1].hex().upper()


def test_what_a_person_named_stays_and_one_node_needs_nothing(own_address: str) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": own_address, **TWO_NODES}
    nodes = DistributedEnv.detect(given)
    assert gloo_variables(nodes, {"GLOO_SOCKET_IFNAME": "ib0"}) == {}
    assert gloo_variables(nodes, {}) == {"GLOO_SOCKET_IFNAME": interface_to(own_address)}
    assert gloo_variables(DistributedEnv.detect({**given, "LOCAL_WORLD_SIZE": "2"}), {}) == {}


def test_nothing_of_it_imports_torch() -> None:
    code = "import sys, trainer.distributed.place; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
