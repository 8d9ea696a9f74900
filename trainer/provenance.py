"""Which code runs: its commit, for the record of a run and of a job."""

from __future__ import annotations

import subprocess
from pathlib import Path

COMMIT_FILE = "COMMIT"
"""In a copy of the code, which may lie in another checkout or a later one: the commit, if any, of what was
copied."""
_TIMEOUT_S = 30.0


def git_commit(folder: Path, *, mark_changes: bool = False) -> str | None:
    """Commit of the checkout that holds `folder`, or that a copy of it was made of; None outside both.

    Args:
        mark_changes: append `+changes` when the working tree is not clean. That reads every file's state,
            too much for each rank of a run.
    """
    for place in (folder, *folder.parents):
        if (place / COMMIT_FILE).is_file():
            return (place / COMMIT_FILE).read_text(encoding="utf-8").strip() or None
        if (place / ".git").exists():
            break
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or not mark_changes:
        return commit
    return f"{commit}+changes" if _git(folder, "status", "--porcelain") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
