import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
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
    better,
    bfloat16_convolutions,
    by_seed,
    distributed_evaluation,
    interval,
    judge,
    large_batch,
    plain_optimizer,
    polynomial_decay,
    protocols,
    seeds_to_run,
    warmup,
)
from effnetlib.reports.tables import best_rates, suite_records
from effnetlib.runs.record import ONE_CORE_A_DEVICE, Record
from effnetlib.suites.suite import load_suite

SPREAD = np.array([-0.25, 0.125, 0.25, -0.125, 0.0])  # of five seeds, exact in binary
S = np.sqrt(0.15625 / 4)  # its standard deviation
T4 = 2.7764451051977987  # t(0.975, 4), from a table


def of(**means):
    """Five seeds per point. Points share their seeds' spread, so differences have none."""
    return pd.DataFrame({name.replace("_", "-"): mean + SPREAD for name, mean in means.items()})


def test_the_interval_of_five_seeds_is_students():
    found = interval(3 + SPREAD)
    assert found.mean == pytest.approx(3) and (found.n, found.wanted) == (5, 5)
    assert found.half == pytest.approx(T4 * S / np.sqrt(5))
    wanted = stats.ttest_1samp(3 + SPREAD, 0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((wanted.low, wanted.high))


@pytest.mark.parametrize(
    ("s", "n"), [(0.1, 5), (0.8, 5), (0.81, 6), (0.88, 6), (0.89, 7), (0.95, 7), (0.96, 8), (1.0, 8), (9.0, 8)]
)
def test_the_first_five_seeds_decide_how_many_there_are(s, n):
    """n >= (T4 s)^2: 4.93 at 0.8, 5.06 at 0.81, 5.97 at 0.88, 6.11 at 0.89, 6.96 at 0.95, 7.10 at 0.96."""
    first = s * SPREAD / S
    later = [10.0, 20.0, 30.0]
    found = interval(np.array([*first, *later]))
    assert (found.n, found.wanted) == (n, n)
    assert found.mean == pytest.approx(sum(later[: n - 5]) / n)  # of all n, and no more
    assert found.half == pytest.approx(T4 * s / np.sqrt(n))  # the later ones do not change s
    assert interval(first).n == 5 and interval(first).wanted == n


def test_the_two_stages_cover_in_95_percent_whatever_the_spread_is():
    rng = np.random.default_rng(0)
    for sigma in (0.3, 0.8, 1.2):
        draws = sigma * rng.standard_normal((2000, 8))
        covered = np.mean([abs(found.mean) <= found.half for found in map(interval, draws)])
        assert abs(covered - 0.95) < 0.015  # three standard errors of a share of 0.95


def test_a_number_of_pairs_that_was_fixed_is_one_stage_of_them_all():
    pairs = np.arange(10.0)
    wanted = stats.ttest_1samp(pairs, 0).confidence_interval(0.95)
    found = interval(pairs, 10, 10)
    assert (found.mean - found.half, found.mean + found.half, found.n) == pytest.approx((wanted.low, wanted.high, 10))


def test_differences_are_taken_seed_by_seed():
    top1 = of(a=80, b=79)
    top1["a"] = top1["a"] + 10 * SPREAD  # 79 + 11 x, so the difference is 1 + 10 x
    found = better("a is better", "-", top1, "a", "b")
    assert (found.low + found.high) / 2 == pytest.approx(found.effect) and found.effect == pytest.approx(1)
    assert found.high - found.effect == pytest.approx(T4 * 10 * S / np.sqrt(5))
    assert found.verdict == UNDECIDED and found.n == 5 and found.more == {"a": (5, 7), "b": (5, 7)}
    partly = top1.drop(index=0)[["a"]].join(top1[["b"]], how="outer")  # a seed that only one of them has
    assert better("a", "-", partly, "a", "b").n == 4 and better("a", "-", partly, "a", "b").more == {"a": (4, 4)}


@pytest.mark.parametrize(
    ("effect", "scale", "verdict"),
    [(2, 0, SUPPORTED), (-2, 0, CONTRADICTED), (0.5, 4, UNDECIDED), (0, 0, UNDECIDED), (50, 10, UNDECIDED)],
)
def test_the_interval_decides_and_one_that_is_too_wide_decides_nothing(effect, scale, verdict):
    top1 = of(a=80, b=80)
    top1["a"] += effect + scale * SPREAD
    found = better("a is better", "-", top1, "a", "b")
    assert found.verdict == verdict and found.low <= found.effect <= found.high


def test_all_parts_must_hold_and_the_weakest_is_shown():
    top1 = of(a=80, b=79, c=70, d=90)
    assert better("a", "-", top1, "a", "b", "c").measured == "a minus b"
    assert better("a", "-", top1, "a", "b", "c").verdict == SUPPORTED
    lost = better("a", "-", top1, "a", "b", "d")
    assert (lost.verdict, lost.measured, round(lost.effect)) == (CONTRADICTED, "a minus d", -10)
    assert lost.rule == "the 95 % interval of a minus b, and of a minus d lies above 0"


def test_what_is_missing_cannot_be_tested():
    top1 = of(a=80, b=79)
    missing = better("a", "-", top1, "a", "b", "c")
    assert (missing.verdict, missing.effect, missing.rule) == (NOT_TESTABLE, None, "there are no runs of c")
    few = better("a", "-", top1[:2], "a", "b")
    assert (few.verdict, few.finding) == (NOT_TESTABLE, "fewer than 3 seeds have runs of a, b")


def test_a_verdict_says_what_it_means_and_what_it_does_not():
    interval = "a minus b is {0:+.2f} points (95 % interval {0:+.2f} to {0:+.2f}, n = 5)"
    assert warmup(of(a=80, b=78), "a", "b", "LARS").meaning == f"At this size the claim holds: {interval.format(2)}."
    lost = warmup(of(a=78, b=80), "a", "b", "LARS")
    assert lost.meaning == f"At this size the opposite holds: {interval.format(-2)}."
    equal, wide = of(a=80, b=80), of(a=80, b=30)
    wide["a"] += 30 * SPREAD
    assert warmup(equal, "a", "b", "LARS").meaning.endswith("+0.00, n = 5), which includes 0.")
    assert warmup(wide, "a", "b", "LARS").meaning.endswith("n = 5), which is too wide for the rule.")
    assert warmup(equal, "a", "c", "LARS").meaning == "Our runs cannot test it: there are no runs of c."
    assert lost.limit.startswith("This test does not say how long a warm-up should be")


def test_the_seeds_to_run_are_named_once():
    verdicts = [
        judge("x", "-", {"a minus b": {"a": 1, "b": -1}}, pd.DataFrame({"a": 9 * SPREAD, "b": 0 * SPREAD})),
        judge("y", "-", {"a minus c": {"a": 1, "c": -1}}, pd.DataFrame({"a": 4.25 * SPREAD, "c": 0 * SPREAD})),
    ]
    assert [verdict.more for verdict in verdicts] == [{"a": (5, 7), "b": (5, 7)}, {"a": (5, 5), "c": (5, 5)}]
    assert seeds_to_run(verdicts) == "seeds 5-5 of c; seeds 5-7 of a, b"
    assert seeds_to_run([better("a", "-", of(a=80, b=79), "a", "b")]) == ""


@pytest.mark.parametrize(
    ("rmsprop", "lars", "verdict", "decides"),
    [
        ((80, 70), (78, 76), SUPPORTED, "LARS minus RMSProp at 4,096"),
        ((80, 80), (80, 85), UNDECIDED, "RMSProp at 128 minus RMSProp at 4,096"),  # RMSProp loses nothing
        ((80, 70), (85, 75), UNDECIDED, "RMSProp's loss to 4,096 minus LARS's"),  # LARS loses as much
        ((80, 70), (80, 60), CONTRADICTED, "RMSProp's loss to 4,096 minus LARS's"),
        ((70, 80), (80, 90), CONTRADICTED, "RMSProp at 128 minus RMSProp at 4,096"),  # RMSProp gains
    ],
)
@pytest.mark.parametrize("protocol", ["tuned", "scaled"])
def test_large_batches(rmsprop, lars, verdict, decides, protocol):
    end = "" if protocol == "tuned" else "-scaled"
    points = {
        f"rmsprop-128{end}": rmsprop[0],
        f"rmsprop-4096{end}": rmsprop[1],
        "lars-128": lars[0],
        f"lars-4096{end}": lars[1],
    }
    top1 = of(**points, **{"lars-512": 1, "eval-102-on-2": 1})
    assert protocols(top1) == ["tuned", "scaled"][: 1 + (protocol == "scaled")]
    found = large_batch(top1, protocol)
    assert (found.verdict, found.measured, found.protocol) == (verdict, decides, protocol)
    assert "RMSProp: 80.1% at 4,096" in found.paper and f"lars-4096{end}: {lars[1]:.2f} ± 0.20 % (n = 5)" in found.ours


def test_large_batches_of_one_optimizer_cannot_be_compared():
    found = large_batch(of(lars_64=80, lars_256=70), "tuned")
    assert (found.verdict, found.rule) == (NOT_TESTABLE, "there are no runs of rmsprop-64, rmsprop-256")


@pytest.mark.parametrize(("gap", "verdict"), [(-0.5, SUPPORTED), (-1.5, CONTRADICTED), (-1, UNDECIDED), (3, SUPPORTED)])
def test_a_plain_optimizer_may_be_a_point_behind(gap, verdict):
    tuned = of(**{"lars-128": 80, "lars-4096": 70, "momentum-128": 80, "momentum-4096": 70 + gap})
    found = plain_optimizer(tuned, "tuned")
    assert (found.verdict, found.least) == (verdict, -1) and found.effect == pytest.approx(gap)
    assert "LARS is needless" in found.limit
    scaled = tuned.rename(columns={name: f"{name}-scaled" for name in ("lars-4096", "momentum-4096")})
    assert plain_optimizer(scaled, "scaled").effect == pytest.approx(gap)


def test_schedules_groups_and_precision_take_the_names_of_their_points():
    top1 = of(a=80, b=79, c=70)
    assert polynomial_decay(top1, "a", "b", "to 1 %").verdict == SUPPORTED == warmup(top1, "a", "c", "LARS").verdict
    assert "decay to 1 %, for LARS" in polynomial_decay(top1, "a", "b", "to 1 %").claim
    assert batch_norm_batch(top1, "b", "a", "c").verdict == SUPPORTED
    assert batch_norm_batch(top1, "c", "b", "a").verdict == CONTRADICTED  # an end is better than the middle
    equal = bfloat16_convolutions(of(a=79.5, b=80), "a", "b")
    assert (equal.verdict, equal.least, equal.most) == (SUPPORTED, -1, 1)
    assert bfloat16_convolutions(of(a=78.5, b=80), "a", "b").verdict == CONTRADICTED
    of_all = (
        polynomial_decay(top1, "a", "b", ""),
        batch_norm_batch(top1, "b", "a", "c"),
        bfloat16_convolutions(top1, "a", "b"),
    )
    assert len({each.limit for each in of_all}) == 3


def timed(tmp_path, seed, seconds, flags=ONE_CORE_A_DEVICE):
    environment = {"platform": "cpu", "devices": 2, "xla_flags": flags}
    recipe = Recipe.preset("digits-64-lars").replace(seed=seed)
    record = Record(tmp_path, recipe, environment=environment, timing={"total_seconds": seconds, "images": 73_440})
    record.result, record.metrics = {"eval_examples": 360}, [{"kind": "eval", "step": 1}, {"kind": "eval", "step": 2}]
    return record


def test_evaluation_is_timed_in_pairs_where_devices_do_not_share_their_cores(tmp_path):
    """Pairs differ by 2, 2.1 and 1.9 s of 12, whatever hour they were run at."""
    drift, gap = np.array([10.0, 14.0, 9.0]), np.array([2.0, 2.1, 1.9])
    fast = [timed(tmp_path, seed, x) for seed, x in enumerate(drift)]
    slow = [timed(tmp_path, seed, x) for seed, x in enumerate(drift + gap)]
    found = distributed_evaluation(fast, slow[::-1])
    assert (found.verdict, found.unit, found.protocol, found.n) == (SUPPORTED, "percent", "timed", 3)
    share = 100 * gap / (drift + gap).mean()
    half = stats.t.ppf(0.975, 2) * share.std(ddof=1) / np.sqrt(3)
    assert (found.effect, found.low) == pytest.approx((share.mean(), share.mean() - half))
    assert "(102 training images per evaluated one)" in found.claim and "pod" in found.limit
    assert distributed_evaluation(slow, fast).verdict == CONTRADICTED
    assert distributed_evaluation(fast[:2], slow).verdict == NOT_TESTABLE
    sharing = distributed_evaluation(fast, [timed(tmp_path, 0, 12, flags="")])
    assert sharing.verdict == NOT_TESTABLE and "simulated" in sharing.rule


def test_top1_by_seed_is_in_percent(tmp_path):
    records = []
    for name, seed, top1 in (("a-seed0", 0, 0.5), ("a-seed1", 1, 0.6), ("b-seed1", 1, 0.7)):
        record = Record(tmp_path / name, Recipe.preset("digits-64-lars").replace(seed=seed))
        record.result["final_top1"] = top1
        records.append(record)
    table = by_seed(records)
    assert dict(table["a"]) == {0: 50, 1: 60} and table["b"].isna()[0] and table["b"][1] == pytest.approx(70)
    assert protocols(table) == ["preset"] and warmup(table, "a", "b", "LARS").protocol == "preset"
    (tmp_path / "search-a-1").mkdir()
    assert protocols(by_seed(records)) == ["tuned"]


def test_a_verdict_leaves_itself_in_the_notebook():
    verdict = warmup(of(a=80, b=50), "a", "b", "LARS")
    shown = verdict._repr_mimebundle_()
    output = nbformat.v4.new_output("display_data", data=shown)
    nbformat.validate(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output])]))
    assert json.loads(json.dumps(shown[MIME]))["verdict"] == SUPPORTED
    said = "by LARS (tuned): a minus b is +30.00 points (95 % interval +30.00 to +30.00, n = 5)."
    assert shown["text/plain"].startswith("✓ Supported: warm-up is needed") and said in shown["text/plain"]
    assert '"supported">✓ Supported</strong>' in shown["text/html"] and said in shown["text/html"]
    wide = pd.DataFrame({"a": 30 * SPREAD, "b": SPREAD})
    assert "still to run: seeds 5-7 of a, b" in warmup(wide, "a", "b", "LARS")._repr_mimebundle_()["text/plain"]


def test_the_cifar10_suite_trains_what_won_its_search():
    suite = load_suite(Path(__file__).parents[2] / "notebooks/suites/cifar10.yaml")
    winners = best_rates(suite_records("cifar10", "search-*"))
    assert winners["inside"].all() and set(winners["rates"]) <= {5, 6}
    trained = {}
    for entry in suite.runs:
        if not entry.name.startswith("search-"):
            trained.setdefault(re.sub(r"-seed\d+$", "", entry.name), set()).add(entry.parameters["lr_per_256"])
    assert all(trained[point] == {winners.loc[point, "lr_per_256"]} for point in winners.index)
    others = set(trained) - set(winners.index)
    assert len(others) == 7 and all(trained[point] == trained["lars-128"] for point in others)
