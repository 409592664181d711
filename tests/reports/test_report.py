import json
import math
import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import PIL.Image
import pytest

from effnetlib import EffnetlibError, Recipe, Record
from effnetlib.reports.html import render_html, render_index
from effnetlib.reports.style import COLOURS, label_lines, mean_line, palette, percent
from effnetlib.reports.tables import (
    best_rates,
    conditions,
    curves,
    input_advice,
    over_seeds,
    results,
    show,
    steps_to,
    styled,
    suite_records,
    what_happened,
)
from effnetlib.runs.paths import outputs_folder, published_folder

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def made_up(name, status="completed", **changes):
    """A record that no run made, for tests alone."""
    directory = outputs_folder() / "suite/runs" / name
    directory.mkdir(parents=True)
    record = Record(
        directory, Recipe.preset("digits-64-lars").replace(**changes), status,
        environment={"host": "made up", "device_kind": "cpu", "devices": 1, "python": "3", "jax": "0", "flax": "0"},
        timing={"images": 64, "train_seconds": 2.0, "input_wait_seconds": 0.02}, error=None if status == "completed" else "ValueError: <made up>",
    )  # fmt: skip
    for step in (1, 2):
        record.log(kind="train", step=step, epoch=step, loss=1.0, top1=0.1, lr=0.1, images_per_second=1.0, seconds=step)
        record.log(kind="eval", step=step, epoch=step, nseen=360, top1=0.4, top5=0.9, loss=1.0, ema_top1=step / 4,
                   ema_top5=0.9, ema_loss=1.0, seconds=step)  # fmt: skip
    record.summarize()
    record.save()
    return record


def notebook(name, *cells):
    executed = outputs_folder() / "suite/executed"
    executed.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), executed / f"{name}.ipynb")
    return outputs_folder() / "suite"


def outcome(name, run=True, error=""):
    """What the suite runner leaves of an executed notebook."""
    folder = notebook(name, nbformat.v4.new_markdown_cell(f"# Title of {name}"))
    (folder / "executed" / f"{name}.json").write_text(json.dumps({"run": run, "error": error, "key": ""}))
    return folder


def test_tables_hold_recipe_environment_and_result():
    records = [made_up("a"), made_up("b", seed=1)]
    table = results(records)
    assert list(table.index) == ["a", "b"] and list(table["seed"]) == [0, 1]
    assert list(table["peak_top1"]) == [0.5, 0.5] and list(table["images_per_second"]) == [32.0, 32.0]
    long = curves(records, "eval")
    assert list(long["run"]) == ["a", "a", "b", "b"] and set(long["optimizer"]) == {"lars"}
    assert conditions(records).startswith(
        "2 runs of nano at 32 px on digits, epochs: 10; seeds 0, 1; on made up (devices: cpu)"
    )


def test_reports_read_completed_records_only():
    made_up("a")
    made_up("b", status="failed")
    assert [record.name for record in suite_records("suite")] == ["a"]
    with pytest.raises(EffnetlibError, match="no completed record of 'b', only of a"):
        suite_records("suite", "b")
    with pytest.raises(EffnetlibError, match="effnetlib run notebooks/suites/other.yaml"):
        suite_records("other")
    (outputs_folder() / "suite/runs/b/run.json").write_text("{}")
    with pytest.warns(UserWarning, match="b/run.json is damaged"):
        assert [record.name for record in suite_records("suite")] == ["a"]


def test_a_run_that_diverged_counts_as_chance():
    made_up("lars-64-seed0")
    diverged = made_up("lars-64-seed1", status="failed", seed=1)
    diverged.error, diverged.data, diverged.metrics = "DivergedError: the loss is nan", {"num_classes": 10}, []
    diverged.save()
    diverged.rewind(0)
    records = suite_records("suite", "lars-64")
    assert [record.result["final_top1"] for record in records] == [0.5, 0.1]
    assert len(curves(records, "eval")) == 2 and "(lars-64-seed0)" in input_advice(records)


def test_what_happened_names_the_end_the_peak_and_what_took_the_time():
    record = made_up("a")
    record.timing = {
        "compile_seconds": 30.0,
        "train_seconds": 50.0,
        "input_wait_seconds": 10.0,
        "eval_seconds": 15.0,
        "total_seconds": 70.0,
    }
    record.log(kind="eval", step=3, epoch=9.98, nseen=1360, ema_top1=0.475, seconds=660.0)
    reached = "Top-1 reached 50.0 % at epoch 2, after 2 s. The last is 47.5 %, counted on 1,360 images."
    # 30 + 70 seconds: training steps took 50 - 10, and all else 70 - 50 - 15.
    limited = (
        "It was limited by training steps, which took 40 % of 100 s; then came compilation (30 %), evaluation (15 %), "
    )
    limited += "the wait for images (10 %), all else (5 %)."
    assert what_happened(record) == f"Completed at epoch 9.98 of 10. {reached} {limited}"
    for status, said in (
        ("preempted", "Stopped on request at epoch 9.98 of 10."),
        ("running", "Running, or killed, at epoch 9.98 of 10."),
    ):
        record.status = status
        assert what_happened(record) == f"{said} {reached} {limited}"
    record.timing |= {"input_wait_seconds": 45.0, "total_seconds": 1070.0}
    assert "limited by all else, which took 91 % of 1,100 s; then came the wait for images (4 %), " in what_happened(
        record
    )


