"""Training: the loop around the step, which records, evaluates, saves, stops and resumes."""

import contextlib
import time
from collections import deque
from pathlib import Path

import jax
import numpy as np

from effnetlib import data
from effnetlib.checkpoints import open_checkpoints, restore, save
from effnetlib.distributed import all_or_none, wait_for_all
from effnetlib.errors import EffnetlibError, FailedError
from effnetlib.evaluation import Evaluator
from effnetlib.lock import held
from effnetlib.mesh import batch_sharding, make_mesh, replicated
from effnetlib.progress import Progress
from effnetlib.recipe import Recipe
from effnetlib.records import Record, environment, is_main_process
from effnetlib.step import TrainState, lower_train_step
from effnetlib.stopping import PreemptedError, Stop

LOGGED_STEPS = 200  # about as many training rows as a run's metrics hold


CHECKPOINT_SECONDS = 600.0  # between checkpoints where evaluations, each of which makes one, are further apart
EXPLODED_LOSS = 1000.0  # nats: no cross-entropy comes near it unless the weights have blown up


class DivergedError(RuntimeError):
    """The loss is no longer finite, or has exploded."""


def train(
    recipe: Recipe, directory: Path | str, *, eval_devices: int | None = None, max_minutes: float | None = None
) -> Record:
    """Trains a recipe into a folder, on all devices of all processes.

    Running it again resumes: from the latest checkpoint that can be read, at the step it was saved, with the same data, to
    the same bits. A finished run is returned as it is. A checkpoint is written at every evaluation, every ten minutes, and
    when the run is asked to stop: by SIGTERM, by SIGINT (Jupyter's stop button; twice means at once), or by the clock.

    Args:
      recipe: what to train.
      directory: the run's folder; made if need be.
      eval_devices: evaluate on the first so many devices only, to measure what distributing evaluation saves. Changes
        no result beyond rounding.
      max_minutes: stop after so many minutes from now, for sessions that end without warning; None is never.

    Returns:
      The record, `completed`.

    Raises:
      EffnetlibError: the recipe does not fit the devices, the data is missing, the folder cannot be written or holds
        another recipe's run, or another process is training in it. Nothing has been compiled or written then.
      PreemptedError: asked to stop; all is saved, the record is `preempted`, and the same call goes on.
      DivergedError: the loss became infinite, nan or huge; the record is `failed` and says at which step, with which
        learning rate and norms.
    """
    directory = Path(directory).expanduser().absolute()
    devices = jax.devices()
    with contextlib.ExitStack() as block:
        with all_or_none():
            recipe.validate(len(devices))
            if eval_devices is not None:
                _check_eval_devices(eval_devices, len(devices), recipe.global_batch_size)
            splits = {name: data.load(recipe.dataset, name, recipe.subset) for name in ("train", "eval")}
            _make_writable(directory)
            if is_main_process():
                block.enter_context(held(directory, "training in"))
            record = _open_record(recipe, directory, splits)
        if record.status == "completed":
            return record
        stop = block.enter_context(Stop(max_minutes))
        return _train(recipe, record, splits, devices[:eval_devices], stop)


def _train(recipe: Recipe, record: Record, splits, eval_devices, stop: Stop) -> Record:
    record.environment = environment() | {"eval_devices": len(eval_devices)}
    record.status, record.error = "running", None
    try:
        _run(recipe, record, splits, eval_devices, stop)
        record.status = "completed"
    except (KeyboardInterrupt, PreemptedError):
        record.status = "preempted"
        raise
    except OSError as error:
        record.status, record.error = "failed", str(error)
        reason = f"{error.strerror or error} ({error.filename or 'no file named'})"
        raise FailedError(
            f"the run in {record.directory} met an error of the file system: {reason}; once it is mended, the same call goes on"
        ) from error
    except Exception as error:
        record.status, record.error = "failed", f"{type(error).__name__}: {error}"
        raise
    finally:
        with contextlib.suppress(OSError):  # where the disk is the trouble, the error above says so
            record.save()
    return record


