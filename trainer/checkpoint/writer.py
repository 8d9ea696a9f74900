"""Writing one checkpoint from one rank: its shard, and on rank 0 the commit. Needs no torch.

In time, on two ranks (attempt 5e0f0001 of step 500; the names are those in checkpoints/step_000000500/):

    rank 1   fills its host buffer | rank_00001.5e0f0001.<checksum>.safetensors
    rank 0   fills its host buffer | rank_00000.5e0f0001.<checksum>.safetensors
                                   | state.5e0f0001.{json,safetensors}
                                   |      lists the folder until a shard of every rank is in it
                                   | manifest.json            <- from here on the checkpoint counts
                                   | older checkpoints begin to go, and files of earlier attempts
    training stands still          | and goes on

Killed anywhere before the manifest, a save leaves files that nothing refers to: the next commit removes them,
but for those of a later start of the run, whose number is in each name (reliability/lease.py). A shard
appears under its name when it is whole, and the name says what it holds: rank 0 reads no shard, and asks
storage as often for 500 of them as for one. The attempt is in every name but the manifest's, since a shard of
a killed attempt at the same step must not be taken for one of this.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

from data_pipeline.errors import RetryableFault
from data_pipeline.storage.files import list_names
from data_pipeline.storage.large import checksum_bytes, write_whole
from data_pipeline.storage.retry import PATIENT_TRIES
from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import Retention, folder_name
from trainer.checkpoint.layout import ShardPlan, tables_from_json, tables_to_json
from trainer.checkpoint.manifest import MANIFEST_NAME, Manifest, StoredFile
from trainer.checkpoint.retirement import Retirement
from trainer.reliability.lease import Claim

_FIRST_POLL_S, _LONGEST_POLL_S = 0.02, 1.0


@dataclass(frozen=True)
class Commit:
    """What rank 0 writes besides its shard."""

    manifest: Manifest
    """Complete but for its tables and files."""
    tables: bytes
    """JSON: the tables of all ranks, megabytes of them under ZeRO-3 on hundreds, which nobody parses here."""
    sizes: tuple[int, ...]
    """Bytes of each rank's shard."""
    state: bytes
    """JSON."""
    tensors: bytes
    """safetensors."""
    retention: Retention
    patience_s: float
    """How long the other ranks may take longer than this one."""
    claim: Claim | None = None
    """Asked before anything counts or goes; None where nobody else can be in the folder."""


@dataclass(frozen=True)
class Job:
    """One rank's part in writing one checkpoint."""

    folder: str
    """URL of the run's checkpoints."""
    step: int
    attempt: str
    """Differs between attempts at the same step, so that no file of one is taken for another's."""
    rank: int
    plan: ShardPlan
    commit: Commit | None
    """On rank 0."""

    @property
    def url(self) -> str:
        """The checkpoint's folder."""
        return join(self.folder, folder_name(self.step))


def shard_name(rank: int, attempt: str, checksum: str) -> str:
    """File of one rank in one attempt."""
    return f"rank_{rank:05d}.{attempt}.{checksum}.safetensors"


def write_shard(job: Job, data: memoryview) -> StoredFile:
    """Write this rank's shard. Raises UserError or RetryableFault."""
    assert len(data) == job.plan.data_bytes
    header = job.plan.header()
    checksum = checksum_bytes(header, data)
    name = shard_name(job.rank, job.attempt, checksum)
    size, written = write_whole(join(job.url, name), header, data)
    if written != checksum:
        raise RetryableFault(f"{name} changed in memory while it was written; this host's memory is suspect.")
    return StoredFile(name, size, checksum)


