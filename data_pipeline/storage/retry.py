"""Storage calls, tried again where that helps, and explained by consequence where it does not."""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from data_pipeline.errors import (
    AccessDenied,
    DataError,
    Failure,
    MissingBucket,
    NotFound,
    RetryableFault,
    StorageOutage,
    Unreachable,
    UserError,
    in_a_line,
    shortened,
)
from data_pipeline.storage.urls import is_http, is_local, is_s3
from data_pipeline.storage.waits import tell, tell_end

T = TypeVar("T")

QUICK_TRIES = 2
"""Where a person waits for the answer."""
TRIES = 5
"""A few seconds: enough for a hiccup."""
PATIENT_TRIES = 30
"""Five to eight minutes: for what a run cannot go on without, less than the watchdog grants a save."""

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 20.0
_LONGEST_S = 600.0
_TRANSIENT = re.compile(
    r"timeout|timed out|connect|reset|closed|incomplete|payload|slow ?down|throttl|too many|"
    r"internal ?error|unavailable|bad gateway|temporar|short body|\b(429|500|502|503|504)\b|eof",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"NoCredentials|PartialCredentials|InvalidAccessKey|SignatureDoesNotMatch|AccessDenied|Forbidden"
)
_MISTAKES = (
    (
        r"ExpiredToken|TokenRefreshRequired|UnauthorizedSSOToken|token .*expired",
        "the session has expired; renew AWS_SESSION_TOKEN and the keys",
    ),
    (r"RequestTimeTooSkewed", "the clock of this machine is wrong; set it"),
    (
        r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint|region .* is wrong",
        "the bucket is in another region; set AWS_REGION to it",
    ),
    (
        r"certificate verify failed|CERTIFICATE_VERIFY_FAILED",
        "the server's certificate is not trusted here; set AWS_CA_BUNDLE to its authority's",
    ),
    (
        r"WRONG_VERSION_NUMBER|record layer failure",
        "the server does not speak https; write http:// in AWS_ENDPOINT_URL",
    ),
)
"""What a person has to mend, by the words of storage libraries; no retry helps."""
_GONE = (404, 410)
_HOPELESS = frozenset({errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


class ShortBody(OSError):
    """The server sent fewer bytes than it promised."""


def require_range(url: str, received: int, asked: int) -> None:
    """Refuse a server that answers a range with more than was asked for. Raises DataError."""
    if received > asked:
        raise DataError(
            f"The server of {url} does not answer ranges: it sent {received} bytes for {asked}; copy the "
            "files to storage that does."
        )


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: network trouble, throttling, 5xx, a short body."""
    error = _real(error)
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    if isinstance(error, (TimeoutError, ShortBody)):
        return True
    text = f"{type(error).__name__} {error}"
    known = isinstance(error, ConnectionError) or bool(_TRANSIENT.search(text))
    return known and not any(re.search(words, text) for words, _ in _MISTAKES)


def _real(error: BaseException) -> BaseException:
    """What went wrong where a client of web servers says of everything that there is no such file."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    of_network = isinstance(cause, TimeoutError) or type(cause).__module__.partition(".")[0] == "aiohttp"
    return cause if of_network and getattr(cause, "status", None) not in _GONE else error


def pause_before(attempt: int) -> float:
    """Seconds to wait before try number `attempt` (1 is the second try): full jitter."""
    return random.uniform(0.5, 1.0) * min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (attempt - 1))


def with_retries(
    action: Callable[[], T],
    url: str,
    *,
    done: str,
    tries: int,
) -> T:
    """Call `action` until it succeeds or `tries` transient failures; others are raised at once.

    What lasts is told, by `url` and the participle of what is done: read, written, removed.
    """
    began, told = time.monotonic(), False
    for attempt in range(1, tries + 1):
        try:
            result = action()
        except Exception as error:
            waited = time.monotonic() - began
            # tries that are not answered take their timeout each
            if attempt == tries or waited > _LONGEST_S or not is_transient(error):
                raise
            told |= tell(
                waited,
                f"{url} is not {done} after {waited:.0f} s ({in_a_line(error)}); tried again, until "
                f"{tries} tries ({attempt} so far) or {_LONGEST_S:.0f} s are over",
            )
        else:
            if told:
                tell_end(f"{url} is {done}, after {time.monotonic() - began:.0f} s")
            return result
        time.sleep(pause_before(attempt))
    raise AssertionError("tries must be at least 1")


def guarded(action: Callable[[], T], url: str, *, tries: int = QUICK_TRIES) -> T:
    """Run a call that reads storage; what it raises in the end is a Failure."""
    try:
        return with_retries(action, url, done="read", tries=tries)
    except Failure:
        raise
    except Exception as error:
        raise _after(tries, explain(error, url)) from error


def guarded_change(action: Callable[[], T], url: str, *, done: str, tries: int = PATIENT_TRIES) -> T:
    """The same for a call that changes storage; `done` is the participle for the sentence: written, ..."""
    if is_http(url):
        raise _read_only(url, done)
    try:
        return with_retries(action, url, done=done, tries=tries)
    except Failure:
        raise  # from reading what is written
    except Exception as error:
        raise _after(tries, explain_change(error, url, done)) from error


def _after(tries: int, failure: Failure) -> Failure:
    """Silence that has lasted for minutes is an outage, whatever a short one would have meant."""
    if isinstance(failure, Unreachable) and tries >= PATIENT_TRIES:
        return StorageOutage(str(failure))
    return failure


def explain(error: BaseException, url: str) -> Failure:
    """The sentence, and the consequence, of what a storage library raised while reading."""
    error = _real(error)
    text = f"{type(error).__name__}: {error}"
    for words, remedy in _MISTAKES:
        if re.search(words, text) and not is_local(url):
            return AccessDenied(f"{url} cannot be reached: {remedy} ({shortened(text)}).")
    if "NoSuchBucket" in text or "bucket does not exist" in text:
        return missing_bucket(url.partition("://")[2].split("/", 1)[0])
    if isinstance(error, PermissionError) or _DENIED.search(text):
        remedy = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if is_s3(url) else "its permissions"
        return AccessDenied(f"Access to {url} is denied; check {remedy} ({shortened(text)}).")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return NotFound(f"{url} does not exist; check the URL.")
    if isinstance(error, IsADirectoryError):
        return DataError(f"{url} is a folder, and a file is wanted; name the file in it.")
    if is_transient(error):
        return Unreachable(
            f"{url} cannot be reached; check the network and AWS_ENDPOINT_URL ({shortened(text)})."
        )
    return DataError(f"{url} cannot be read ({shortened(text)}); check the URL and its permissions.")


def explain_change(error: BaseException, url: str, done: str) -> Failure:
    """The same while writing or removing: what is not known to be a mistake is worth another try."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(
            f"{url} cannot be {done}: the disk is full; make room or choose another place. What was stored "
            "before is intact."
        )
    hopeless = isinstance(
        error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
    ) or (isinstance(error, OSError) and error.errno in _HOPELESS)
    if hopeless and is_local(url):
        assert isinstance(error, OSError)
        return UserError(
            f"{url} cannot be {done} ({error.strerror or error}); check the path and its permissions. What "
            "was stored before is intact."
        )
    if isinstance(error, NotImplementedError):
        return _read_only(url, done)
    explained = explain(error, url)
    if done == "removed" and isinstance(explained, AccessDenied) and not is_local(url):
        text = shortened(f"{type(error).__name__}: {error}")
        return AccessDenied(
            f"{url} cannot be removed: access is denied; grant the permission to delete (s3:DeleteObject), "
            f"or check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({text})."
        )
    if hopeless or isinstance(explained, (AccessDenied, MissingBucket, Unreachable)):
        return explained
    return RetryableFault(f"{url} cannot be {done}: {explained}")


def _read_only(url: str, done: str) -> UserError:
    return UserError(
        f"{url} cannot be {done}: storage of this kind is read only; choose another place (data.index says "
        "where an index goes)."
    )


def missing_bucket(bucket: str) -> MissingBucket:
    """The sentence for a bucket that is not there."""
    return MissingBucket(
        f"The bucket {bucket!r} does not exist at this endpoint; create it or correct the URL "
        "(AWS_ENDPOINT_URL chooses the endpoint)."
    )
