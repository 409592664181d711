"""What the reports of a suite, or of all suites that are published, say together; and the published speeds."""

import json
from pathlib import Path

from nbformat import NotebookNode

from effnetlib.reports import html
from effnetlib.reports.claims import Verdict
from effnetlib.suites.outcome import Outcome


def reports(folder: Path) -> dict[Path, NotebookNode]:
    """The executed reports of a suite's folder, or of every suite in a folder, by path."""
    paths = sorted([*folder.glob("executed/*.ipynb"), *folder.glob("*/executed/*.ipynb")])
    found = [path for path in paths if not Outcome.read(path.parents[1], path.stem).is_run]
    return {path: html.read_notebook(path) for path in found}


def verdicts(folder: Path) -> list[tuple[Path, Verdict]]:
    """The verdict on each claim under each protocol, with the path of its executed report; sorted by the report's name.

    If several suites have tested a claim, the one with the most seeds counts. A claim without a test is left out if the
    same report has tested something in another suite."""
    found = [(path, verdict) for path, notebook in reports(folder).items() for verdict in html.verdicts(notebook)]
    tested = {path.stem: path for path, verdict in found if verdict.n}
    best = {}
    for path, verdict in sorted(found, key=lambda each: each[1].n):
        if verdict.n or tested.get(path.stem, path) == path:
            best[verdict.claim, verdict.protocol] = path, verdict
    return sorted(best.values(), key=lambda each: (each[0].stem, found.index(each)))


def speed(folder: Path) -> list[dict]:
    """The measurements of `make bench` that are ratios or have an aim. Those that only a machine with a GPU can make are
    from `make bench-gpu`; without `values`, nobody has made them."""
    here, on_gpu = (
        {each["name"]: each for each in json.loads((folder / name).read_text())["measurements"]}
        for name in ("bench.json", "bench-gpu.json")
    )
    rows = [each for each in here.values() if each["unit"] == "times" or each["met"] is not None]
    return [each if each["values"] else on_gpu.get(each["name"], each) for each in rows]
