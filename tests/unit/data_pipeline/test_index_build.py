"""How an index is built: what it tells while it works, what a kill leaves, what it reads and writes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import build_loader
from data_pipeline.shards import build_index as build
from data_pipeline.shards.build_index import Estimate, build_index
from data_pipeline.shards.manifest import MANIFEST, PARTS, append_rows, read_manifest, write_manifest
from data_pipeline.shards.opening import open_dataset
from data_pipeline.shards.tars import scan
from data_pipeline.storage.listing import list_files
from trainer.__main__ import main


class _Stopped(BaseException):
    """What ends a build in the middle, as a kill would."""


@pytest.fixture(name="gate")
def gate_fixture(tmp_path: Path) -> Iterator[tuple[str, threading.Event]]:
    """Address of a web server on a folder that sends no byte of a tar before the event is set."""
    opened = threading.Event()

    class Gated(SimpleHTTPRequestHandler):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts, directory=str(tmp_path))

        def do_GET(self) -> None:
            opened.wait()
            path = tmp_path / self.path.lstrip("/")
            if not path.exists():
                return self.send_error(404)
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            body = path.read_bytes()[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
            self.end_headers()
            self.wfile.write(body)
            return None

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Gated) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", opened
        opened.set()
        server.shutdown()


def test_a_build_tells_that_it_lives_while_no_shard_is_finished(
    gate: tuple[str, threading.Event], tmp_path: Path, write_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, opened = gate
    write_shards(tmp_path, [3, 2])
    monkeypatch.setattr(build, "_SPEAK_EVERY_S", 0.02)
    told: list[tuple[str, int, int]] = []

    def progress(*said: Any) -> None:
        told.append(said)
        if len(told) == 5:  # nothing can have been read by now
            opened.set()

    config = DataConfig(shards=f"{address}/{{00000..00001}}.tar", index=str(tmp_path / "index"))
    assert open_dataset(config, progress=progress).counts.tolist() == [3, 2]
    assert [said[1:] for said in told[:5]] == [(0, 2)] * 5
    assert told[-1][1:] == (2, 2)
    assert {said[0] for said in told} == {f"indexing {config.shards}"}


def killed_build(folder: Path, index: str, after: int) -> None:
    """Index a folder until `after` shards are done."""

    def stop(done: int, total: int) -> None:
        if done == after:
            raise _Stopped

    with pytest.raises(_Stopped):
        build_index(list_files(str(folder)), index, progress=stop)


def part_rows(index: str) -> list[list[str]]:
    """Names of the shards in each part beside the manifest."""
    lines = [
        gzip.decompress(path.read_bytes()).decode().splitlines() for path in (Path(index) / PARTS).iterdir()
    ]
    return [[json.loads(line)["shard"].rpartition("/")[2] for line in part[1:]] for part in lines]


def test_what_a_killed_build_has_saved_is_not_read_again(
    tmp_path: Path, write_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = str(tmp_path / "index")
    write_shards(tmp_path / "shards", [2, 3, 1, 4, 2])
    monkeypatch.setattr(build, "_SAVE_EVERY_S", -1.0)
    killed_build(tmp_path / "shards", index, after=4)
    # Each row was written once, by a part of its own, and the last was not: the kill came before.
    assert [len(part) for part in part_rows(index)] == [1, 1, 1]
    assert not (Path(index) / MANIFEST).exists()
    assert len(read_manifest(index)) == 3
    report = build_index(list_files(str(tmp_path / "shards")), index)
    assert report.read == 2
    assert [row.samples for row in report.rows.values()] == [2, 3, 1, 4, 2]
    assert part_rows(index) == []
    assert {url: row.samples for url, row in read_manifest(index).items()} == {
        f"{tmp_path}/shards/{i:05d}.tar": samples for i, samples in enumerate([2, 3, 1, 4, 2])
    }


def test_a_damaged_index_file_is_made_anew_as_the_error_says(tmp_path: Path, write_shards, capsys) -> None:
    write_shards(tmp_path, [20, 30, 10])
    config = DataConfig(shards=str(tmp_path), workers=0, image_size=16)
    dataset = open_dataset(config)
    damaged = Path(dataset.index_urls[1])
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with (
        pytest.raises(DataError, match=r"00001-.*npz does not match its manifest; delete it and run"),
        build_loader(config, seed=0, global_batch_size=60) as loader,
    ):
        next(loader)
    damaged.unlink()
    assert main(["data", "index", str(tmp_path)]) == 0
    assert "shards            3 (1 read now)" in capsys.readouterr().out
    with build_loader(config, seed=0, global_batch_size=60) as loader:
        assert len(set(next(loader).keys)) == 60


def test_rows_of_several_writers_are_kept_and_the_newest_counts(tmp_path: Path, write_shards) -> None:
    write_shards(tmp_path / "shards", [2, 3])
    (first, second), index = list_files(str(tmp_path / "shards")), str(tmp_path / "index")
    old = build_index([first], index).rows[first.url]
    write_shards(tmp_path / "shards", [5])
    new = build_index(list_files(first.url), str(tmp_path / "other")).rows[first.url]
    append_rows(index, [new])
    assert read_manifest(index)[first.url].samples == 5
    report = build_index([second], index)  # whose end must not forget what the other wrote
    assert (report.read, old.samples) == (1, 2)
    assert {url: row.samples for url, row in read_manifest(index).items()} == {first.url: 5, second.url: 3}


def test_manifests_of_earlier_and_of_later_versions_are_one_format(tmp_path: Path, write_shards) -> None:
    """Written as one text, as it was before; and what is written now reads as that text."""
    write_shards(tmp_path / "shards", [2, 3, 1])
    rows = build_index(list_files(str(tmp_path / "shards")), str(tmp_path / "index")).rows
    path = tmp_path / "index" / MANIFEST
    head, *lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    assert json.loads(head)["checksum"] == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert [json.loads(line)["samples"] for line in lines] == [2, 3, 1]
    path.write_bytes(gzip.compress("\n".join([head, *lines]).encode(), mtime=0))
    assert read_manifest(str(tmp_path / "index")) == rows
    write_manifest(str(tmp_path / "index"), rows)
    assert read_manifest(str(tmp_path / "index")) == rows


def test_what_the_rest_will_take_is_told_before_it_is_read(tmp_path: Path, write_shards) -> None:
    write_shards(tmp_path / "shards", [2] * 20)
    shards = list_files(str(tmp_path / "shards"))
    told: list[tuple[int, Estimate]] = []
    done = [0]
    report = build_index(
        shards,
        str(tmp_path / "index"),
        progress=lambda now, total: done.append(now),
        announce=lambda estimate: told.append((done[-1], estimate)),
    )
    ((at, estimate),) = told
    assert (at, estimate.shards, report.read) == (3, 17, 20)
    # The tar in one request; another one finds no parquet.
    assert (estimate.requests, estimate.bytes) == (2, shards[0].size)
    some = Estimate(shards=1000, workers=20, requests=3, bytes=5e8, wall_s=36.0, cpu_s=0.0)
    assert some.seconds == 1800
    assert "1,000 are left: 500.0 GB in 3,000 requests, about 30 min with 20 workers" in some.sentence()
    one_core = Estimate(shards=1000, workers=1, requests=3, bytes=5e8, wall_s=5.0, cpu_s=7.2)
    assert one_core.seconds == 7200  # no faster than one processor computes
    assert "2 h 0 min" in one_core.sentence()


def test_few_shards_are_not_probed(tmp_path: Path, write_shards) -> None:
    write_shards(tmp_path / "shards", [1, 2])

    def announce(estimate: Estimate) -> None:
        raise AssertionError(estimate)

    build_index(list_files(str(tmp_path / "shards")), str(tmp_path / "index"), announce=announce)


def large_picture(num_bytes: int) -> bytes:
    """A picture in a file of this size: decoders do not mind what follows its end."""
    out = io.BytesIO()
    Image.new("RGB", (40, 30)).save(out, "JPEG")
    return out.getvalue().ljust(num_bytes, b"\1")


@pytest.mark.parametrize(
    ("picture_bytes", "most_of_all"), [(2_000_000, 0.25), (40_000, 1.0)], ids=["large", "small"]
)
def test_large_pictures_are_jumped_over_and_small_ones_read_through(
    tmp_path: Path,
    write_tar: Callable[..., None],
    picture_bytes: int,
    most_of_all: float,
) -> None:
    names = [(f"{i:03d}.jpg", large_picture(picture_bytes)) for i in range(20)]
    texts = [(f"{i:03d}.txt", b"words") for i in range(20)]
    write_tar(tmp_path / "0.tar", sorted(names + texts))
    body = (tmp_path / "0.tar").read_bytes()
    counts: Counter[str] = Counter()

    def read(start: int, stop: int) -> bytes:
        counts.update(requests=1, bytes=stop - start)
        return body[start:stop]

    found = scan(read, len(body), look=lambda name, member: len(member.read(0, 4000)))
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert [(m.name, m.offset) for m in found.members] == [(m.name, m.offset_data) for m in tar]
    assert found.problems == []
    assert counts["bytes"] <= most_of_all * len(body)
    # One request for each picture that is jumped over, and its text; else one for each 4 MB.
    assert counts["requests"] <= (21 if picture_bytes > 1_000_000 else 1)
