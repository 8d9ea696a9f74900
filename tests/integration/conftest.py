"""Fixtures that several launchers share: one S3 server, one unbroken run, one cluster of each kind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from tests.integration import launch_bucket
from tests.integration.ray import ray_cluster as ray_processes
from tests.integration.slurm import slurm_cluster


@pytest.fixture(autouse=True)
def no_cached_clients() -> None:
    """fsspec keeps S3 clients for ever, with the endpoint of a server that an earlier module stopped."""
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """S3 server with shards."""
    made = launch_bucket.Bucket(tmp_path_factory.mktemp("bucket"))
    with made.server:
        yield made


@pytest.fixture(scope="session")
def unbroken(bucket: Any) -> Any:
    """The run that nothing happens to: two local ranks."""
    return bucket.train_here("unbroken")


@pytest.fixture(scope="session")
def slurm(bucket: Any) -> Iterator[Any]:
    """munged, slurmctld and three slurmd."""
    sentence = slurm_cluster.missing_sentence()
    if sentence is not None:
        pytest.skip(sentence)
    # Not pytest's temporary folder: munge wants a path that nobody else can write, and short sockets.
    root = Path(tempfile.mkdtemp(prefix="ldm-slurm-"))
    root.chmod(0o755)
    cluster = slurm_cluster.SlurmCluster(root, bucket.environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster(bucket: Any) -> Iterator[Any]:
    """A head and two raylets."""
    sentence = ray_processes.missing_sentence()
    if sentence is not None:
        pytest.skip(sentence)
    root = Path(tempfile.mkdtemp(prefix="ldmray"))  # holds sockets: their paths must stay short
    cluster = ray_processes.RayCluster(root, bucket.environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)
        for log in root.parent.glob(f"{root.name}-*.log"):
            log.unlink()
