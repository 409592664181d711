"""The paper suite: its recipes are Table 2's, fit their slices, have plans and start; and what is said of its records.

The records here are made up, for tests alone: nobody trained them, and nothing of them is ever published."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from test_prepare import by_class

from effnetlib import Recipe, Record
from effnetlib.__main__ import main
from effnetlib.data import load as load_data
from effnetlib.data import train_batches
from effnetlib.mesh import batch_sharding, make_mesh
from effnetlib.model import VARIANTS
from effnetlib.planning.plan import find_plan, load_plans
from effnetlib.presets import PAPER_PRESETS
from effnetlib.reports import paper
from effnetlib.reports.against_paper import (
    deviations,
    figure1,
    row_of,
    table1,
    table2,
)
from effnetlib.reports.comparison import difference, labels, load, outcomes, points, settings
from effnetlib.runs.paths import outputs_folder, published_folder
from effnetlib.step import lower_train_step, make_train_step
from effnetlib.suites.parameters import train_recipe
from effnetlib.suites.suite import load_suite

SUITE = load_suite(Path(__file__).parents[2] / "notebooks/suites/paper.yaml")
CORES = dict(zip(paper.table2()["preset"], paper.table2()["cores"], strict=True))
SLICES = {128: "v3:8x8x1", 256: "v3:16x8x1", 512: "v3:16x16x1", 1024: "v3:32x16x1"}


def made_up(name, preset, folder="paper", *, devices=128, kind="TPU v3", top5=0.94, images=1_281_167, **changes):
    """A record that no run made, for tests alone: 2 evaluations a minute apart, top-1 of 0.5 and 0.8."""
    directory = outputs_folder() / folder / "runs" / name
    directory.mkdir(parents=True)
    record = Record(
        directory, Recipe.preset(preset).replace(**changes), "completed",
        environment={"host": "made up", "platform": "tpu", "device_kind": kind, "devices": devices, "python": "3", "jax": "0", "flax": "0"},
        data={"num_classes": 1000, "train_examples": images, "fingerprints": {"train": "made up"}},
        timing={"images": 6_000_000, "train_seconds": 120.0, "input_wait_seconds": 0.0, "total_seconds": 120.0},
    )  # fmt: skip
    for k, top1 in ((1, 0.5), (2, 0.8)):
        row = dict(step=k, epoch=175.0 * k, seconds=60.0 * k, loss=1.0)
        record.log(kind="train", **row, top1=0.5, lr=0.1, images_per_second=50_000.0)
        record.log(kind="eval", **row, nseen=50_000, top1=top1, top5=0.9, ema_top1=top1, ema_top5=top5 - (2 - k) * 0.1, ema_loss=1.0)  # fmt: skip
    record.summarize()
    record.save()
    return record


def test_the_suite_is_table_2_and_gives_table_1():
    recipes = {entry.name: train_recipe(entry.parameters) for entry in SUITE.runs}
    assert list(recipes) == list(paper.table2()["preset"]) and len(recipes) == 11
    assert recipes == {name: Recipe.preset(name) for name in PAPER_PRESETS}
    steps = {(recipe.variant, recipe.global_batch_size, CORES[name]) for name, recipe in recipes.items()}
    assert steps > {(row.variant, row.global_batch_size, row.cores) for row in paper.table1().itertuples()}
    assert all(row.global_batch_size == 32 * row.cores for row in paper.table1().itertuples())


@pytest.mark.parametrize("preset", PAPER_PRESETS)
def test_each_recipe_fits_its_slice_and_has_a_plan_that_fits(preset):
    recipe, cores = Recipe.preset(preset), CORES[preset]
    recipe.validate(cores)
    plan = find_plan(load_plans(published_folder() / "plans"), recipe, SLICES[cores])
    assert plan.fits and plan.devices == cores and plan.hbm_bytes < plan.hbm_limit_bytes


def reduced(preset, dataset):
    """The recipe for one device: 16 images of 32 pixels in two batch-norm groups, its own learning rate, another data set."""
    recipe = Recipe.preset(preset)
    same_peak = recipe.lr_per_256 * recipe.global_batch_size / 16
    return recipe.replace(
        dataset=str(dataset), image_size=32, global_batch_size=16, batch_norm_batch_size=8, lr_per_256=same_peak
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout")
    by_class(folder)
    return folder


@pytest.mark.parametrize("optimizer", ["rmsprop", "lars"])
@pytest.mark.parametrize("variant", ["b2", "b5"])
def test_each_recipe_starts(variant, optimizer, photographs, monkeypatch):
    """Two steps with the recipe's own learning rates, augmentation and widths, and one block per stage.

    Neither ImageNet nor the cores are here: a few photographs in ImageNet's layout stand for the one, one device for the others
    (see `reduced`; what devices do together is tested in test_invariance.py). What differs in batch and learning rate alone is one
    program then, which is compiled once, without the compiler's costly passes. B5 under RMSProp is traced, in its full depth, and
    not compiled: B5 runs under LARS, and RMSProp with B2.
    """
    presets = [name for name in PAPER_PRESETS if name.startswith(variant) and name.endswith(optimizer)]
    recipes = [reduced(preset, photographs) for preset in presets]
    (program,) = {recipe.replace(lr_per_256=16.0, warmup_epochs=5.0) for recipe in recipes}
    mesh, key = make_mesh(program.num_groups, jax.devices()[:1]), jax.random.key(0)
    if (variant, optimizer) == ("b5", "rmsprop"):
        init, step, _ = make_train_step(program)
        images = {
            "images": jax.ShapeDtypeStruct((16, 32, 32, 3), "uint8"),
            "labels": jax.ShapeDtypeStruct((16,), "int32"),
        }
        jax.eval_shape(step, jax.eval_shape(init, key), images, key, 0.1)
        return
    monkeypatch.setitem(VARIANTS, variant, dataclasses.replace(VARIANTS[variant], depth=0.2))
    init, lowered, _, _ = lower_train_step(program, mesh)
    init, step = init.lower(key).compile(), lowered.compile()
    for preset, recipe in zip(presets, recipes, strict=True):
        state = init(key)
        rates = np.asarray(Recipe.preset(preset).schedule(np.arange(1, 3)))
        assert rates[0] > 0 and rates[1] == pytest.approx(2 * rates[0])  # it warms up
        batches = train_batches(
            load_data(recipe.dataset, "train"), seed=0, batch=recipe.global_batch_size, size=32,
            augmentation=recipe.augmentation, sharding=batch_sharding(mesh), start=0, stop=2,
        )  # fmt: skip
        for rate in rates:
            state, metrics = step(state, next(batches), jax.random.key(1), rate)
            assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0
        assert int(state.step) == 2


def test_tables_have_ours_beside_the_papers_and_say_what_was_not_run():
    made_up("b2-4096-rmsprop", "b2-4096-rmsprop")
    made_up("short", "b2-4096-rmsprop", epochs=90, devices=8, kind="TPU v5 lite", images=1_000_000)
    records = load([outputs_folder() / "paper/runs" / name for name in ("b2-4096-rmsprop", "short")])
    second = table2(records).set_index("preset")
    assert second.loc["b2-4096-rmsprop", "run"] == "b2-4096-rmsprop"  # and not the one of 90 epochs
    assert second.loc["b2-4096-rmsprop", "difference, points"] == pytest.approx(80.0 - 80.1)
    assert len(second) == 11 and second["run"].isna().sum() == 10
    first = table1(records)
    assert list(first["our images/ms"].dropna()) == [50.0, 50.0] and len(first) == 9  # 6,000,000 in 120 s; both runs
    points_ = figure1(records)
    assert list(points_["whose"]) == ["paper", "paper", "b2-4096-rmsprop"] and points_["minutes"].iloc[-1] == 2.0
    assert deviations(records[0]) == []
    assert deviations(records[1]) == [
        "epochs 90, not 350",
        "trained on 1,000,000 images, not 1,281,167",
        "8 x TPU v5 lite, not 128 TPU-v3 cores",
    ]


def test_seed_and_place_of_imagenet_are_no_deviations_and_other_runs_have_no_row():
    moved = made_up("moved", "b2-4096-rmsprop", dataset="/mnt/imagenet", seed=5)
    other = made_up("other", "b2-2048-rmsprop")
    small = made_up("small", "digits-64-lars")
    assert deviations(moved) == [] and row_of(other) is row_of(small) is None
    assert list(table2([moved, other, small])["run"].dropna()) == ["moved"]


def test_the_comparison_of_points_with_seeds():
    for seed in (0, 1, 2):
        made_up(f"lars-seed{seed}", "b2-16384-lars", seed=seed)
        made_up(f"rmsprop-seed{seed}", "b2-16384-rmsprop", seed=seed)
    runs = outputs_folder() / "paper/runs"
    records = load([runs / "lars", runs / "rmsprop"])
    assert points(records) == ["lars"] * 3 + ["rmsprop"] * 3 and labels(records)[0] == "lars-seed0"
    table = settings(records).set_index("setting")
    assert "seed" not in table.index and dict(table.loc["optimizer"]) == {"lars": "lars", "rmsprop": "rmsprop"}
    assert list(outcomes(records)["final_top1"]) == [0.8] * 6
    for record, top1 in zip(records, [0.79, 0.80, 0.81, 0.69, 0.71, 0.70], strict=True):
        record.result["final_top1"] = top1
    # Seed by seed: 10, 9 and 11 points, so s = 1, and half the interval is t(0.975, 2) / sqrt(3) = 4.303 / sqrt(3).
    said = "Final top-1 of lars minus rmsprop: +10.00 (+7.52 to +12.48) points (95 % interval, 3 seeds)."
    assert difference(records) == said
    assert "may be chance" in difference([records[0], records[3]])
    third = made_up("plain-seed0", "b2-16384-lars", optimizer="momentum")
    assert (
        difference([*records, third])
        == f"{said} Final top-1 of lars minus plain: +0.00 points; with fewer than 3 seeds in both that may be chance."
    )
    third.result = {}
    assert difference([records[0], third]) == "Fewer than two points have a result, so there is no difference to tell."
    made_up("lars-seed0", "b2-4096-rmsprop", folder="other")
    same = load([runs / "lars-seed0", outputs_folder() / "other/runs/lars-seed0"])
    assert labels(same) == ["paper/lars-seed0", "other/lars-seed0"] and points(same) == ["paper/lars", "other/lars"]


def test_a_report_of_what_is_no_suite_and_no_pair_of_runs_ends_in_one_sentence():
    run = made_up("a", "b2-4096-rmsprop").directory
    other = made_up("b", "b2-4096-rmsprop").directory
    empty = outputs_folder() / "empty"
    empty.mkdir()
    damaged = outputs_folder() / "paper/runs/damaged"
    damaged.mkdir()
    (damaged / "run.json").write_text("{")
    broken = outputs_folder() / "broken/runs/a"
    broken.mkdir(parents=True)
    (broken / "run.json").write_text(json.dumps({"status": "failed"} | {"recipe": {}}))
    cases = [
        ([empty], "holds no executed notebooks and no records"),
        ([empty / "none"], "holds no executed notebooks and no records"),
        ([run], "is one run: name a second run to compare"),
        ([run, empty], "is not the folder of a run"),
        ([run, run], "a comparison needs two runs or more"),
        ([run, damaged], "damaged/run.json is damaged"),
        ([run, other, "--price", "2"], "--price is for one suite, not for a comparison of runs"),
        ([outputs_folder() / "broken"], "but no completed one"),
    ]
    for arguments, sentence in cases:
        done = CliRunner().invoke(main, ["report", *map(str, arguments)])
        assert (done.exit_code, done.exception.__class__) == (2, SystemExit), done.output
        assert sentence in done.output and len(done.output.splitlines()) == 1


@pytest.mark.slow
def test_a_report_on_a_part_of_the_suites_records_sets_them_beside_the_paper():
    made_up("b2-4096-rmsprop", "b2-4096-rmsprop")
    made_up("b5-65536-lars", "b5-65536-lars", devices=256, epochs=90)
    done = CliRunner().invoke(main, ["report", str(outputs_folder() / "paper")])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == str(outputs_folder() / "paper/index.html")
    html = (outputs_folder() / "paper/13_paper_against_ours.html").read_text()
    assert "not run" in html and "epochs 90, not 350; 256 x TPU v3, not 1,024 TPU-v3 cores" in html
    assert "13_paper_against_ours.html" in (outputs_folder() / "paper/index.html").read_text()
    again = CliRunner().invoke(main, ["report", str(outputs_folder() / "paper/runs")])
    assert again.exit_code == 0 and "finished before, not executed again" in again.output
    made_up("b5-4096-rmsprop", "b5-4096-rmsprop")
    more = CliRunner().invoke(main, ["report", str(outputs_folder() / "paper"), "--price", "4"])
    assert more.exit_code == 0 and "completed in" in more.output
    assert "4.00 dollars" in (outputs_folder() / "paper/13_paper_against_ours.html").read_text()


@pytest.mark.slow
def test_a_report_on_two_runs_compares_them():
    runs = [made_up(name, name, folder).directory for name, folder in (("b2-16384-lars", "one"), ("b2-16384-rmsprop", "two"))]  # fmt: skip
    done = CliRunner().invoke(main, ["report", *map(str, runs)])
    assert done.exit_code == 0, done.output
    page = outputs_folder() / "comparisons/b2-16384-lars-against-b2-16384-rmsprop/14_comparison.html"
    assert done.output.splitlines()[-1] == str(page)
    html = page.read_text()
    assert "lr_per_256" in html and "may be chance" in html and "exponential" in html
    made_up("b2-16384-lars-seed1", "b2-16384-lars", "one", seed=1)
    record = Record.load(runs[1])
    record.result["final_top1"] = 0.1
    record.save()
    again = CliRunner().invoke(main, ["report", *map(str, runs)])
    assert again.exit_code == 0 and "completed in" in again.output  # the record is another
