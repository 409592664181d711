"""Several hosts ask one another whether to stop: seldom enough to cost nothing, often enough to be heard in time."""

import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from effnetlib.runs import stopping


def times_of_asking(monkeypatch, seconds_of_call):
    """When two hosts of the same pace ask each other, if call `i` comes `seconds_of_call(i)` after the last one."""
    now, asked = [0.0], []
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def allgather(mine):
        asked.append(now[0])
        return np.stack([mine, mine])

    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    stop = stopping.Stop(None)
    for i in range(5000):
        now[0] += seconds_of_call(i)
        assert stop.requested_anywhere("training") == ""
    return np.array(asked)


def test_hosts_ask_one_another_every_few_seconds_and_seldom_at_a_steady_pace(monkeypatch):
    asked = times_of_asking(monkeypatch, lambda i: 0.01)
    assert asked[0] == 0.01 and max(np.diff(asked)) < 3
    assert len(asked) < 50 / 2.5 + 10


def test_one_quick_call_does_not_keep_the_hosts_from_asking(monkeypatch):
    asked = times_of_asking(monkeypatch, lambda i: 0.0001 if i < 4 else 0.2)
    assert max(np.diff(asked)) < 4


def test_steps_that_become_three_times_as_slow_are_still_heard_within_ten_seconds(monkeypatch):
    asked = times_of_asking(monkeypatch, lambda i: 0.01 if i < 2000 else 0.03)
    assert max(np.diff(asked)) < 8


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_what_a_terminal_or_a_batch_system_sends_asks_for_a_stop(name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with stopping.Stop(None) as stop:
            signal.raise_signal(number)
            assert stop.requested() == name in stopping.REASONS
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before or signal.SIG_DFL)


def test_before_training_a_signal_ends_the_run_at_once_and_is_noted_from_then_on():
    with stopping.Stop(None) as stop:
        stop.before_training()
        with pytest.raises(stopping.PreemptedError, match="stopped before training .SIGTERM.: run the same"):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)  # not once more, while the first one ends the run
        assert stop.requested() == "SIGTERM"
    with stopping.Stop(None) as stop:
        stop.before_training()
        stop.can_save.set()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested() == "SIGTERM"


def test_the_clock_starts_with_the_process():
    code = """
import time
time.sleep(0.5)
from effnetlib.runs.stopping import BEGAN, Stop
print(time.monotonic() - BEGAN, Stop(1.0).deadline - BEGAN)
"""
    before = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    age, allowed = map(float, said)
    assert 0.5 <= age <= time.monotonic() - before + 0.01 and allowed == pytest.approx(60)  # /proc counts in 0.01 s