def _check_eval_devices(eval_devices: int, num_devices: int, batch: int) -> None:
    if not 0 < eval_devices <= num_devices:
        raise EffnetlibError(f"eval_devices must be from 1 to {num_devices}, and is {eval_devices}")
    if batch % eval_devices:
        raise EffnetlibError(f"global_batch_size {batch} does not divide over {eval_devices} eval_devices")
    if eval_devices < num_devices and jax.process_count() > 1:
        raise EffnetlibError("eval_devices needs a single process: each of several must take part in the evaluation")


def _make_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable.{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EffnetlibError(f"the run's folder {directory} cannot be written: {error.strerror}") from None


def _open_record(recipe: Recipe, directory: Path, splits) -> Record:
    described = {
        "source": recipe.dataset,
        "train_examples": len(splits["train"]),
        "eval_examples": len(splits["eval"]),
        "num_classes": len(splits["train"].class_names),
        "class_names": list(splits["train"].class_names),
        "fingerprints": {name: split.fingerprint for name, split in splits.items()},
        "total_steps": recipe.total_steps,
    }
    if not (directory / "run.json").exists():
        record = Record(directory, recipe)
        record.data = described
        return record
    record = Record.load(directory)
    if record.recipe != recipe:
        fields = [name for name, value in vars(recipe).items() if vars(record.recipe).get(name, value) != value]
        raise EffnetlibError(
            f"{directory} holds a run of another recipe ({', '.join(fields)} differ): choose another folder, "
            "or delete that one"
        )
    if record.status != "completed" and {**described, **record.data} != described:
        raise EffnetlibError(
            f"the data set {recipe.dataset} is not the one that {directory} was begun with: choose another folder"
        )
    return record


def _run(recipe: Recipe, record: Record, splits, eval_devices, stop: Stop) -> None:
    mesh = make_mesh(recipe.num_groups)
    everywhere, sharded = replicated(mesh), batch_sharding(mesh)
    split_key = jax.jit(lambda: tuple(jax.random.split(jax.random.key(recipe.seed))), out_shardings=everywhere)
    init_key, run_key = split_key()
    batch, size = recipe.global_batch_size, recipe.resolution

    compiling = time.perf_counter()
    init, lowered, _, graphdef = lower_train_step(recipe, mesh)
    # Runs once, so it is not worth the compiler's time (a third of it, measured on CPU).
    state = init.lower(init_key).compile({"xla_backend_optimization_level": 0})(init_key)
    train_step = lowered.compile()
    eval_mesh = mesh if len(eval_devices) == mesh.size else make_mesh(1, eval_devices)
    evaluator = Evaluator(
        graphdef, splits["eval"], batch=batch, size=size, augmentation=recipe.augmentation, mesh=eval_mesh
    )
    evaluator.compile((state.params, state.batch_stats))
    wait_for_all("compiled")
    compile_seconds = time.perf_counter() - compiling

    with open_checkpoints(record.directory) as checkpoints:
        if found := restore(checkpoints, record.directory, vars(state)):
            restored, timing = found
            state = jax.device_put(TrainState(**restored), everywhere)
        else:
            names = ("compile_seconds", "train_seconds", "eval_seconds", "input_wait_seconds", "total_seconds")
            timing = dict.fromkeys(names, 0.0) | {"images": 0}
        start = int(state.step)
        record.timing = timing | {"compile_seconds": timing["compile_seconds"] + compile_seconds}
        record.rewind(start)
        record.save()
        batches = data.train_batches(
            splits["train"],
            seed=recipe.seed,
            batch=batch,
            size=size,
            augmentation=recipe.augmentation,
            sharding=sharded,
            start=start,
            stop=recipe.total_steps,
        )
        _loop(recipe, record, state, run_key, batches, train_step, evaluator, checkpoints, stop)
    record.summarize()


def _loop(recipe, record, state, run_key, batches, train_step, evaluator, checkpoints, stop) -> None:
    timing = record.timing
    total, first = recipe.total_steps, int(state.step)
    log_every = max(1, total // LOGGED_STEPS)
    eval_steps = frozenset(recipe.eval_steps)
    learning_rates = np.asarray(jax.jit(recipe.schedule)(np.arange(total)))
    progress = Progress(total, first, recipe.global_batch_size)
    clock = _Clock(timing)
    pending = deque()
    saved = first

    def settle(keep: int) -> None:
        """Waits for, checks and logs the metrics of all steps but the latest `keep`."""
        while len(pending) > keep:
            step, metrics = pending.popleft()
            row = {name: float(value) for name, value in metrics.items()}
            timing["images"] += recipe.global_batch_size
            if not row["loss"] < EXPLODED_LOSS:
                raise DivergedError(
                    f"the loss is {row['loss']:.4g} at step {step} of {total}, learning rate {learning_rates[step - 1]:.4g}, "
                    f"norm of the gradient {row['grad_norm']:.4g}, of the parameters {row['param_norm']:.4g}; "
                    + (f"the last good checkpoint is that of step {saved}" if saved else "there is no checkpoint yet")
                )
            seconds = clock.now()
            progress.update(step, loss=row["loss"])
            if step % log_every == 0 or step == total:
                rate = timing["images"] / max(timing["train_seconds"] + clock.lap(), 1e-9)
                record.log(kind="train", step=step, epoch=step / recipe.steps_per_epoch, **row,
                           lr=float(learning_rates[step - 1]), images_per_second=rate, seconds=seconds)  # fmt: skip

    def checkpoint(step: int, top1: float | None = None) -> None:
        nonlocal saved
        timing["total_seconds"] = clock.now()
        if is_main_process() and saved != step:
            host_state = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), vars(state))
            save(checkpoints, step, host_state, timing, top1)
        saved = step
        record.save()

    def evaluate(step: int) -> None:
        with clock.measure("eval_seconds"):
            raw, ema = evaluator((state.params, state.batch_stats), (state.ema_params, state.ema_batch_stats))
        record.log(kind="eval", step=step, epoch=step / recipe.steps_per_epoch, nseen=raw.nseen,
                   top1=raw.top1, top5=raw.top5, loss=raw.loss,
                   ema_top1=ema.top1, ema_top5=ema.top5, ema_loss=ema.loss, seconds=clock.now())  # fmt: skip
        progress.update(step, top1=ema.top1)
        evaluated = [row for row in record.metrics if row["kind"] == "eval"]
        progress.draw([row["epoch"] for row in evaluated], [row["ema_top1"] for row in evaluated])
        checkpoint(step, ema.top1)

    def stop_if_asked(step: int) -> None:
        if reason := stop.agreed():
            settle(keep=0)
            clock.stop_lap("train_seconds")
            checkpoint(step)
            checkpoints.wait_until_finished()
            raise PreemptedError(
                f"stopped at step {step} of {total} ({reason}); saved, and the same command or cell, run again, goes on"
            )

    if first in eval_steps and not any(row["kind"] == "eval" and row["step"] == first for row in record.metrics):
        evaluate(first)  # the run was stopped between this step and its evaluation
    last_saved = time.monotonic()
    clock.start_lap()
    for step in range(first + 1, total + 1):
        # With several processes asking is a collective, so not at every step.
        if jax.process_count() == 1 or step % log_every == 0:
            stop_if_asked(step - 1)
        with clock.measure("input_wait_seconds"):
            batch = next(batches)
        state, metrics = train_step(state, batch, run_key, learning_rates[step - 1])
        pending.append((step, metrics))
        # The metrics of a step are read once the next one is under way, so the devices never wait for the host.
        settle(keep=1)
        if step in eval_steps:
            stop_if_asked(step)
            settle(keep=0)
            clock.stop_lap("train_seconds")
            evaluate(step)
        elif time.monotonic() - last_saved > CHECKPOINT_SECONDS:
            settle(keep=0)
            clock.stop_lap("train_seconds")
            checkpoint(step)
        else:
            continue
        last_saved = time.monotonic()
        clock.start_lap()
    checkpoints.wait_until_finished()


class _Clock:
    """The run's clock, going on from where a resumed run stood, and the laps between evaluations."""

    def __init__(self, timing: dict):
        self.timing = timing
        self.zero = time.perf_counter() - timing["total_seconds"]
        self.start_lap()

    def now(self) -> float:
        return time.perf_counter() - self.zero

    def start_lap(self) -> None:
        self.lap_start = time.perf_counter()

    def lap(self) -> float:
        return time.perf_counter() - self.lap_start

    def stop_lap(self, name: str) -> None:
        self.timing[name] += self.lap()

    @contextlib.contextmanager
    def measure(self, name: str):
        start = time.perf_counter()
        yield
        self.timing[name] += time.perf_counter() - start
