"""The client behind a URL: one of S3 per process, with region and credentials from the environment.

Every request of S3 has a deadline, since the libraries' own timeouts begin with the first byte of an answer:
an upload whose server says nothing would be waited for without end.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import fsspec
from fsspec.asyn import sync, sync_wrapper

from data_pipeline.errors import DataError
from data_pipeline.storage.urls import is_http, is_local, is_s3, local_path
from data_pipeline.storage.waits import unanswered

_CONNECT_TIMEOUT_S = 5.0
_CONNECTIONS = 64
_CONNECTING = threading.Lock()
_SLOWEST_UPLOAD = 1 << 19
"""Bytes a second that an upload may be slow without being given up."""
_S3_ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_S3_ADDRESSING_STYLE",
)
ADDRESSING_STYLES = ("auto", "path", "virtual")
_CLIENTS = {
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "gcs")),
    **dict.fromkeys(("az", "abfs", "abfss"), ("adlfs", "azure")),
    "hf": ("huggingface_hub", "huggingface"),
}
"""By scheme: package of the client, and the extra of this project that installs it."""


def filesystem(url: str, *, timeout_s: float = 30.0) -> tuple[Any, str]:
    """fsspec filesystem of a URL and the path inside it; connections are shared per process.

    S3 reads AWS_ENDPOINT_URL, AWS_REGION (or AWS_DEFAULT_REGION), AWS_S3_ADDRESSING_STYLE (auto, path or
    virtual) and the credentials from the environment. Retries are ours (see `retry`), not those of the
    client library.

    Raises:
        DataError: what is written wrong, or which package is missing.
    """
    if is_s3(url):
        path = url.partition("://")[2]
        if not path or path.startswith("/"):
            raise DataError(f"{url!r} names no bucket; write s3://BUCKET/PATH.")
        environment = tuple(os.environ.get(name, "").strip() for name in _S3_ENVIRONMENT)
        with _CONNECTING:
            fs = _s3_filesystem(environment, timeout_s, os.getpid())
        return fs, path.rstrip("/")
    if is_local(url):
        fs = fsspec.filesystem("file", auto_mkdir=True)
        return fs, fs._strip_protocol(local_path(url))
    scheme, _, rest = url.partition("://")
    package, extra = _CLIENTS.get(scheme.lower(), ("", ""))
    if package and find_spec(package) is None:  # installed by those who use these clouds
        raise DataError(
            f"{url} cannot be opened without {package}; install it with: "
            f"pip install 'latent-diffusion-trainer[{extra}]'"
        )
    try:
        settings = {"client_kwargs": {"timeout": _silence(timeout_s)}} if is_http(url) else {}
        return fsspec.core.url_to_fs(f"{scheme.lower()}://{rest}", **settings)
    except Exception as error:  # their configuration, which has no common base of errors
        raise DataError(f"{url} cannot be opened ({type(error).__name__}: {error}).") from error


def import_client(url: str) -> None:
    """Import what a client of S3 takes, and make none: it starts a thread, and forks go without threads."""
    if is_s3(url):
        fsspec.get_filesystem_class("s3")


def read_within(deadline_s: float, fs: Any, path: str, **span: int) -> bytes:
    """One read that is given up at its deadline, long before the socket's timeout, where the library can."""
    if fs.async_impl:
        return bytes(await_within(deadline_s, fs, fs._cat_file, path, **span))
    return bytes(fs.cat_file(path, **span))


def await_within(deadline_s: float, fs: Any, coroutine: Callable[..., Any], *parts: Any, **named: Any) -> Any:
    """What a coroutine of an asynchronous file system gives, run in its loop; TimeoutError when late."""
    try:
        return sync(fs.loop, coroutine, *parts, timeout=deadline_s, **named)
    except TimeoutError as error:  # fsspec's says nothing
        raise TimeoutError(str(error) or f"no answer within {deadline_s:.1f} s") from error


