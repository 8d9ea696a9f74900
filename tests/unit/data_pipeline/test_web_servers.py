"""Web servers as stores: without listings, without ranges, with one shard that fails, and in an outage."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError, NoShards, UserError
from data_pipeline.loader import build_loader
from data_pipeline.storage import files
from data_pipeline.storage.listing import list_files
from data_pipeline.storage.ranges import RangeReader


class WebServer(SimpleHTTPRequestHandler):
    """A web server without listings; answers ranges, as Python's own does not, unless told otherwise."""

    ranges = True
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_dir():
            self.send_error(403)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not self.ranges or match is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        part = data[int(match[1]) : int(match[2]) + 1 if match[2] else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args: object) -> None:
        pass


class WithoutRanges(WebServer):
    """Answers each range with everything."""

    ranges = False


class WithoutOne(WebServer):
    """Fails whenever it is asked for one of the shards."""

    def do_HEAD(self) -> None:
        if self.path.endswith("/00002.tar"):
            self.send_error(503)
        else:
            super().do_HEAD()

    def do_GET(self) -> None:
        if self.path.endswith("/00002.tar"):
            self.send_error(503)
        else:
            super().do_GET()


@pytest.fixture(params=[WebServer, WithoutRanges])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    handler = partial(request.param, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("web", [WebServer], indirect=True)
def test_shards_of_a_web_server_need_no_listing(
    web: str, tmp_path: Path, write_shards: Callable[..., list[str]]
) -> None:
    write_shards(tmp_path / "set", [3, 3, 3])
    url = f"{web}/set/{{00000..00002}}.tar"
    found = list_files(url)
    assert [file.url for file in found] == [f"{web}/set/0000{i}.tar" for i in range(3)]
    assert [file.size for file in found] == [(tmp_path / f"set/0000{i}.tar").stat().st_size for i in range(3)]
    assert list_files(f"{web}/set/00001.tar")[0].url == f"{web}/set/00001.tar"
    config = DataConfig(shards=url, index=str(tmp_path / "index"), workers=0, lanes=1, image_size=16)
    with build_loader(config, seed=0, global_batch_size=3) as loader:
        served = [caption for _ in range(3) for caption in next(loader).captions]
        assert sorted(served) == [f"caption {s:05d}{i:04d}" for s in range(3) for i in range(3)]
    with pytest.raises(NoShards, match=r"2 of the 5 shards .* 00003\.tar to 00004\.tar"):
        list_files(f"{web}/set/{{00000..00004}}.tar")
    with pytest.raises(UserError, match=r"read only.*data\.index"):
        build_loader(DataConfig(shards=url, workers=0), seed=0, global_batch_size=3)


@pytest.mark.parametrize("web", [WithoutRanges], indirect=True)
def test_a_server_without_ranges_is_one_sentence(
    web: str, tmp_path: Path, write_shards: Callable[..., list[str]]
) -> None:
    write_shards(tmp_path / "set", [300])
    with pytest.raises(DataError, match="does not answer ranges"):
        files.read_range(f"{web}/set/00000.tar", 0, 10)
    config = DataConfig(
        shards=f"{web}/set/00000.tar", index=str(tmp_path / "other"), workers=0, image_size=16
    )
    with (
        build_loader(config, seed=0, global_batch_size=1) as loader,
        pytest.raises(DataError, match="does not answer ranges"),
    ):
        next(loader)


@pytest.mark.parametrize("web", [WithoutOne], indirect=True)
def test_a_shard_that_does_not_answer_while_others_do_is_left_out(
    web: str, tmp_path: Path, write_shards: Callable[..., list[str]]
) -> None:
    """Without an index, too, where it is looked up when a lane comes to it: no outage is waited for."""
    write_shards(tmp_path / "set", [4, 4, 4, 4])
    config = DataConfig(
        shards=f"{web}/set/{{00000..00003}}.tar",
        order="streamed",
        index=str(tmp_path / "index"),
        workers=0,
        lanes=1,
        image_size=16,
        max_retries=2,
        patience_s=1e6,
    )
    with build_loader(config, seed=0, global_batch_size=4) as loader:
        served = {key.partition("/")[0] for _ in range(6) for key in next(loader).keys}
        assert served == {"00000", "00001", "00003"}
        assert set(loader.rejected) == {"unreadable"}


class Outage(WebServer):
    """Answers a.bin at its sixth request. `whole`: from the first one on, nor is anything else until then."""

    whole = True
    asked: threading.Event
    others: threading.Event
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        count = self.requests.count("/a.bin")
        if self.path == "/a.bin" and count == 1:
            self.asked.set()
            self.others.wait(30)
        down = count < 6 and (self.path == "/a.bin" or (self.whole and self.others.is_set()))
        if down:
            self.send_error(503)
        else:
            super().do_GET()


@pytest.mark.parametrize(
    ("whole", "tries"), [(True, 2), (False, 5)], ids=["as it begins", "in the moment of its end"]
)
def test_an_outage_costs_no_object_that_is_asked_for(tmp_path: Path, whole: bool, tries: int) -> None:
    """Not one that was asked for while others were still answered, nor one whose last try came too early."""
    events: dict[str, Any] = {"asked": threading.Event(), "others": threading.Event(), "requests": []}
    handler = partial(type("Handler", (Outage,), {**events, "whole": whole}), directory=str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"aaaa")
    (tmp_path / "b.bin").write_bytes(b"bbbb")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, ThreadPoolExecutor(1) as pool:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_address[1]}"
        reader = RangeReader(timeout_s=30, tries=tries, patience_s=600, probes=[f"{host}/b.bin"])
        reading = pool.submit(reader.read, f"{host}/a.bin", 0, 4)
        assert events["asked"].wait(30)
        assert reader.read(f"{host}/b.bin", 0, 4) == b"bbbb"
        events["others"].set()
        assert reading.result() == b"aaaa"
        server.shutdown()
    assert events["requests"].count("/a.bin") == 6
