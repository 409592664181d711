"""What a user gives as a path: one rule for every door."""

import os
import re
from pathlib import Path

from effnetlib.errors import EffnetlibError

# One slash too: pathlib makes gs:/bucket of gs://bucket.
_ADDRESS = re.compile(r"^\s*[\w+.@-]+:(?:/|$)|/\s*[A-Za-z][\w+.-]+:(?:/|$)")
_HOST_OR_DRIVE = re.compile(r"[\w+.@-]+:[^/]*")
_VARIABLE = re.compile(r"(?:^|/)(?:\$[A-Za-z_]|%\w+%)|\$[({]|`|\{\{")
_WRAPPED = re.compile(r"^\s|\s$|^(['\"]).*\1$", re.DOTALL)


def user_path(text: Path | str, what: str, base: Path | None = None, *, folder: bool = False) -> Path:
    """The absolute path that a user means, with ``~`` expanded.

    Args:
      text: what was given.
      what: the flag, parameter or variable that it was given as, for the sentence.
      base: the folder in which a relative path begins; the working directory if not given.
      folder: whether a folder is meant, which need not exist.

    Raises:
      EffnetlibError: it is empty, in quotes, an address such as gs://BUCKET or HOST:PLACE, holds a variable, or a file is where
        a folder should be.
    """
    given, wrong = os.fspath(text), f"{what} {os.fspath(text)!r}"
    if not given.strip() or "\0" in given:
        raise EffnetlibError(f"{wrong} is not a path: name a file or folder")
    first = _HOST_OR_DRIVE.match(given)
    if _ADDRESS.search(given) or (first and not os.path.lexists(Path(base or "", first[0]))):
        raise EffnetlibError(
            f"{wrong} is an address: mount it, or copy what it holds, and give the path on this machine"
        )
    if _VARIABLE.search(given):
        raise EffnetlibError(f"{wrong} holds a variable, which no shell has replaced: write out what it stands for")
    if _WRAPPED.search(given):
        raise EffnetlibError(f"{wrong} begins and ends with quotes, or has a blank at an end: leave them out")
    try:
        path = Path(os.path.abspath(Path(base or "", Path(given).expanduser())))
    except RuntimeError:
        raise EffnetlibError(f"{wrong} names a user who has no home folder here: write the path out") from None
    except FileNotFoundError:
        raise EffnetlibError(f"{wrong} begins in the working directory, which was deleted: change to another") from None
    lowest = path if folder else path.parent
    place = next(each for each in (lowest, *lowest.parents) if os.path.exists(each))
    if not place.is_dir():
        raise EffnetlibError(f"{wrong} cannot be used: {place} is a file, where a folder is wanted")
    return path


def name_or_path(text: str, what: str) -> str:
    """A path, which holds a slash or begins with a dot or ``~``, as `user_path` makes it; anything else, a name, as it is."""
    path = user_path(text, what)
    return str(path) if "/" in text or text.startswith((".", "~")) else text
