"""From executed notebooks to HTML: one self-contained page a notebook, and the index page of a suite."""

from pathlib import Path

import jinja2
import markupsafe
import nbformat
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from effnetlib.records import Record, load_records, write_atomically

TEMPLATES = Path(__file__).parent / "templates"


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
