"""The learning rate that a suite's own search found, given to the runs that are to use it."""

import dataclasses

from effnetlib.errors import FailedError
from effnetlib.runs.record import load_records
from effnetlib.suites.suite import Entry, Suite


def tuned(suite: Suite, entry: Entry) -> Entry:
    """The entry with `lr_per_256` as its `tuned` says, which names a search of the same suite.

    The best run of a search has the highest final top-1; of equals, the lowest rate. A run that diverged counts as the worst.
    ``{lr_per_256: SEARCH}`` takes its `lr_per_256`, so that the peak grows linearly with the batch. ``{peak_lr: SEARCH}``
    takes its peak, whatever the batch.

    Raises:
      FailedError: a run of that search is not completed yet.
    """
    if not entry.tuned:
        return entry
    ((what, search),) = entry.tuned.items()
    wanted = {each.name for each in suite.runs if belongs(each.name, search)}
    records = [record for record in load_records(suite.directory / "runs") if record.name in wanted]
    completed = [record for record in records if record.status == "completed"]
    diverged = {record.name for record in records if (record.error or "").startswith("DivergedError")}
    if missing := sorted(wanted - {record.name for record in completed} - diverged):
        raise FailedError(f"{entry.name} needs the whole of {search}, and {', '.join(missing)} is not completed")
    if not completed:
        raise FailedError(f"{entry.name} needs a rate of {search}, and every one diverged")
    best = min(completed, key=lambda record: (-record.result["final_top1"], record.recipe.lr_per_256))
    rate = best.recipe.lr_per_256
    if what == "peak_lr":
        rate = best.recipe.peak_lr * 256 / entry.recipe.global_batch_size
    return dataclasses.replace(entry, parameters={**entry.parameters, "lr_per_256": rate})


def belongs(name: str, search: str) -> bool:
    """Whether a run is one of a search: its name is the search's, and the value that was tried.

    >>> belongs("search-lars-128-0.5", "search-lars-128"), belongs("search-lars-128-late-0.5", "search-lars-128")
    (True, False)
    """
    return name.rpartition("-")[0] == search
