"""Files and folders: atomic writes, checks before work begins, and locks against a second process."""

import contextlib
import fcntl
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

from effnetlib.errors import EffnetlibError
from effnetlib.runs.progress import say


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a whole file. A reader sees the old or the new content, never a part, even after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_writable(folder: Path, what: str = "the folder") -> None:
    """Makes a folder if it is missing. Raises EffnetlibError, which names `what`, if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise EffnetlibError(f"{what} {folder} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def exclusive_lock(folder: Path, doing: str) -> Iterator[None]:
    """Locks a folder while the block runs. The lock is released when the process ends, even if it is killed.

    Raises:
      EffnetlibError: another process holds the lock (the error names it), or the folder cannot be written.
    """
    make_writable(folder)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise EffnetlibError(f"{holder} is {doing} {folder} at this moment: wait for it, or stop it") from None
        except OSError as error:  # a mounted bucket has no locks
            say(f"{folder} cannot be locked ({error.strerror}): start no second process here")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
