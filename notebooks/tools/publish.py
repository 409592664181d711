"""What git keeps of runs: a suite's records and reports, the companion page (00_overview), and the READMEs' tables.

    python notebooks/tools/publish.py [SUITE]

`make publish` runs it. SUITE is a folder's name under outputs/; without it, only pages and tables are written again.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat

from effnetlib.errors import EffnetlibError, FailedError
from effnetlib.planning.plan import find_plan, load_plans
from effnetlib.planning.topology import GIB
from effnetlib.recipe import Recipe
from effnetlib.reports.claims import SYMBOLS, Verdict
from effnetlib.reports.html import read_notebook, render_html, render_index
from effnetlib.reports.published import speed, verdicts
from effnetlib.runs.files import write_atomically
from effnetlib.runs.paths import outputs_folder, published_folder
from effnetlib.runs.record import Record, load_records
from effnetlib.suites.outcome import Outcome

LARGE_SUITE = 100  # runs; of more than these, one training step of ten is published, and every evaluation
COMPANION = Path(__file__).parents[1] / "00_overview.ipynb"


def publish(suite: Path) -> Path:
    """Replaces `outputs/published/SUITE` by the records, figures and executed reports of a suite's folder, all of them or none,
    and then does what `refresh` does.

    Args:
      suite: the folder of its outputs.

    Returns:
      The companion page.

    Raises:
      EffnetlibError: there is no report to publish, or one that failed.
    """
    outcomes = [Outcome.read(suite, path.stem) for path in sorted(suite.glob("executed/*.json"))]
    reports = [outcome.name for outcome in outcomes if not outcome.is_run]
    if not reports:
        raise EffnetlibError(f"{suite} holds no executed reports: run its suite first")
    if failed := [outcome for outcome in outcomes if not outcome.is_run and outcome.error]:
        raise EffnetlibError(f"the report {failed[0].name} of {suite} failed: {failed[0].error}")
    published = published_folder()
    _mend(published)
    place, new = published / suite.name, published / f".{suite.name}.new"
    try:
        for name in reports:
            for path in (f"{name}.html", f"executed/{name}.json"):
                _copy(suite / path, new / path)
            _copy_notebook(suite / f"executed/{name}.ipynb", new / f"executed/{name}.ipynb")
        for path in suite.glob("figures/*.*"):
            _copy(path, new / "figures" / path.name)
        copy_records(suite, new)
        render_index(new, suite.name)
        if place.exists():
            place.rename(published / f".{suite.name}.before")
        new.rename(place)
    except OSError as error:
        raise FailedError(f"{place} cannot be replaced, and stays as it was: {error}") from None
    finally:
        _mend(published)
    return refresh()


def copy_records(suite: Path, to: Path) -> None:
    """Copies the records of a suite's runs, thinned where there are more than `LARGE_SUITE`."""
    records = sorted(suite.glob("runs/*/run.json"))
    for record in records:
        kept = to / record.relative_to(suite)
        _copy(record, kept)
        _copy(record.with_name("metrics.jsonl"), kept.with_name("metrics.jsonl"), len(records) > LARGE_SUITE)


def _mend(published: Path) -> None:
    """Ends what `publish` began, after a failure and after a crash: where the new folder has not come, the old one comes back."""
    for before in published.glob(".*.before"):
        place = published / before.name[1 : -len(".before")]
        shutil.rmtree(before) if place.exists() else before.rename(place)
    for new in published.glob(".*.new"):
        shutil.rmtree(new)


def refresh() -> Path:
    """Renders all that is published again: each report, each suite's index, the READMEs' tables, the claims as JSON and as a
    figure, and the companion page, which it returns."""
    published = published_folder()
    _mend(published)
    for place in sorted(path.parent for path in published.glob("*/executed")):
        for executed in sorted(place.glob("executed/*.ipynb")):
            render_html(place, executed.stem)
        render_index(place, place.name)
    for name, tables in readme_tables(published).items():
        readme = published.parent.parent / name
        write_atomically(readme, with_tables(readme.read_text(), tables))
    write_atomically(published / "claims.json", claims_json(verdicts(published)))
    page, claims = companion(published)
    write_atomically(published / "claims.svg", claims)
    write_atomically(published / "index.html", page)
    return published / "index.html"