@lru_cache(maxsize=8)
def _s3_filesystem(environment: tuple[str, ...], timeout_s: float, process: int) -> Any:
    """One client for all threads of a process; fsspec's own cache would make one per thread."""
    del process
    given = dict(zip(_S3_ENVIRONMENT, environment, strict=True))
    region = given["AWS_REGION"] or given["AWS_DEFAULT_REGION"]
    profile = given["AWS_PROFILE"]
    try:
        fs = fsspec.filesystem(
            "s3",
            endpoint_url=_endpoint(given),
            key=given["AWS_ACCESS_KEY_ID"] or None,
            secret=given["AWS_SECRET_ACCESS_KEY"] or None,
            token=given["AWS_SESSION_TOKEN"] or None,
            client_kwargs={"region_name": region} if region else {},
            config_kwargs=_s3_settings(timeout_s, given["AWS_S3_ADDRESSING_STYLE"]),
            use_listings_cache=False,
            skip_instance_cache=True,
            **({"profile": profile} if profile else {}),
        )
        fs.retries = 1
        _bound_requests(fs, timeout_s)
        # create the client here, once: s3fs would do it in every request that finds none yet
        fs.connect()
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise _wrong_settings(error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("botocore", "aiobotocore"):
            raise
        raise _wrong_settings(error) from error
    return fs


def _wrong_settings(error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    return DataError(
        f"S3 cannot be used as the environment says ({error}); check AWS_ENDPOINT_URL, AWS_REGION, "
        "AWS_PROFILE and the AWS configuration file."
    )


def _endpoint(given: dict[str, str]) -> str | None:
    name = "AWS_ENDPOINT_URL_S3" if given["AWS_ENDPOINT_URL_S3"] else "AWS_ENDPOINT_URL"
    endpoint = given[name]
    if endpoint and not re.match(r"https?://[^/]", endpoint, re.IGNORECASE):
        raise DataError(f"{name}={endpoint} is no URL; write http://HOST:PORT or https://HOST.")
    return endpoint or None


def _s3_settings(timeout_s: float, addressing: str) -> dict[str, Any]:
    if addressing and addressing not in ADDRESSING_STYLES:
        raise DataError(
            f"AWS_S3_ADDRESSING_STYLE={addressing} is unknown; choose one of {', '.join(ADDRESSING_STYLES)}."
        )
    return {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "read_timeout": timeout_s,
        "max_pool_connections": _CONNECTIONS,
        "retries": {"max_attempts": 0},
        # some servers send the whole object's checksum with a range of it, others refuse checksums
        "response_checksum_validation": "when_required",
        "request_checksum_calculation": "when_required",
        **({"s3": {"addressing_style": addressing}} if addressing else {}),
    }


def _bound_requests(fs: Any, timeout_s: float) -> None:
    """Give each request `timeout_s` until its answer begins, and an upload the time that its bytes take."""
    request = fs._call_s3

    async def bounded(method: str, *parts: Any, **named: Any) -> Any:
        body = named.get("Body")
        size = len(body) if isinstance(body, bytes | bytearray | memoryview) else 0
        slack_s = size / _SLOWEST_UPLOAD
        deadline_s = timeout_s + slack_s
        try:
            with unanswered(lambda: _asked(method, named), deadline_s=deadline_s, slack_s=slack_s):
                return await asyncio.wait_for(request(method, *parts, **named), deadline_s)
        except TimeoutError as error:
            # Not a TimeoutError: fsspec would put one of its own, without words, in its place.
            raise ConnectionAbortedError(f"{method} was not answered for {deadline_s:.0f} s") from error

    fs._call_s3 = bounded
    fs.call_s3 = sync_wrapper(bounded, obj=fs)


def _silence(timeout_s: float) -> Any:
    """What a web server may take to answer and between bytes; aiohttp's own limit is five minutes for all."""
    import aiohttp  # with a client only

    return aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=timeout_s)


def _asked(method: str, named: dict[str, Any]) -> str:
    """A request of S3 for people: `delete_objects of s3://bucket/a and 9 more`."""
    keys = [each["Key"] for each in named.get("Delete", {}).get("Objects", [])]
    key = keys[0] if keys else named.get("Key", named.get("Prefix", ""))
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{method} of s3://{named.get('Bucket', '')}/{key}{more}"
