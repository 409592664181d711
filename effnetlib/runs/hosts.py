"""The processes of a slice, one per host: they join JAX's multi-controller runtime, and act as one."""

import contextlib
import ipaddress
import itertools
import os
import re
import socket
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.extend.backend import clear_backends

from effnetlib.errors import EffnetlibError, FailedError, first_line, require
from effnetlib.runs.progress import at_work

PORT = 8476  # the usual firewalls of TPU slices block JAX's own default since 0.8.1
PATIENCE_SECONDS = 60.0
TIMEOUT_SECONDS = 1800
RESOLVE_SECONDS = 60.0  # a pod that is starting may have no name yet
ADDRESS = re.compile(r"(?:\[(.+)\]|([\w-]{1,63}(?:\.[\w-]{1,63})*\.?))(?::(\d{1,5}))?", re.ASCII)
BUSY_SECONDS = 90.0  # chips stay claimed for half a minute after their last process was killed
BUSY = re.compile("resource busy|already in use|/dev/vfio", re.IGNORECASE)
_barriers = itertools.count()  # each barrier needs its own name


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
    with at_work("waiting for the chips: another process holds them, or has just ended", seconds=5.0):
        while True:
            try:
                return jax.devices()
            except RuntimeError as error:
                said = first_line(error)
                if not BUSY.search(str(error)):
                    raise FailedError(f"jax {jax.__version__} finds no devices: {said}") from None
                if time.monotonic() > end:
                    busy = f"another process holds the chips, perhaps a notebook's kernel ({said})"
                    raise FailedError(f"{busy}: restart that kernel or end that process, and try again") from None
            clear_backends()  # else jax would go on without the chips
            time.sleep(BUSY_SECONDS / 30)


def wait_for_all(place: str) -> None:
    """Waits up to half an hour until every process reaches this place. A collective would give up after 30 seconds on CPU,
    but some processes compile much longer than others."""
    from orbax.checkpoint import multihost  # slow to import

    multihost.get_barrier_sync_fn()(key=f"{place} {next(_barriers)}", timeout_ms=1000 * TIMEOUT_SECONDS)


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """Raises an EffnetlibError of this block in every process. Otherwise the others would wait in vain. Their error names the
    process that refused."""
    refusal = None
    try:
        yield
    except EffnetlibError as error:
        refusal = error
    if jax.process_count() > 1:
        wait_for_all("raise_together")
        refused = multihost_utils.process_allgather(np.bool_(refusal is not None))
        if refusal is None and refused.any():
            refusal = EffnetlibError(f"process {refused.argmax()} of {len(refused)} refused: its log says why")
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
