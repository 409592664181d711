"""Worker processes that make examples ahead of their use. They return pixels through shared memory.

Decoding holds the interpreter lock part of the time. This limits the threads of one process, but not several processes.
Workers are started anew, not forked: a fork of a process with jax's threads may hang. They import neither jax nor the
user's `__main__`.

The parent writes the wanted examples into a ring of rows in shared memory. It writes their row numbers into one pipe that
all workers read, `UNIT` at a time. A worker writes the pixels into the rows, then which rows they are into its own pipe.
When a worker dies, its pipe ends and the parent notices. When the parent dies, the task pipe ends and the workers stop.
"""

import contextlib
import itertools
import json
import mmap
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from effnetlib.errors import EffnetlibError, FailedError, first_line

UNIT = 16  # images per task
RECORD = struct.Struct("<ii")  # a finished task: its first row, and the number of rows
FAILED = RECORD.pack(-1, 0)  # the reason follows, as JSON; it is the last message
# Signals that stop a run. Workers block them: the parent ends its workers.
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
START = "import json, sys; sys.path[:], *job = json.loads(sys.argv[1]); from effnetlib.data import workers; workers.work(*job)"


class Workers:
    """Processes that make examples.

    The shared memory holds one batch and 32 images per worker: 4.5 GB for B5 at 4,096 per host with 96 workers. Each
    returned batch is a copy (2.6 GB in this example); a training loop holds two.

    Args:
      make: ``make(epoch, index)`` returns an image, uint8 ``[size, size, 3]``, and its label. It is pickled; all workers
        share its arrays. ``make.name(index)`` names the example in messages.
      batch: examples in the largest batch.
      count: number of processes, at least one.

    Raises:
      FailedError: (while iterating) an example cannot be made, or a worker has died.
    """

    def __init__(self, make: Callable[[int, int], tuple[np.ndarray, int]], size: int, batch: int, count: int):
        self.make, self.rows, self.sent, self.taken = make, batch + 2 * UNIT * count, 0, 0
        buffers = []
        job = [pickle.dumps(make, protocol=5, buffer_callback=buffers.append)]
        job += [buffer.raw() for buffer in buffers]
        shape = [[len(part) for part in job], self.rows, size, count]
        with contextlib.ExitStack() as stack:
            fd = _shared_memory()
            stack.callback(os.close, fd)
            os.ftruncate(fd, 8 * count + self.rows * _row(size).itemsize + sum(shape[0]))
            self.current, self.ring, parts = _map(fd, *shape)
            for part, content in zip(parts, job, strict=True):
                part[:] = content
            self.current[:], self.done = -1, np.zeros(self.rows, bool)
            unread, self.tasks = os.pipe()
            stack.callback(os.close, self.tasks)
            self.selector = stack.enter_context(selectors.DefaultSelector())
            with os.fdopen(unread, "rb") as tasks, contextlib.ExitStack() as after:
                # Workers inherit the signal mask of this thread.
                after.callback(
                    signal.pthread_sigmask, signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                )
                for number in range(count):
                    arguments = json.dumps([sys.path, fd, number, *shape])
                    worker = subprocess.Popen(
                        [sys.executable, "-c", START, arguments],
                        stdin=tasks, stdout=subprocess.PIPE, pass_fds=[fd],
                        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    )  # fmt: skip
                    stack.enter_context(worker)  # its exit waits for the process
                    stack.callback(worker.kill)
                    self.selector.register(worker.stdout, selectors.EVENT_READ, (number, worker))
            self.close = stack.pop_all().close  # ends the processes

    def __call__(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images and labels of each batch of (epoch, index), int64 ``[examples, 2]``, in order."""
        ahead = deque()
        for batch in batches:
            ahead.append(len(batch))
            while len(batch) > (free := self.rows - (self.sent - self.taken)):  # the ring is full
                self._send(batch[:free])
                batch = batch[free:]
                yield self._take(ahead.popleft())
            self._send(batch)
        while ahead:
            yield self._take(ahead.popleft())

    def _send(self, wanted):
        rows = np.arange(self.sent, self.sent + len(wanted)) % self.rows
        self.ring["wanted"][rows], self.done[rows] = wanted, False
        self.sent += len(wanted)
        units = rows.astype(np.int32).tobytes()
        with contextlib.suppress(BrokenPipeError):  # all workers have died; `_take` reports why
            while units:
                units = units[os.write(self.tasks, units) :]

    def _take(self, count):
        rows = np.arange(self.taken, self.taken + count) % self.rows
        while not self.done[rows].all():
            for key, _ in self.selector.select():
                content = os.read(key.fd, 1 << 16)
                for first, length in RECORD.iter_unpack(content.partition(FAILED)[0]):
                    self.done[np.arange(first, first + length) % self.rows] = True
                if not content or FAILED in content:
                    raise self._failure(content.partition(FAILED)[2], *key.data)
        self.taken += count
        return self.ring["image"][rows], self.ring["label"][rows]

    def _failure(self, message, number, worker):
        if message := message + worker.stdout.read():
            is_sentence, reason = json.loads(message)
            if is_sentence:
                return FailedError(reason)
        else:
            code = worker.wait()
            reason = signal.Signals(-code).name if code < 0 else f"code {code}"
            reason += ", as the system does when memory is used up" if reason == "SIGKILL" else ""
        place, row = "", int(self.current[number])
        if row >= 0:
            with contextlib.suppress(EffnetlibError):
                place = f" at {self.make.name(int(self.ring['wanted'][row, 1]))}"
        return FailedError(f"a worker process of the input ended{place} with {reason}")


def work(fd: int, number: int, *shape) -> None:
    """The loop of a worker process. It ends when the parent ends."""
    results = os.dup(1)
    os.dup2(2, 1)  # what a library prints goes to stderr, not into the results
    current, ring, job = _map(fd, *shape)
    images, labels, wanted = (ring[name] for name in ring.dtype.names)
    try:
        make = pickle.loads(job[0], buffers=job[1:])
        while task := np.frombuffer(os.read(0, 4 * UNIT), np.int32).tolist():
            for row in task:
                current[number] = row
                images[row], labels[row] = make(*wanted[row].tolist())
            current[number] = -1
            os.write(results, RECORD.pack(task[0], len(task)))
    except BrokenPipeError:  # the parent has ended
        return
    except Exception as error:
        is_sentence = isinstance(error, EffnetlibError)
        if not is_sentence:
            traceback.print_exc()
        reason = str(error) if is_sentence else f"{type(error).__name__}: {first_line(error)}"
        with contextlib.suppress(BrokenPipeError):
            os.write(results, FAILED + json.dumps([is_sentence, reason]).encode())
    finally:
        os.close(results)


class Packed(Sequence):
    """A list that pickles as two arrays, which all workers share. An item is unpickled when it is used."""

    def __init__(self, items: Iterable):
        items = [pickle.dumps(item) for item in items]
        self.content = np.frombuffer(b"".join(items), np.uint8)
        self.ends = np.cumsum([0, *map(len, items)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int):
        return pickle.loads(self.content[self.ends[index] : self.ends[index + 1]])


def _shared_memory() -> int:
    """A nameless file in memory. /dev/shm is not used, because it is often limited to 64 MB."""
    try:
        return os.memfd_create("effnetlib")
    except (AttributeError, OSError):  # not Linux, or forbidden
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())


def _row(size: int) -> np.dtype:
    return np.dtype([("image", np.uint8, (size, size, 3)), ("label", np.int32), ("wanted", np.int64, 2)])


def _map(fd: int, job: list[int], rows: int, size: int, count: int):
    """Maps the shared memory: the current row per worker, the ring, and the parts of the job, whose lengths are `job`."""
    memory = memoryview(mmap.mmap(fd, 0))
    current = np.frombuffer(memory, np.int64, count)
    ring = np.frombuffer(memory, _row(size), rows, current.nbytes)
    ends = itertools.accumulate(job, initial=current.nbytes + ring.nbytes)
    return current, ring, [memory[start:end] for start, end in itertools.pairwise(ends)]
