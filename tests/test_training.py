import json
import sys

import jax
import numpy as np
import pytest

import effnetlib
from effnetlib import EffnetlibError, Recipe, Record, train
from effnetlib.training import DivergedError, make_train_step, smoothed_cross_entropy

MODULE = sys.modules["effnetlib.training"]


def weights(directory):
    """The arrays of the last checkpoint of a run."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(directory / "checkpoints") as checkpoints:
        step = checkpoints.latest_step()
        restored = checkpoints.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return step, jax.tree.leaves(restored.state)


def without_clock(record):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in record.metrics]


@pytest.fixture
def whole(tiny, tmp_path):
    return train(tiny, tmp_path / "whole")


def test_label_smoothing_is_the_formula():
    logits, labels = np.random.default_rng(0).normal(size=(4, 10)), np.array([0, 3, 9, 3])
    target = 0.9 * np.eye(10)[labels] + 0.1 / 10
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -(target * log_probs).sum(-1).mean()
    assert float(smoothed_cross_entropy(logits, labels, 0.1)) == pytest.approx(wanted, rel=1e-5)


def test_a_run_leaves_a_complete_record(whole, tiny):
    run = json.loads((whole.directory / "run.json").read_text())
    assert run["status"] == "completed" and run["recipe_hash"] == tiny.hash
    assert run["data"]["fingerprints"] == {"train": "c87c0fdca1ec4582", "eval": "711accb5e9d713fd"}
    assert run["environment"]["devices"] == 8 and run["environment"]["jax"] == jax.__version__
    assert run["result"]["eval_examples"] == 360
    assert run["timing"]["images"] == tiny.total_steps * 64
    evaluations = whole.frame("eval")
    assert list(evaluations["step"]) == list(tiny.eval_steps)
    assert run["result"]["peak_top1"] == evaluations["ema_top1"].max()
    np.testing.assert_allclose(whole.frame("train")["lr"], tiny.schedule(np.arange(tiny.total_steps)), rtol=1e-5)
    assert Record.load(whole.directory) == whole


def test_running_again_returns_the_finished_run(whole, tiny, monkeypatch):
    monkeypatch.setattr(MODULE, "_run", None)
    assert train(tiny, whole.directory) == whole


def test_a_run_cut_off_after_a_checkpoint_resumes_to_the_same_bits(whole, tiny, tmp_path, monkeypatch):
    directory = tmp_path / "cut"
    original = Record.log

    def log(self, **row):
        if row["step"] == tiny.eval_steps[0] + 3:
            raise KeyboardInterrupt
        original(self, **row)

    monkeypatch.setattr(Record, "log", log)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, directory)
    assert Record.load(directory).status == "preempted"
    monkeypatch.setattr(Record, "log", original)
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # as a crash would leave it
    resumed = train(tiny, directory)
    assert without_clock(resumed) == without_clock(whole) == without_clock(Record.load(directory))
    (step, ours), (same_step, theirs) = weights(directory), weights(whole.directory)
    assert step == same_step == tiny.total_steps
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    assert resumed.timing["images"] == whole.timing["images"]


def test_the_losses_do_not_depend_on_logging_evaluation_or_reading_ahead(whole, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "LOGGED_STEPS", 3)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    other = train(tiny.replace(eval_every_epochs=0.5), tmp_path / "other")
    assert len(other.frame("eval")) < len(whole.frame("eval"))
    rows = other.frame("train").set_index("step")[["loss", "top1"]]
    assert 3 <= len(rows) < len(whole.frame("train"))
    assert rows.equals(whole.frame("train").set_index("step")[["loss", "top1"]].loc[rows.index])


def test_another_recipe_in_the_same_folder_is_refused(whole, tiny):
    with pytest.raises(EffnetlibError, match=r"another recipe \(seed differ\)"):
        train(tiny.replace(seed=1), whole.directory)


def test_divergence_stops_and_is_recorded(tiny, tmp_path):
    recipe = tiny.replace(lr_per_256=1e30, warmup_epochs=0)
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at step \d+"):
        train(recipe, tmp_path / "run")
    record = Record.load(tmp_path / "run")
    assert record.status == "failed" and record.error.startswith("DivergedError: the loss is")


def test_what_cannot_run_says_so_before_anything_is_written(tiny, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(EffnetlibError, match="run's folder .* cannot be written: Not a directory"):
        train(tiny, blocker / "run")
    for recipe, sentence in [
        (tiny.replace(dataset="cifar10"), "effnetlib data fetch cifar10"),
        (tiny.replace(global_batch_size=96, batch_norm_batch_size=32), "3 batch-norm groups do not fit 8 devices"),
    ]:
        with pytest.raises(EffnetlibError, match=sentence):
            train(recipe, tmp_path / "run")
    with pytest.raises(EffnetlibError, match="eval_devices must be from 1 to 8, and is 9"):
        train(tiny, tmp_path / "run", eval_devices=9)
    assert not (tmp_path / "run").exists()


def test_evaluation_on_one_device_changes_no_result(whole, tiny, tmp_path):
    alone = train(tiny, tmp_path / "alone", eval_devices=1)
    assert alone.environment["eval_devices"] == 1
    for name in ("top1", "ema_top1", "nseen"):
        assert list(alone.frame("eval")[name]) == list(whole.frame("eval")[name])


def test_a_step_updates_everything_and_donates_its_state(tiny):
    init, step, _ = make_train_step(tiny)
    key = jax.random.key(0)
    state = jax.jit(init)(key)
    before = jax.tree.map(np.array, state)
    batch = {
        "images": np.random.default_rng(0).integers(0, 255, (64, 32, 32, 3), np.uint8),
        "labels": np.arange(64) % 10,
    }
    after, metrics = jax.jit(step, donate_argnums=0)(state, batch, key, 0.0)
    assert int(after.step) == 1 and float(metrics["loss"]) > 0
    # At a learning rate of zero the parameters stay where they were, and the statistics do not.
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.batch_stats, after.batch_stats)
    assert all(jax.tree.leaves(moved))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_public_names():
    for name in effnetlib.__all__:
        assert getattr(effnetlib, name).__doc__
    assert Recipe.preset("digits-64-lars").optimizer == "lars"