def write_commit(job: Job, own: StoredFile, retirement: Retirement) -> None:
    """On rank 0: wait for the other shards, then write the manifest; old checkpoints go.

    Raises:
        UserError, RetryableFault: storage failed, or another rank never delivered.
        RunTaken: another job holds the run folder by now; nothing was committed or removed.
    """
    commit = job.commit
    assert commit is not None
    state_name, tensors_name = f"state.{job.attempt}.json", f"state.{job.attempt}.safetensors"
    state = write_whole(join(job.url, state_name), commit.state)
    tensors = write_whole(join(job.url, tensors_name), commit.tensors)
    manifest = replace(
        commit.manifest,
        shards=(own, *_shards_of_others(job, commit)),
        state=StoredFile(state_name, *state),
        tensors=StoredFile(tensors_name, *tensors),
    )
    retirement.spare(job.url)
    if commit.claim is not None:
        commit.claim.verify(tries=PATIENT_TRIES)  # as patient as the shards were
    write_whole(join(job.url, MANIFEST_NAME), manifest.to_bytes(commit.tables))
    token = 0 if commit.claim is None else commit.claim.token
    retirement.begin(job.folder, manifest, commit.retention, token)


def _shards_of_others(job: Job, commit: Commit) -> list[StoredFile]:
    """What the ranks but 0 wrote, as their files' names tell; waits until all are there."""
    pattern = re.compile(rf"rank_(?P<rank>\d+)\.{job.attempt}\.(?P<checksum>[0-9a-f]{{32}})\.safetensors")
    deadline, pause = time.monotonic() + commit.patience_s, _FIRST_POLL_S
    while True:
        matches = map(pattern.fullmatch, list_names(job.url, tries=PATIENT_TRIES))
        found = {int(match["rank"]): match for match in matches if match}
        missing = [rank for rank in range(1, len(commit.sizes)) if rank not in found]
        if not missing:
            break
        if time.monotonic() > deadline:
            late = ", ".join(map(str, missing[:8]))
            raise RetryableFault(f"the checkpoint of step {job.step} was given up: no shard of ranks {late}.")
        time.sleep(pause)
        pause = min(_LONGEST_POLL_S, 1.5 * pause)
    return [
        StoredFile(found[rank][0], size, found[rank]["checksum"])
        for rank, size in enumerate(commit.sizes)
        if rank
    ]


def job_to_header(job: Job) -> tuple[dict[str, object], list[bytes]]:
    """JSON-able description of a job and the blobs that belong to it, for another process."""
    header: dict[str, object] = {
        "folder": job.folder,
        "step": job.step,
        "attempt": job.attempt,
        "rank": job.rank,
        "tables": tables_to_json(job.plan.tables),
        "kinds": job.plan.kinds,
    }
    if job.commit is None:
        return header, []
    commit = job.commit
    header["commit"] = {
        "sizes": commit.sizes,
        "retention": vars(commit.retention),
        "patience_s": commit.patience_s,
        "claim": vars(commit.claim) if commit.claim is not None else None,
    }
    return header, [commit.manifest.to_bytes(), commit.tables, commit.state, commit.tensors]


def job_from_header(header: dict[str, object], blobs: list[bytes]) -> Job:
    """The inverse of `job_to_header`."""
    commit = header.get("commit")
    tables, kinds = header["tables"], header["kinds"]
    assert isinstance(tables, dict)
    assert isinstance(kinds, dict)
    parts: Commit | None = None
    if isinstance(commit, dict):
        manifest, tables_of_all, state, tensors = blobs
        retention = Retention(**commit["retention"])
        claim = Claim(**commit["claim"]) if commit["claim"] is not None else None
        parts = Commit(
            Manifest.from_bytes(manifest), tables_of_all, tuple(commit["sizes"]), state, tensors,
            retention, commit["patience_s"], claim,
        )  # fmt: skip
    return Job(
        folder=str(header["folder"]),
        step=int(str(header["step"])),
        attempt=str(header["attempt"]),
        rank=int(str(header["rank"])),
        plan=ShardPlan(tables_from_json(tables), {engine: tuple(names) for engine, names in kinds.items()}),
        commit=parts,
    )
