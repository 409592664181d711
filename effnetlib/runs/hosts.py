"""The processes of a slice, one per host: how they join JAX's multi-controller runtime, and act as one."""

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

from effnetlib.errors import EffnetlibError, FailedError, require
from effnetlib.runs.progress import at_work

PORT = 8476  # JAX moved to another one in 0.8.1, which the usual firewalls of TPU slices do not let through
PATIENCE_SECONDS = 60.0
TIMEOUT_SECONDS = 1800
RESOLVE_SECONDS = 60.0  # a pod that has just begun to start may not have its name yet
ADDRESS = re.compile(r"(?:\[(.+)\]|([\w-]{1,63}(?:\.[\w-]{1,63})*\.?))(?::(\d{1,5}))?", re.ASCII)
_visits = itertools.count()  # a barrier has a name of its own each time


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout_seconds: int = TIMEOUT_SECONDS,
) -> None:
    """Joins this process to the others. Call it before anything else touches jax's devices.

    The `coordinator` is process 0: HOST, HOST:PORT or [IPv6]:PORT, with port 8476 if none is given. `process` is the number of
    this one of all `processes`, from 0. What is None is read from EFFNETLIB_COORDINATOR, EFFNETLIB_PROCESSES and
    EFFNETLIB_PROCESS. With one process, or none of the three, nothing happens. After a minute a line says that some are missing.
    (Where only process 0 has come, jaxlib ends the waiting processes itself, with a stack trace.)

    Raises:
      EffnetlibError: only some of the three are known, or one is impossible.
      FailedError: process 0 did not come, or its name cannot be resolved for a minute.
    """
    found = {"coordinator": coordinator, "processes": processes, "process": process}
    for name, value in found.items():
        found[name] = os.environ.get(f"EFFNETLIB_{name.upper()}", "").strip() if value is None else str(value)
    missing = [name for name, value in found.items() if not value]
    if len(missing) == 3 or found["processes"] == "1":
        return
    unknown = f"of coordinator, processes and process {', '.join(missing)} is not known: give all three, "
    require(not missing, f"{unknown}as parameters or as EFFNETLIB_COORDINATOR, EFFNETLIB_PROCESSES, EFFNETLIB_PROCESS")
    address, *numbers = found.values()
    require(
        all(re.fullmatch(r"-?\d+", each) for each in numbers),
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
            os.environ[name] = ",".join(dict.fromkeys([*filter(None, hosts), host]))  # a proxy could not reach it
        jax.distributed.initialize(address, count, number, initialization_timeout=timeout_seconds)


def _host_and_port(address: str) -> tuple[str, int]:
    """The two parts of an address. A port follows an IPv6 address only where that stands in brackets."""
    given = address.strip()
    parts = ADDRESS.fullmatch(f"[{given}]" if given.count(":") > 1 and given[0] != "[" else given)
    with contextlib.suppress(ValueError):  # no address in the brackets
        if parts and 0 < (port := int(parts[3] or PORT)) < 65536:
            return parts[2] or str(ipaddress.IPv6Address(parts[1])), port
    forms = "HOST, HOST:PORT or [IPv6]:PORT is one, up to port 65535"
    raise EffnetlibError(f"coordinator {address!r} is no address: {forms}")


def _wait_for(host: str, port: int, deadline: float, answer: bool) -> None:
    """Waits until the host has an address and, for an `answer`, until somebody listens there.
    Where nobody does, jaxlib's client would abort the process."""
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
    """Whether this is process 0, the only one that writes."""
    return jax.process_index() == 0


def wait_for_all(place: str) -> None:
    """Waits until every process has come to this place, for half an hour. A collective would not do: on CPU it gives up after
    30 seconds, and some processes compile for longer than others."""
    from orbax.checkpoint import multihost  # takes long

    multihost.get_barrier_sync_fn()(key=f"{place} {next(_visits)}", timeout_ms=1000 * TIMEOUT_SECONDS)


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """Raises an EffnetlibError of this block in every process, since the others would wait for the one that raised. Theirs
    names that one."""
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
      EffnetlibError: jax runs already, with other devices (in a notebook: restart the kernel).
    """
    with contextlib.suppress(RuntimeError):  # the backend has started; whether that matters is seen below
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    there = f"{jax.local_device_count()} {jax.default_backend()}"
    wrong = f"{count} simulated devices were asked for, but jax already runs with {there} device(s)"
    require(there == f"{count} cpu", f"{wrong}: restart the kernel and run from the top")
