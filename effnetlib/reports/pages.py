"""Makes pages from existing records: the reports of a suite, the paper against ours, a comparison of runs."""

from collections.abc import Sequence
from pathlib import Path

from effnetlib.errors import EffnetlibError, FailedError
from effnetlib.reports import comparison
from effnetlib.reports.html import render_html, render_index
from effnetlib.runs.files import exclusive_lock
from effnetlib.runs.paths import outputs_folder, user_path
from effnetlib.runs.record import load_records
from effnetlib.suites import execute
from effnetlib.suites.outcome import Outcome
from effnetlib.suites.suite import Suite, report_alone

AGAINST_PAPER = "13_paper_against_ours"
COMPARISON = "14_comparison"
NAMED_POINTS = 3  # the most points in the name of a comparison's folder


def report_suite(directory: Path, chip_hour: float | None = None) -> Path:
    """Renders the executed reports of a suite's folder and its index page again. Returns the path of the index.

    A folder of records without an executed report first gets the paper against ours. If that report exists already, it
    is executed again when the records are newer.

    Args:
      directory: the suite's folder, or `runs` in it.
      chip_hour: dollars per chip and hour, for the paper against ours.

    Raises:
      EffnetlibError: the folder holds no reports and no records, or it is the folder of a run.
    """
    directory = user_path(directory, "the folder", folder=True)
    if directory.name == "runs":
        directory = directory.parent
    if (directory / "run.json").exists():
        raise EffnetlibError(f"{directory} is one run: name a second run to compare, or the suite's folder for reports")
    executed = [path.stem for path in sorted(directory.glob("executed/*.ipynb"))]
    reports = [name for name in executed if not Outcome.read(directory, name).is_run]
    has_records = any(directory.glob("runs/*/run.json"))
    if has_records and (not reports or AGAINST_PAPER in reports):
        if not any(record.status == "completed" for record in load_records(directory / "runs")):
            raise EffnetlibError(f"{directory} holds records, but no completed one that can be read")
        outputs = outputs_folder()  # the name of a suite is its path below this folder, or else its whole path
        name = str(directory.relative_to(outputs) if directory.is_relative_to(outputs) else directory)
        _execute(report_alone(name, AGAINST_PAPER, **({} if chip_hour is None else {"chip_hour": chip_hour})))
    elif not executed:
        raise EffnetlibError(
            f"{directory} holds no executed notebooks and no records (runs/NAME/run.json): run a suite first"
        )
    elif chip_hour is not None:
        raise EffnetlibError(f"--price is for {AGAINST_PAPER}, which is not among the reports of {directory}")
    with exclusive_lock(directory, "rendering the reports of"):
        for name in executed:
            render_html(directory, name)
        return render_index(directory, directory.name)


def compare(paths: Sequence[Path]) -> Path:
    """Executes the comparison of runs in outputs/comparisons. Returns its page. `comparison.load` takes the paths."""
    records = comparison.load(paths)
    points = [point.replace("/", "-") for point in dict.fromkeys(comparison.points(records))]
    more = f"-and-{len(points) - NAMED_POINTS}-more" * (len(points) > NAMED_POINTS)
    name = f"comparisons/{'-against-'.join(points[:NAMED_POINTS])}{more}"
    return _execute(report_alone(name, COMPARISON, runs=[str(record.directory) for record in records]))


def _execute(suite: Suite) -> Path:
    """Executes a suite of one report, and returns its page."""
    (entry,) = execute.execute(suite)
    if entry.error:
        raise FailedError(f"the report {entry.name} failed: {entry.error}")
    return suite.directory / f"{entry.name}.html"
