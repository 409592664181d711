"""A run that goes on from one session of Kaggle to the next."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from effnetlib.runs.progress import say
from effnetlib.runs.record import Record
from effnetlib.runs.stopping import PreemptedError

INPUT = Path("/kaggle/input")


@contextlib.contextmanager
def session(directory: Path) -> Iterator[None]:
    """On Kaggle, a run in `directory` begins with what an earlier version of the notebook saved, where its output is attached
    as an input; and if it stops before its end, the notebook ends there without an error, for Kaggle keeps the output of no
    other. Elsewhere nothing happens.
    """
    if "KAGGLE_KERNEL_RUN_TYPE" not in os.environ:
        yield
        return
    earlier = _earlier(directory)
    if earlier and not (directory / "run.json").exists():
        shutil.copytree(earlier, directory, dirs_exist_ok=True)
        say(f"goes on with {earlier}")
    try:
        yield
    except PreemptedError as stopped:
        say(f"{stopped}; in the next session, attach the output of this version as an input")
        raise SystemExit from None  # with no code: papermill, which runs Kaggle's notebooks, takes it for a success


def _earlier(directory: Path) -> Path | None:
    """The attached folder of the same run that got furthest."""
    inside = f"{directory.parent.name}/{directory.name}/run.json"
    # INPUT/NOTEBOOK/outputs, or two levels below that; looking deeper would list every photograph.
    found = [path.parent for levels in (1, 2, 3, 4) for path in INPUT.glob("*/" * levels + inside)]
    return max(found, key=lambda folder: len(Record.load(folder).metrics), default=None)
