"""One rank of `ldm train` in this process, and run folders as a run leaves them."""

from __future__ import annotations

from tests.unit.test_resume_changed import train

__all__ = ["train"]
