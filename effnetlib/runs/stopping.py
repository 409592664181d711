"""Asking a run to stop: a signal, or its time is up. It saves and says that the same command goes on."""

import os
import signal
import subprocess
import threading
import time

from effnetlib.runs.progress import say

TRY_AGAIN = 75  # EX_TEMPFAIL: the exit code of a process whose run was stopped and may be started again
# What a user, a terminal, ssh, SLURM or a cloud sends to a process that is to end.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGQUIT)
REASONS = ("", *(each.name for each in SIGNALS), "max_minutes")
AGREE_SECONDS = 2.5  # a quarter of what several hosts may take to hear of it: steps may become slower meanwhile
FOLLOW_SECONDS = 2.0


class PreemptedError(RuntimeError):
    """The run stopped before its end because it was asked to; it is saved, and running it again goes on."""


class _Handler:
    """Handles `SIGNALS` while the block runs. An ignored one stays ignored, as SIGHUP is under nohup.
    Outside the main thread, where Python allows no handlers, the block changes nothing."""

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            wanted = [each for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
            self.before = {each: signal.signal(each, self._handle) for each in wanted}
        return self

    def __exit__(self, *error) -> None:
        for each, old in self.before.items():
            signal.signal(each, signal.SIG_DFL if old is None else old)  # None: it was set by a library in C


class Stop(_Handler):
    """Notes the first of `SIGNALS` while the block runs; a second SIGINT interrupts at once.
    After `max_minutes` from now it is time to stop too; None is never."""

    def __init__(self, max_minutes: float | None):
        self.deadline = float("inf") if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signal = self.during = ""
        self.calls, self.interval, self.last = 0, 1, time.monotonic()

    def _handle(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal = signal.Signals(number).name
            say(f"{self.signal}: stopping after this step")

    def requested(self) -> str:
        """Why this process is to stop: one of `REASONS`, empty to go on."""
        return self.signal or ("max_minutes" if time.monotonic() >= self.deadline else "")

    def requested_anywhere(self, during: str) -> str:
        """`requested`, the same in every process: if one is to stop, all are. All must call it equally often.

        They ask one another about every `AGREE_SECONDS`, by the pace of the slowest. The number of calls in between begins at
        one, and again when `during`, what is being done, changes. It at most doubles: one quick call does not promise many.
        """
        import jax
        import numpy as np
        from jax.experimental import multihost_utils

        reason = self.requested()
        if jax.process_count() == 1:
            return reason
        self.calls += 1
        if during != self.during:
            self.during, self.interval = during, 1
        if self.calls < self.interval:
            return ""
        mine = np.float32([REASONS.index(reason), (time.monotonic() - self.last) / self.calls])
        reasons, seconds = multihost_utils.process_allgather(mine).T
        self.interval = max(1, min(2 * self.interval, int(AGREE_SECONDS / max(seconds.max(), 1e-6))))
        self.calls, self.last = 0, time.monotonic()
        return REASONS[int(reasons.max())]


class Children(_Handler):
    """Child processes, to which `SIGNALS` are passed on while the block runs. `asked` are the signals so far."""

    def __init__(self):
        self.asked, self.processes = [], []

    def add(self, process: subprocess.Popen) -> None:
        """Adds a process; from any thread. One that comes after a signal is asked to stop at once."""
        self.processes.append(process)
        if self.asked:
            process.terminate()

    def _handle(self, number, frame) -> None:
        self.asked.append(number)
        say(f"{signal.Signals(number).name}: passed on, waiting for it to save", err=True)
        for process in list(self.processes):
            process.send_signal(number)  # does nothing where it has ended


def follow(parent: int) -> None:
    """Sends SIGTERM to this process once its parent has ended, even if killed: so a run is saved. It is repeated: after the
    first a kernel saves, and then waits for its next cell for ever. The id `parent` comes from the parent, which may have
    ended before this process could ask."""

    def watch():
        while True:
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(FOLLOW_SECONDS)

    threading.Thread(target=watch, daemon=True).start()
