"""The writer process: hashes, writes and uploads beside training. `python -m` this; needs no torch."""

from __future__ import annotations

import json
import logging
import mmap
import os
import queue
import sys
import threading
from typing import Any, BinaryIO

from data_pipeline.errors import Failure, consequence_of
from data_pipeline.processes import die_with_parent
from trainer.checkpoint.manifest import StoredFile
from trainer.checkpoint.retirement import Retirement
from trainer.checkpoint.writer import Job, job_from_header, write_commit, write_shard

Frame = tuple[dict[str, Any], list[bytes]]


def send_frame(stream: BinaryIO, header: dict[str, Any], blobs: list[bytes]) -> None:
    """One message: a line of JSON, then the blobs whose lengths it names."""
    line = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    stream.write(line + b"\n")
    for blob in blobs:
        stream.write(blob)
    stream.flush()


def receive_frame(stream: BinaryIO) -> Frame | None:
    """The next message; None at the end of the stream."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    header = json.loads(line)
    blobs = [stream.read(length) for length in header.pop("blobs")]
    return header, blobs


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Write jobs as they come, until told to stop; end at once when the trainer is gone."""
    inbox: queue.Queue[Frame] = queue.Queue()
    threading.Thread(target=_listen, args=(requests, inbox), daemon=True).start()
    memory: memoryview | None = None
    retirement = Retirement()
    while True:
        header, blobs = inbox.get()
        if header["order"] == "stop":
            return
        if header["order"] == "memory":
            size = int(header["bytes"])
            memory = memoryview(mmap.mmap(int(header["descriptor"]), max(size, 1)))[:size]
            continue
        assert memory is not None
        _perform(job_from_header(header, blobs), memory, answers, retirement)


def _perform(job: Job, memory: memoryview, answers: BinaryIO, retirement: Retirement) -> None:
    stored: StoredFile | None = None
    try:
        stored = write_shard(job, memory[: job.plan.data_bytes])
    except Failure as failure:
        _answer(answers, "shard", failure)
        return
    _answer(answers, "shard", None)
    if job.commit is None:
        return
    try:
        write_commit(job, stored, retirement)
    except Failure as failure:
        _answer(answers, "commit", failure)
        return
    _answer(answers, "commit", None)


def _answer(answers: BinaryIO, event: str, failure: Failure | None) -> None:
    header: dict[str, Any] = {"event": event}
    if failure is not None:
        header |= {"failure": str(failure), "consequence": consequence_of(failure).__name__}
    send_frame(answers, header, [])


def _listen(requests: BinaryIO, inbox: queue.Queue[Frame]) -> None:
    while True:
        frame = receive_frame(requests)
        if frame is None:
            # The trainer is gone. A checkpoint without a manifest does not count: nothing to undo.
            os._exit(1)
        inbox.put(frame)


def main() -> None:
    """Speak over standard input and output; the trainer's signals do not reach this process."""
    die_with_parent()
    logging.basicConfig(level=logging.WARNING, format="checkpoint writer: %(levelname)s %(message)s")
    os.nice(19)  # training comes first on a busy host; when it waits for this process it is idle itself
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    serve(sys.stdin.buffer, answers)
    # The listening thread is inside a read, which an orderly exit would trip over.
    os._exit(0)


if __name__ == "__main__":
    main()
