"""The processes of a slice, one per host: they join JAX's multi-controller runtime, and act as one."""

import contextlib
import ipaddress
import os
import pickle
import re
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

import jax
from jax._src import distributed  # the store of keys and values has no public name
from jax.extend.backend import clear_backends

from effnetlib.errors import EffnetlibError, FailedError, first_line, require
from effnetlib.runs.progress import at_work, say

PORT = 8476  # the usual firewalls of TPU slices block JAX's own default since 0.8.1
PATIENCE_SECONDS = 60.0
TIMEOUT_SECONDS = 1800
RESOLVE_SECONDS = 60.0  # a pod that is starting may have no name yet
ADDRESS = re.compile(r"(?:\[(.+)\]|([\w-]{1,63}(?:\.[\w-]{1,63})*\.?))(?::(\d{1,5}))?", re.ASCII)
BUSY_SECONDS = 90.0  # chips stay claimed for half a minute after their last process was killed
BUSY = re.compile("resource busy|already in use|/dev/vfio", re.IGNORECASE)
_uses = Counter()  # of each name: a key of the store can be set once


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout_seconds: int = TIMEOUT_SECONDS,
) -> None:
    """Joins this process to the others. Call it before anything else touches jax's devices.

    The `coordinator` is process 0: HOST, HOST:PORT or [IPv6]:PORT; the default port is 8476. `processes` is their number, and
    `process` the index of this one, from 0. The default of each is the variable EFFNETLIB_COORDINATOR, EFFNETLIB_PROCESSES
    or EFFNETLIB_PROCESS. With one process, or none of the three, nothing happens. After a minute of waiting a line says so.
    (If process 0 comes but another does not, jaxlib ends the waiting processes itself, with a stack trace.)

    Raises:
      EffnetlibError: only some of the three are known, or one is invalid.
      FailedError: process 0 did not come, or its name did not resolve for a minute.
    """
    found = {"coordinator": coordinator, "processes": processes, "process": process}
    for name, value in found.items():
        found[name] = os.environ.get(f"EFFNETLIB_{name.upper()}", "").strip() if value is None else str(value)
    missing = [name for name, value in found.items() if not value]
    if len(missing) == 3 or found["processes"] == "1":
        return
    unknown = f"{', '.join(missing)} is not known: give all three of coordinator, processes and process, as parameters"
    require(not missing, f"{unknown} or as EFFNETLIB_COORDINATOR, EFFNETLIB_PROCESSES and EFFNETLIB_PROCESS")
    address, *numbers = found.values()
    require(
        all(re.fullmatch(r"-?\d+", text) for text in numbers),
        f"processes and process are numbers, not {' and '.join(numbers)}",
    )
    count, number = map(int, numbers)
    require(0 <= number < count, f"process must be from 0 to {count - 1}, and is {number}")
    host, port = _host_and_port(address)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if jax.distributed.is_initialized():
        return
    waiting = (
        f"process {number} of {count} still waits for the others at {address}: has the same notebook been started on every "
        f"host? Giving up after {timeout_seconds} s"
    )
    with at_work(waiting, seconds=PATIENCE_SECONDS):
        _wait_for(host, port, time.monotonic() + timeout_seconds, answer=number > 0)
        for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy"), ("no_grpc_proxy", "no_proxy")):
            hosts = os.environ.get(name, os.environ.get(other, "")).split(",")
            os.environ[name] = ",".join(dict.fromkeys([*filter(None, hosts), host]))  # no proxy can reach it
        with contextlib.suppress(AttributeError):  # an old jax does not have it
            # Its handler would swallow a SIGTERM until training begins.
            jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(address, count, number, initialization_timeout=timeout_seconds)


def _host_and_port(address: str) -> tuple[str, int]:
    """Splits an address. An IPv6 address needs brackets before a port."""
    given = address.strip()
    parts = ADDRESS.fullmatch(f"[{given}]" if given.count(":") > 1 and given[0] != "[" else given)
    with contextlib.suppress(ValueError):  # the brackets hold no IPv6 address
        if parts and 0 < (port := int(parts[3] or PORT)) < 65536:
            return parts[2] or str(ipaddress.IPv6Address(parts[1])), port
    wrong = f"coordinator {address!r} is no address"
    raise EffnetlibError(f"{wrong}: HOST, HOST:PORT or [IPv6]:PORT is wanted, with a port up to 65535")


