"""The client behind a URL: one of S3 per process, with region and credentials from the environment."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import fsspec
from fsspec.asyn import sync

from data_pipeline.errors import DataError
from data_pipeline.storage.urls import is_local, is_s3, local_path

_CONNECT_TIMEOUT_S = 5.0
_CONNECTIONS = 64
_CONNECTING = threading.Lock()
_S3_ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)


def filesystem(url: str, *, timeout_s: float = 30.0) -> tuple[Any, str]:
    """fsspec filesystem of a URL and the path inside it; connections are shared per process.

    S3 reads AWS_ENDPOINT_URL, AWS_REGION (or AWS_DEFAULT_REGION) and the credentials from the
    environment. Retries are ours (see `retry`), not those of the client library.
    """
    if is_s3(url):
        environment = tuple(os.environ.get(name) for name in _S3_ENVIRONMENT)
        with _CONNECTING:
            fs = _s3_filesystem(environment, timeout_s, os.getpid())
        path = url.partition("://")[2]
        if not path or path.startswith("/"):
            raise DataError(f"{url!r} names no bucket; write s3://BUCKET/PATH.")
        return fs, path.rstrip("/")
    if is_local(url):
        fs = fsspec.filesystem("file", auto_mkdir=True)
        return fs, fs._strip_protocol(local_path(url))
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # the clients of other clouds are installed by those who use them
        raise DataError(f"{url} cannot be opened: {error}.") from error


def read_within(deadline_s: float, fs: Any, path: str, **span: int) -> bytes:
    """One read that is given up at its deadline, long before the socket's timeout, where the library can."""
    if fs.async_impl:
        return bytes(await_within(deadline_s, fs, fs._cat_file, path, **span))
    return bytes(fs.cat_file(path, **span))


def await_within(deadline_s: float, fs: Any, coroutine: Callable[..., Any], *parts: Any, **named: Any) -> Any:
    """What a coroutine of an asynchronous file system gives, run in its loop; TimeoutError when late."""
    return sync(fs.loop, coroutine, *parts, timeout=deadline_s, **named)


@lru_cache(maxsize=8)
def _s3_filesystem(environment: tuple[str | None, ...], timeout_s: float, process: int) -> Any:
    """One client for all threads of a process; fsspec's own cache would make one per thread."""
    del process
    service_endpoint, endpoint, region, default_region, key, secret, token = environment
    fs = fsspec.filesystem(
        "s3",
        endpoint_url=service_endpoint or endpoint,
        key=key,
        secret=secret,
        token=token,
        client_kwargs={"region_name": region or default_region} if region or default_region else {},
        config_kwargs={
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": timeout_s,
            "max_pool_connections": _CONNECTIONS,
            "retries": {"max_attempts": 0},
            # some servers send the whole object's checksum with a range of it
            "response_checksum_validation": "when_required",
            "request_checksum_calculation": "when_required",
        },
        use_listings_cache=False,
    )
    fs.retries = 1
    # create the client here, once: s3fs would do it in every request that finds none yet
    fs.connect()
    return fs
