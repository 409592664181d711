"""From executed notebooks to HTML: one self-contained page a notebook, and the index page of a suite."""

import re
from pathlib import Path

import jinja2
import markupsafe
import nbformat
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from effnetlib.runs.files import write_atomically
from effnetlib.runs.record import load_records
from effnetlib.suites.outcome import Outcome

TEMPLATES = Path(__file__).parent / "templates"


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook, whose cells get ids where they were saved without: nbformat and nbconvert warn of those, and need them."""
    notebook = nbformat.reader.reads(path.read_text())
    notebook.nbformat_minor = max(5, notebook.nbformat_minor)
    for number, cell in enumerate(notebook.cells):
        cell.setdefault("id", f"cell-{number}")
    return notebook


def render_html(directory: Path, name: str) -> Path:
    """Renders the executed notebook `name` of a suite's folder to one self-contained HTML file, the code folded.

    Args:
      directory: the suite's folder; the notebook is ``executed/NAME.ipynb`` in it, and ``NAME.html`` is written.

    Returns:
      The HTML file, with a banner where the notebook failed.
    """
    executed = directory / "executed" / f"{name}.ipynb"
    notebook = read_notebook(executed)
    # What only an open notebook has a use for; and the badges are images from the network.
    notebook.cells = [cell for cell in notebook.cells if cell.id not in ("badges", "setup")]
    for cell in notebook.cells[:1]:
        cell.source = re.sub(r"(?s)<!-- badges -->.*?<!-- / -->\n*", "", cell.source)
    exporter = HTMLExporter(template_name="report", extra_template_basedirs=[str(TEMPLATES)])
    page = {"title": title(notebook, executed), "css": css(), "source": executed.name}
    page["error"] = Outcome.read(directory, name).error
    body, _ = exporter.from_notebook_node(notebook, resources={"report": page})
    # A heading may break at its underscores, or columns would be as wide as the names of their fields.
    body = re.sub(r"(<th\b[^>]*>)([^<]*)", lambda heading: heading[1] + heading[2].replace("_", "_<wbr>"), body)
    write_atomically(directory / f"{name}.html", body)
    return directory / f"{name}.html"


def render_index(directory: Path, name: str) -> Path:
    """Writes the index page of a suite's folder: status, key figures and links. Returns its path."""
    records = {record.name: record for record in load_records(directory / "runs")}
    executed = {path.stem for path in directory.glob("executed/*.json")}
    runs, reports = [], []
    for entry in sorted({*records, *executed}):
        record, became = records.get(entry), Outcome.read(directory, entry)
        page = directory / f"{entry}.html"
        row = {"name": entry, "link": page.name if page.exists() else None, "error": became.error}
        if became.is_run:
            row["error"] = row["error"] or (record.error if record else "")
            row["status"] = "failed" if row["error"] else record.status if record else "not started"
            runs.append(row | {"record": record})
        else:
            source = directory / "executed" / f"{entry}.ipynb"
            row["title"] = title(read_notebook(source), source) if source.exists() else entry
            reports.append(row)
    hosts = sorted({record.environment["host"] for record in records.values() if record.environment})
    template = jinja2.Environment(autoescape=True).from_string((TEMPLATES / "suite.html.j2").read_text())
    page = template.render(name=name, runs=runs, reports=reports, hosts=hosts, css=markupsafe.Markup(css()))
    write_atomically(directory / "index.html", page)
    return directory / "index.html"


def title(notebook, path: Path) -> str:
    """The notebook's first heading."""
    headings = (line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
    return next((line.lstrip("# ") for line in headings if line.startswith("# ")), path.stem)


def css() -> str:
    """The style of every page."""
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    return f"{(TEMPLATES / 'style.css').read_text()}{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n"
