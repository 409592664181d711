"""Asking a run to stop: a signal, or its time is up. It saves and says that the same command goes on."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

TRY_AGAIN = 75  # EX_TEMPFAIL: the exit code of a process whose run was stopped and may be started again
AGREE_SECONDS = 5.0  # half of what several hosts may take to hear of it
REASONS = ("", "SIGTERM", "SIGINT", "max_minutes")


class PreemptedError(RuntimeError):
    """The run stopped before its end because it was asked to; it is saved, and running it again goes on."""


class Stop:
    """Notes SIGTERM and SIGINT while the block runs, in place of what they do otherwise; a second SIGINT interrupts at once.

    Args:
      max_minutes: minutes from now after which to stop; None is never.
    """

    def __init__(self, max_minutes: float | None):
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signal = self.during = ""
        self.calls, self.interval, self.last = 0, 1, time.monotonic()
        self.before = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # only there may Python handle signals
            for each in (signal.SIGTERM, signal.SIGINT):
                self.before[each] = signal.signal(each, self._note)
        return self

    def __exit__(self, *_) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def _note(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        print(f"{self.signal}: stopping after this step", flush=True)

    def asked(self) -> str:
        """Why to stop, in this process's own view: one of `REASONS`, empty to go on."""
        if self.signal:
            return self.signal
        return "max_minutes" if self.deadline is not None and time.monotonic() >= self.deadline else ""

    def agreed(self, during: str) -> str:
        """`asked`, the same in every process: if one is to stop, all are. With several processes all must call it equally
        often; it is a collective about every `AGREE_SECONDS`, by the pace of the slowest since the last one, and at every
        call until that is known: at first, and when what is done `during` it is no longer the same."""
        import jax
        import numpy as np
        from jax.experimental import multihost_utils

        reason = self.asked()
        if jax.process_count() == 1:
            return reason
        self.calls += 1
        known = during == self.during
        if known and self.calls < self.interval:
            return ""
        mine = np.float32([REASONS.index(reason), (time.monotonic() - self.last) / self.calls])
        reasons, seconds = multihost_utils.process_allgather(mine).T
        self.interval = int(AGREE_SECONDS / max(seconds.max(), 1e-6)) if known else 1
        self.during, self.calls, self.last = during, 0, time.monotonic()
        return REASONS[int(reasons.max())]


@contextlib.contextmanager
def signals_to(process: subprocess.Popen) -> Iterator[list[int]]:
    """Passes SIGTERM and SIGINT on to another process while the block runs, in place of what they do otherwise (where Python
    allows it: in the main thread). Yields the list of those that were passed on so far."""
    passed = []
    if threading.current_thread() is not threading.main_thread():
        yield passed
        return

    def pass_on(number, frame):
        passed.append(number)
        print(f"{signal.Signals(number).name}: passed on, waiting for it to save", file=sys.stderr, flush=True)
        process.send_signal(number)  # does nothing where it has ended

    before = {each: signal.signal(each, pass_on) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield passed
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
