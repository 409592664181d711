"""Paths: what a user may give as one, and the folders where results are written and read."""

import os
import re
from pathlib import Path

from effnetlib.errors import EffnetlibError, require
from effnetlib.runs.progress import say

# One slash too: pathlib makes gs:/bucket of gs://bucket.
_ADDRESS = re.compile(r"^\s*[\w+.@-]+:(?:/|$)|/\s*[A-Za-z][\w+.-]+:(?:/|$)")
_HOST_OR_DRIVE = re.compile(r"[\w+.@-]+:[^/]*")
_VARIABLE = re.compile(r"(?:^|/)(?:\$[A-Za-z_]|%\w+%)|\$[({]|`|\{\{")
_WRAPPED = re.compile(r"^\s|\s$|^(['\"]).*\1$", re.DOTALL)


def user_path(text: Path | str, what: str, base: Path | None = None, *, folder: bool = False) -> Path:
    """The absolute path that a user means, with ``~`` expanded: the one rule for every door.

    `what` is the flag, parameter or variable that it was given as, for the sentence. A relative path begins in the folder
    `base`, or the working directory. Where a `folder` is meant, it need not exist.

    Raises:
      EffnetlibError: it is empty, in quotes, an address such as gs://BUCKET or HOST:PLACE, holds a variable, or a file is where
        a folder should be.
    """
    given, wrong = os.fspath(text), f"{what} {os.fspath(text)!r}"
    require(given.strip() and "\0" not in given, f"{wrong} is not a path: name a file or folder")
    first = _HOST_OR_DRIVE.match(given)
    address = _ADDRESS.search(given) or (first and not os.path.lexists(Path(base or "", first[0])))
    require(not address, f"{wrong} is an address: mount it, or copy what it holds, and give the path on this machine")
    unfilled = f"{wrong} holds a variable, which no shell has replaced: write out what it stands for"
    require(not _VARIABLE.search(given), unfilled)
    require(
        not _WRAPPED.search(given), f"{wrong} begins and ends with quotes, or has a blank at an end: leave them out"
    )
    try:
        path = Path(os.path.abspath(Path(base or "", Path(given).expanduser())))
    except RuntimeError:
        raise EffnetlibError(f"{wrong} names a user who has no home folder here: write the path out") from None
    except FileNotFoundError:
        raise EffnetlibError(f"{wrong} begins in the working directory, which was deleted: change to another") from None
    lowest = path if folder else path.parent
    place = next(each for each in (lowest, *lowest.parents) if os.path.exists(each))
    require(place.is_dir(), f"{wrong} cannot be used: {place} is a file, where a folder is wanted")
    return path


def name_or_path(text: str, what: str) -> str:
    """A path, which holds a slash or begins with a dot or ``~``, as `user_path` makes it; anything else, a name, as it is."""
    path = user_path(text, what)
    return str(path) if "/" in text or text.startswith((".", "~")) else text


def outputs_folder() -> Path:
    """Where runs write: the environment variable EFFNETLIB_OUTPUTS, else `outputs/` of the checkout around the working
    directory, else `outputs/` in the working directory."""
    if given := os.environ.get("EFFNETLIB_OUTPUTS"):
        return user_path(given, "EFFNETLIB_OUTPUTS", folder=True)
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "notebooks/suites").is_dir()), here) / "outputs"


def published_folder() -> Path:
    """`outputs/published` of the checkout that this package runs from: what git keeps of earlier runs."""
    return Path(__file__).parents[2] / "outputs/published"


def runs_folder(suite: str) -> Path:
    """Where a suite's records are: `outputs/SUITE/runs`. Where there are none, the published ones, and a line says so."""
    mine, published = (user_path(suite, "suite", base) / "runs" for base in (outputs_folder(), published_folder()))
    if any(mine.glob("*/run.json")) or not published.exists():
        return mine
    say(f"{mine} holds no record: these are the records that come with effnetlib.")
    return published