def test_what_happened_to_a_run_that_failed_says_why_and_nothing_of_its_clocks():
    record = made_up("a", status="failed")
    record.timing = {
        "compile_seconds": 3.0,
        "train_seconds": 0.0,
        "input_wait_seconds": 2.0,
        "eval_seconds": 0.0,
        "total_seconds": 0.0,
    }
    record.error = "DivergedError: the loss is nan at step 9 of 122"
    assert what_happened(record) == (
        "Failed at epoch 2 of 10 (DivergedError: the loss is nan at step 9 of 122). "
        "Top-1 reached 50.0 % at epoch 2, after 2 s. The last is 50.0 %, counted on 360 images."
    )
    record.rewind(0)
    record.status = "diverged"  # as reports read it
    assert what_happened(record).startswith("Diverged at epoch 0 of 10 (DivergedError: ")
    assert what_happened(record).endswith(" It has no evaluation.")
    record.status, record.error, record.timing = "running", None, {}  # it has only begun
    assert what_happened(record) == "Running, or killed, at epoch 0 of 10. It has no evaluation."


def test_steps_to_a_top1_are_read_from_a_straight_line():
    record = made_up("a")  # 0.25 after step 1, 0.5 after step 2
    assert [steps_to(record, top1) for top1 in (0.1, 0.25, 0.3, 0.5)] == pytest.approx([1, 1, 1.2, 2])
    assert math.isnan(steps_to(record, 0.51))
    for step, top1 in ((3, 0.4), (4, 0.6)):  # it falls below what it had, and rises again
        record.log(kind="eval", step=step, ema_top1=top1)
    assert [steps_to(record, top1) for top1 in (0.45, 0.5, 0.55)] == pytest.approx([1.8, 2, 3.0])


def test_a_point_is_all_its_seeds_and_a_search_stands_apart():
    for seed in (0, 1):
        made_up(f"lars-64-seed{seed}", seed=seed)
    made_up("search-lars-64-0.5", lr_per_256=0.5)
    assert [record.name for record in suite_records("suite", "lars-64")] == ["lars-64-seed0", "lars-64-seed1"]
    assert [record.name for record in suite_records("suite", "lars-64-seed1")] == ["lars-64-seed1"]
    assert list(results(suite_records("suite"))["point"]) == ["lars-64", "lars-64"]
    assert [record.name for record in suite_records("suite", "search-*")] == ["search-lars-64-0.5"]


def test_the_best_rate_is_the_lowest_of_the_highest():
    for rate, top1 in ((0.5, 0.6), (1.0, 0.8), (2.0, 0.8), (4.0, 0.1)):
        record = made_up(f"search-lars-64-{rate}", lr_per_256=rate)
        record.result["final_top1"] = top1
        record.save()
        made_up(f"search-rmsprop-64-{rate}", lr_per_256=rate)
    best = best_rates(suite_records("suite", "search-*"))
    assert dict(best.loc["lars-64", ["lr_per_256", "rates", "inside"]]) == {
        "lr_per_256": 1.0,
        "rates": 4,
        "inside": True,
    }
    assert best.loc["rmsprop-64", "lr_per_256"] == 0.5 and not best.loc["rmsprop-64", "inside"]


def test_a_table_over_seeds_gives_mean_spread_and_count():
    table = pd.DataFrame({"point": ["a", "a", "b"], "top1": [0.5, 0.7, 0.9], "seconds": [1000.0, 1002.0, 5.0]})
    found = over_seeds(table, ["point"], ["top1", "seconds"])
    assert found.loc[0].tolist() == ["a", "60.00 ± 14.14", "1,001.0 ± 1.4", 2]  # top-1 in percent
    assert found.loc[1].tolist() == ["b", "90.00", "5.0", 1]


