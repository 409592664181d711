"""Every HTML page, opened in headless Chromium: at desktop and phone width, light and dark."""

import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import nbformat
import pytest
from playwright.sync_api import sync_playwright
from publish import companion
from test_publish import verdict
from test_report import made_up, notebook, outcome

from effnetlib.reports.html import render_html, render_index
from effnetlib.reports.tables import results, show

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here (Debian: apt-get install chromium)")

PUBLISHED = Path(__file__).parents[2] / "outputs/published"
PAGES = sorted(PUBLISHED.rglob("*.html"))
WIDTHS = {"desktop": 1280, "phone": 390}
LARGEST = 2_000_000  # bytes of a page


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def complaints(browser, path: Path) -> list[str]:
    """What is wrong with a page, a sentence each."""
    found = []
    page = browser.new_page()
    page.on("console", lambda message: found.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("requestfailed", lambda request: found.append(f"could not be loaded: {request.url[:90]}"))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:")) else found.append(f"left the page: {request.url}")
        ),
    )
    page.goto(path.as_uri())
    for image in page.locator("img").all():
        if not image.evaluate("image => image.decode().then(() => image.naturalWidth, () => 0)"):
            found.append(f"a broken image: {image.get_attribute('alt')}")
        if not (image.get_attribute("alt") or "").strip():
            found.append("an image without alternative text")
    if "Traceback (most recent call last)" in page.content():
        found.append("a traceback")
    for link in page.locator("a[href]").evaluate_all("links => links.map(link => link.href)"):
        target = Path(unquote(urlsplit(link).path))
        if link.startswith("file:") and not target.exists():
            found.append(f"a link to nothing: {target}")
    for name, width in WIDTHS.items():
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
                found.append(f"{name}, {scheme}: {wide} pixels wide")
    page.close()
    if path.stat().st_size >= LARGEST:
        found.append(f"{path.stat().st_size / 1e6:.1f} MB large")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(PUBLISHED)))
def test_a_published_page_is_whole_and_stays_on_the_page(browser, path):
    assert complaints(browser, path) == []


def test_pages_rendered_now_are_whole_and_stay_on_the_page(browser):
    records = [made_up(f"a-run-of-a-rather-long-name-{seed}", seed=seed) for seed in range(3)]
    figure, _ = plt.subplots(figsize=(12, 4))
    image = show(figure, "suite/figures/empty.png", "nothing at all")
    outputs = [
        nbformat.v4.new_output("display_data", {"image/png": image._repr_mimebundle_()[0]["image/png"]},
                               metadata={"image/png": {"alt": image.alt}}),
        nbformat.v4.new_output("display_data", {"text/html": results(records).to_html()}),
        nbformat.v4.new_output("display_data", verdict()._repr_mimebundle_()),
        nbformat.v4.new_output("stream", name="stdout", text="a line without end " * 50),
    ]  # fmt: skip
    cells = [
        nbformat.v4.new_markdown_cell("# A title\n\n`" + "a_long_name_" * 20 + "`"),
        nbformat.v4.new_code_cell("x = 1  # " + "long " * 60, outputs=outputs),
    ]
    folder = outcome("03_schedules", run=False)
    notebook("03_schedules", *cells)
    pages = [render_html(folder, "03_schedules"), render_index(folder, "suite")]
    suites = folder.parent.parent / "notebooks/suites"
    suites.mkdir(parents=True)
    (suites / "suite.yaml").touch()
    (suites.parent / "12_learning_rates.ipynb").touch()
    published = folder.parent / "published"
    shutil.copytree(folder, published / "suite")
    (published / "index.html").write_text(companion(published))
    pages += [published / "index.html"]
    assert [complaint for path in pages for complaint in complaints(browser, path)] == []


def test_what_is_wrong_with_a_page_is_found(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<img src='data:image/png;base64,AAAA' alt='broken'><img src='https://example.invalid/x.png'>"
        "<script>console.error('made up')</script><div style='width: 700px'>wide</div><a href='none.html'>none</a>"
        "<pre>Traceback (most recent call last)</pre>" + " " * LARGEST
    )
    found = "\n".join(complaints(browser, page))
    for wrong in ("a broken image: broken", "left the page: https://example.invalid/x.png", "without alternative text", "console: made up",
                  "phone, dark: 7", "a link to nothing", "a traceback", "2.0 MB large"):  # fmt: skip
        assert wrong in found
    assert "desktop, light" not in found
