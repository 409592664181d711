"""From records to what people read: tables, curves, figures, HTML reports and the index page of a suite."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jinja2
import markupsafe
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
from IPython.display import Image
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from effnetlib.errors import EffnetlibError
from effnetlib.records import Record, load_records, outputs_folder, write_atomically

TEMPLATES = Path(__file__).parent / "templates"


def suite_records(suite: str, *names: str) -> list[Record]:
    """The completed records of a suite (a folder under outputs/), all of them or those named, in the order given.

    Raises:
      EffnetlibError: the suite has no completed record, or lacks one that is named.
    """
    folder = outputs_folder() / suite / "runs"
    completed = {record.name: record for record in load_records(folder) if record.status == "completed"}
    if not completed:
        raise EffnetlibError(f"{folder} holds no completed record: run `effnetlib run notebooks/suites/{suite}.yaml`")
    for name in names:
        if name not in completed:
            raise EffnetlibError(f"{folder} holds no completed record of {name!r}, only of {', '.join(completed)}")
    return [completed[name] for name in names or completed]


def results(records: Sequence[Record]) -> pd.DataFrame:
    """A row a run: its name (the index), every recipe field, and every value of timing, environment and result."""
    rows = [asdict(r.recipe) | {"peak_lr": r.recipe.peak_lr} | r.environment | r.timing | r.result for r in records]
    return pd.DataFrame(rows, index=pd.Index([record.name for record in records], name="run"))


def curves(records: Sequence[Record], kind: str) -> pd.DataFrame:
    """The "train" or "eval" rows of several runs in one long table, with the columns `run` and every recipe field."""
    frames = []
    for record in records:
        frame = record.frame(kind)
        names = [name for name in asdict(record.recipe) if name not in frame.columns]
        frames.append(frame.assign(run=record.name, **{name: getattr(record.recipe, name) for name in names}))
    return pd.concat(frames, ignore_index=True)


def conditions(records: Sequence[Record]) -> str:
    """One sentence on where and with what the records were made, for the notebooks to print."""
    environments = [record.environment for record in records]
    parts = [
        ", ".join(sorted({str(environment[name]) for environment in environments}))
        for name in ("host", "device_kind", "python", "jax", "flax")
    ]
    seeds = sorted({record.recipe.seed for record in records})
    return (
        f"{len(records)} runs on {parts[0]} (devices: {parts[1]}), Python {parts[2]}, jax {parts[3]}, flax {parts[4]}; "
        f"seeds {', '.join(map(str, seeds))}."
    )


def show(figure, path: Path | str, alt: str) -> Image:
    """A figure as an image with alternative text, also written to a PNG file.

    Args:
      figure: a matplotlib figure or axes, or a seaborn grid.
      path: of the file, relative to the outputs folder.
      alt: what the figure shows, for who cannot see it.
    """
    figure = getattr(figure, "figure", figure)
    path = outputs_folder() / path
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)  # or the notebook would show it a second time, without the text
    return Image(data=path.read_bytes(), alt=alt)


def render_html(directory: Path, name: str, error: str = "") -> Path:
    """Renders the executed notebook `name` of a suite's folder to one self-contained HTML file, the code folded.

    Args:
      directory: the suite's folder; the notebook is ``executed/NAME.ipynb`` in it, and ``NAME.html`` is written.
      error: why it failed, for the banner; found in the record or in the notebook when empty.

    Returns:
      The HTML file.
    """
    executed = directory / "executed" / f"{name}.ipynb"
    notebook = nbformat.read(executed, as_version=4)
    exporter = HTMLExporter(template_name="report", extra_template_basedirs=[str(TEMPLATES)])
    page = {"title": _title(notebook, executed), "css": _css(), "source": executed.name}
    page["error"] = error or _error_in(directory / "runs" / name, notebook)
    body, _ = exporter.from_notebook_node(notebook, resources={"report": page})
    write_atomically(directory / f"{name}.html", body)
    return directory / f"{name}.html"


def _error_in(run: Path, notebook) -> str:
    """What the run's record says went wrong, or the notebook's error output; empty if all went well."""
    if (run / "run.json").exists():
        record = Record.load(run)
        return "" if record.status == "completed" else record.error or f"the record says {record.status}"
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return next((f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"), "")


def render_index(directory: Path, name: str) -> Path:
    """Writes the index page of a suite's folder: status, key figures and links. Returns its path."""
    records = load_records(directory / "runs")
    titles = {
        path.stem: _title(nbformat.read(path, as_version=4), path)
        for path in sorted(directory.glob("executed/*.ipynb"))
        if (directory / f"{path.stem}.html").exists()
    }
    names = {record.name for record in records}
    runs = [{"record": record, "link": f"{record.name}.html" if record.name in titles else None} for record in records]
    reports = [{"link": f"{stem}.html", "title": title} for stem, title in titles.items() if stem not in names]
    hosts = sorted({record.environment["host"] for record in records if record.environment})
    template = jinja2.Environment(autoescape=True).from_string((TEMPLATES / "suite.html.j2").read_text())
    page = template.render(name=name, runs=runs, reports=reports, hosts=hosts, css=markupsafe.Markup(_css()))
    write_atomically(directory / "index.html", page)
    return directory / "index.html"


def _title(notebook, path: Path) -> str:
    """The notebook's first heading."""
    headings = (line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
    return next((line.lstrip("# ") for line in headings if line.startswith("# ")), path.stem)


def _css() -> str:
    return (TEMPLATES / "style.css").read_text() + HtmlFormatter().get_style_defs(".highlight")
