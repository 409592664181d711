"""Joining processes; that they then train as one is in test_invariance."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


LAUNCH = Path(__file__).parent.parent / "notebooks/launch"
FAKE = """#!/bin/sh
trap 'kill $!; exit 75' TERM
touch "$EFFNETLIB_OUTPUTS/started$EFFNETLIB_PROCESS"
if [ "$EFFNETLIB_PROCESS" = "$FAILS" ]; then sleep 1; exit 3; fi
sleep 600 & wait
"""


def gang(tmp_path, fails):
    """The launcher with a stand-in for papermill, of which one may fail."""
    (tmp_path / "papermill").write_text(FAKE)
    (tmp_path / "papermill").chmod(0o755)
    places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "EFFNETLIB_OUTPUTS": str(tmp_path), "FAILS": str(fails)}
    return subprocess.Popen([LAUNCH / "local.sh", "3"], env=os.environ | places, stderr=subprocess.PIPE, text=True)


def test_a_host_that_fails_takes_the_others_down(tmp_path):
    process = gang(tmp_path, fails=1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3 and "host 1 ended with 3" in said and "host 0 ended with 75" in said


def test_a_gang_that_is_stopped_says_try_again(tmp_path):
    process = gang(tmp_path, fails="none")
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"started{i}").exists() for i in range(3)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and all(f"host {i} ended with 75" in said for i in range(3))


def test_the_scripts_are_ones():
    for script in LAUNCH.glob("*.sh"):
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", str(script)], check=True)
