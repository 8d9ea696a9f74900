"""Requests to a running job: signals and files in its folder set what the loop reads at step boundaries."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

from data_pipeline.errors import Failure, UserError
from data_pipeline.storage.files import exists, read_bytes, remove_file
from data_pipeline.storage.retry import QUICK_TRIES
from data_pipeline.storage.urls import is_local
from trainer.exit_codes import StopRequest
from trainer.reliability.requests import ProfileRequest

logger = logging.getLogger(__name__)

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preemption:
    """Watches SIGTERM, SIGUSR1, SIGUSR2, SIGINT and a stop file while used as a context manager.

    The loop reads `request` once a step, takes the maximum over ranks and saves when it is not NONE:
    a signal that reached one rank only stops all of them at the same step. The first SIGINT asks for
    a saved stop, the second raises KeyboardInterrupt. Outside the main thread (Ray Train workers)
    Python cannot install handlers; the stop file still works there.

    stop_file: path or URL whose appearance asks for a saved stop (poll it on one rank only); it is
    removed by `acknowledge` once the state is saved, so that the same command resumes the run.
    profile_file: path or URL that asks for a profile of the next steps; removed once it is read, and the
    request waits in `take_profile`.
    poll_s: seconds between looks at the files, in a thread of its own since it may be remote; unset:
    1, or 10 for object storage.
    """

    def __init__(
        self, stop_file: str | None = None, profile_file: str | None = None, *, poll_s: float | None = None
    ) -> None:
        self._stop_file = stop_file
        self._profile_file = profile_file
        self._profile: ProfileRequest | None = None
        remote = stop_file is not None and not is_local(stop_file)
        self._poll_s = poll_s if poll_s is not None else 10.0 if remote else 1.0
        self._request = StopRequest.NONE
        self._asked = 0.0
        self._interrupts = 0
        self._owner = os.getpid()
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._closing = threading.Event()
        self._poller: threading.Thread | None = None

    @property
    def request(self) -> StopRequest:
        """The strongest request so far on this rank."""
        return self._request

    @property
    def since_s(self) -> float | None:
        """Seconds since the strongest request reached this rank; None where only another one has it."""
        return None if self._request is StopRequest.NONE else time.monotonic() - self._asked

    def take_profile(self) -> ProfileRequest | None:
        """The profile that was asked for, once."""
        taken, self._profile = self._profile, None
        return taken

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in PREEMPTION_SIGNALS:
                self._previous[number] = signal.signal(number, self._on_preemption)
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
        else:
            logger.info("not in the main thread: only the stop file can stop this rank early")
        if self._stop_file is not None:
            self._poller = threading.Thread(target=self._poll, name="stop-file", daemon=True)
            self._poller.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if self._poller is not None:
            # Bounded: a look at remote storage may hang, and the thread is a daemon anyway.
            self._poller.join(timeout=5.0)

    def acknowledge(self, agreed: StopRequest) -> StopRequest:
        """What ends the run, whose state is saved by now; removes the stop file. Call on the polling rank.

        agreed: what the ranks saved for; NONE: all steps are made, and a request came too late. A person may
        have asked while they saved for a preemption: the next start must not be one that nobody wants.
        """
        request = max(agreed, self._request)
        if self._stop_file is None:
            return request
        try:
            if exists(self._stop_file):
                request = StopRequest.STOPPED
                remove_file(self._stop_file, tries=QUICK_TRIES)
        except Failure as error:  # the state is saved, which matters more
            logger.warning("could not remove the stop file %s: %s", self._stop_file, error)
        return request

    def _ask(self, request: StopRequest, reason: str) -> None:
        if request > self._request:
            self._request = request
            self._asked = time.monotonic()
            logger.warning("%s: saving at the next step boundary, then leaving", reason)

    def _on_preemption(self, number: int, frame: FrameType | None) -> None:
        # A forked loader worker inherits this handler; a signal to the whole group is not for it.
        if os.getpid() == self._owner:
            self._ask(StopRequest.PREEMPTED, signal.Signals(number).name)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self._ask(StopRequest.STOPPED, "SIGINT (once more aborts without saving)")

    def _poll(self) -> None:
        assert self._stop_file is not None
        while not self._closing.is_set():
            try:
                if exists(self._stop_file):
                    self._ask(StopRequest.STOPPED, f"stop file {self._stop_file}")
                    return
                if self._profile_file is not None and exists(self._profile_file):
                    self._read_profile(self._profile_file)
            except Failure as error:
                logger.debug("could not look for requests: %s", error)
            self._closing.wait(self._poll_s)

    def _read_profile(self, url: str) -> None:
        content = read_bytes(url, tries=QUICK_TRIES)
        remove_file(url, tries=QUICK_TRIES)  # what cannot be removed would be asked for again and again
        try:
            self._profile = ProfileRequest.from_bytes(content)
        except UserError as error:
            logger.warning("%s is not followed: %s", url, error)
