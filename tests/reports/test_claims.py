import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from scipy import stats

from effnetlib.recipe import Recipe
from effnetlib.reports.claims import (
    CONTRADICTED,
    MIME,
    NOT_TESTABLE,
    SUPPORTED,
    UNDECIDED,
    batch_norm_batch,
    bfloat16_convolutions,
    contrast,
    distributed_evaluation,
    large_batch,
    polynomial_decay,
    warmup,
)
from effnetlib.reports.tables import best_rates, search_records
from effnetlib.runs.record import ONE_CORE_A_DEVICE, Record
from effnetlib.suites.suite import load_suite

HIGH, LOW = [0.80, 0.81, 0.82], [0.50, 0.51, 0.52]


def test_a_contrast_of_two_is_welchs_interval():
    a, b = [1.0, 2.0, 4.0], [0.0, 0.5, 0.25, 3.0]
    wanted = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    found = contrast((1, a), (-1, b))
    np.testing.assert_allclose((found.low, found.high), wanted, rtol=1e-12)
    assert found.estimate == pytest.approx(np.mean(a) - np.mean(b))


def test_a_contrast_of_four_equal_spreads_has_the_pooled_degrees_of_freedom():
    # s^2 = 1 and n = 3 in each, so v = 4/3, and 4 x 2 degrees of freedom.
    samples = [[mean - 1, mean, mean + 1] for mean in (10, 4, 8, 7)]
    found = contrast(*zip((1, -1, -1, 1), samples, strict=True))
    half = stats.t.ppf(0.975, 8) * np.sqrt(4 / 3)
    np.testing.assert_allclose((found.estimate, found.low, found.high), (5, 5 - half, 5 + half))


def test_values_without_spread_have_an_interval_without_width():
    found = contrast((1, [0.5, 0.5, 0.5]), (-1, [0.25, 0.25, 0.25]))
    assert (found.estimate, found.low, found.high) == (0.25, 0.25, 0.25)


def of(rmsprop_small, rmsprop_large, lars_small, lars_large):
    return {
        ("rmsprop", 64): rmsprop_small, ("rmsprop", 256): rmsprop_large,
        ("lars", 64): lars_small, ("lars", 256): lars_large,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("points", "verdict"),
    [
        (of(HIGH, LOW, HIGH, HIGH), SUPPORTED),
        (of(HIGH, HIGH, HIGH, HIGH), UNDECIDED),  # RMSProp loses nothing, as far as three seeds can tell
        (of(HIGH, LOW, HIGH, LOW), UNDECIDED),  # LARS loses as much
        (of(HIGH, LOW, HIGH, [0.3, 0.31, 0.32]), CONTRADICTED),  # LARS loses more, and is behind
        (of(LOW, HIGH, HIGH, HIGH), CONTRADICTED),  # RMSProp gains
        (of(HIGH, LOW, HIGH, HIGH[:1]), NOT_TESTABLE),
    ],
)
def test_large_batches(points, verdict):
    found = large_batch(points)
    assert found.verdict == verdict and "RMSProp: 80.1 % at 4,096" in found.paper
    if verdict != NOT_TESTABLE:
        assert "lars at 64" in found.ours and "(n = 3)" in found.ours
        assert found.measured == "LARS minus RMSProp at 256" and found.n == 3
        assert found.low <= found.effect <= found.high and found.unit == "points"


def test_large_batches_of_one_optimizer_cannot_be_compared():
    found = large_batch({("lars", 64): HIGH, ("lars", 256): HIGH})
    assert found.verdict == NOT_TESTABLE and "'rmsprop', 64" in found.why


@pytest.mark.parametrize("judge", [polynomial_decay, warmup])
def test_one_way_is_better_where_the_interval_says_so(judge):
    assert judge(HIGH, LOW).verdict == SUPPORTED
    assert judge(LOW, HIGH).verdict == CONTRADICTED and judge(HIGH, HIGH).verdict == UNDECIDED
    assert judge(HIGH, LOW[:2]).verdict == NOT_TESTABLE
    assert "difference +30.00 points" in judge(HIGH, LOW).ours
    assert judge(HIGH, LOW).effect == pytest.approx(30) and judge(HIGH, LOW[:2]).effect is None


