"""One process at a time in a folder."""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from effnetlib.errors import EffnetlibError
from effnetlib.runs.progress import say


@contextlib.contextmanager
def held(folder: Path, doing: str) -> Iterator[None]:
    """Holds a folder while the block runs; the system lets go of it whenever the process ends, killed or not.

    Raises:
      EffnetlibError: another process holds it (which, and where), or the folder cannot be written.
    """
    try:
        file = open(folder / ".lock", "a+")
    except OSError as error:
        raise EffnetlibError(f"the folder {folder} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise EffnetlibError(f"{holder} is {doing} {folder} at this moment: wait for it, or stop it") from None
        except OSError as error:  # mounted buckets know no locks
            say(f"{folder} cannot be locked ({error.strerror}): nothing keeps a second process out")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
