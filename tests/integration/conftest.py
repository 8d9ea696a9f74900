"""Fixtures that several launchers share: one S3 server, one unbroken run, one cluster of each kind."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_HERE = Path(__file__).parent


def _load(path: Path) -> ModuleType:
    """A neighbouring file; under importmode=importlib test folders are not on the search path."""
    name = f"ldm_integration_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """S3 server with shards."""
    made = _load(_HERE / "launch_bucket.py").Bucket(tmp_path_factory.mktemp("bucket"))
    with made.server:
        yield made


@pytest.fixture(scope="session")
def unbroken(bucket: Any) -> Any:
    """The run that nothing happens to: two local ranks."""
    return bucket.train_here("unbroken")


@pytest.fixture(scope="session")
def slurm(bucket: Any) -> Iterator[Any]:
    """munged, slurmctld and three slurmd."""
    module = _load(_HERE / "slurm" / "slurm_cluster.py")
    sentence = module.missing_sentence()
    if sentence is not None:
        pytest.skip(sentence)
    # Not pytest's temporary folder: munge wants a path that nobody else can write, and short sockets.
    root = Path(tempfile.mkdtemp(prefix="ldm-slurm-"))
    root.chmod(0o755)
    cluster = module.SlurmCluster(root, bucket.environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster(bucket: Any) -> Iterator[Any]:
    """A head and two raylets."""
    module = _load(_HERE / "ray" / "ray_cluster.py")
    sentence = module.missing_sentence()
    if sentence is not None:
        pytest.skip(sentence)
    root = Path(tempfile.mkdtemp(prefix="ldmray"))  # holds sockets: their paths must stay short
    cluster = module.RayCluster(root, bucket.environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)
        for log in root.parent.glob(f"{root.name}-*.log"):
            log.unlink()