def companion(published: Path) -> tuple[str, str]:
    """Executes 00_overview for all that is published, in the folder `overview` beside it. Returns its page and the figure of
    the claims.

    Raises:
      FailedError: the notebook failed.
    """
    place = published.parent / "overview"
    executed = place / "executed" / COMPANION.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", "--engine", "effnetlib", "--kernel", "python3", "--no-progress-bar"]
    # Links on the page begin in the working directory.
    command += ["--cwd", str(published), str(COMPANION), str(executed)]
    environment = os.environ | {"EFFNETLIB_OUTPUTS": str(published.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise FailedError(f"the companion page failed, see {executed}: {done.stderr.strip().splitlines()[-1]}")
    page = render_html(place, COMPANION.stem, home="")
    return page.read_text(), (place / "figures/claims.svg").read_text()


def claims_json(found: list[tuple[Path, Verdict]]) -> str:
    """A row per claim and protocol: its suite, the effect with its 95 % interval, n, the verdict and its rule."""
    names = ("claim", "protocol", "suite", "measured", "effect", "low", "high", "unit", "least", "n", "verdict", "rule")
    rows = [vars(verdict) | {"suite": path.parents[1].name} for path, verdict in found]
    return json.dumps([{name: row[name] for name in names} for row in rows], indent=2) + "\n"


def readme_tables(published: Path) -> dict[str, dict[str, str]]:
    """The tables of each README, as Markdown, by the name that its markers give them."""
    return {
        "README.md": {"claims": "\n".join(_claims(verdicts(published)))},
        "outputs/README.md": {
            "laptop": "\n".join(_laptop(load_records(published / "laptop/runs"))),
            "plans": "\n".join(_plans(published)),
            "speed": "\n".join(_speed(published)),
        },
    }


def with_tables(text: str, tables: dict[str, str]) -> str:
    """The text with what stands between `<!-- table: NAME -->` and `<!-- end -->` replaced by the table of that name.

    Raises:
      EffnetlibError: a table has no place in the text.
    """
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(text):
            raise EffnetlibError(f"no README has a place for the table {name}: <!-- table: {name} --> … <!-- end -->")
        text = marked.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    return text


LAPTOP_RUNS = ("rmsprop-64", "lars-64", "rmsprop-256", "lars-256", "one-device", "eight-devices", "one-device-bfloat16")
README_PLANS = (
    ("b2-4096-rmsprop", "v3:8x8x1"),
    ("b2-32768-lars", "v3:32x16x1"),
    ("b5-4096-rmsprop", "v3:8x8x1"),
    ("b5-32768-lars", "v3:32x16x1"),
    ("b5-65536-lars", "v3:32x16x1"),
    ("b0-1024-lars", "v5e:2x4"),
)


def _laptop(records: list[Record]) -> Iterator[str]:
    by_name = {record.name: record for record in records}
    yield "| run | epochs | steps | devices | peak top-1 | final top-1 | images/s |"
    yield "|---|---|---|---|---|---|---|"
    for name in LAPTOP_RUNS:
        recipe, result = by_name[name].recipe, by_name[name].result
        yield (
            f"| `{name}` | {recipe.epochs:g} | {recipe.total_steps} | {by_name[name].environment['devices']} "
            f"| {100 * result['peak_top1']:.1f} % | {100 * result['final_top1']:.1f} % | {result['images_per_second']:.0f} |"
        )


def _claims(found: list[tuple[Path, Verdict]]) -> Iterator[str]:
    if not found:
        yield "No claim is judged yet: that takes the whole of the CIFAR-10 suite, whose runs are not all done."
        return
    yield "| claim | protocol | measured here (95 % interval) | seeds | verdict |"
    yield "|---|---|---|---|---|"
    for path, each in found:
        page = f"outputs/published/{path.parents[1].name}/{path.stem}.html"
        measured = "-"
        if each.effect is not None:
            interval = f"{each.low:+.1f} to {each.high:+.1f}"
            measured = f"{each.measured}: {each.effect:+.1f} {each.unit} ({interval})"
        shown = f"[{SYMBOLS[each.verdict]} {each.verdict}]({page})"
        yield f"| {each.claim} | {each.protocol} | {measured} | {each.n or '-'} | {shown} |"


def _plans(published: Path) -> Iterator[str]:
    plans = load_plans(published / "plans")
    yield "| recipe | slice | GiB per device | step, ms | all-reduce | images/s | minutes |"
    yield "|---|---|---|---|---|---|---|"
    for preset, topology in README_PLANS:
        plan = find_plan(plans, Recipe.preset(preset), topology)
        yield (
            f"| `{preset}` | {topology} | {plan.hbm_bytes / GIB:.2f} | {1e3 * plan.step_seconds:.1f} "
            f"| {plan.all_reduce_share:.1%} | {plan.images_per_second:,.0f} | {plan.minutes:.0f} |"
        )


def _speed(published: Path) -> Iterator[str]:
    yield "| side by side | median | least to greatest | aim |"
    yield "|---|---|---|---|"
    for each in speed(published):
        aims = (("at least", each["at_least"]), ("at most", each["at_most"]))
        aim = ", ".join(f"{word} {value:g}" for word, value in aims if value is not None)
        met = {True: ": met", False: ": **missed**", None: ""}[each["met"]]
        figures = (
            f"{each['median']:.3g} | {each['min']:.3g} to {each['max']:.3g}" if each["values"] else f"{each['note']} | "
        )
        unit = "" if each["unit"] == "times" else f", {each['unit']}"
        yield f"| {each['name']}{unit} | {figures} | {aim}{met} |"


def _copy_notebook(source: Path, to: Path) -> None:
    """Without the folders of the machine that executed it, which papermill writes down."""
    notebook = read_notebook(source)
    stated = notebook.metadata.get("papermill", {})
    stated.update({key: Path(stated[key]).name for key in ("input_path", "output_path") if key in stated})
    nbformat.write(notebook, to)


def _copy(source: Path, to: Path, thinned: bool = False) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, to)
    if thinned:
        rows = source.read_text().splitlines(keepends=True)
        steps = set([row for row in rows if '"kind": "train"' in row][::10])
        to.write_text("".join(row for row in rows if '"kind": "train"' not in row or row in steps))


if __name__ == "__main__":
    try:
        print(publish(outputs_folder() / sys.argv[1]) if sys.argv[1:] else refresh())
    except EffnetlibError as error:
        sys.exit(f"publish: {error}")
