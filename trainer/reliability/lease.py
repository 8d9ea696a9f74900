"""The lease of a run folder: one job at a time may commit checkpoints into it, and remove what lies there.

`run_dir/lease.json` says whose the folder is. Each start takes the next number, the fencing token:

    job A, token 7    writes the lease, renews it every RENEW_S, asks it before every commit, releases it
    job B             finds A's lease and   is the same job (restart, requeue)     takes it at once, token 8
                                            it is released, or A's process, of     takes it at once, token 8
                                            this machine, is gone
                                            it is renewed while B looks            B ends with a sentence
                                            it is not, for EXPIRY_S                takes it, and says so
    A, come back      finds token 8 at its next renewal or commit, and ends with a sentence; B is not hurt

The token is part of the names of a checkpoint's files, so that who cleans up knows whose they are. No clock
is compared with another's: a lease lives as long as it changes. Storage need not know conditional writes: of
two that take the same lease at once, the one whose text was overwritten finds that out before it commits.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace

from data_pipeline.errors import Failure, NotFound, RunTaken
from data_pipeline.storage.files import modified_at, read_bytes, write_bytes
from data_pipeline.storage.retry import TRIES
from data_pipeline.storage.urls import join
from trainer.reliability.job import is_gone, job_identity, machine, process_identity

RENEW_S = 10.0
EXPIRY_S = 45.0
_FIRST_LOOK_S = 2.0
_NAME = "lease.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tenure:
    """What the lease says."""

    token: int
    """Counts the starts of all jobs in this folder."""
    job: str
    """The same for all starts of one job."""
    process: str
    """Who renews it (`process_identity`)."""
    described: str
    """In words, for people."""
    nonce: str
    """Differs between any two starts."""
    renewals: int = 0
    released: bool = False


@dataclass(frozen=True)
class Claim:
    """What a writer in another process has to know to ask whether the folder is still its run's."""

    run_dir: str
    token: int
    nonce: str

    def verify(self, *, tries: int = TRIES) -> None:
        """Raises RunTaken when another start holds the folder by now, or a Failure of storage's."""
        held = _read(self.run_dir, tries=tries)
        if held is None or held.nonce == self.nonce:
            return  # nobody else; a lease that was removed by hand comes back with the next renewal
        raise RunTaken(
            f"{self.run_dir} was taken over by {held.described}; this run ends without writing there. "
            "Give each run a run_dir of its own."
        )


class Lease:
    """Held by rank 0 from the start of a run to its end; a thread renews it."""

    def __init__(self, run_dir: str, tenure: Tenure, renew_s: float) -> None:
        self.claim = Claim(run_dir, tenure.token, tenure.nonce)
        self._run_dir = run_dir
        self._tenure = tenure
        self._renew_s = renew_s
        self._closing = threading.Event()
        self._lost: RunTaken | None = None
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> RunTaken | None:
        """That another job has taken the folder over, once this is known. Does not wait."""
        return self._lost

    def taken(self) -> RunTaken | None:
        """Look now, and remember. None also where storage does not answer."""
        try:
            self.claim.verify()
        except RunTaken as taken:
            self._lost = taken
        except Failure as error:
            logger.debug("the lease of %s could not be read: %s", self._run_dir, error)
        return self._lost

    def release(self) -> None:
        """Let the next job begin at once. Quiet when storage does not answer: then the lease expires."""
        self._closing.set()
        self._thread.join(timeout=self._renew_s)
        if self._lost is not None:
            return
        try:
            self.claim.verify()
            self._write(replace(self._tenure, released=True), tries=2)
        except Failure as error:
            logger.debug("the lease of %s was not released: %s", self._run_dir, error)

    def _renew(self) -> None:
        pause = min(_FIRST_LOOK_S, self._renew_s)  # early, for two that started in the same moment
        while not self._closing.wait(pause):
            pause = self._renew_s
            try:
                self.claim.verify()
                self._tenure = replace(self._tenure, renewals=self._tenure.renewals + 1)
                self._write(self._tenure, tries=1)
            except RunTaken as taken:
                logger.error("%s", taken)
                self._lost = taken
                return
            except Exception as error:  # noqa: BLE001 - while storage is away nobody can take the folder, either
                logger.debug("the lease of %s was not renewed: %s", self._run_dir, error)

    def _write(self, tenure: Tenure, *, tries: int) -> None:
        write_bytes(join(self._run_dir, _NAME), json.dumps(asdict(tenure)).encode(), tries=tries)


def acquire(
    run_dir: str, *, job: str | None = None, renew_s: float = RENEW_S, expiry_s: float = EXPIRY_S
) -> Lease:
    """Hold the folder for this start of this job; waits up to `expiry_s` for a sign of life of another's.

    Raises:
        RunTaken: another job's run is alive there.
        UserError, RetryableFault: the lease cannot be read or written.
    """
    job = job_identity() if job is None else job
    held = _read(run_dir)
    if held is not None and not held.released and not _is_ours(held, job):
        if not is_gone(held.process):
            _outlast(run_dir, held, expiry_s)
        logger.warning("%s was left by %s, which is gone; this job takes it over", run_dir, held.described)
    tenure = Tenure(
        token=(0 if held is None else held.token) + 1,
        job=job,
        process=process_identity(os.getpid()),
        described=_described(job),
        nonce=uuid.uuid4().hex,
    )
    write_bytes(join(run_dir, _NAME), json.dumps(asdict(tenure)).encode())
    return Lease(run_dir, tenure, renew_s)


def holder(run_dir: str) -> Tenure | None:
    """What the lease of a run folder says; None where there is none."""
    return _read(run_dir)


def written_at(run_dir: str) -> float:
    """When the lease was last renewed, by the storage's clock. Raises NotFound where there is none."""
    return modified_at(join(run_dir, _NAME))


def _is_ours(held: Tenure, job: str) -> bool:
    """Whether an earlier start of this job holds it. One that lives beside us on this machine is another
    run."""
    if held.job != job or not held.process.startswith(f"{machine()}/"):
        return held.job == job
    pid = int(held.process.rsplit("/", 2)[1])
    return pid == os.getpid() or is_gone(held.process)


def _outlast(run_dir: str, held: Tenure, expiry_s: float) -> None:
    logger.warning("%s is held by %s: looking for %.0f s whether it lives", run_dir, held.described, expiry_s)
    deadline = time.monotonic() + expiry_s
    while time.monotonic() < deadline:
        time.sleep(min(2.0, expiry_s / 8))
        now = _read(run_dir)
        if now is None or now.released:
            return
        if now != held:
            raise RunTaken(
                f"{run_dir} is in use by {now.described}; stop that run, or give this one a run_dir of "
                "its own."
            )


def _read(run_dir: str, *, tries: int = TRIES) -> Tenure | None:
    try:
        text = read_bytes(join(run_dir, _NAME), tries=tries)
    except NotFound:
        return None
    try:
        return Tenure(**json.loads(text))
    except (ValueError, TypeError):
        logger.warning("%s is not a lease; it is written anew", join(run_dir, _NAME))
        return None


def _described(job: str) -> str:
    who = job if job.startswith(("SLURM", "Ray")) else "a job"
    return f"{who} (host {socket.gethostname()}, process {os.getpid()}, begun {time.strftime('%F %T%z')})"
