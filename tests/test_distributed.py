"""Joining processes; that they then train as one is in test_invariance."""

import subprocess
import sys

import pytest
from test_invariance import free_port

from effnetlib import EffnetlibError, distributed


def test_a_process_on_its_own_joins_nothing(monkeypatch):
    distributed.start()
    distributed.start("nowhere", 1, 0)
    monkeypatch.setenv("EFFNETLIB_PROCESSES", "1")
    distributed.start()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("host", None, 1), "processes is not known: give all three"),
        ((None, 2, None), "coordinator, process is not known"),
        (("host", 2, 2), "process must be from 0 to 1, and is 2"),
        (("host", "two", 0), "are numbers, not 'two' and 0"),
    ],
)
def test_half_an_address_is_refused(given, sentence):
    with pytest.raises(EffnetlibError, match=sentence):
        distributed.start(*given)


def test_missing_hosts_are_named_while_one_waits_and_given_up_in_a_sentence():
    code = (
        "import sys, jax; jax.config.update('jax_platforms', 'cpu'); from effnetlib import distributed\n"
        "distributed.PATIENCE_SECONDS = 1.0\n"
        "try: distributed.start(f'localhost:{sys.argv[1]}', 2, 1, timeout_seconds=4)\n"
        "except distributed.FailedError as error: print(error); sys.exit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(free_port())], capture_output=True, text=True, timeout=90)
    assert "process 1 of 2 still waits for the others" in done.stdout
    assert done.returncode == 3 and "process 0 does not answer at localhost" in done.stdout, done.stderr[-500:]
