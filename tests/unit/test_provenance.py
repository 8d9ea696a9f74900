"""The commit that a run and a job record."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from trainer.launch.slurm_job import snapshot
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


def test_a_copy_of_the_code_says_what_was_copied(tmp_path: Path) -> None:
    """A job's, below the checkout that people work on while the job waits and runs."""
    git(tmp_path, "init", "-q")
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    first = git_commit(tmp_path, mark_changes=True)
    copy, second_copy = tmp_path / "runs" / "1" / "code", tmp_path / "runs" / "2" / "code"
    snapshot(tmp_path, copy)
    (tmp_path / "trainer" / "a.py").write_text("2")
    git(tmp_path, "commit", "-qam", "second")
    assert git_commit(copy / "trainer") == git_commit(copy, mark_changes=True) == first
    assert git_commit(tmp_path) != first
    snapshot(copy, second_copy)
    assert git_commit(second_copy / "trainer") == first
    shutil.rmtree(tmp_path / ".git")  # what was no checkout stays without a commit, wherever its copy lies
    snapshot(tmp_path, copy)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "another")
    assert git_commit(copy) is None
