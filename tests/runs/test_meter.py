"""The clock and the metrics of a run, without a run."""

import numpy as np
import pytest

from effnetlib import Recipe, Record
from effnetlib.evaluation import EvalResult
from effnetlib.runs import meter
from effnetlib.runs.meter import DivergedError, Meter

BATCH = 64
GOOD = {"loss": 2.0, "top1": 0.5, "grad_norm": 1.0, "param_norm": 3.0}


@pytest.fixture
def now(monkeypatch):
    """The time, which stands still unless a test moves it."""
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    return now


def metered(folder, step=0, steps=4, **timing):
    timing = dict.fromkeys(meter.CLOCKS, 0.0) | {"images": 0} | timing
    record = Record(folder, Recipe.preset("digits-64-lars"), timing=timing)
    return Meter(record, np.arange(steps) / 10, step)


def test_a_step_is_read_when_the_next_one_has_begun(tmp_path, now):
    run = metered(tmp_path)
    run.resume()
    run.add(1, GOOD)
    assert run.record.metrics == []
    with run.measure("input_wait_seconds"):
        now[0] += 0.5
    now[0] += 1.5
    run.add(2, GOOD)
    (row,) = run.record.metrics
    assert row == {"kind": "train", "step": 1, "epoch": row["epoch"], **GOOD, "lr": 0.0,
                   "images_per_second": BATCH / 2.0, "input_wait_share": 0.25, "seconds": 2.0}  # fmt: skip
    run.pause()
    assert [row["step"] for row in run.record.metrics] == [1, 2] and run.timing["images"] == 2 * BATCH


def test_only_what_lies_between_resume_and_pause_is_training_time(tmp_path, now):
    run = metered(tmp_path, train_seconds=10.0, total_seconds=20.0)
    assert run.now() == 20.0  # goes on from where the run stood
    for seconds in (3.0, 4.0):
        run.resume()
        now[0] += seconds
        run.pause()
        run.pause()  # no more than once
        now[0] += 100.0
    with run.measure("eval_seconds"):
        now[0] += 5.0
    with pytest.raises(KeyError), run.measure("eval_seconds"):
        now[0] += 1.0
        raise KeyError
    assert (run.timing["train_seconds"], run.timing["eval_seconds"], run.now()) == (17.0, 5.0, 233.0)


def test_about_as_many_steps_as_wanted_are_logged_and_the_last_one_always(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "LOGGED_STEPS", 3)
    run = metered(tmp_path, steps=10)
    run.resume()
    for step in range(1, 11):
        run.add(step, GOOD)
    run.pause()
    assert [row["step"] for row in run.record.metrics] == [3, 6, 9, 10]
    assert [row["lr"] for row in run.record.metrics] == pytest.approx([0.2, 0.5, 0.8, 0.9])


@pytest.mark.parametrize("loss", [np.nan, np.inf, 1e4])
def test_a_loss_that_is_not_finite_or_huge_ends_the_run_and_names_the_last_checkpoint(loss, tmp_path):
    run = metered(tmp_path)
    run.add(1, GOOD | {"loss": loss})
    with pytest.raises(DivergedError, match=r"the loss is .* at step 1 of 4, learning rate 0, .*no checkpoint yet"):
        run.pause()
    run.saved(2)
    run.add(3, GOOD | {"loss": loss})
    with pytest.raises(
        DivergedError,
        match="at step 3 of 4, learning rate 0.2, norm of the gradient 1, of the parameters 3; .* is that of step 2$",
    ):
        run.add(4, GOOD)
    assert run.record.metrics == []


def test_an_evaluation_is_a_row_with_both_weights(tmp_path, now):
    run = metered(tmp_path, total_seconds=7.0)
    run.add_evaluation(3, EvalResult(10, 5, 8, 20.0), EvalResult(10, 6, 9, 10.0))
    (row,) = run.record.metrics
    assert row == {"kind": "eval", "step": 3, "epoch": row["epoch"], "nseen": 10, "top1": 0.5, "top5": 0.8, "loss": 2.0,
                   "ema_top1": 0.6, "ema_top5": 0.9, "ema_loss": 1.0, "seconds": 7.0}  # fmt: skip