def test_html_is_one_file_that_asks_the_network_for_nothing():
    image = nbformat.v4.new_output("display_data", {"image/png": PIXEL}, metadata={"image/png": {"alt": "one pixel"}})
    page = notebook(
        "page",
        nbformat.v4.new_markdown_cell("# A title\n\nsee [the paper](https://arxiv.org/abs/2011.00071)"),
        nbformat.v4.new_code_cell("secret = 1", outputs=[image]),
    )
    html = render_html(page, "page").read_text()
    assert "<title>A title</title>" in html and 'name="viewport"' in html
    assert re.search(r"<details class=.code.><summary>show code</summary>.*secret", html, re.S)  # folded
    assert 'alt="one pixel"' in html and f"base64,{PIXEL}" in html
    assert not re.findall(r"""(?:src|<link[^>]*href|url\()\s*=?\s*["'(]?(?:https?:)?//""", html)
    assert "<script" not in html


def test_the_answer_stands_under_the_title_and_a_section_shows_its_code_once():
    def code(source, said, tags=()):
        return nbformat.v4.new_code_cell(
            source, metadata={"tags": list(tags)}, outputs=[nbformat.v4.new_output("stream", text=said)]
        )

    markdown = nbformat.v4.new_markdown_cell
    setup = code("install = 1", "installed")
    setup.id = "setup"
    cells = [
        markdown("# Title"),
        setup,
        markdown("## Evidence"),
        code("first = 1", "figure"),
        code("second = 2", "table"),
    ]
    cells += [markdown("## Answer"), code("third = 3", "held", ["answer"])]
    html = render_html(notebook("page", *cells), "page").read_text().partition("<body>")[2]  # styles name words too
    places = [html.index(word) for word in ("Title", "held", "third", "Evidence", "figure", "table", "first", "second")]
    assert places == sorted(places) and html.count("show code") == 2
    assert "install" not in html


def test_a_failed_run_says_so_at_the_top():
    made_up("bad", status="failed")
    html = render_html(outcome("bad", error="ValueError: <made up>"), "bad").read_text()
    assert "FAILED" in html and "ValueError: &lt;made up&gt;" in html
    assert "FAILED" not in render_html(outcome("good"), "good").read_text()


def test_index_lists_runs_reports_and_status():
    made_up("good")
    made_up("bad", status="failed")
    for name in ("good", "never-began"):
        render_html(outcome(name, error="no data" if name == "never-began" else ""), name)
    for name, error in (("01_report", ""), ("02_broken", "KeyError: <made up>")):
        render_html(outcome(name, run=False, error=error), name)
    html = render_index(outputs_folder() / "suite", "suite").read_text()
    assert "1 of 3 runs completed" in html and "<td>50.00</td>" in html
    assert re.search('<a href="02_broken.html">Title of 02_broken</a></h3>\\s*<p><strong class="failed">failed', html)
    assert "<strong>never-began</strong>: no data" in html and '<td class="failed">failed</td>' in html
    assert '<a href="01_report.html">Title of 01_report</a>' in html and '<a href="good.html">good</a>' in html
    assert "<strong>bad</strong>: Failed at epoch 2 of 10 (ValueError: &lt;made up&gt;)" in html


def test_a_seed_that_is_missing_costs_a_point_nothing_and_a_point_without_seeds_is_a_gap():
    figure, axes = plt.subplots()
    values = pd.DataFrame({"a": [50.0, 52.0], "b": [60.0, np.nan], "c": [np.nan, np.nan]})
    mean_line(axes, pd.Index([128, 512, 2048]), values, place=1, label="lars")
    (line,) = (line for line in axes.lines if line.get_label() == "lars")
    np.testing.assert_allclose(line.get_xydata(), [[131.84, 51], [527.36, 60], [2109.44, np.nan]])
    plt.close(figure)


