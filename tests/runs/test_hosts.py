"""Joining processes; that they then train as one is in test_invariance."""

import subprocess
import sys

import pytest
from test_invariance import free_port

from effnetlib import EffnetlibError, data
from effnetlib.errors import FailedError
from effnetlib.runs import hosts, run


def test_a_process_on_its_own_joins_nothing(monkeypatch):
    hosts.start()
    hosts.start("nowhere", 1, 0)
    monkeypatch.setenv("EFFNETLIB_PROCESSES", "1")
    hosts.start()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("host", None, 1), "processes is not known: give all three"),
        ((None, 2, None), "coordinator, process is not known"),
        (("host", 2, 2), "process must be from 0 to 1, and is 2"),
        (("host", "two", 0), "are numbers, not two and 0"),
    ],
)
def test_half_an_address_is_refused(given, sentence):
    with pytest.raises(EffnetlibError, match=sentence):
        hosts.start(*given)


@pytest.mark.parametrize(
    ("given", "host", "port"),
    [("tpu-0", "tpu-0", 8476), ("tpu_0.svc.local:80", "tpu_0.svc.local", 80), ("10.0.0.2", "10.0.0.2", 8476),
     ("1.2.3.4:8476", "1.2.3.4", 8476), ("[::1]:80", "::1", 80), ("[::1]", "::1", 8476), ("::1", "::1", 8476),
     ("fe80::1:80", "fe80::1:80", 8476), (" tpu-0\n", "tpu-0", 8476), ("host.:65535", "host.", 65535)],
)  # fmt: skip
def test_an_address_is_a_host_and_a_port(given, host, port):
    assert hosts._host_and_port(given) == (host, port)


@pytest.mark.parametrize(
    "given",
    ["host:", "host:port", "host:0", "host:65536", "host:-1", "host: 80", ":8476", ":", " ", "http://host:1", "http://host", "a b",
     "[::1", "::1]", "[::1]:", "[::1]8476", "[host]:1", "[]:1", "::1:99999", "a:1:2", "host:1/x", "user@host", "a..b", "x" * 64],
)  # fmt: skip
def test_what_is_no_address_is_refused_at_once(given):
    with pytest.raises(EffnetlibError, match="^coordinator .* is no address: HOST, HOST:PORT or") as refused:
        hosts.start(given, 2, 1)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("process", [0, 1])
def test_a_name_that_cannot_be_resolved_is_given_up_in_a_minute_and_not_in_half_an_hour(process, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(hosts.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(hosts.time, "sleep", lambda _: tried.append(1))
    monkeypatch.setattr(hosts.jax.distributed, "initialize", None)
    tried = []

    def unknown(*_):
        raise hosts.socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(hosts.socket, "getaddrinfo", unknown)
    with pytest.raises(
        FailedError, match="the host of process 0, tpu-0, cannot be resolved: Name or service not known"
    ):
        hosts.start("tpu-0:80", 2, process)
    assert 2 <= len(tried) <= 6


def test_a_name_that_comes_late_is_waited_for(monkeypatch):
    answers = [hosts.socket.gaierror(-3, "try again"), None]
    joined = []

    def getaddrinfo(*_):
        if error := answers.pop(0):
            raise error

    monkeypatch.setattr(hosts.time, "sleep", lambda _: None)
    monkeypatch.setattr(hosts.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *given, **_: joined.append(given))
    hosts.start("::1", 2, 0)
    assert joined == [("[::1]:8476", 2, 0)]


def test_missing_hosts_are_named_while_one_waits_and_given_up_in_a_sentence():
    code = (
        "import sys, jax; jax.config.update('jax_platforms', 'cpu'); from effnetlib.runs import hosts\n"
        "hosts.PATIENCE_SECONDS = 1.0\n"
        "try: hosts.start(f'localhost:{sys.argv[1]}', 2, 1, timeout_seconds=4)\n"
        "except hosts.FailedError as error: print(error); sys.exit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(free_port())], capture_output=True, text=True, timeout=90)
    assert "process 1 of 2 still waits for the others" in done.stderr
    assert done.returncode == 3 and "process 0 does not answer at localhost" in done.stdout, done.stderr[-500:]


def busy_chips(monkeypatch, *errors):
    """`jax.devices` raises these one after another, and then succeeds. Returns the times that were waited."""
    answers, now, waited = list(errors), [0.0], []

    def devices():
        if answers:
            raise RuntimeError(answers.pop(0))
        return ["chip"]

    def sleep(seconds):
        now[0] += seconds
        waited.append(seconds)

    monkeypatch.setattr(hosts.jax, "devices", devices)
    monkeypatch.setattr(hosts, "clear_backends", lambda: None)
    monkeypatch.setattr(hosts.time, "sleep", sleep)
    monkeypatch.setattr(hosts.time, "monotonic", lambda: now[0])
    return waited


BUSY = (
    "Unable to initialize backend 'tpu': UNKNOWN: TPU initialization failed: open(/dev/vfio/0): Device or resource busy",
    "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 1234.",
)


def test_chips_that_the_last_run_still_holds_are_waited_for(monkeypatch, capsys):
    waited = busy_chips(monkeypatch, BUSY[0], BUSY[1], BUSY[0])
    assert hosts.wait_for_devices() == ["chip"] and waited == [5.0] * 3
    assert "Device or resource busy): asking for up to 90 s more" in capsys.readouterr().out


def test_chips_that_stay_busy_are_given_up_in_a_sentence_and_other_errors_at_once(monkeypatch):
    waited = busy_chips(monkeypatch, *BUSY * 50)
    with pytest.raises(FailedError, match="the chips are busy .*pid 1234.*: end the process that holds them"):
        hosts.wait_for_devices()
    assert 90 <= sum(waited) < 100
    waited = busy_chips(monkeypatch, "Unable to initialize backend 'tpu': no such flag")
    with pytest.raises(FailedError, match="finds no devices: .*no such flag"):
        hosts.wait_for_devices()
    assert waited == []


def test_what_one_process_on_its_own_makes_or_refuses_is_its_own():
    def refuse():
        raise EffnetlibError("no")

    assert hosts.gather("here", 3) == [3] and hosts.from_first("here", lambda: 4) == 4
    with pytest.raises(EffnetlibError, match="no"):
        hosts.from_first("here", refuse)


def test_hosts_that_read_other_data_than_process_0_are_refused(monkeypatch):
    splits = {"train": data.load("digits", "train")}
    monkeypatch.setattr(run.jax, "process_count", lambda: 3)
    monkeypatch.setattr(run, "gather", lambda place, mine: [mine] * 3)
    run._require_same_data(splits)
    monkeypatch.setattr(run, "gather", lambda place, mine: [mine, mine, ["another"]])
    with pytest.raises(
        EffnetlibError, match="process 2 reads other data than process 0: the data set must be the same"
    ):
        run._require_same_data(splits)
