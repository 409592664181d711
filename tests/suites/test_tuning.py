"""A run takes the learning rate that its suite's own search found."""

import pytest

from effnetlib.errors import EffnetlibError, FailedError
from effnetlib.recipe import Recipe
from effnetlib.runs.record import Record
from effnetlib.suites.suite import load_suite
from effnetlib.suites.tuning import tuned

SUITE = """
runs:
  - name: search-small-{lr_per_256}
    parameters: {preset: digits-64-lars}
    each: {lr_per_256: [1, 2, 4]}
  - name: search-small-late-{lr_per_256}
    parameters: {preset: digits-64-lars, warmup_epochs: 5}
    each: {lr_per_256: [8]}
  - {name: linear, parameters: {preset: digits-256-lars}, tuned: {lr_per_256: search-small}}
  - {name: constant, parameters: {preset: digits-256-lars}, tuned: {peak_lr: search-small}}
  - {name: alone, parameters: {preset: digits-256-lars}}
"""


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "notebooks/suites/small.yaml"
    path.parent.mkdir(parents=True)
    (path.parent.parent / "train.ipynb").write_text("{}")
    path.write_text(SUITE)
    return load_suite(path)


def made_up(suite, rate, top1, status="completed", point="search-small", error=None):
    """A record that no run made."""
    directory = suite.directory / f"runs/{point}-{rate}"
    directory.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.preset("digits-64-lars").replace(lr_per_256=float(rate))
    Record(directory, recipe, status, result={"final_top1": top1}, error=error).save()


def test_the_best_rate_is_taken_linearly_or_as_a_constant_peak(suite):
    for rate, top1 in ((1, 0.5), (2, 0.75), (4, 0.75)):
        made_up(suite, rate, top1)
    made_up(suite, 8, 0.9, point="search-small-late")  # another search
    linear, constant, alone = suite.runs[-3:]
    assert tuned(suite, linear).recipe.lr_per_256 == 2  # of equals, the lower
    assert tuned(suite, constant).recipe.peak_lr == 2 * 64 / 256
    assert tuned(suite, alone) is alone


def test_a_run_that_diverged_counts_as_the_worst(suite):
    made_up(suite, 1, 0.5)
    for rate in (2, 4):
        made_up(suite, rate, 0.9, "failed", error="DivergedError: the loss is nan at step 3 of 9")
    assert tuned(suite, suite.runs[-3]).recipe.lr_per_256 == 1
    made_up(suite, 1, 0.0, "failed", error="DivergedError: the loss is nan at step 3 of 9")
    with pytest.raises(FailedError, match="every one diverged"):
        tuned(suite, suite.runs[-3])


@pytest.mark.parametrize("status", ["running", None])
def test_a_search_that_is_not_complete_decides_nothing(suite, status):
    made_up(suite, 1, 0.5)
    made_up(suite, 2, 0.75)
    if status:
        made_up(suite, 4, 0.0, status)
    with pytest.raises(
        FailedError, match="linear needs the whole of search-small, and search-small-4 is not completed"
    ):
        tuned(suite, suite.runs[-3])


@pytest.mark.parametrize(
    ("tuned", "sentence"),
    [
        ("{lr_per_256: search-smal}", "no runs named search-smal-VALUE: did you mean search-small?"),
        ("{momentum: search-small}", "tuned must be lr_per_256 or peak_lr with the name of a search"),
        ("search-small", "tuned must be lr_per_256 or peak_lr"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(suite, tuned, sentence, tmp_path):
    path = tmp_path / "notebooks/suites/small.yaml"
    path.write_text(SUITE.replace("tuned: {lr_per_256: search-small}", f"tuned: {tuned}"))
    with pytest.raises(EffnetlibError, match=sentence):
        load_suite(path)


def test_a_rate_is_not_given_twice(suite, tmp_path):
    path = tmp_path / "notebooks/suites/small.yaml"
    path.write_text(SUITE.replace("linear, parameters: {preset", "linear, parameters: {lr_per_256: 1, preset"))
    with pytest.raises(EffnetlibError, match="linear: its learning rate comes from search-small: leave lr_per_256 out"):
        load_suite(path)