def test_figures_are_kept_with_their_text_in_256_colours_as_drawings_or_as_photographs():
    figure, axes = plt.subplots()
    axes.set_facecolor("#123456")
    image = show(figure, "suite/figures/x.png", "nothing but a colour")
    assert image.metadata == {"alt": "nothing but a colour"} and figure.number not in plt.get_fignums()
    with PIL.Image.open(outputs_folder() / "suite/figures/x.png") as kept:
        assert kept.mode == "P"
        middle, corner = (kept.width // 2, kept.height // 2), (0, 0)
        assert [kept.convert("RGB").getpixel(at) for at in (middle, corner)] == [(0x12, 0x34, 0x56), (255, 255, 255)]
    for marks, suffix in ((50, ".svg"), (30_000, ".png")):
        figure = plt.figure(figsize=(12, 12))
        figure.add_axes((0, 0, 1, 1), frame_on=False, xticks=[], yticks=[]).plot([k % 49 for k in range(marks)])
        (outputs_folder() / "suite/figures/either.svg").touch()  # of an earlier time
        show(figure, "suite/figures/either", "the smaller form")
        assert [path.suffix for path in (outputs_folder() / "suite/figures").glob("either.*")] == [suffix]
    drawing = show(plt.figure(), "suite/figures/x.svg", "nothing")
    assert drawing._repr_svg_()[1] == {"alt": "nothing"} and (outputs_folder() / "suite/figures/x.svg").exists()
    photograph = show(plt.figure(), "suite/figures/x.jpg", "black")
    assert photograph.data.startswith(b"\xff\xd8") and (outputs_folder() / "suite/figures/x.jpg").exists()


def test_reports_of_a_suite_that_nobody_ran_here_show_the_published_records(capsys):
    assert len(suite_records("laptop")) == 12
    assert "these are the records that come with effnetlib" in capsys.readouterr().out
    run = outputs_folder() / "laptop/runs/begun"
    run.mkdir(parents=True)  # a folder is no record
    assert len(suite_records("laptop")) == 12
    (run / "run.json").write_text(
        (published_folder() / "laptop/runs/lars-64/run.json").read_text().replace("completed", "running", 1)
    )
    with pytest.raises(EffnetlibError, match="effnetlib run notebooks/suites/laptop.yaml"):
        suite_records("laptop")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("minor", [2, 4, 5])
def test_a_notebook_that_was_saved_without_ids_renders(minor):
    folder = outcome("old", run=False)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Old"), nbformat.v4.new_code_cell("1")])
    for cell in notebook.cells:
        del cell["id"]
    notebook.nbformat_minor = minor
    (folder / "executed/old.ipynb").write_text(json.dumps(notebook))
    assert "<title>Old" in render_html(folder, "old").read_text()
    assert "Old" in render_index(folder, "suite").read_text()


def test_integers_stay_integers_in_a_table_that_lacks_some():
    html = styled(pd.DataFrame([{"devices": 1024, "step ms": 34.567}, {"step ms": 1.0}]), missing="none").to_html()
    assert all(f">{cell}</td>" in html for cell in ("1,024", "34.57", "none", "1.00"))
    assert "<NA>" not in styled(pd.DataFrame({"a": [1, None], "b": ["x", None]}), missing="").to_html()


def test_a_table_to_read_has_headings_with_units_percent_and_no_index():
    table = pd.DataFrame({"optimizer": ["lars", "rmsprop"], "final_top1": [0.4474, None], "global_batch_size": [2048, 128],
                          "peak_lr": [15.104, 0.064], "eval_seconds": [1234.5, 1.0], "name_of_mine": ["<b>", "x"]})  # fmt: skip
    assert "<th" in styled(pd.DataFrame({"p": []}, dtype="Float64")).to_html()  # no rows
    assert ">-<" in styled(pd.DataFrame({"p": [None, None]}, dtype="Float64")).to_html()  # nothing but gaps
    html = styled(table).to_html()
    assert re.findall(r"<th[^>]*>([^<]*)</th>", html) == [
        "optimizer", "final top-1, %", "batch", "peak learning rate", "evaluation, s", "name of mine"
    ]  # fmt: skip
    assert re.findall(r"<td[^>]*>([^<]*)</td>", html) == [
        "LARS", "44.74", "2,048", "15.1", "1,234", "&lt;b&gt;", "RMSProp", "-", "128", "0.064", "1", "x"
    ]  # fmt: skip


def test_a_figure_has_one_colour_per_optimizer_and_names_beside_its_lines():
    assert palette(["rmsprop", "mine", "lars"])["lars"] == palette(["LARS"])["LARS"] == COLOURS["lars"]
    assert len({*palette(["lars", "rmsprop", "paper", "momentum"]).values()}) == 4
    colours = palette(["mine", "lars", "rmsprop"])
    assert len({*colours.values()}) == 3
    figure, axes = plt.subplots()
    for name, end in (("lars", 0.5), ("rmsprop", 0.501), ("mine", 0.1)):
        axes.plot([1, 2], [0, end], label=name, color=colours[name])
    axes.legend()
    percent(axes)
    label_lines(axes)
    places = {text.get_text(): text.xy[1] for text in axes.texts}
    assert list(places) == ["mine", "LARS", "RMSProp"] and axes.get_legend() is None
    assert places["RMSProp"] - places["LARS"] >= 0.07  # apart, although the lines end at almost the same place
    assert axes.yaxis.get_major_formatter()(0.425, 0) == "42.5 %"
    axes.set_ylim(0, 0.501)  # both end at the top: no name leaves the panel
    for old in list(axes.texts):
        old.remove()
    label_lines(axes)
    assert [round(text.xy[1], 3) for text in axes.texts] == [0.2, 0.925, 1.0]
    plt.close(figure)
