"""The page of the paper against ours, without a record and with one of a pod. Nobody trained it: it is made up, for tests alone."""

import re

from test_paper_suite import made_up
from test_study import draw

from effnetlib import Recipe
from effnetlib.planning.plan import find_plan, load_plans
from effnetlib.runs.paths import published_folder

SUITE = {"suite": "paper", "chip_hour": 2.0}


def tables(shown):
    """What each table says: a row of cells per line, after the headings."""
    for each in shown:
        if hasattr(each, "to_html"):
            head, *rows = re.findall(r"<tr>(.*?)</tr>", each.to_html(), re.S)
            yield [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in (head, *rows)]


def text(shown):
    return " ".join(str(getattr(each, "data", each)) for each in shown)


def test_without_a_record_every_row_is_not_run_and_has_a_prediction_that_is_called_so(monkeypatch):
    shown = draw("13_paper_against_ours", SUITE, monkeypatch)
    points, second, first, *_ = tables(shown)
    assert "None of the 11 rows of Table 2 has a run of ours" in text(shown)
    assert "ours: not run" in text(shown) and "No run of ours is beside a row yet." in text(shown)
    assert len(points) == 3 and len(second) == 12 and len(first) == 9
    assert second[0] == ["preset", "paper top-1, %", "our peak top-1, %", "difference, points", "our final top-1, %", "run",
                         "predicted minutes", "checked"]  # fmt: skip
    recipe = Recipe.preset("b2-32768-lars")
    plan = find_plan(load_plans(published_folder() / "plans"), recipe, "v3:32x16x1").supplied(recipe, None)
    assert ["b2-32768-lars", "79.7", *4 * ["not run"], f"{plan.minutes:.1f}", "confirmed"] in second
    predicted = f"{plan.images_per_second / 1e3:,.1f}"
    assert ["b2", "1,024", "451.4", "not run", "not run", predicted, "not run", "not run", "to check"] in first


def test_one_record_of_a_pod_stands_beside_its_rows_and_in_the_figure(monkeypatch):
    made_up("mine", "b2-32768-lars", devices=1024)  # 80 % after 2 minutes, 50 images per ms
    shown = draw("13_paper_against_ours", SUITE, monkeypatch)
    points, second, first, _, deviating = tables(shown)
    assert "Rows of Table 2 with a run of ours: 1 of 11. Our peak top-1 minus the paper's: +0.3 points." in text(shown)
    assert "The paper: B2 in 18 minutes, B5 in 64 minutes; ours: B2 in 2 minutes" in text(shown)
    assert ["mine", "b2", "2", "80.00", "1,024", "32,768"] in points
    (ours,) = [row for row in second if row[0] == "b2-32768-lars"]
    assert ours[1:6] == ["79.7", "80.0", "0.3", "80.0", "mine"]
    assert sum(row.count("not run") == 4 for row in second) == 10
    (ours,) = [row for row in first if row[:2] == ["b2", "1,024"]]
    assert ours[2:5] == ["451.4", "50", "0.11"] and ours[6:8] == ["1,024 x TPU v3", "mine"]
    assert deviating[1][:4] == ["mine", "b2-32768-lars", "none known", "the same"]


def test_dawnbench_counts_the_seconds_and_dollars_to_93_percent(monkeypatch):
    made_up("reached", "b2-4096-rmsprop", top5=0.94)  # 84 % after one minute, 94 % after two, on 64 chips
    made_up("never", "b2-4096-rmsprop", devices=8, kind="TPU v5 lite", top5=0.92, epochs=90)
    *_, race, deviating = tables(draw("13_paper_against_ours", SUITE | {"chip_hour": 3.0}, monkeypatch))
    rows = {row[0]: row[1:] for row in race}
    assert rows["reached"] == ["120", f"{64 * 3 * 120 / 3600:.1f}", "80.00", "94.00", "128 x TPU v3", "ours"]
    assert rows["never"] == ["", "", "80.00", "92.00", "8 x TPU v5 lite", "ours: 93 % not reached"]
    assert rows["ResNet-50, Alibaba Cloud, the fastest"][0] == "158" and len(race) == 1 + 9 + 2
    assert {row[0]: row[3] for row in deviating[1:]} == {"reached": "the same", "never": "another"}


def test_a_comparison_says_in_two_lines_what_differs_and_what_happened_in_each_run(monkeypatch):
    for name, optimizer in (("a", "lars"), ("b", "momentum")):
        record = made_up(name, "b2-16384-lars", optimizer=optimizer)
        record.environment["host"] = f"host of {name}"
        record.save()
    said = text(draw("14_comparison", {"suite": "paper", "runs": ["a", "b"]}, monkeypatch))
    assert "Settings that differ: optimizer (lars against momentum).\n\nCircumstances that differ: host." in said
    assert "Final top-1 of a minus b: +0.00 points; with fewer than 3 seeds in both that may be chance." in said
    assert "- **b**: Completed at epoch 350 of 350. Top-1 reached 80.0 % at epoch 350, after 120 s." in said
