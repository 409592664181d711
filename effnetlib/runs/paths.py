"""Paths that users give, and the folders where results are written and read."""

import os
import re
from pathlib import Path

from effnetlib.errors import EffnetlibError, require
from effnetlib.runs.progress import say

ADDRESS = "is an address: mount it, or copy what it holds, and give the path on this machine"
# What is no path on this machine. In an address one slash is enough: pathlib turns gs://bucket into gs:/bucket.
REFUSED = {
    r"^\s*$|\0": "is not a path: name a file or folder",
    r"^\s*[\w+.@-]+:(?:/|$)|/\s*[A-Za-z][\w+.-]+:(?:/|$)": ADDRESS,
    r"(?:^|/)(?:\$[A-Za-z_]|%\w+%)|\$[({]|`|\{\{": "holds a variable, which no shell has replaced: write out its value",
    r"(?s)^\s|\s$|^(['\"]).*\1$": "begins and ends with quotes, or has a blank at an end: leave them out",
}
_HOST_OR_DRIVE = re.compile(r"[\w+.@-]+:[^/]*")


def user_path(text: Path | str, what: str, base: Path | None = None, *, folder: bool = False) -> Path:
    """Checks a path from a user and makes it absolute, with ``~`` expanded. Every path from a user comes through here.

    `what` is the flag, parameter or variable that errors name. A relative path begins in `base`, or in the working
    directory. `folder`: the path means a folder, which need not exist.

    Raises:
      EffnetlibError: the path is empty, in quotes, holds a variable, or is an address such as gs://BUCKET or HOST:PLACE. Or
        a file is where a folder should be.
    """
    given, wrong = os.fspath(text), f"{what} {os.fspath(text)!r}"
    for pattern, reason in REFUSED.items():
        require(not re.search(pattern, given), f"{wrong} {reason}")
    host = _HOST_OR_DRIVE.match(given)
    require(not host or os.path.lexists(Path(base or "", host[0])), f"{wrong} {ADDRESS}")
    try:
        path = Path(os.path.abspath(Path(base or "", Path(given).expanduser())))
    except RuntimeError:
        raise EffnetlibError(f"{wrong} names a user who has no home folder here: write the path out") from None
    except FileNotFoundError:
        raise EffnetlibError(f"{wrong} begins in the working directory, which was deleted: change to another") from None
    lowest = path if folder else path.parent
    place = next(p for p in (lowest, *lowest.parents) if os.path.exists(p))
    require(place.is_dir(), f"{wrong} cannot be used: {place} is a file, where a folder is wanted")
    return path


def name_or_path(text: str, what: str) -> str:
    """Makes a path absolute, and returns a name as it is. A path holds a slash, or begins with a dot or ``~``."""
    path = user_path(text, what)
    return str(path) if "/" in text or text.startswith((".", "~")) else text


def outputs_folder() -> Path:
    """The folder where runs write: the environment variable EFFNETLIB_OUTPUTS, else `outputs/` of the checkout around the
    working directory, else `outputs/` in the working directory."""
    if given := os.environ.get("EFFNETLIB_OUTPUTS"):
        return user_path(given, "EFFNETLIB_OUTPUTS", folder=True)
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "notebooks/suites").is_dir()), here) / "outputs"


def published_folder() -> Path:
    """`outputs/published` of this package's checkout: earlier runs, kept in git."""
    return Path(__file__).parents[2] / "outputs/published"


def runs_folder(suite: str) -> Path:
    """The folder of a suite's records: `outputs/SUITE/runs`. Without records, the published folder, and a line says so."""
    mine, published = (user_path(suite, "suite", base) / "runs" for base in (outputs_folder(), published_folder()))
    if any(mine.glob("*/run.json")) or not published.exists():
        return mine
    say(f"{mine} holds no record: these are the records that come with effnetlib.")
    return published
