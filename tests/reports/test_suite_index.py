"""The index page of a suite: a card per report, and a table of runs that a reader sorts and filters."""

import base64
import re
import shutil

import nbformat
import pytest
from playwright.sync_api import sync_playwright
from test_publish import verdict
from test_report import PIXEL, made_up, notebook, outcome

from effnetlib.reports.html import render_index

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def shown(**data):
    """A cell's output, with a figure's alternative text."""
    names = {"svg": "image/svg+xml", "png": "image/png", "jpeg": "image/jpeg", "markdown": "text/markdown"}
    data = {names[name]: value for name, value in data.items()}
    return nbformat.v4.new_output("display_data", data, metadata={kind: {"alt": f"a {kind}"} for kind in data})


def report(name, *outputs, tags=()):
    """A suite with one executed report, of one cell."""
    folder = outcome(name, run=False)
    cell = nbformat.v4.new_code_cell(outputs=list(outputs), metadata={"tags": list(tags)})
    notebook(name, nbformat.v4.new_markdown_cell(f"# Title of {name}"), cell)
    return folder


def test_a_card_has_the_first_figure_and_the_verdicts_or_else_the_answer():
    claim = nbformat.v4.new_output("display_data", verdict()._repr_mimebundle_())
    report("02_claim", claim, shown(svg="<svg/>"), shown(png=PIXEL), shown(markdown="Scale: 3 runs"), tags=["answer"])
    answer, scale = shown(markdown="**The best is `a`.**"), shown(markdown="Scale: 3 runs")
    report("07_speed", answer, scale, shown(png=PIXEL), tags=["answer"])
    folder = report("11_photographs", shown(jpeg="AAAA"))
    page = render_index(folder, "suite").read_text()
    cards = re.findall(r"<li>.*?</li>", page, re.S)
    assert (
        '<strong class="supported">✓ supported</strong>: warm-up is needed at a large batch, by LARS (tuned): with minus'
        in cards[0]
    )
    drawn = base64.b64encode(b"<svg/>").decode()
    assert f'src="data:image/svg+xml;base64,{drawn}" alt="a image/svg+xml"' in cards[0] and "Scale" not in cards[0]
    assert "<p>The best is a.</p>" in cards[1] and f"base64,{PIXEL}" in cards[1] and "Scale" not in cards[1]
    assert 'src="data:image/jpeg;base64,AAAA" alt="a image/jpeg"' in cards[2] and "<p>" not in cards[2]


def test_a_run_has_a_curve_of_its_top_1_on_the_scale_of_all_and_one_that_stopped_says_what_happened():
    made_up("whole")  # 0.25 at epoch 1, 0.5 at epoch 2
    stopped = made_up("stopped", status="preempted")
    stopped.rewind(1)
    stopped.error, stopped.timing = None, {}
    stopped.save()
    page = render_index(stopped.directory.parents[1], "suite").read_text()
    curves = re.findall(r'aria-label="([^"]+)"><polyline points="([^"]+)"/><circle cx="82" cy="([^"]+)"', page)
    assert [points.split() for _, points, _ in curves] == [["82.0,22.0"], ["82.0,2.0", "42.0,22.0"]]
    assert curves[1][0] == "top-1 from 25.0 to 50.0 %, 2 evaluations" and [end for *_, end in curves] == ["22.0", "2.0"]
    assert "1 of 2 runs completed" in page and page.count("<li>") == 2  # no report, and one run that stopped
    assert "<strong>stopped</strong>: Stopped on request at epoch 1 of 10. Top-1 reached 25.0 %" in page


def test_many_evaluations_are_thinned_and_the_last_is_drawn():
    record = made_up("long")
    for step in range(3, 400):
        record.log(kind="eval", step=step, epoch=step, nseen=360, ema_top1=0.5)
    page = render_index(record.directory.parents[1], "suite").read_text()
    points = re.search('points="([^"]+)"', page)[1].split()
    assert len(points) == 40 and points[0] == "82.0,2.0"


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here (Debian: apt-get install chromium)")
def test_the_runs_are_sorted_and_filtered_by_keyboard_and_are_whole_without_a_script():
    for name, rate in (("lars-9", 900.0), ("lars-10", 12_000.0), ("rmsprop-1", 50.0)):
        record = made_up(name)
        record.result["images_per_second"] = rate
        record.save()
    begun = made_up("begun", status="running")
    begun.result = {}
    begun.save()
    path = render_index(begun.directory.parents[1], "suite")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM) as browser:
        plain = browser.new_context(java_script_enabled=False).new_page()
        plain.goto(path.as_uri())
        assert plain.locator("tbody tr").count() == 4 and plain.locator("input, th button").count() == 0
        page = browser.new_page()
        page.goto(path.as_uri())

        def names():
            return page.locator("tbody tr:visible > th").all_inner_texts()

        assert names() == ["begun", "lars-10", "lars-9", "rmsprop-1"]
        page.get_by_role("button", name="images per second").focus()
        for key, order, said in (
            ("Enter", ["lars-10", "lars-9", "rmsprop-1", "begun"], "descending"),  # by number; what has none comes last
            ("Space", ["rmsprop-1", "lars-9", "lars-10", "begun"], "ascending"),
        ):
            page.keyboard.press(key)
            assert names() == order
            assert page.locator("th[aria-sort]").get_attribute("aria-sort") == said
        page.get_by_role("button", name="run", exact=True).click()
        assert names() == ["begun", "lars-9", "lars-10", "rmsprop-1"]
        page.get_by_label("Show runs with").fill("LARS")
        assert names() == ["lars-9", "lars-10"] and page.get_by_role("status").inner_text() == "2 of 4"
