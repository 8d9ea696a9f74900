"""An S3 server that misbehaves, for tests whose `folder` is its buckets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.storage.local_s3 import LocalS3
from tests.integration.data.fault_proxy import FaultProxy


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The S3 server and the proxy in front of it; the environment points to the proxy."""
    with LocalS3(folder) as s3, FaultProxy(s3.port) as proxy:
        for name, value in proxy.environment(s3.env).items():
            monkeypatch.setenv(name, value)
        yield proxy
