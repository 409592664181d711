"""Training: the loop around the step, which records, evaluates, saves, stops and resumes."""

import contextlib
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from effnetlib import data
from effnetlib.errors import EffnetlibError, FailedError, first_line
from effnetlib.evaluation import Evaluator
from effnetlib.mesh import batch_sharding, make_mesh, replicated
from effnetlib.recipe import Recipe
from effnetlib.runs.checkpoints import finish, open_checkpoints, restore, save
from effnetlib.runs.files import exclusive_lock, make_writable
from effnetlib.runs.hosts import all_or_none, wait_for_all
from effnetlib.runs.machine import pinned
from effnetlib.runs.paths import user_path
from effnetlib.runs.progress import Progress, say
from effnetlib.runs.record import Record, environment, is_main_process
from effnetlib.runs.stopping import PreemptedError, Stop
from effnetlib.step import TrainState, lower_train_step

LOGGED_STEPS = 200  # about as many training rows as a run's metrics hold


CHECKPOINT_SECONDS = 600.0  # between checkpoints where evaluations, each of which makes one, are further apart
CHANGES_NUMBERS = ("jax", "jaxlib", "flax", "optax", "platform", "device_kind", "xla_flags")  # of the environment
EXPLODED_LOSS = 1000.0  # nats: no cross-entropy comes near it unless the weights have blown up


class DivergedError(RuntimeError):
    """The loss is no longer finite, or has exploded."""


def train(
    recipe: Recipe, directory: Path | str, *, eval_devices: int | None = None, max_minutes: float | None = None
) -> Record:
    """Trains a recipe into a folder, on all devices of all processes.

    Running it again resumes: from the latest checkpoint that can be read, at the step it was saved, with the same data, to
    the same bits, whatever settings of jax the shell or the notebook has made (see `effnetlib.runs.machine`). A finished run is
    returned as it is. A checkpoint is written at every evaluation, every ten minutes, before an error of the input, and when
    the run is asked to stop: by SIGTERM, by SIGINT (Jupyter's stop button; twice means at once), or by the clock.

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
      FailedError: the input or the file system failed, which is saved like a stop, or no checkpoint can be read.
      DivergedError: the loss became infinite, nan or huge; the record is `failed` and says at which step, with which
        learning rate and norms.
    """
    devices = jax.devices()
    with contextlib.ExitStack() as block:
        settings = block.enter_context(pinned())
        with all_or_none():
            directory = user_path(directory, "directory", folder=True)
            recipe.validate(len(devices))
            if eval_devices is not None:
                _check_eval_devices(eval_devices, len(devices), recipe.global_batch_size)
            splits = {name: data.load(recipe.dataset, name, recipe.subset) for name in ("train", "eval")}
            make_writable(directory, "the run's folder")
            if is_main_process():
                block.enter_context(exclusive_lock(directory, "training in"))
            record = _open_record(recipe, directory, splits)
        if is_main_process() and (remark := data.remark(splits)):
            say(remark)
        if record.status == "completed":
            return record
        stop = block.enter_context(Stop(max_minutes))
        _note_environment(record, environment() | {"settings": settings, "eval_devices": len(devices[:eval_devices])})
        return _train(recipe, record, splits, devices[:eval_devices], stop)


def _note_environment(record: Record, now: dict) -> None:
    """Into the record; and, where a run that was begun goes on in another one, what was otherwise before."""
    before = record.environment
    changed = {name: before[name] for name in CHANGES_NUMBERS if name in before and before[name] != now[name]}
    if changed:
        said = ", ".join(f"{name} was {value!r} and is {now[name]!r}" for name, value in changed.items())
        say(f"this run goes on in another environment, and the record says so: {said}")
    earlier = before.get("earlier", []) + ([changed] if changed else [])
    record.environment = now | ({"earlier": earlier} if earlier else {})


def _train(recipe: Recipe, record: Record, splits, eval_devices, stop: Stop) -> Record:
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


def _open_record(recipe: Recipe, directory: Path, splits) -> Record:
    described = {
        "source": recipe.dataset,
        "train_examples": len(splits["train"]),
        "eval_examples": len(splits["eval"]),
        "num_classes": len(splits["train"].class_names),
        "class_names": list(splits["train"].class_names),
        "fingerprints": {name: split.fingerprint for name, split in splits.items()},
        "names": {name: split.names for name, split in splits.items() if split.names},
        "total_steps": recipe.total_steps,
    }
    if not (directory / "run.json").exists():
        record = Record(directory, recipe)
        record.data = described
        return record
    record = Record.load(directory)
    wanted, known = asdict(recipe), record.as_read["recipe"] | asdict(record.recipe)
    if fields := [name for name, value in known.items() if name not in wanted or value != wanted[name]]:
        raise EffnetlibError(
            f"{directory} holds a run of another recipe ({', '.join(fields)} differ): choose another folder, "
            "or delete that one"
        )
    if record.status != "completed":
        record.data = _same_data(described, record)
    return record