def _wait_for(host: str, port: int, deadline: float, answer: bool) -> None:
    """Waits until the host's name resolves and, with `answer`, until its port accepts a connection.
    Without a listener, jaxlib's client would abort the process."""
    resolved = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(host, port)
            resolved = time.monotonic()
            if answer:
                socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror) and time.monotonic() >= min(resolved + RESOLVE_SECONDS, deadline):
                raise FailedError(f"the host of process 0, {host}, cannot be resolved: {error.strerror}") from None
            if time.monotonic() >= deadline:
                raise FailedError(f"process 0 does not answer at {host}, port {port}: {error}") from None
            time.sleep(1)


def is_main_process() -> bool:
    """Whether this is process 0. Only process 0 writes."""
    return jax.process_index() == 0


def wait_for_devices() -> list[jax.Device]:
    """`jax.devices()`. Waits up to a minute and a half for chips that are busy. Raises FailedError if they still are, or if
    jax cannot use them."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return jax.devices()
        except RuntimeError as error:
            if not BUSY.search(str(error)):
                raise FailedError(f"jax {jax.__version__} finds no devices: {first_line(error)}") from None
            busy, left = f"the chips are busy ({first_line(error)})", end - time.monotonic()
            if left < 0:
                raise FailedError(f"{busy}: end the process that holds them, perhaps a notebook's kernel") from None
        say(f"{busy}: asking for up to {left:.0f} s more")
        clear_backends()  # else jax would go on without the chips
        time.sleep(BUSY_SECONDS / 18)


def begin_run() -> None:
    """Counts keys anew. Processes that a stop ended at different places have used different keys in the run before."""
    runs = _uses["run"] + 1
    _uses.clear()
    _uses["run"] = runs


def new_key(name: str) -> str:
    """A key of the store that all processes share. The n-th call in a run returns the same key in every process."""
    _uses[name] += 1
    return f"effnetlib/{_uses['run']}/{name}/{_uses[name]}"


def post(key: str, value: object) -> None:
    """Sets the value of a key, for all processes."""
    content = zlib.compress(pickle.dumps(value), 1)
    distributed.global_state.client.key_value_set_bytes(key, content, allow_overwrite=True)


def posted(key: str, seconds: float = TIMEOUT_SECONDS) -> object:
    """Waits for the value of a key, at most a second at a time, so that signals are heard. Raises FailedError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            content = distributed.global_state.client.blocking_key_value_get_bytes(key, int(1000 * min(1.0, seconds)))
            return pickle.loads(zlib.decompress(content))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if time.monotonic() > end:
            raise FailedError(f"another process did not come to {key} within {seconds:.0f} s")


def gather(place: str, value: object = None) -> list:
    """Waits until every process reaches this place. Returns the values of all. A collective would give up after 30 seconds
    on CPU, but some processes compile much longer than others."""
    joined = distributed.global_state
    if joined.client is None:
        return [value]
    key = new_key(place)
    with at_work(f"process {joined.process_id} waits for the others ({place})"):
        if joined.process_id == 0:
            post(key, [value, *(posted(f"{key}/{process}") for process in range(1, joined.num_processes))])
        else:
            post(f"{key}/{joined.process_id}", value)
        return posted(key)


def from_first(place: str, make: Callable[[], object]):
    """What `make` returns, or the EffnetlibError that it raises, in process 0. The others do not call it."""
    try:
        made = make() if distributed.global_state.process_id == 0 else None
    except EffnetlibError as error:
        made = error
    made = gather(place, made)[0]
    if isinstance(made, EffnetlibError):
        raise made
    return made


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """Raises an EffnetlibError of this block in every process. Otherwise the others would wait in vain. Their error names the
    process that refused."""
    refusal = None
    try:
        yield
    except EffnetlibError as error:
        refusal = error
    for process, reason in enumerate(gather("raise_together", refusal and str(refusal))):
        if reason and refusal is None:
            refusal = EffnetlibError(f"process {process} of {jax.process_count()} refused: {reason}")
    if refusal is not None:
        raise refusal


def simulate_devices(count: int) -> None:
    """Gives this process `count` CPU devices. Call it after `start`, and before anything else touches jax's devices.

    Raises:
      EffnetlibError: jax already runs with other devices (in a notebook: restart the kernel).
    """
    with contextlib.suppress(RuntimeError):  # the backend runs already; its devices are checked below
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    present = f"{jax.local_device_count()} {jax.default_backend()}"
    wrong = f"{count} simulated devices were asked for, but jax already runs with {present} device(s)"
    require(present == f"{count} cpu", f"{wrong}: restart the kernel and run from the top")