def test_an_optimum_of_the_batch_norm_batch_lies_inside():
    assert batch_norm_batch({4: LOW, 32: HIGH, 256: LOW}).verdict == SUPPORTED
    assert batch_norm_batch({4: LOW, 32: LOW, 256: HIGH}).verdict == CONTRADICTED  # at an end
    assert batch_norm_batch({4: LOW, 32: LOW, 256: LOW}).verdict == UNDECIDED  # no difference
    found = batch_norm_batch({4: LOW, 32: HIGH, 256: [value + 0.1 for value in LOW]})
    assert "best at 32" in found.ours and found.measured == "groups of 32 minus groups of 256"
    assert found.effect == pytest.approx(20)


def test_bfloat16_may_cost_less_than_a_point():
    near = [0.7995, 0.8000, 0.8005]
    assert bfloat16_convolutions([value - 0.005 for value in near], near).verdict == SUPPORTED
    assert bfloat16_convolutions([value - 0.0099 for value in near], near).verdict == UNDECIDED
    assert bfloat16_convolutions([value - 0.02 for value in near], near).verdict == CONTRADICTED
    assert bfloat16_convolutions(near, near).least == -1
    # No difference, but three seeds that spread by a point cannot exclude one.
    assert bfloat16_convolutions(HIGH, HIGH).verdict == UNDECIDED


def made_up(tmp_path, seconds, flags=ONE_CORE_A_DEVICE):
    environment = {"platform": "cpu", "devices": 2, "xla_flags": flags}
    return Record(tmp_path, Recipe.preset("digits-64-lars"), environment=environment, timing={"total_seconds": seconds})


def test_evaluation_is_timed_where_devices_do_not_share_their_cores(tmp_path):
    fast, slow = ([made_up(tmp_path, start + i / 10) for i in range(3)] for start in (10, 12))
    assert distributed_evaluation(fast, slow).verdict == SUPPORTED
    assert "saved 2.0 s" in distributed_evaluation(fast, slow).ours
    found = distributed_evaluation(slow, fast)
    assert found.effect == pytest.approx(-100 * 2 / 10.1) and found.n == 3
    assert found.verdict == CONTRADICTED and found.unit == "% of the time"
    assert distributed_evaluation(fast[:2], slow).verdict == NOT_TESTABLE
    sharing = distributed_evaluation(fast, [made_up(tmp_path, 12, flags="")])
    assert sharing.verdict == NOT_TESTABLE and "simulated" in sharing.why


def test_a_verdict_leaves_itself_in_the_notebook():
    verdict = warmup(HIGH, LOW)
    shown = verdict._repr_mimebundle_()
    output = nbformat.v4.new_output("display_data", data=shown)
    nbformat.validate(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output])]))
    assert json.loads(json.dumps(shown[MIME]))["verdict"] == SUPPORTED
    said = "with warm-up minus without is +30.00 points (95 % interval +27.73 to +32.27, n = 3 seeds each)"
    assert (
        shown["text/plain"].startswith(f"✓ Supported: {said}.")
        and f'"supported">✓ Supported</strong>: {said}.' in shown["text/html"]
    )
    assert "<th" in shown["text/html"]
    assert warmup(HIGH, LOW[:2]).finding == "a point has fewer than 3 seeds"


def test_the_cifar10_suite_trains_what_won_its_search():
    suite = load_suite(Path(__file__).parents[2] / "notebooks/suites/cifar10.yaml")
    winners = best_rates(search_records("cifar10"))
    assert winners["inside"].all() and set(winners["rates"]) <= {5, 6}
    trained = {}
    for entry in suite.runs:
        if not entry.name.startswith("search-"):
            trained.setdefault(re.sub(r"-seed\d+$", "", entry.name), set()).add(entry.parameters["lr_per_256"])
    assert all(trained[point] == {winners.loc[point, "lr_per_256"]} for point in winners.index)
    others = set(trained) - set(winners.index)
    assert len(others) == 7 and all(trained[point] == trained["lars-128"] for point in others)
