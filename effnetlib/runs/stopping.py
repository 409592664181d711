"""Stops a run on a signal, or when its time is up. The run is saved, and the same command resumes it."""

import contextlib
import functools
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from effnetlib.errors import FailedError
from effnetlib.runs.progress import say

TRY_AGAIN = 75  # EX_TEMPFAIL: the exit code of a run that was stopped and can be resumed
# Signals by which a user, a terminal, ssh, SLURM or a cloud ends a process.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGQUIT)
REASONS = ("", *(s.name for s in SIGNALS), "max_minutes")
AGREE_SECONDS = 2.5  # a quarter of the 10 seconds allowed, because steps may become slower
FOLLOW_SECONDS = 2.0  # between two looks at the parent
LISTEN_SECONDS = 1.0  # between two looks at whether another process was asked to stop


def _age() -> float:
    """Seconds since this process began. 0 on systems without Linux's /proc."""
    with contextlib.suppress(OSError):
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    return 0.0


BEGAN = time.monotonic() - _age()


class PreemptedError(RuntimeError):
    """The run was asked to stop, and stopped early. It is saved, and running it again resumes it."""


class _Handler:
    """Handles `SIGNALS` while the block runs. An ignored signal stays ignored, such as SIGHUP under nohup.
    Outside the main thread nothing changes, because Python allows no handlers there."""

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._handle) for number in wanted}
        return self

    def __exit__(self, *error) -> None:
        for number, old in self.before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None: a C library had set it


class Stop(_Handler):
    """Notes the first signal of `SIGNALS` while the block runs. A second SIGINT interrupts at once.
    Also stops the run `max_minutes` after this process began; None sets no limit.

    After `before_training`, and until `can_save` is set, a signal raises PreemptedError, in every process. Only a compilation
    cannot be interrupted. It ends first."""

    def __init__(self, max_minutes: float | None):
        self.deadline = float("inf") if max_minutes is None else BEGAN + 60 * max_minutes
        self.signal = self.during = ""
        self.calls, self.interval, self.last = 0, 1, time.monotonic()
        self.can_save, self.tell, self.listener = threading.Event(), lambda reason: None, None
        self.can_save.set()

    def __exit__(self, *error) -> None:
        self.can_save.set()
        if self.listener:
            self.listener.join()
        super().__exit__(*error)

    def before_training(self) -> None:
        from effnetlib.runs import hosts

        def listen():
            while not self.can_save.wait(LISTEN_SECONDS):
                with contextlib.suppress(FailedError):
                    hosts.posted(key, 0.01)
                    return None if self.signal else os.kill(os.getpid(), signal.SIGTERM)

        self.can_save.clear()
        hosts.begin_run()
        if hosts.distributed.global_state.client:
            key = hosts.new_key("stop")
            self.tell, self.listener = functools.partial(hosts.post, key), threading.Thread(target=listen, daemon=True)
            self.listener.start()

    def _handle(self, number, frame) -> None:
        if self.signal:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal = signal.Signals(number).name
        if self.can_save.is_set():
            say(f"{self.signal}: stopping after this step")
            return
        self.tell(self.signal)
        raise PreemptedError(f"stopped before training ({self.signal}): run the same command or cell again to go on")

    def requested(self) -> str:
        """Why this process must stop: one of `REASONS`. Empty means go on."""
        return self.signal or ("max_minutes" if time.monotonic() >= self.deadline else "")

    def requested_anywhere(self, during: str) -> str:
        """`requested`, but the same in every process: if one must stop, all must. All must call it equally often.

        The processes agree about every `AGREE_SECONDS`, at the pace of the slowest. `interval` is the number of calls per
        agreement. It restarts at 1 when the work, `during`, changes. It at most doubles: slow calls may follow a quick one.
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
    """Child processes. `SIGNALS` are passed on to them while the block runs. `asked` lists the signals so far."""

    def __init__(self):
        self.asked, self.processes = [], []

    def add(self, process: subprocess.Popen) -> None:
        """Adds a process, from any thread. After a signal, a new process is stopped at once."""
        self.processes.append(process)
        if self.asked:
            process.terminate()

    def _handle(self, number, frame) -> None:
        self.asked.append(number)
        say(f"{signal.Signals(number).name}: passed on, waiting for it to save", err=True)
        for process in list(self.processes):
            process.send_signal(number)  # does nothing if it has ended


def follow(parent: int) -> None:
    """Sends SIGTERM to this process after its parent has ended, even if it was killed. So a run is saved. The signal is
    repeated: after the first, a kernel saves and then waits for its next cell forever. `parent` is an argument because the
    parent may end before this process can ask for its id."""

    def watch():
        while True:
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(FOLLOW_SECONDS)

    threading.Thread(target=watch, daemon=True).start()
