"""Every HTML page, opened in headless Chromium: at desktop and phone width, light, dark and on paper."""

import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright
from test_publish import verdict
from test_report import made_up, notebook, outcome

from effnetlib.reports.html import render_html, render_index
from effnetlib.reports.tables import results, show, styled

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here (Debian: apt-get install chromium)")

PUBLISHED = Path(__file__).parents[2] / "outputs/published"
PAGES = sorted(PUBLISHED.rglob("*.html"))
WIDTHS = {"desktop": 1280, "phone": 360}
READ = {"the companion page": "index.html", "a suite": "laptop/index.html", "a report": "cifar10/02_large_batch.html",
        "a run": "photos/photos.html"}  # fmt: skip
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


def barriers(browser, path: Path, scheme: str) -> list[str]:
    """What axe finds: contrast, order of headings, landmarks, names, what the keyboard cannot reach. Tables unfold, and
    code does not."""
    page = browser.new_page(viewport={"width": WIDTHS["phone"], "height": 900}, color_scheme=scheme)
    page.goto(path.as_uri())
    page.locator("details:not(.code)").evaluate_all("all => all.forEach(each => each.open = true)")
    found = Axe().run(page).response["violations"]
    page.close()
    return [f"{each['id']}: {each['nodes'][0]['html'][:120]}" for each in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", READ.values(), ids=READ)
def test_a_page_can_be_read_by_everybody(browser, name, scheme):
    assert barriers(browser, PUBLISHED / name, scheme) == []


def test_the_contents_follow_on_a_wide_screen_and_lead_to_every_section(browser):
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto((PUBLISHED / "index.html").as_uri())
    links = page.locator(".contents a")
    assert links.count() == page.locator("h2").count() > 2
    links.last.click()
    place = page.locator("h2").last.bounding_box()
    assert 0 <= place["y"] < 900 and 0 <= links.first.bounding_box()["y"] < 900  # both are on the screen
    page.set_viewport_size({"width": WIDTHS["phone"], "height": 900})
    assert not links.first.is_visible() and page.get_by_text("Contents", exact=True).is_visible()
    page.close()


def test_the_keyboard_comes_first_to_a_link_that_skips_to_the_text(browser):
    page = browser.new_page()
    page.goto((PUBLISHED / "cifar10/02_large_batch.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.close()


def test_on_paper_tables_are_unfolded_and_there_are_no_contents_and_no_code(browser):
    page = browser.new_page(viewport={"width": 700, "height": 900}, color_scheme="dark")
    page.goto((PUBLISHED / "index.html").as_uri())
    tables = page.locator("details table")
    assert tables.count() >= 2 and not any(table.is_visible() for table in tables.all())
    page.emulate_media(media="print")
    assert all(table.is_visible() for table in tables.all())
    assert not page.locator(".contents").is_visible() and not page.locator("details.code").first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    page.close()


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
        nbformat.v4.new_output("display_data", {"text/html": styled(results(records)).to_html()}),
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
    assert [complaint for path in pages for complaint in complaints(browser, path)] == []
    assert [barrier for path in pages for barrier in barriers(browser, path, "dark")] == []


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
    page.write_text("<title>Grey</title><main><h1>Title</h1><h3 style='color: #aaa'>a level is left out</h3></main>")
    found = "\n".join(barriers(browser, page, "light"))
    for wrong in ("color-contrast: <h3", "heading-order: <h3", "html-has-lang"):
        assert wrong in found
