"""A proxy in front of an S3 server that misbehaves as storage does."""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class FaultProxy(ThreadingHTTPServer):
    """Forwards to an S3 server and spoils a seeded share of the object reads.

    `faults`: share of the reads by kind: short (half a body), storm (503), reset, stall (30 s of silence).
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.rng = random.Random(7)
        self.faults: dict[str, float] = {}
        self.first_byte_s = 0.0
        """Of object reads."""
        self.delay_s = 0.0
        """Of every request."""
        self.broken: tuple[str, ...] = ()
        """Objects that always fail."""
        self.deletes = 0
        """Status with which deletes are answered instead of being passed on; 0: they are passed on."""
        self.no_bulk = False
        """Whether deletes of several objects in one request are unknown, as at Google."""
        self.silent_bulk = False
        """Whether they are never answered, until whoever asked gives up."""
        self.deleted: list[str] = []
        """What was asked to be deleted: paths, and the keys of bulk requests."""
        self.counts: Counter[str] = Counter()
        self.traffic: list[tuple[str, str, int]] = []
        """(method, path, bytes of the answer) of all that is passed on and done."""
        self.failures: list[tuple[str, str, int]] = []
        """(method, path, status) of what the server behind failed to do by itself, and is asked for again."""
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, direct: Mapping[str, str]) -> dict[str, str]:
        """Environment of the S3 server, with the endpoint replaced by the proxy's."""
        return {**direct, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_address[1]}"}

    def passed_on(self, method: str, path: str, num_bytes: int) -> None:
        """Take note of a request that was passed on and done, and of the size of its answer."""
        self.traffic.append((method, path, num_bytes))

    def choose(self, path: str) -> str:
        with self.lock:
            fault = "storm" if any(b in path for b in self.broken) else ""
            draw = self.rng.random()
            for name, share in self.faults.items():
                if not fault and draw < share:
                    fault = name
                draw -= share
            self.counts[fault or "served"] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *args: object) -> None:
        pass

    def _refusal(self, body: bytes) -> tuple[int, str] | None:
        """Status and code with which a delete is refused; None: it is passed on, as is everything else."""
        bulk = self.command == "POST" and "?delete" in self.path
        if self.command != "DELETE" and not bulk:
            return None
        self.server.deleted += re.findall(r"<Key>(.*?)</Key>", body.decode()) if bulk else [self.path]
        if bulk and self.server.no_bulk:
            return 501, "NotImplemented"
        if self.server.deletes:
            return self.server.deletes, "AccessDenied" if self.server.deletes == 403 else "SlowDown"
        return None

    def _wait_until_given_up(self) -> None:
        self.server.counts["silent"] += 1
        self.connection.settimeout(None)
        self.connection.recv(1, socket.MSG_PEEK)
        self.server.counts["given up"] += 1
        self.close_connection = True

    def _forward(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.server.silent_bulk and self.command == "POST" and "?delete" in self.path:
            self._wait_until_given_up()
            return
        if (refusal := self._refusal(body)) is not None:
            status, code = refusal
            answer_body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer_body)))
            self.end_headers()
            self.wfile.write(answer_body)
            return
        time.sleep(self.server.delay_s)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if answer.status >= 500:
            self.server.failures.append((self.command, self.path, answer.status))
        else:
            self.server.passed_on(self.command, self.path, len(data))
        reads = self.command == "GET" and "list-type" not in self.path
        fault = self.server.choose(self.path) if reads else ""
        if reads:
            time.sleep(self.server.first_byte_s)
        if fault == "storm":
            answer_code, data, headers = 503, b"<Error><Code>SlowDown</Code></Error>", []
        else:
            answer_code, headers = answer.status, answer.getheaders()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        self.send_response(answer_code)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", size)
        self.end_headers()
        if fault in ("short", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(30)
            self.close_connection = True
            return
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward
