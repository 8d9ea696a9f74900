"""Shared by all tests: quiet libraries, few threads, no network."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

# A shell that starts the tests in its background lets them, and every child, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
