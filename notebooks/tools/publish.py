"""What git keeps of runs: a suite's records and reports, the page that sets them beside the paper, and the READMEs' tables.

    python notebooks/tools/publish.py [SUITE]

`make publish` runs it. SUITE is a folder's name under outputs/; without it, only the page and the tables are written again.
"""

import base64
import io
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import jinja2
import markupsafe
import matplotlib.pyplot as plt
import nbformat

from effnetlib.errors import EffnetlibError, FailedError
from effnetlib.planning.plan import find_plan, load_plans
from effnetlib.planning.topology import GIB
from effnetlib.recipe import Recipe
from effnetlib.reports import html
from effnetlib.reports.claims import CONTRADICTED, SUPPORTED, SYMBOLS, UNDECIDED
from effnetlib.reports.html import css, read_notebook, render_index, title
from effnetlib.reports.style import SETTINGS
from effnetlib.runs.files import write_atomically
from effnetlib.runs.paths import outputs_folder, published_folder
from effnetlib.runs.record import Record, load_records
from effnetlib.suites.outcome import Outcome

LARGE_SUITE = 100  # runs; of more than these, one training step of ten is published, and every evaluation
TEMPLATE = Path(__file__).parent / "companion.html.j2"


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
    """Writes the companion page, which it returns, the claims as JSON and as a figure, and the READMEs' tables, from all that is
    published."""
    published = published_folder()
    _mend(published)
    for name, tables in readme_tables(published).items():
        readme = published.parent.parent / name
        write_atomically(readme, with_tables(readme.read_text(), tables))
    write_atomically(published / "claims.json", claims_json(published))
    write_atomically(published / "claims.svg", draw_claims(verdicts(published)))
    write_atomically(published / "index.html", companion(published))
    return published / "index.html"


def verdicts(published: Path) -> list[dict]:
    """What the published reports say of each claim under each protocol: the fields of `effnetlib.reports.claims.Verdict`, and
    `suite` and `report`. Where several suites have tested a claim, that with the most seeds. What a suite's report cannot test is
    left out where the same report could test anything in another suite."""
    found = []
    for path in sorted(published.glob("*/executed/*.ipynb")):
        where = {"suite": path.parent.parent.name, "report": path.stem}
        found += [asdict(each) | where for each in html.verdicts(read_notebook(path))]
    tested = {each["report"]: each["suite"] for each in found if each["n"]}
    best = {}
    for each in sorted(found, key=lambda row: row["n"]):
        if each["n"] or tested.get(each["report"], each["suite"]) == each["suite"]:
            best[each["claim"], each["protocol"]] = each
    return sorted(best.values(), key=lambda row: (row["report"], found.index(row)))


def claims_json(published: Path) -> str:
    """A row per claim and protocol: its suite, the effect with its 95 % interval, n, the verdict and its rule."""
    names = ("claim", "protocol", "suite", "measured", "effect", "low", "high", "unit", "least", "n", "verdict", "rule")
    return json.dumps([{name: each[name] for name in names} for each in verdicts(published)], indent=2) + "\n"


WIDEST_AXIS = 10
COLOURS = {SUPPORTED: "#1a7f37", CONTRADICTED: "#b3261e", UNDECIDED: "#6b6b6b"}


