"""Compares runs of one or several suites: settings, outcomes, and the interval of the difference."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from effnetlib.errors import EffnetlibError
from effnetlib.reports.claims import MIN_SEEDS, interval
from effnetlib.reports.tables import results
from effnetlib.runs.paths import user_path
from effnetlib.runs.record import Record

CIRCUMSTANCES = ("host", "device_kind", "devices", "processes", "eval_devices", "python", "jax", "flax", "git_commit",
                 "xla_flags", "settings")  # fmt: skip
OUTCOMES = ("final_top1", "peak_top1", "peak_epoch", "seconds_to_peak", "images_per_second", "raw_final_top1")


def load(paths: Sequence[Path]) -> list[Record]:
    """The records to compare.

    Args:
      paths: folders of runs. A path without the seed (`lars-64` for `lars-64-seed0` …) takes all seeds.

    Raises:
      EffnetlibError: a path is not a run, a record cannot be read or has no evaluation, or there is only one run.
    """
    found = {}
    for path in (user_path(path, "the run") for path in paths):
        folders = [path] if (path / "run.json").exists() else sorted(path.parent.glob(f"{path.name}-seed*"))
        if not folders:
            raise EffnetlibError(f"{path} is not the folder of a run: run.json is missing")
        found |= {folder.resolve(): Record.load(folder) for folder in folders}
    for record in found.values():
        if record.frame("eval").empty:
            raise EffnetlibError(f"the run {record.directory} has not been evaluated yet (it is {record.status})")
    if len(found) < 2:
        raise EffnetlibError(f"a comparison needs two runs or more, and {', '.join(map(str, paths))} is one")
    return list(found.values())


def labels(records: Sequence[Record]) -> list[str]:
    """A name per run: its folder, and the parent folders that equal names need to differ."""
    paths = [[part for part in record.directory.absolute().parts if part != "runs"] for record in records]
    depth = 1
    while len({tuple(path[-depth:]) for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def points(records: Sequence[Record]) -> list[str]:
    """The point of each run: its label without the seed."""
    return [label.removesuffix(r.name) + r.point for label, r in zip(labels(records), records, strict=True)]


def settings(records: Sequence[Record]) -> pd.DataFrame:
    """The settings that differ between points: one row per field, one column per point with all values of its runs."""
    table = results(records).reindex(columns=[*asdict(records[0].recipe), *CIRCUMSTANCES])
    for split in ("train", "eval"):
        table[f"{split} data"] = [record.data.get("fingerprints", {}).get(split) for record in records]
    by_point = table.map(str).groupby(points(records), sort=False).agg(lambda x: ", ".join(x.unique())).T
    return by_point[by_point.nunique(axis=1) > 1].rename_axis("setting").reset_index()


def outcomes(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run: its point, status and outcomes (missing while it is running)."""
    table = results(records).reindex(columns=[*OUTCOMES, "eval_examples", "seed"]).reset_index(drop=True)
    names = pd.DataFrame({"run": labels(records), "point": points(records)})
    return names.join(table).assign(status=[record.status for record in records])


def difference(records: Sequence[Record]) -> str:
    """The difference in final top-1 of the first point and of each other one, seed by seed: a sentence each."""
    table = outcomes(records).dropna(subset=["final_top1"])
    top1 = 100 * table.pivot_table("final_top1", "seed", "point", sort=False)
    said = []
    for other in top1.columns[1:]:
        first = top1.columns[0]
        differences = (top1[first] - top1[other]).dropna().sort_index()
        n, gap = len(differences), top1[first].mean() - top1[other].mean()
        few = f"{gap:+.2f} points; with fewer than {MIN_SEEDS} seeds in both that may be chance"
        known = f"{interval(differences, n, n)} points (95 % interval, {n} seeds)" if n >= MIN_SEEDS else few
        said.append(f"Final top-1 of {first} minus {other}: {known}.")
    return " ".join(said) or "Fewer than two points have a result, so there is no difference to tell."
