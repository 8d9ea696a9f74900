"""The commit that a run and a job record."""

from __future__ import annotations

import subprocess
from pathlib import Path

from trainer.provenance import git_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_commit_and_whether_the_tree_is_clean(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path / "inner") == git_commit(tmp_path, mark_changes=True) == head
    (tmp_path / "inner" / "a").write_text("2")
    assert git_commit(tmp_path) == head
    assert git_commit(tmp_path, mark_changes=True) == f"{head}+changes"
