"""Gives runs the best learning rate of a search in the same suite."""

import dataclasses

from effnetlib.errors import FailedError
from effnetlib.runs.record import load_records
from effnetlib.suites.suite import Entry, Suite


def tuned(suite: Suite, entry: Entry) -> Entry:
    """Returns the entry with the `lr_per_256` of its search, which `tuned` names.

    The best run of a search has the highest final top-1. On a tie the lowest rate wins. A diverged run never wins.
    ``{lr_per_256: SEARCH}`` takes its `lr_per_256`, so the peak grows linearly with the batch. ``{peak_lr: SEARCH}`` takes
    its peak, whatever the batch.

    Raises:
      FailedError: a run of the search is not completed yet, or all diverged.
    """
    if not entry.tuned:
        return entry
    ((what, search),) = entry.tuned.items()
    wanted = {run.name for run in suite.runs if belongs(run.name, search)}
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
    """Whether a run belongs to a search: its name is SEARCH-VALUE.

    >>> belongs("search-lars-128-0.5", "search-lars-128"), belongs("search-lars-128-late-0.5", "search-lars-128")
    (True, False)
    """
    return name.rpartition("-")[0] == search
