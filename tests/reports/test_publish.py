import json
import os
import re
import shutil

import nbformat
import numpy as np
import pandas as pd
import publish
import pytest
from test_report import made_up, outcome

from effnetlib import EffnetlibError
from effnetlib.errors import FailedError
from effnetlib.reports.claims import warmup
from effnetlib.reports.html import render_html
from effnetlib.reports.published import verdicts
from effnetlib.runs.paths import outputs_folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A published folder and a README of a made-up project."""
    published = tmp_path / "project/outputs/published"
    published.mkdir(parents=True)
    (tmp_path / "project/README.md").write_text("before\n<!-- table: claims -->\n\nold\n\n<!-- end -->\nafter\n")
    monkeypatch.setattr(publish, "published_folder", lambda: published)
    tables = publish.readme_tables
    monkeypatch.setattr(publish, "readme_tables", lambda folder: {"README.md": tables(folder)["README.md"]})
    monkeypatch.setattr(publish, "_laptop", lambda _: [])
    monkeypatch.setattr(publish, "_plans", lambda _: [])
    monkeypatch.setattr(publish, "_speed", lambda _: [])
    monkeypatch.setattr(publish, "companion", lambda _: ("the page", "the figure"))  # the real one takes a kernel
    return published


def verdict(effect=30, seeds=5):
    """A made-up verdict: the usual warm-up is better by so many points, seed by seed."""
    without = 50 + np.arange(float(seeds))
    return warmup(pd.DataFrame({"with": without + effect, "without": without}), "with", "without", "LARS")


def report_of(verdict, name="03_schedules"):
    """A suite with one run and one executed report, which shows a verdict."""
    folder = outcome(name, run=False)
    shown = nbformat.v4.new_output("display_data", data=verdict._repr_mimebundle_())
    cells = [nbformat.v4.new_markdown_cell(f"# Title of {name}"), nbformat.v4.new_code_cell(outputs=[shown])]
    metadata = {"papermill": {"input_path": f"/home/someone/{name}.ipynb", "version": "2"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / f"executed/{name}.ipynb")
    render_html(folder, name)
    return folder


def test_what_is_published_is_records_reports_and_what_they_say(project):
    made_up("lars-64-seed0")
    suite = report_of(verdict())
    (suite / "runs/lars-64-seed0/checkpoints").mkdir()
    (suite / "runs/lars-64-seed0/checkpoints/big").write_text("")
    (suite / "lars-64-seed0.html").write_text("a run's page")
    page = publish.publish(suite)
    kept = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    assert kept == {
        "index.html", "claims.json", "claims.svg", "suite/index.html", "suite/03_schedules.html", "suite/executed/03_schedules.ipynb",
        "suite/executed/03_schedules.json", "suite/runs/lars-64-seed0/run.json", "suite/runs/lars-64-seed0/metrics.jsonl",
    }  # fmt: skip
    assert page == project / "index.html" and page.read_text() == "the page"
    notebook = nbformat.read(project / "suite/executed/03_schedules.ipynb", as_version=4)
    assert notebook.metadata.papermill == {"input_path": "03_schedules.ipynb", "version": "2"}
    readme = (project.parent.parent / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "by LARS | tuned | with minus without: +30.0 points (+30.0 to +30.0) | 5 |" in readme
    assert "| [✓ supported](outputs/published/suite/03_schedules.html) |" in readme
    publish.publish(suite)
    assert (project.parent.parent / "README.md").read_text() == readme
    assert not [path for path in project.iterdir() if path.name.startswith(".")]


def test_of_a_large_suite_one_step_in_ten_is_kept_and_every_evaluation(project, monkeypatch):
    monkeypatch.setattr(publish, "LARGE_SUITE", 1)
    for name in ("a", "b"):
        record = made_up(name)
        rows = [{"kind": "train", "step": step} for step in range(25)] + [{"kind": "eval", "step": 25}]
        (record.directory / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    publish.copy_records(record.directory.parents[1], project / "suite")
    kept = [json.loads(row) for row in (project / "suite/runs/a/metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in kept] == [("train", 0), ("train", 10), ("train", 20), ("eval", 25)]


def claims(suite, name, *verdicts):
    """A suite with an executed report that shows verdicts."""
    (suite / "executed").mkdir(parents=True)
    outputs = [nbformat.v4.new_output("display_data", data=verdict._repr_mimebundle_()) for verdict in verdicts]
    cells = [nbformat.v4.new_markdown_cell(f"# Title of {name}"), nbformat.v4.new_code_cell(outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), suite / f"executed/{name}.ipynb")
    (suite / f"executed/{name}.json").write_text(json.dumps({"run": False, "error": "", "key": ""}))


def test_of_two_suites_that_tested_a_claim_the_one_with_more_seeds_counts(project):
    for suite, seeds in (("first", 5), ("larger", 6), ("untested", 2)):
        top1 = pd.DataFrame({"a": 50 + 0.85 * np.array([-1, 1, 0, 1, -1, 2][:seeds]), "b": 50.0})
        more = [warmup(top1, "a", "c", "momentum")] if suite == "untested" else []
        claims(project / suite, "03_schedules", warmup(top1, "a", "b", "LARS"), *more)
    ((path, found),) = verdicts(project)
    assert (path.parents[1].name, found.n, found.verdict) == ("larger", 6, "undecided")
    (row,) = json.loads(publish.claims_json(verdicts(project)))
    assert {"claim", "protocol", "effect", "low", "high", "unit", "n", "verdict", "rule"} <= set(row)
    assert row["suite"] == "larger" and row["low"] < row["effect"] < row["high"]
    assert row["rule"] == "the 95 % interval of a minus b lies above 0"


def test_the_companion_page_has_a_section_per_claim_its_verdict_and_its_evidence(tmp_path):
    made_up("lars-64-seed0")
    suite = outputs_folder() / "published/suite"
    (outputs_folder() / "suite").rename(tmp_path / "made")
    shutil.copytree(tmp_path / "made", suite)
    (suite / "index.html").touch()
    readme = "## What was not tried\n\nNobody asked.\n\n## Another part\n\nNot this.\n"
    (outputs_folder() / "README.md").write_text(readme)
    top1 = pd.DataFrame({name: base + np.arange(5.0) for name, base in (("a", 50), ("b", 20), ("c", 50), ("wide", 50))})
    top1["wide"] += [20, -20, 0, 20, -20]
    pairs = (("a", "b", "LARS"), ("b", "a", "<momentum>"), ("a", "wide", "RMSProp"), ("a", "none", "LAMB"))
    claims_of = [warmup(top1, *pair) for pair in pairs]
    shutil.rmtree(suite / "executed", ignore_errors=True)
    claims(suite, "03_schedules", *claims_of)
    page, figure = publish.companion(outputs_folder() / "published")
    text = " ".join(re.sub("(?s)<style.*?</style>|<[^>]*>", " ", page).split())
    assert "Of 4 tests of the paper's claims: 1 supported, 1 contradicted, 1 undecided, 1 not testable here." in text
    assert "none on ImageNet, none on a TPU" in text
    assert (
        "Warm-up is needed at a large batch, by LARS (tuned) ¶ ✓ supported At this size the claim holds: a minus b is +30.00"
        in text
    )
    assert "✗ contradicted At this size the opposite holds" in text and "? undecided Our runs leave it open" in text
    assert (
        "– not testable here Our runs cannot test it: there are no runs of none. This test does not say how long"
        in text
    )
    assert "by &lt;momentum&gt;" in page and "<momentum>" not in page
    assert "Nobody asked." in text and "Not this." not in text
    for link in ("suite/03_schedules.html", "suite/executed/03_schedules.ipynb", "suite/index.html"):
        assert f'href="./{link}"' in page
    assert page.count("<main") == page.count("</main>") == 1 and "← index" not in page and str(tmp_path) not in page
    assert page.count('<li><a href="#') == page.count("<h2")
    for said in (">✓ supported<", ">✗ contradicted<", ">? undecided<", ">a minus b, points (n = 5)<"):
        assert said in figure
    assert "not testable" not in figure


def test_without_a_suite_the_tables_are_written_from_what_is_published(project):
    page = publish.publish(report_of(verdict()))
    readme = project.parent.parent / "README.md"
    written = readme.read_text()
    readme.write_text(written.replace("supported", "forgotten"))
    page.unlink()
    assert publish.refresh() == page
    assert readme.read_text() == written and page.exists()


def test_nothing_is_published_of_a_suite_that_failed_or_never_ran(project):
    made_up("lars-64-seed0")
    suite = report_of(verdict())
    publish.publish(suite)
    before = (project / "suite/03_schedules.html").read_bytes()
    (suite / "executed/03_schedules.json").write_text(
        json.dumps({"run": False, "error": "ValueError: made up", "key": ""})
    )
    with pytest.raises(EffnetlibError, match="the report 03_schedules of .* failed: ValueError: made up"):
        publish.publish(suite)
    assert (project / "suite/03_schedules.html").read_bytes() == before
    with pytest.raises(EffnetlibError, match="holds no executed reports: run its suite first"):
        publish.publish(outputs_folder() / "other")


@pytest.mark.parametrize("crash", [False, True], ids=["failure", "crash"])
@pytest.mark.parametrize("step", range(8))
def test_whatever_fails_on_the_way_the_old_one_stays(project, monkeypatch, step, crash):
    """Five copies, the index, the old folder's renaming and the new one's. After a crash nothing is mended until the next time."""
    made_up("lars-64-seed0")
    suite = report_of(verdict())
    publish.publish(suite)

    def content():
        return {path.relative_to(project): path.read_bytes() for path in project.rglob("*") if path.is_file()}

    def failing(function):
        def call(*arguments):
            done.append(function)
            if len(done) == step + 1:
                raise KeyboardInterrupt if crash else OSError("disk full")
            return function(*arguments)

        return call

    monkeypatch.setattr(publish, "render_html", lambda *_: None)  # pages are there, and stay
    before, done, mend = content(), [], publish._mend
    with monkeypatch.context() as patched:
        for name in ("_copy", "_copy_notebook", "render_index"):
            patched.setattr(publish, name, failing(getattr(publish, name)))
        rename = failing(os.rename)
        patched.setattr(publish.Path, "rename", lambda path, to: rename(path, to))
        patched.setattr(publish, "_mend", lambda published: None if crash else mend(published))
        with pytest.raises(KeyboardInterrupt if crash else FailedError):
            publish.publish(suite)
    assert crash or content() == before
    publish.refresh()
    assert content() == before
    publish.publish(suite)
    assert content() == before


def test_a_table_without_a_place_is_a_sentence():
    assert (
        publish.with_tables("<!-- table: a -->\nx\n<!-- end -->", {"a": "y"})
        == "<!-- table: a -->\n\ny\n\n<!-- end -->"
    )
    with pytest.raises(EffnetlibError, match="a place for the table b"):
        publish.with_tables("", {"b": "y"})
