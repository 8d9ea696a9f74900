"""Two hosts with addresses of their own: a link that is cut in mid-run, and one that loses packets."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hosts import network as network_module

pytestmark = [pytest.mark.slow]

LIMIT_S = 1500.0
COLLECTIVE_TIMEOUT_S = 900.0


@pytest.fixture
def network(bucket: Any) -> Iterator[Any]:
    sentence = network_module.missing_sentence()
    if sentence is not None:
        pytest.skip(sentence)
    with network_module.Network(bucket.root / "s3") as made:
        yield made


class TwoHosts:
    """Both ranks of a run; whatever still runs at the end is killed."""

    def __init__(self, network: Any, bucket: Any, run: Any, folder: Path, link: Any = None) -> None:
        arguments = [
            str(bucket.config),
            f"run_dir={run.url}",
            f"distributed.timeout_s={COLLECTIVE_TIMEOUT_S}",
        ]
        arguments += [
            "distributed.watchdog_s=10",
            "distributed.link_patience_s=0",
            "data.request_timeout_s=5",
        ]
        self.run = run
        self.ranks = [
            network_module.HostRank(
                network,
                number,
                arguments,
                folder / f"rank-{number}.log",
                environment=bucket.environment,
                master=(link or network).address(0),
                interface="eth0" if link is None else "line0",
            )
            for number in range(2)
        ]

    def until_checkpoint(self, step: int) -> None:
        limit = time.monotonic() + LIMIT_S
        while max(self.run.steps(), default=0) < step:
            assert all(rank.process.poll() is None for rank in self.ranks), self.texts()
            assert time.monotonic() < limit, self.texts()
            time.sleep(0.02)

    def wait(self) -> list[int]:
        return [rank.process.wait(LIMIT_S) for rank in self.ranks]

    def everything(self) -> str:
        return "".join(rank.text for rank in self.ranks)

    def texts(self) -> str:
        return "\n".join(f"{rank.log.name}:\n{rank.text[-3000:]}" for rank in self.ranks)

    def __enter__(self) -> TwoHosts:
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.wait()


def test_a_cut_link_is_noticed_by_both_sides_and_the_run_ends_the_same(
    network: Any, bucket: Any, unbroken: Any, tmp_path: Path
) -> None:
    run = bucket.run("hosts-cut")
    with TwoHosts(network, bucket, run, tmp_path) as hosts:
        hosts.until_checkpoint(10)
        network.cut(1)
        cut_at = time.monotonic()
        assert hosts.wait() == [76, 76], hosts.texts()
        noticed_s = time.monotonic() - cut_at
        # By the watchdog (or a refused connection), not by the collective's timeout.
        assert noticed_s < COLLECTIVE_TIMEOUT_S, hosts.texts()
        silences = re.findall(r"no progress for [\d.]+ s, in phase", hosts.everything())
        assert silences, hosts.texts()
        print(f"both ranks ended {noticed_s:.1f} s after the cut; silences {silences}")
    network.restore(1)
    with TwoHosts(network, bucket, run, tmp_path) as hosts:
        assert hosts.wait() == [0, 0], hosts.texts()
        assert "resuming from step" in hosts.everything()
    assert run.losses() == unbroken.losses()
    assert run.fingerprint() == unbroken.fingerprint()


def test_latency_and_loss_change_nothing(network: Any, bucket: Any, unbroken: Any, tmp_path: Path) -> None:
    run = bucket.run("hosts-lossy")
    with network_module.LossyLink(network, delay_s=0.005, loss=0.01) as link:
        with TwoHosts(network, bucket, run, tmp_path, link) as hosts:
            assert hosts.wait() == [0, 0], hosts.texts()
        assert link.carried > 1000
        assert link.lost > 0
    assert run.losses() == unbroken.losses()
    assert run.fingerprint() == unbroken.fingerprint()
