import collections
import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import psutil
import pytest
from chaos import chaos
from PIL import Image

import effnetlib
from effnetlib import EffnetlibError, Recipe, Record, train
from effnetlib.data import photographs as photographs_module
from effnetlib.errors import FailedError
from effnetlib.runs import checkpoints
from effnetlib.runs.meter import DivergedError
from effnetlib.runs.run import Run
from effnetlib.runs.stopping import PreemptedError, Stop
from effnetlib.step import make_train_step, smoothed_cross_entropy

MODULE = sys.modules["effnetlib.training"]


def weights(directory):
    """The arrays of the last checkpoint of a run."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(directory / "checkpoints") as checkpoints:
        step = checkpoints.latest_step()
        restored = checkpoints.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return step, jax.tree.leaves(restored.state)


def without_clock(record):
    clock = ("seconds", "images_per_second", "input_wait_share")
    return [{k: v for k, v in row.items() if k not in clock} for row in record.metrics]


def begun(directory):
    """Makes a finished run one that is under way."""
    record = Record.load(directory)
    record.status = "running"
    record.save()


def equal_to_the_bit(directory, whole):
    assert without_clock(Record.load(directory)) == without_clock(whole)
    (step, ours), (same_step, theirs) = weights(directory), weights(whole.directory)
    assert step == same_step
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    return step


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
    monkeypatch.setattr(MODULE, "make_mesh", None)
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
    assert without_clock(resumed) == without_clock(whole)
    assert equal_to_the_bit(directory, whole) == tiny.total_steps
    assert resumed.timing["images"] == whole.timing["images"]


def test_the_losses_do_not_depend_on_logging_or_evaluation(whole, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("effnetlib.runs.meter.LOGGED_STEPS", 3)
    other = train(tiny.replace(eval_every_epochs=0.5), tmp_path / "other")
    assert len(other.frame("eval")) < len(whole.frame("eval"))
    rows = other.frame("train").set_index("step")[["loss", "top1"]]
    assert 3 <= len(rows) < len(whole.frame("train"))
    assert rows.equals(whole.frame("train").set_index("step")[["loss", "top1"]].loc[rows.index])


def test_signals_and_the_clock_stop_a_run_which_goes_on_to_the_same_bits(whole, tiny, tmp_path, monkeypatch):
    directory, original = tmp_path / "stopped", MODULE.data.train_batches
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):

        def batches(*arguments, number=number, **options):
            for count, batch in enumerate(original(*arguments, **options), 1):
                if count == 3:
                    os.kill(os.getpid(), number)
                yield batch

        monkeypatch.setattr(MODULE.data, "train_batches", batches)
        with pytest.raises(PreemptedError, match=rf"stopped at step \d+ of 11 \({name}\); saved"):
            train(tiny, directory)
        assert Record.load(directory).status == "preempted"
    monkeypatch.setattr(MODULE.data, "train_batches", original)
    with pytest.raises(PreemptedError, match=r"\(max_minutes\)"):
        train(tiny, directory, max_minutes=0.0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # put back as it was
    train(tiny, directory)
    equal_to_the_bit(directory, whole)


def test_a_stop_between_a_step_and_its_evaluation_loses_neither(whole, tiny, tmp_path, monkeypatch):
    at, directory = tiny.eval_steps[0], tmp_path / "between"
    asked = iter([""] * at + ["SIGTERM"])  # once before each step, and once more before the evaluation
    monkeypatch.setattr(Stop, "requested", lambda self: next(asked, ""))
    with pytest.raises(PreemptedError, match=f"stopped at step {at}"):
        train(tiny, directory)
    assert Record.load(directory).frame("eval").empty
    train(tiny, directory)
    equal_to_the_bit(directory, whole)


@pytest.mark.parametrize("kind", ["truncated", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(kind, whole, tiny, tmp_path, capsys):
    directory = tmp_path / "damaged"
    shutil.copytree(whole.directory, directory)
    begun(directory)
    steps = sorted((int(path.name), path) for path in (directory / "checkpoints").iterdir())
    assert [step for step, _ in steps] == list(tiny.eval_steps)[-2:]
    largest = max((path for path in steps[-1][1].rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.unlink() if kind == "missing" else os.truncate(largest, largest.stat().st_size // 2)
    train(tiny, directory)
    assert "the checkpoint of step 11 cannot be read, falling back to 5" in capsys.readouterr().out
    assert list((directory / "checkpoints").glob("damaged-11-*"))  # set aside, not deleted
    equal_to_the_bit(directory, whole)


def test_where_no_checkpoint_can_be_read_the_run_fails_and_nothing_is_moved(whole, tiny, tmp_path, monkeypatch):
    directory = tmp_path / "unreadable"
    shutil.copytree(whole.directory, directory)
    begun(directory)
    metrics = (directory / "metrics.jsonl").read_bytes()

    def full(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as broken:
        broken.setattr("orbax.checkpoint.CheckpointManager.restore", full)
        with pytest.raises(
            FailedError, match=r"no checkpoint in .* can be read \(that of step 11: .*Too many open files"
        ):
            train(tiny, directory)
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"5", "11"}
    assert (directory / "metrics.jsonl").read_bytes() == metrics
    record = Record.load(directory)
    assert (record.status, record.result, record.timing) == ("failed", whole.result, whole.timing)
    train(tiny, directory)
    equal_to_the_bit(directory, whole)


def test_a_disk_that_is_full_for_a_checkpoint_is_an_error_of_the_file_system(tmp_path):
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with checkpoints.open_checkpoints(tmp_path) as manager:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            with pytest.raises(OSError, match="a checkpoint cannot be written: .*File too large"):
                checkpoints.save(manager, 1, {"w": np.random.default_rng(0).random(100_000)})
                checkpoints.finish(manager)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


Before, Grown = collections.namedtuple("Before", "m"), collections.namedtuple("Grown", "m count")


@pytest.mark.parametrize(
    ("written", "wanted", "reason"),
    [
        (Before(np.ones(2)), Grown(np.ones(2), np.ones(1)), ""),  # a field added, as an update of optax may
        (Grown(np.ones(2), np.ones(1)), Before(np.ones(2)), "do not match"),
        (Before(np.ones(2)), Before(np.ones(3)), "its arrays have other shapes than this program's"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_program_stays_where_it_is(written, wanted, reason, tmp_path):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        assert checkpoints.restore(manager, {"opt_state": wanted}) is None  # none at all is a beginning
        for step in (3, 7):
            checkpoints.save(manager, step, {"opt_state": written})
        manager.wait_until_finished()
        with pytest.raises(FailedError, match=rf"can be read \(that of step 7: .*{reason}"):
            checkpoints.restore(manager, {"opt_state": wanted})
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "7"}
        state, _ = checkpoints.restore(manager, {"opt_state": written})
    np.testing.assert_array_equal(state["opt_state"].m, np.ones(2))


def test_two_runs_in_one_folder(tiny, tmp_path):
    code = "import sys, pathlib, time; from effnetlib.runs.files import exclusive_lock\nwith exclusive_lock(pathlib.Path(sys.argv[1]), 'training in'): print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(EffnetlibError, match=f"process {other.pid} on .* is training in"):
            train(tiny, tmp_path)
        other.kill()
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    ("code", "touches", "target"),
    [
        (errno.ENOSPC, "builtins.open", "metrics.jsonl"),
        (errno.EROFS, "os.replace", "run.json"),
        (errno.EROFS, "os.mkdir", "checkpoints/11"),
    ],
)
def test_a_full_disk_or_a_folder_made_read_only_is_a_sentence_and_loses_nothing(
    code, touches, target, whole, tiny, tmp_path, monkeypatch
):
    directory, evaluated = tmp_path / "full", []
    module, name = touches.split(".")
    original = getattr(sys.modules[module], name)

    def failing(path, *arguments, **options):
        paths = [str(path), *map(str, arguments)]
        if evaluated and any(target in each for each in paths):
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *arguments, **options)

    log = Record.log
    monkeypatch.setattr(
        Record, "log", lambda self, **row: (log(self, **row), evaluated.append(1) if row["kind"] == "eval" else None)
    )
    with monkeypatch.context() as broken:
        broken.setattr(touches, failing)
        with pytest.raises(
            EffnetlibError, match=f"error of the file system: .*{os.strerror(code)} .*the same call goes on"
        ):
            train(tiny, directory)
    with warnings.catch_warnings(action="ignore"):
        gc.collect()  # coroutines of Orbax's that will not be awaited: Python 3.11 can trip over a warning of theirs later
    assert Record.load(directory).status in ("failed", "running")  # what was written last before the disk failed
    train(tiny, directory)
    equal_to_the_bit(directory, whole)


def photographs(root, tiny):
    """Ten classes of eight, for which the program is that of `tiny`."""
    for number in range(90):
        split, label = ("train", number % 10) if number < 80 else ("val", number % 10)
        (root / split / str(label)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * label, number, 0)).save(root / split / str(label) / f"{number:02}.png")
    return tiny.replace(dataset=str(root), augmentation="inception", epochs=3.0, eval_every_epochs=1.0)


def test_a_photograph_that_cannot_be_read_loses_nothing_and_may_be_replaced(tiny, tmp_path, capsys):
    recipe = photographs(tmp_path / "photos", tiny)
    bad = tmp_path / "photos/train/9/79.png"
    good = bad.read_bytes()
    bad.write_bytes(b"no photograph")
    with pytest.raises(
        FailedError, match=rf"the input failed after step (\d+) of .*{bad.name}.*saved: fix the cause"
    ) as failed:
        train(recipe, tmp_path / "run")
    step = int(str(failed.value).split("after step ")[1].split()[0])
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not [child for child in living if "workers.work" in " ".join(child.cmdline())]
    assert Record.load(tmp_path / "run").status == "failed"
    assert not step or (tmp_path / "run/checkpoints" / str(step)).is_dir()
    bad.write_bytes(good + b"and more")
    photographs_module._LISTINGS.clear()  # as in a new process
    record = train(recipe, tmp_path / "run")
    assert "were replaced by others of the same names" in capsys.readouterr().out
    assert [list(each) for each in record.data["replaced"]] == [["train"]]
    assert record.status == "completed" and record.timing["images"] == 64 * recipe.total_steps

    begun(tmp_path / "run")
    bad.rename(bad.with_name("another" + bad.suffix))
    with pytest.raises(EffnetlibError, match="is not the one that .* was begun with"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "eval"])
def test_whatever_the_input_raises_is_saved_first_and_goes_on_to_the_same_bits(
    split, whole, tiny, tmp_path, monkeypatch
):
    module = MODULE.data if split == "train" else sys.modules["effnetlib.evaluation"]
    original = getattr(module, f"{split}_batches")

    def failing(*arguments, **options):
        for step, batch in enumerate(original(*arguments, **options)):
            if step == 3:
                raise KeyError("a decoder's")
            yield batch

    with monkeypatch.context() as broken:
        broken.setattr(module, f"{split}_batches", failing)
        at = 3 if split == "train" else tiny.eval_steps[0]
        with pytest.raises(
            FailedError, match=f"the input failed after step {at} of 11: KeyError: .*a decoder's.*; saved"
        ):
            train(tiny, tmp_path / "run")
    assert (tmp_path / "run/checkpoints" / str(at)).is_dir()
    train(tiny, tmp_path / "run")
    equal_to_the_bit(tmp_path / "run", whole)


def test_a_run_that_goes_on_in_another_environment_says_so(whole, tiny, tmp_path, capsys):
    shutil.copytree(whole.directory, tmp_path / "run")
    record = Record.load(tmp_path / "run")
    record.status, record.environment["xla_flags"] = "running", "--xla_other"
    record.save()
    assert train(tiny, tmp_path / "run").environment["earlier"] == [{"xla_flags": "--xla_other"}]
    assert "another environment, and the record says so: xla_flags was '--xla_other'" in capsys.readouterr().out


def test_a_clock_that_jumps_changes_nothing(whole, tiny, tmp_path, monkeypatch):
    jumps, offset, now, log = {3: 86400.0, 9: -200000.0}, [0.0], time.time, Record.log

    def logged(self, **row):
        offset[0] += jumps.pop(row["step"], 0.0)
        log(self, **row)

    monkeypatch.setattr(Record, "log", logged)
    monkeypatch.setattr("time.time", lambda: now() + sum(offset))
    record = train(tiny, tmp_path / "run")
    assert not jumps
    equal_to_the_bit(tmp_path / "run", whole)
    seconds = [row["seconds"] for row in record.metrics]
    assert seconds == sorted(seconds) and 0 < seconds[-1] < 600


@pytest.mark.slow
def test_a_short_chaos_loses_nothing(tmp_path):
    result = chaos(faults=2, minutes=4, seed=3, folder=tmp_path)
    assert result["faults"] >= 2 and result["runs_completed"] and result["lost"] == []


def test_another_recipe_in_the_same_folder_is_refused(whole, tiny):
    with pytest.raises(EffnetlibError, match=r"another recipe \(seed differ\)"):
        train(tiny.replace(seed=1), whole.directory)


def test_divergence_stops_and_is_recorded(tiny, tmp_path):
    recipe = tiny.replace(lr_per_256=1e30, warmup_epochs=0)
    with pytest.raises(
        DivergedError,
        match=r"the loss is .* at step \d+ of 11, learning rate .*, norm of the gradient .* no checkpoint yet",
    ):
        train(recipe, tmp_path / "run")
    record = Record.load(tmp_path / "run")
    assert record.status == "failed" and record.error.startswith("DivergedError: the loss is")


def test_a_checkpoint_starts_to_copy_every_array_before_it_waits_for_one(monkeypatch):
    calls = []

    class OnDevice:
        def addressable_data(self, number):
            return self

        def copy_to_host_async(self):
            calls.append("start")

        def __array__(self, *_, **__):
            calls.append("wait")
            return np.zeros(1)

        def __int__(self):
            return 1

    meter = SimpleNamespace(now=lambda: 0.0, saved_step=0, saved=lambda step: None)
    record = SimpleNamespace(timing={}, save=lambda: None)
    run = Run(record, {}, [], Stop(None), meter=meter)
    monkeypatch.setattr("effnetlib.runs.run.save", lambda *_: None)
    run.checkpoint(SimpleNamespace(step=OnDevice(), params={"a": OnDevice(), "b": OnDevice()}))
    assert calls == ["start"] * 3 + ["wait"] * 3


def test_what_cannot_run_says_so_before_anything_is_written(tiny, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(EffnetlibError, match="directory .* is a file, where a folder is wanted"):
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