def draw_claims(found: list[dict]) -> str:
    """A forest plot, as SVG: a row per claim and protocol that was tested, its effect with the 95 % interval, and the verdict
    beside it. The claim holds where the interval lies in the shaded part of its row."""
    rows = [each for each in found if each["effect"] is not None]
    # An interval that leaves the axis ends in an arrow.
    points = [abs(each[end]) for each in rows for end in ("low", "high") if each["unit"] == "points"]
    reach = min(WIDEST_AXIS, 1.1 * max(points, default=WIDEST_AXIS))
    with plt.style.context(["default", SETTINGS | {"font.size": 9}]):
        figure, axes = plt.subplots(figsize=(10, 0.9 + 0.52 * len(rows)), layout="constrained")
        for place, each in enumerate(rows):
            colour = COLOURS[each["verdict"]]
            side = (each["least"] + reach) / (2 * reach)
            axes.axhspan(place - 0.36, place + 0.36, side, 1, color="#eaf3ec", zorder=0)
            axes.plot([each["low"], each["high"]], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(each["effect"], place, "o", color=colour, markersize=7)
            for end, beyond, arrow in ((-reach, each["low"] < -reach, "<"), (reach, each["high"] > reach, ">")):
                if beyond:
                    axes.plot(end, place, arrow, color=colour, markersize=8, clip_on=False)
            text = f"{SYMBOLS[each['verdict']]} {each['verdict']}  (n = {each['n']})"
            axes.annotate(text, (1.03, place), xycoords=("axes fraction", "data"), va="center", color=colour)
        names = [textwrap.fill(f"{each['claim']} ({each['protocol']})", 70) for each in rows]
        labels = [f"{name}\n{each['measured']}, {each['unit']}" for name, each in zip(names, rows, strict=True)]
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.axvline(0, color="#888888", linewidth=0.8, linestyle="--")
        axes.set(
            xlim=(-reach, reach),
            ylim=(len(rows) - 0.5, -0.5),
            xlabel="effect with its 95 % interval, in points of top-1 or percent of the time; the claim holds in the shaded part",
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0, pad=12)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", facecolor="white", metadata={"Date": None})
    plt.close(figure)
    return drawn.getvalue()


def companion(published: Path) -> str:
    """The page of the published folder: each claim, the paper's figure, ours, the verdict, and where to look."""
    suites = [
        {
            "name": path.parent.name,
            "reports": [(name.stem, _title(name)) for name in sorted(path.parent.glob("executed/*.ipynb"))],
            "records": load_records(path.parent / "runs"),
        }
        for path in sorted(published.glob("*/index.html"))
    ]
    plans = sorted(load_plans(published / "plans"), key=lambda plan: (plan.variant, plan.global_batch_size))
    figure = base64.b64encode(draw_claims(verdicts(published)).encode()).decode()
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text())
    return template.render(
        verdicts=verdicts(published), suites=suites, plans=plans, gib=GIB, css=markupsafe.Markup(css()), figure=figure
    )


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


def _claims(found: list[dict]) -> Iterator[str]:
    if not found:
        yield "No claim is judged yet: that takes the whole of the CIFAR-10 suite, whose runs are not all done."
        return
    yield "| claim | protocol | measured here (95 % interval) | seeds | verdict |"
    yield "|---|---|---|---|---|"
    for each in found:
        link = (
            f"[{SYMBOLS[each['verdict']]} {each['verdict']}](outputs/published/{each['suite']}/{each['report']}.html)"
        )
        measured = "-"
        if each["effect"] is not None:
            effect, low, high = (f"{each[name]:+.1f}" for name in ("effect", "low", "high"))
            measured = f"{each['measured']}: {effect} {each['unit']} ({low} to {high})"
        yield f"| {each['claim']} | {each['protocol']} | {measured} | {each['n'] or '-'} | {link} |"


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
    """The ratios of `make bench`, with those that a machine with a GPU measured, all else that has an aim, and what has not run."""
    yield "| side by side | median | least to greatest | aim |"
    yield "|---|---|---|---|"
    here, on_gpu = (
        {each["name"]: each for each in json.loads((published / record).read_text())["measurements"]}
        for record in ("bench.json", "bench-gpu.json")
    )
    for name, each in here.items():
        if each["unit"] != "times" and each["met"] is None:
            continue
        if not each["values"]:
            each = on_gpu.get(name, each)
        aims = (("at least", each["at_least"]), ("at most", each["at_most"]))
        aim = ", ".join(f"{word} {value:g}" for word, value in aims if value is not None)
        met = {True: ": met", False: ": **missed**", None: ""}[each["met"]]
        figures = (
            f"{each['median']:.3g} | {each['min']:.3g} to {each['max']:.3g}" if each["values"] else f"{each['note']} | "
        )
        unit = "" if each["unit"] == "times" else f", {each['unit']}"
        yield f"| {each['name']}{unit} | {figures} | {aim}{met} |"


def _title(path: Path) -> str:
    return title(read_notebook(path), path)


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
