"""Bytes: what is written is whole or absent, and each failure of storage has its consequence."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from data_pipeline.errors import (
    AccessDenied,
    DataError,
    Failure,
    MissingBucket,
    NoShards,
    NotFound,
    RetryableFault,
    StorageOutage,
    Unreachable,
    UserError,
)
from data_pipeline.storage import files, large, retry
from data_pipeline.storage.client import filesystem
from data_pipeline.storage.listing import list_files
from data_pipeline.storage.urls import folder_before_patterns, is_local, local_path


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "made") if request.param == "local" else f"memory://{tmp_path}/made"


def test_written_read_listed_removed(folder: str) -> None:
    url = f"{folder}/deep/a.txt"
    assert not files.exists(url)
    assert files.list_names(folder) == []
    files.write_bytes(url, "grün\r\nrot".encode())
    files.write_bytes(f"{folder}/b", b"0123456789")
    assert files.read_text(url) == "grün\nrot"
    assert files.read_range(f"{folder}/b", 2, 5) == b"234"
    assert files.read_tail(f"{folder}/b", 3) == b"789"
    assert files.read_tail(f"{folder}/b", 99) == b"0123456789"
    with files.open_stream(f"{folder}/b") as stream:
        assert stream.read(4) == b"0123"
    assert files.list_names(folder) == ["b", "deep"]
    files.remove(f"{folder}/b")
    files.remove(f"{folder}/b")
    assert files.list_names(folder) == ["deep"]


def test_large_files_carry_their_checksum(folder: str) -> None:
    url, parts = f"{folder}/large", (b"head", bytes(range(256)) * 100)
    written = large.write_whole(url, *parts)
    assert written == (25_604, large.checksum_bytes(b"".join(parts)))
    assert large.measure(url, 25_604) == written
    assert large.measure(url, 1) == (25_604, "")
    assert large.measure(f"{url}-absent", 1) == (-1, "")
    assert list(large.read_ranges(url, [(0, 4), (4, 4), (5, 7)])) == [b"head", b"", b"\x01\x02"]


def test_what_is_not_there_or_no_text_is_said(folder: str) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        files.read_bytes(f"{folder}/absent")
    files.write_bytes(f"{folder}/latin", "grün".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        files.read_text(f"{folder}/latin")


def test_a_short_answer_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.0)
    (tmp_path / "ten").write_bytes(b"0123456789")
    with pytest.raises(Unreachable, match="short body: 5 of 15 bytes"):
        files.read_range(str(tmp_path / "ten"), 5, 20)


def test_names_with_wildcards_are_taken_as_they_are(folder: str) -> None:
    for name in ("run[1]*", "run1", "run1x", "run[1]?"):
        files.write_bytes(f"{folder}/{name}/step/a", b"a")
        files.write_bytes(f"{folder}/{name}/b", b"b")
    files.remove(f"{folder}/run[1]*/step")
    assert not files.exists(f"{folder}/run[1]*/step/a")
    assert files.read_bytes(f"{folder}/run[1]*/b") == b"b"
    files.remove(f"{folder}/run[1]?")
    files.remove_file(f"{folder}/run1*/b")
    for name in ("run1", "run1x"):
        assert files.read_bytes(f"{folder}/{name}/step/a") == b"a"
        assert files.read_bytes(f"{folder}/{name}/b") == b"b"


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_bytes(b"a")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    files.remove(str(tmp_path / "link"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "a").read_bytes() == b"a"


@pytest.mark.parametrize("name", ["set[1]", "set*", "set?", "a{b}", "]["])
def test_special_characters_of_a_name_are_escaped_by_brackets(folder: str, name: str) -> None:
    escaped = "".join(f"[{c}]" if c in "[]*?{}" else c for c in name)
    for shard in (0, 1):
        files.write_bytes(f"{folder}/{name}/0000{shard}.tar", b"x" * (shard + 1))
        files.write_bytes(f"{folder}/set1/0000{shard}.tar", b"other")
    patterns = (f"{escaped}/*.tar", f"{escaped}/{{00000..00001}}.tar", f"{escaped}/0000[01].tar", escaped)
    for pattern in patterns:
        found = list_files(f"{folder}/{pattern}")
        assert [file.size for file in found] == [1, 2], pattern
        assert [files.read_bytes(file.url) for file in found] == [b"x", b"xx"]
    assert [file.size for file in list_files(f"{folder}/{escaped}/00001.tar")] == [2]
    assert folder_before_patterns(f"{folder}/{escaped}/{{00000..00001}}.tar") == f"{folder}/{name}"


@pytest.mark.parametrize(
    ("name", "written"), [("set[12]", "set[[]12]"), ("set[x]", "set[[]x]"), ("why?", "why[?]")]
)
def test_wildcards_that_stand_in_a_name_are_explained(tmp_path: Path, name: str, written: str) -> None:
    """Also where the pattern matches another folder, whose shards would be read instead."""
    files.write_bytes(f"{tmp_path}/{name}/00000.tar", b"x")
    files.write_bytes(f"{tmp_path}/setx/00000.tar", b"other")
    for rest in ("", "/*.tar", "/{00000..00001}.tar", "/00000.tar"):
        with pytest.raises(NoShards, match=re.escape(f"; write {tmp_path}/{written} for it.")):
            list_files(f"{tmp_path}/{name}{rest}")
    (found,) = list_files(f"{tmp_path}/{written}")
    assert files.read_bytes(found.url) == b"x"
    assert [f.size for f in list_files(f"{tmp_path}/set[a-z]/*.tar")] == [5]
    with pytest.raises(NoShards, match=r"written \[\[\]"):
        list_files(f"{tmp_path}/none[12]/*.tar")


def test_braces_over_folders_mean_their_shards(folder: str) -> None:
    for part in ("a", "b"):
        files.write_bytes(f"{folder}/{part}/00000.tar", part.encode())
    found = list_files(f"{folder}/{{a,b}}")
    assert [files.read_bytes(file.url) for file in found] == [b"a", b"b"]


def test_the_scheme_may_be_written_large_and_the_bucket_not_left_out() -> None:
    with pytest.raises(DataError, match="names no bucket"):
        files.read_bytes("s3:///key")
    with pytest.raises(DataError, match="names no bucket"):
        files.exists("s3://")
    assert filesystem("S3://Bucket/Key/")[1] == filesystem("s3a://Bucket/Key")[1] == "Bucket/Key"


def test_a_home_folder_is_expanded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files.write_bytes("~/x/a", b"a")
    assert (tmp_path / "x/a").read_bytes() == b"a"
    assert local_path("~/x") == local_path("file://~/x") == str(tmp_path / "x")
    assert files.read_bytes(f"file://{tmp_path}/x/a") == b"a"


@pytest.mark.parametrize("url", ["pipe:cat x", "s3://a|b", "filecache::s3://a/b", "ssh://host/x"])
def test_nothing_that_could_start_a_program_is_opened(url: str) -> None:
    for action in (is_local, files.read_bytes, files.exists, files.remove):
        with pytest.raises(DataError, match="not a URL this project opens"):
            action(url)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("x"), NotFound),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), NotFound),
        (PermissionError("x"), AccessDenied),
        (RuntimeError("NoSuchBucket"), MissingBucket),
        (RuntimeError("SignatureDoesNotMatch"), AccessDenied),
        (ConnectionResetError("peer"), Unreachable),
        (RuntimeError("503 Slow Down"), Unreachable),
        (RuntimeError("PermanentRedirect"), AccessDenied),
        (RuntimeError("NobodyKnows"), DataError),
    ],
)
def test_reading_failures_by_consequence(error: Exception, kind: type[Failure]) -> None:
    assert type(retry.explain(error, "s3://bucket/key")) is kind


@pytest.mark.parametrize(
    ("error", "url", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "/run/a", UserError),
        (OSError(errno.EROFS, "Read-only file system"), "/run/a", UserError),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "/run/a", UserError),
        (FileNotFoundError("NoSuchBucket"), "s3://bucket/a", MissingBucket),
        (PermissionError("x"), "s3://bucket/a", AccessDenied),
        (ConnectionResetError("peer"), "s3://bucket/a", Unreachable),
        (NotImplementedError(), "https://host/a", UserError),
        (RuntimeError("PermanentRedirect"), "s3://bucket/a", AccessDenied),
        (RuntimeError("NobodyKnows"), "s3://bucket/a", RetryableFault),
    ],
)
def test_writing_failures_by_consequence(error: Exception, url: str, kind: type[Failure]) -> None:
    assert type(retry.explain_change(error, url, "written")) is kind


def test_silence_that_lasts_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.0)

    def silent() -> None:
        raise ConnectionResetError("peer")

    for tries, kind in ((retry.QUICK_TRIES, Unreachable), (retry.PATIENT_TRIES, StorageOutage)):
        with pytest.raises(Failure) as caught:
            retry.guarded(silent, "s3://bucket/a", tries=tries)
        assert type(caught.value) is kind
