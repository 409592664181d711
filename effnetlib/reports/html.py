"""Renders executed notebooks to HTML: one self-contained page per notebook, and an index page per suite."""

import base64
import re
from collections.abc import Iterable
from pathlib import Path

import jinja2
import markupsafe
import nbformat
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from effnetlib.reports.claims import MIME, SYMBOLS, Verdict, seeds_to_run
from effnetlib.reports.tables import what_happened
from effnetlib.runs.files import write_atomically
from effnetlib.runs.record import load_records
from effnetlib.suites.outcome import Outcome

TEMPLATES = Path(__file__).parent / "templates"
FIGURES = {"image/svg+xml", "image/png", "image/jpeg"}


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """Reads a notebook, and gives an id to each cell without one. nbformat and nbconvert need the ids."""
    notebook = nbformat.reader.reads(path.read_text())
    notebook.nbformat_minor = max(5, notebook.nbformat_minor)
    for number, cell in enumerate(notebook.cells):
        cell.setdefault("id", f"cell-{number}")
    return notebook


def render_html(directory: Path, name: str, home: str = "index.html") -> Path:
    """Renders ``executed/NAME.ipynb`` of a suite's folder to a self-contained ``NAME.html``. Returns its path.
    The page links to `home`, if any. The page of a failed notebook has a banner with the error."""
    executed = directory / "executed" / f"{name}.ipynb"
    notebook = read_notebook(executed)
    first, *cells = (cell for cell in notebook.cells if cell.id not in ("badges", "setup"))
    if first.cell_type == "markdown":  # the badges are images on the network
        first.source = re.sub(r"(?s)<!-- badges -->.*?<!-- / -->\n*", "", first.source)
    cells.sort(key=lambda cell: "answer" not in cell.metadata.get("tags", ()))  # answers go below the title
    notebook.cells = _code_at_the_end([first, *cells])
    exporter = HTMLExporter(template_name="report", extra_template_basedirs=[str(TEMPLATES)])
    page = {"title": title(notebook, executed), "css": css(), "source": executed.name, "home": home}
    page["error"] = Outcome.read(directory, name).error
    body, _ = exporter.from_notebook_node(notebook, resources={"report": page})
    write_atomically(directory / f"{name}.html", _with_contents(body))
    return directory / f"{name}.html"


def _with_contents(page: str) -> str:
    """Adds a table of contents to a page of more than two sections."""
    sections = re.findall(r'<h2 id="([^"]*)">(.*?)<a class="anchor-link"', page)
    links = "".join(f'<li><a href="#{place}">{name}</a></li>' for place, name in sections)
    contents = f'<nav class="contents" aria-label="Contents"><details><summary>Contents</summary><ul>{links}</ul></details></nav>'
    return page.replace("<main", f"{contents}\n<main", 1) if len(sections) > 2 else page


def _code_at_the_end(cells: Iterable[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Moves the code of each section into one cell at its end, so that nothing stands between the results."""
    moved, code = [], []
    end = nbformat.v4.new_markdown_cell("# end", id="end")
    for cell in [*cells, end]:
        if cell.cell_type == "code":
            code.append(cell.source)
            cell.source = ""
        elif code and re.search(r"(?m)^#+ ", cell.source):
            moved.append(nbformat.v4.new_code_cell("\n\n".join(filter(None, code)), id=f"code-{cell.id}"))
            code = []
        moved.append(cell)
    return moved[:-1]


def verdicts(notebook: nbformat.NotebookNode) -> list[Verdict]:
    """The verdicts stored in an executed notebook."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return [Verdict(**output.data[MIME]) for output in outputs if MIME in output.get("data", {})]


def _card(notebook: nbformat.NotebookNode) -> dict:
    """What the card of a report shows: verdicts, or else the first sentence of the answer; and the first figure with its text."""
    card = {"verdicts": verdicts(notebook)}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "text/markdown" in data and "answer" in cell.metadata.get("tags", ()):
                card.setdefault("said", re.sub("[*`]", "", data["text/markdown"]))
            for kind in FIGURES & data.keys():
                drawn = base64.b64encode(data[kind].encode()).decode() if kind == "image/svg+xml" else data[kind]
                card.setdefault("figure", (f"data:{kind};base64,{drawn}", output.metadata.get(kind, {}).get("alt", "")))
    return card


def render_index(directory: Path, name: str) -> Path:
    """Writes the index page of a suite's folder: a card per report, and a table of the runs. Returns its path."""
    records = {record.name: record for record in load_records(directory / "runs")}
    shown = {"runs": [], "reports": [], "name": name, "css": markupsafe.Markup(css()), "symbols": SYMBOLS}
    for entry in sorted({*records, *(path.stem for path in directory.glob("executed/*.json"))}):
        record, outcome = records.get(entry), Outcome.read(directory, entry)
        link = f"{entry}.html" if (directory / f"{entry}.html").exists() else None
        row = {"name": entry, "link": link, "error": outcome.error, "title": entry, "record": record}
        if outcome.is_run:
            status = record.status if record else "not started"
            row["status"] = "failed" if row["error"] and status != "preempted" else status
            row["said"] = what_happened(record) if record and record.status != "completed" else row["error"]
        elif (source := directory / "executed" / f"{entry}.ipynb").exists():
            notebook = read_notebook(source)
            row |= {"title": title(notebook, source), **_card(notebook)}
        shown["runs" if outcome.is_run else "reports"].append(row)
    shown["missing"] = seeds_to_run([verdict for row in shown["reports"] for verdict in row.get("verdicts", ())])
    template = jinja2.Environment(autoescape=True).from_string((TEMPLATES / "suite.html.j2").read_text())
    write_atomically(directory / "index.html", template.render(shown))
    return directory / "index.html"


def title(notebook, path: Path) -> str:
    """The notebook's first heading."""
    headings = (line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
    return next((line.lstrip("# ") for line in headings if line.startswith("# ")), path.stem)


def css() -> str:
    """The style of every page."""
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    return (
        f"{(TEMPLATES / 'style.css').read_text()}{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n"
    )
