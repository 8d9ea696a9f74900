"""Stores as they are met: silent ones, and environments in which something is written wrong."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_pipeline.errors import (
    AccessDenied,
    DataError,
    Failure,
    RetryableFault,
    StorageOutage,
    Unreachable,
)
from data_pipeline.storage import client, files, large, retry, waits
from data_pipeline.storage.client import filesystem
from data_pipeline.storage.listing import list_files
from data_pipeline.storage.local_s3 import LocalS3
from data_pipeline.storage.ranges import RangeReader
from tests.integration.data.fault_proxy import FaultProxy
from trainer.__main__ import main


@pytest.fixture(params=["reads", "reads nothing"])
def silent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """S3's endpoint is a server that accepts and never answers."""
    kept: list[socket.socket] = []

    def accept(server: socket.socket) -> None:
        while True:
            try:
                kept.append(server.accept()[0])
            except OSError:
                return
            if request.param == "reads":
                threading.Thread(target=drain, args=(kept[-1],), daemon=True).start()

    def drain(connection: socket.socket) -> None:
        try:
            while connection.recv(1 << 20):
                pass
        except OSError:
            return

    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        threading.Thread(target=accept, args=(server,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.setenv(name, "x")
        monkeypatch.setattr(large, "_TIMEOUT_S", 0.3)
        monkeypatch.setattr(client, "_SLOWEST_UPLOAD", 1 << 26)
        monkeypatch.setattr(large, "_PART_BYTES", 6 << 20)
        yield
        for connection in kept:
            connection.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [10, 14 << 20])
def test_an_upload_that_is_never_answered_ends(silent: None, size: int) -> None:
    def parts() -> list[memoryview]:
        return [memoryview(bytes(size))]

    with pytest.raises(Unreachable, match=r"(put_object|create_multipart_upload) was not answered"):
        large.write_stream("s3://bucket/a", parts, tries=2)


@pytest.mark.timeout(120)
def test_every_request_that_is_never_answered_ends(silent: None) -> None:
    fs, path = filesystem("s3://bucket/a", timeout_s=0.3)
    for request in (
        lambda: fs.pipe_file(path, bytes(8 << 20)),
        lambda: fs.cat_file(path),
        lambda: fs.find(path),
        lambda: fs.rm_file(path),
    ):
        with pytest.raises(Failure, match="was not answered"):
            retry.guarded(request, "s3://bucket/a", tries=1)


def test_silence_is_not_waited_for_as_often_as_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(retry, "_LONGEST_S", -1.0)
    asked = []

    def silence() -> None:
        asked.append(1)
        raise ConnectionAbortedError("put_object was not answered")

    with pytest.raises(RetryableFault):
        retry.guarded_change(silence, "s3://bucket/a", done="written")
    assert len(asked) == 1


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are told after a fifth of a second."""
    # The process has one, which counts what other tests left out.
    monkeypatch.setattr(waits, "_SPEAKER", waits._Speaker())
    monkeypatch.setattr(waits, "_QUIET_S", 0.2)
    monkeypatch.setattr(waits, "_BETWEEN_S", 0.0)


@pytest.fixture
def impatient(talkative: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, and requests of S3 are given up after half a second."""
    made = client._s3_filesystem
    monkeypatch.setattr(client, "_s3_filesystem", lambda given, timeout_s, pid: made(given, 0.5, pid))


@pytest.mark.parametrize("command", ["status", "report"])
def test_who_waits_is_told_for_what_and_until_when(
    silent: None, impatient: None, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    assert main([command, "s3://bucket/run"]) != 0
    unanswered, again = caplog.messages[:2]
    assert re.fullmatch(
        r"storage has not answered \w+ of s3://bucket/run\S* for \d+ s; the request is given up after \d+ s",
        unanswered,
    )
    assert re.fullmatch(
        r"s3://bucket/run\S* is not read after \d+ s \(\w+ was not answered for \d+ s\); tried again, "
        r"until \d tries \(1 so far\) or 600 s are over",
        again,
    )


def test_a_loader_that_waits_says_so(silent: None, impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    reader = RangeReader(timeout_s=0.5, tries=2, patience_s=0.1)
    with pytest.raises(StorageOutage):
        reader.read("s3://bucket/a.tar", 0, 4)
    assert "storage has not answered get_object of s3://bucket/a.tar" in caplog.messages[0]
    assert re.fullmatch(
        r"s3://bucket/a.tar is not read after \d+ s "
        r"\((no answer within 0\.5 s|\w+ was not answered for \d+ s)\)"
        r"; tried again, at least 2 times \(1 so far\), and while nothing answers for 0 s",
        caplog.messages[1],
    )


def test_a_web_server_that_says_nothing_is_asked_again_and_its_password_not_told(
    silent: None, talkative: None, caplog: pytest.LogCaptureFixture
) -> None:
    host = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    with pytest.raises(Unreachable):
        files.read_bytes(f"http://me:hidden@{host}/a?X-Amz-Signature=hidden", tries=2, timeout_s=0.5)
    assert f"http://***@{host}/a?X-Amz-Signature=*** is not read" in caplog.text
    assert "hidden" not in "".join(caplog.messages)


def test_what_is_answered_late_is_told_to_be_there(
    server: LocalS3, talkative: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(server.port) as proxy:
        for name, value in proxy.environment(server.env).items():
            monkeypatch.setenv(name, value)
        files.write_bytes("s3://bucket/late/a", b"a")
        proxy.delay_s = 0.4
        assert files.read_bytes("s3://bucket/late/a") == b"a"
    assert "storage has answered get_object of s3://bucket/late/a, after" in caplog.messages[-1]


def test_of_many_ranks_each_speaks_later_and_seldom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waits, "_SPEAKER", waits._Speaker())
    monkeypatch.setenv("WORLD_SIZE", "512")
    monkeypatch.setenv("RANK", "511")
    assert not waits.tell(500.0, "a wait that rank 0 has told")
    assert waits.tell(530.0, "first")
    assert not waits.tell(530.0, "second")
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(waits, "_BETWEEN_S", 0.0)
    assert not waits.tell(14.0, "a hiccup")
    assert waits.tell(16.0, "third")
    assert caplog.messages == ["first", "third [like lines left out since the last: 1]"]


WRONG = (
    ({"AWS_ENDPOINT_URL": "localhost:9000"}, r"AWS_ENDPOINT_URL=localhost:9000 is no URL; write http://"),
    ({"AWS_ENDPOINT_URL": "http://"}, "is no URL"),
    ({"AWS_ENDPOINT_URL_S3": "minio"}, "AWS_ENDPOINT_URL_S3=minio is no URL"),
    ({"AWS_S3_ADDRESSING_STYLE": "dns"}, "choose one of auto, path, virtual"),
    ({"AWS_PROFILE": "nobody"}, r"AWS_PROFILE"),
    ({"AWS_REGION": "no region!"}, r"AWS_REGION"),
    ({"AWS_SECRET_ACCESS_KEY": "wrong"}, r"denied; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, r"denied; check AWS_ACCESS_KEY_ID"),
    ({"AWS_ENDPOINT_URL": "https://127.0.0.1:{port}"}, r"does not speak https; write http://"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    with LocalS3(tmp_path_factory.mktemp("stores"), buckets=("bucket",)) as running:
        yield running


@pytest.fixture
def s3(server: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalS3:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return server


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_what_is_written_wrong_is_said_by_every_access(
    wrong: dict[str, str], said: str, s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in wrong.items():
        monkeypatch.setenv(name, value.format(port=s3.port))
    for access in (
        lambda: files.read_bytes("s3://bucket/a"),
        lambda: files.write_bytes("s3://bucket/a", b"a", tries=1),
        lambda: files.read_range("s3://bucket/a", 0, 1),
        lambda: files.list_names("s3://bucket/a"),
        lambda: large.write_stream("s3://bucket/a", lambda: [memoryview(b"a")], tries=1),
        lambda: large.measure("s3://bucket/a", 1),
        lambda: list_files("s3://bucket/{00000..00003}.tar"),
        lambda: list_files("s3://bucket/*.tar"),
    ):
        with pytest.raises(DataError, match=said):
            access()


COMMANDS = (
    ("import", "s3://bucket/model.safetensors", "s3://bucket/to"),
    ("export", "s3://bucket/run", "s3://bucket/file.safetensors"),
    ("sample", "s3://bucket/run", "--prompt", "a"),
    ("data", "index", "s3://bucket/{00000..00001}.tar"),
    ("data", "inspect", "s3://bucket/{00000..00001}.tar"),
    ("evaluate", "reconstruction", "s3://bucket/a.safetensors", "--shards", "s3://bucket/*.tar"),
    ("checkpoint", "list", "s3://bucket/run"),
)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [WRONG[0], WRONG[6], ({"bucket": "s3:///x"}, "names no bucket")],
    ids=["url", "key", "name"],
)
def test_what_is_written_wrong_is_one_sentence_of_every_command(
    command: tuple[str, ...],
    wrong: dict[str, str],
    said: str,
    s3: LocalS3,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    arguments = [word.replace("s3://bucket", "s3:///x") if "bucket" in wrong else word for word in command]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert re.search(said, told)
    assert "Traceback" not in told


def test_addressing_is_chosen_in_the_environment(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.example")
    monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", "virtual")
    fs, path = filesystem("s3://bucket/key")
    assert fs.url(path).startswith("https://bucket.store.example/key?")
    monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", "path")
    fs, path = filesystem("s3://bucket/key")
    assert fs.url(path).startswith("https://store.example/bucket/key?")


def test_the_region_is_that_of_the_environment(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    fs, path = filesystem("s3://bucket/key")
    assert "eu-north-1" in fs.url(path)


def test_a_profile_of_the_configuration_file_is_used(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(
        f"[profile lab]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    files.write_bytes("s3://bucket/profile", b"a")
    assert files.read_bytes("s3://bucket/profile") == b"a"


def test_nothing_that_older_stores_refuse_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """New clients of S3 send checksums in trailers and headers of their own, whatever the environment."""
    sent: list[str] = []

    class Store(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # clients ask whether they may send

        def do_PUT(self) -> None:
            sent.extend(f"{name}: {value}".lower() for name, value in self.headers.items())
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("ETag", '"a"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Not on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as store:
        threading.Thread(target=store.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.server_port}")
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.setenv(name, "x")
        files.write_bytes("s3://bucket/a", b"a")
        large.write_whole("s3://bucket/b", b"b")
        store.shutdown()
    assert sum(line.startswith("content-length") for line in sent) == 2
    assert [line for line in sent if "checksum" in line or "trailer" in line or "aws-chunked" in line] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ExpiredToken", "AWS_SESSION_TOKEN"),
        ("RequestTimeTooSkewed", "clock"),
        ("AuthorizationHeaderMalformed: the region 'us-east-1' is wrong", "AWS_REGION"),
        ("SSL: CERTIFICATE_VERIFY_FAILED", "AWS_CA_BUNDLE"),
    ],
)
def test_mistakes_that_a_server_tells_are_not_tried_again(words: str, said: str) -> None:
    asked = []

    def refused() -> None:
        asked.append(1)
        raise RuntimeError(words)

    for guarded in (retry.guarded, lambda *a: retry.guarded_change(*a, done="written")):
        with pytest.raises(AccessDenied, match=said):
            guarded(refused, "s3://bucket/a")
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("gs://bucket/a", "gcsfs", "gcs"),
        ("GCS://bucket/a", "gcsfs", "gcs"),
        ("az://bucket/a", "adlfs", "azure"),
        ("abfss://bucket/a", "adlfs", "azure"),
        ("hf://datasets/me/set/00000.tar", "huggingface_hub", "huggingface"),
    ],
)
def test_other_clouds_are_extras(url: str, package: str, extra: str) -> None:
    extras = Path("pyproject.toml").read_text()
    assert re.search(rf'^{extra} = \["{package}>=', extras, re.MULTILINE)
    if find_spec(package) is None:
        with pytest.raises(
            DataError, match=rf"without {package}; install it with: pip install .*\[{extra}\]"
        ):
            files.read_bytes(url)
    else:
        assert filesystem(url)[1]
