"""Joining the processes of a slice: JAX's own multi-controller runtime, one process a host."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from effnetlib.errors import EffnetlibError, FailedError
from effnetlib.progress import say

PORT = 8476  # JAX moved to another one in 0.8.1, which the usual firewalls of TPU slices do not let through
PATIENCE_SECONDS = 60.0
TIMEOUT_SECONDS = 1800
VARIABLES = {
    "coordinator": "EFFNETLIB_COORDINATOR",
    "processes": "EFFNETLIB_PROCESSES",
    "process": "EFFNETLIB_PROCESS",
}


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout_seconds: int = TIMEOUT_SECONDS,
) -> None:
    """Joins this process to the others. Call it before anything else touches jax's devices; does nothing for a single one.

    What is None is read from the environment: EFFNETLIB_COORDINATOR, EFFNETLIB_PROCESSES, EFFNETLIB_PROCESS.

    Args:
      coordinator: host, or host:port, of process 0; the port is 8476 where none is given.
      processes: how many there are; 1, or nothing at all, is a process on its own.
      process: which one this is, from 0.
      timeout_seconds: how long to wait for the others. After a minute a line says that some are missing. (Where process 0 is
        there and another is not, jaxlib ends the waiting processes itself, with a stack trace after that line.)

    Raises:
      EffnetlibError: only some of the three are known, or one is impossible.
      FailedError: process 0 did not come.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    found = {name: os.environ.get(VARIABLES[name]) if value is None else value for name, value in given.items()}
    missing = [name for name, value in found.items() if value in (None, "")]
    if len(missing) == 3 or (str(found["processes"]) == "1"):
        return
    if missing:
        raise EffnetlibError(
            f"of coordinator, processes and process {', '.join(missing)} is not known: give all three, as parameters or as "
            f"{', '.join(VARIABLES.values())}"
        )
    try:
        count, number = int(found["processes"]), int(found["process"])
    except ValueError:
        raise EffnetlibError(
            f"processes and process are numbers, not {found['processes']!r} and {found['process']!r}"
        ) from None
    if not 0 <= number < count:
        raise EffnetlibError(f"process must be from 0 to {count - 1}, and is {number}")
    address = str(found["coordinator"])
    address = address if ":" in address else f"{address}:{PORT}"
    if jax.distributed.is_initialized():
        return
    waiting = threading.Timer(
        PATIENCE_SECONDS,
        lambda: say(
            f"process {number} of {count} still waits for the others at {address}: has the same notebook been started on "
            f"every host? Giving up after {timeout_seconds} s"
        ),
    )
    waiting.daemon = True
    waiting.start()
    try:
        if number > 0:
            _wait_for(address, time.monotonic() + timeout_seconds)
        jax.distributed.initialize(address, count, number, initialization_timeout=timeout_seconds)
    finally:
        waiting.cancel()


def _wait_for(address: str, deadline: float) -> None:
    """Until somebody listens there: jaxlib's own client does not raise when nobody does, it aborts the process."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise FailedError(f"process 0 does not answer at {address}: {error}") from None
            time.sleep(1)


def wait_for_all(place: str) -> None:
    """Until every process has come to this place, for half an hour. It is no collective: those give up on a process that is
    late, on CPU after 30 seconds, and compiling takes some longer than others."""
    multihost.get_barrier_sync_fn()(key=place, timeout_ms=1000 * TIMEOUT_SECONDS)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What one process refuses in this block is refused by all of them, which would otherwise wait for it.

    Raises:
      EffnetlibError: the process's own, or one that says which other process has refused.
    """
    refusal = None
    try:
        yield
    except EffnetlibError as error:
        refusal = error
    if jax.process_count() > 1:
        wait_for_all("all_or_none")
        refused = multihost_utils.process_allgather(np.bool_(refusal is not None))
        if refusal is None and refused.any():
            refusal = EffnetlibError(f"process {refused.argmax()} of {len(refused)} refused: its log says why")
    if refusal is not None:
        raise refusal
