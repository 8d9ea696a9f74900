"""Mistakes at `ldm data` and in paths of this machine: one sentence and exit code 2."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.__main__ import main


@pytest.fixture(name="config")
def config_fixture(tmp_path: Path, make_shards: Any) -> Path:
    url, _ = make_shards([12])
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\nsteps: 4\nglobal_batch_size: 4\nmicro_batch_size: 4\n"
        f"data: {{shards: '{url}', image_size: 16, lanes: 1, shuffle_window: 4, workers: 0}}\n"
        "first_stage: {name: identity, latent_channels: 3}\n"
        "unet: {model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 4,"
        " attention_factors: [2], head_dim: 16}\ndistributed: {engine: torch, ranks: 1, precision: fp32}\n"
    )
    return path


MISTAKES = {
    "trace --steps 5:2": "--steps is '5:2'; write A:B with whole numbers",
    "trace --steps 1.5:2": "--steps is '1.5:2'; write A:B with whole numbers",
    "trace --steps nan:2": "--steps is 'nan:2'; write A or A:B",
    "trace --steps inf": "--steps is 'inf'; write A or A:B",
    "trace --ranks 0": "--ranks is 0; it must be at least 1",
    "trace --workers -1": "--workers is -1; it must be at least 0",
    "explain --step 99999999999999999999": "no run has 100,000,000",
    "explain --step 1 --rejects NOTES": "line 1 is no record of a rejection",
    "trace data.reject_file=s3://bucket/rejects.jsonl": "s3://bucket/rejects.jsonl is not on this machine",
    "trace data.reject_file=FOLDER": "data.reject_file FOLDER cannot be written (Is a directory)",
    "trace data.reject_file=/proc/none/x": "data.reject_file /proc/none/x cannot be written",
    "trace data.cache_dir=s3://bucket/cache data.cache_bytes=99999999": "is not on this machine",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_one_sentence(config: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("not a reject file")
    places = {"NOTES": str(notes), "FOLDER": str(tmp_path)}

    def placed(text: str) -> str:
        for name, path in places.items():
            text = text.replace(name, path)
        return text

    verb, *words = placed(command).split()
    assert main(["data", verb, str(config), *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert placed(MISTAKES[command]) in said.err


@pytest.mark.parametrize("option", ["--decode", "--pictures"])
def test_inspect_takes_no_negative_numbers(
    make_shards: Any, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "inspect", make_shards([2])[0], option, "-1"]) == 2
    assert f"{option} is -1; it must be at least 0" in capsys.readouterr().err


def test_a_reject_file_appears_with_the_first_rejection(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "rejects.jsonl"
    command = ["data", "trace", str(config), "--steps", "0:2", f"data.reject_file={path}"]
    assert main(command) == 0
    assert not path.exists()
    assert main([*command, "data.filter=score < 0.3"]) == 0
    assert '"reason": "filter: score < 0.3"' in path.read_text()


@pytest.fixture(name="answer")
def answer_fixture() -> Iterator[tuple[str, type]]:
    """A web server that answers everything with one status, and where it stands."""

    class Handler(http.server.BaseHTTPRequestHandler):
        status = 403

        def do_GET(self) -> None:
            self.send_response(self.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Not on stderr."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (403, "is denied; check its permissions"),
        (404, "2 of the 2 shards"),
        (503, "cannot be reached"),
        (401, "401"),
    ],
)
def test_a_web_server_that_refuses_has_the_shards(
    answer: tuple[str, Any], tmp_path: Path, status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """fsspec says of whatever went wrong that there is no such file."""
    answer[1].status = status
    url = answer[0] + "/{00000..00001}.tar"
    assert main(["data", "index", url, "--index", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert ("do not exist" in said) == (status == 404)


def test_a_web_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:9/{00000..00001}.tar"
    assert main(["data", "index", url, "--index", str(tmp_path)]) == 2
    assert "cannot be reached" in capsys.readouterr().err