def _same_data(described: dict, record: Record) -> dict:
    """What is there, if a run may go on with it: what it was begun with, or photographs of the same names."""
    source, before, replaced = described["source"], record.data, record.data.get("replaced", [])
    known = {"class_names": described["class_names"]} | before  # records were without them once
    same = all(known.get(name) == value for name, value in described.items() if name not in ("fingerprints", "names"))
    ours, theirs = described["fingerprints"], before.get("fingerprints", {})
    changed = {name: theirs.get(name) for name in ours if ours[name] != theirs.get(name)}
    names = described["names"]
    if not same or any(name not in names or names[name] != before.get("names", {}).get(name) for name in changed):
        raise EffnetlibError(
            f"the data set {source} is not the one that {record.directory} was begun with: choose another folder"
        )
    if changed:
        replaced = [*replaced, changed]
        say(
            f"photographs in {source} ({', '.join(changed)}) were replaced by others of the same names since this run began: "
            "it goes on with them, and the record says so"
        )
    return described | ({"replaced": replaced} if replaced else {})


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

    def checkpoint(step: int, top1: float | None = None, by_any: bool = False) -> None:
        nonlocal saved  # the state is replicated, so that a process whose input fails can save it too
        timing["total_seconds"] = clock.now()
        if (is_main_process() or by_any) and saved != step:
            host_state = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), vars(state))
            save(checkpoints, step, host_state, timing, top1)
        saved = step
        record.save()

    def save_all(step: int, by_any: bool = False) -> None:
        settle(keep=0)
        clock.stop_lap("train_seconds")
        checkpoint(step, by_any=by_any)
        finish(checkpoints)

    @contextlib.contextmanager
    def saved_first(step: int):
        """Saves the state after `step` where the input fails, so that nothing but what is still to do is lost."""
        try:
            yield
        except (PreemptedError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # whatever a decoder, a file system or a thread of the input raises
            save_all(step, by_any=True)
            said = error if isinstance(error, EffnetlibError) else f"{type(error).__name__}: {first_line(error)}"
            raise FailedError(
                f"the input failed after step {step} of {total}: {said}; saved, and once it is mended the same call goes on"
            ) from error

    def evaluate(step: int) -> None:
        between = SimpleNamespace(update=lambda _: stop_if_asked(step, "evaluation"))
        with clock.measure("eval_seconds"), saved_first(step):
            weights = (state.params, state.batch_stats), (state.ema_params, state.ema_batch_stats)
            raw, ema = evaluator(*weights, progress=between)
        record.log(kind="eval", step=step, epoch=step / recipe.steps_per_epoch, nseen=raw.nseen,
                   top1=raw.top1, top5=raw.top5, loss=raw.loss,
                   ema_top1=ema.top1, ema_top5=ema.top5, ema_loss=ema.loss, seconds=clock.now())  # fmt: skip
        progress.update(step, top1=ema.top1)
        evaluated = [row for row in record.metrics if row["kind"] == "eval"]
        progress.draw([row["epoch"] for row in evaluated], [row["ema_top1"] for row in evaluated])
        checkpoint(step, ema.top1)

    def stop_if_asked(step: int, during: str = "training") -> None:
        if reason := stop.agreed(during):
            save_all(step)
            raise PreemptedError(
                f"stopped at step {step} of {total} ({reason}); saved, and the same command or cell, run again, goes on"
            )

    if first in eval_steps and not any(row["kind"] == "eval" and row["step"] == first for row in record.metrics):
        evaluate(first)  # the run was stopped between this step and its evaluation
    last_saved = time.monotonic()
    clock.start_lap()
    for step in range(first + 1, total + 1):
        stop_if_asked(step - 1)
        with clock.measure("input_wait_seconds"), saved_first(step - 1):
            batch = next(batches)
        state, metrics = train_step(state, batch, run_key, learning_rates[step - 1])
        pending.append((step, metrics))
        # The metrics of a step are read once the next one is under way, so the devices never wait for the host.
        settle(keep=1)
        if step in eval_steps:
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
    finish(checkpoints)


class _Clock:
    """The run's clock, going on from where a resumed run stood, and the laps between evaluations."""

    def __init__(self, timing: dict):
        self.timing = timing
        self.zero = time.perf_counter() - timing["total_seconds"]
        self.lap_start = None

    def now(self) -> float:
        return time.perf_counter() - self.zero

    def start_lap(self) -> None:
        self.lap_start = time.perf_counter()

    def lap(self) -> float:
        return time.perf_counter() - self.lap_start

    def stop_lap(self, name: str) -> None:
        if self.lap_start is not None:
            self.timing[name] += self.lap()
        self.lap_start = None

    @contextlib.contextmanager
    def measure(self, name: str):
        start = time.perf_counter()
        yield
        self.timing[name] += time.perf_counter() - start
