"""Training: the loop around the step, which records, evaluates, saves, stops and resumes.

`runs/run.py` holds what a run owns on disk, and `runs/meter.py` what it measures.
"""

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from jax.sharding import Mesh

from effnetlib import data
from effnetlib.evaluation import Evaluator
from effnetlib.mesh import batch_sharding, make_mesh, on_every_device, replicated
from effnetlib.recipe import Recipe
from effnetlib.runs.record import Record
from effnetlib.runs.run import Run, open_run
from effnetlib.step import TrainState, lower_train_step

CHECKPOINT_SECONDS = 600.0  # between checkpoints, where evaluations, each of which makes one, are further apart


def train(
    recipe: Recipe, directory: Path | str, *, eval_devices: int | None = None, max_minutes: float | None = None
) -> Record:
    """Trains a recipe into a folder, on all devices of all processes.

    Running it again resumes from the latest checkpoint that can be read. It goes on with the same data,
    to the same bits, whatever settings of jax the shell or the notebook has made. A finished run is
    returned as it is. A checkpoint is written at every evaluation, every ten minutes, before an error of
    the input, and when the run is asked to stop: by SIGTERM, by SIGINT (Jupyter's stop button; twice
    means at once), or by the clock.

    Args:
      recipe: what to train.
      directory: the run's folder; made if need be.
      eval_devices: evaluate on the first so many devices only, to measure what all of them save. Changes
        no result beyond rounding.
      max_minutes: stop so many minutes after this process began, for sessions that end without warning; None is never.

    Returns:
      The record, `completed`.

    Raises:
      EffnetlibError: the recipe does not fit the devices, the data is missing, the folder cannot be
        written or holds another recipe's run, or another process is training in it. Nothing has been
        compiled or written then.
      PreemptedError: asked to stop. All is saved, and the same call goes on. A compilation ends first.
      FailedError: the input failed, and all is saved; or the file system; or no checkpoint can be read.
      DivergedError: the loss became infinite, nan or huge.
    """
    with open_run(recipe, directory, eval_devices, max_minutes) as run, contextlib.ExitStack() as inputs:
        if run.record.status == "completed":
            return run.record

        ### Compile ###

        compiling = time.perf_counter()
        mesh = make_mesh(recipe.num_groups)
        everywhere, total = replicated(mesh), recipe.total_steps
        split_key = jax.jit(lambda: tuple(jax.random.split(jax.random.key(recipe.seed))), out_shardings=everywhere)
        init_key, run_key = split_key()
        state, train_step, evaluator = _compile(recipe, mesh, init_key, run)
        inputs.callback(evaluator.close)
        learning_rates = np.float32(recipe.schedule(np.arange(total)))
        compile_seconds = time.perf_counter() - compiling

        ### Restore, or begin ###

        if restored := run.begin(vars(state), learning_rates, compile_seconds):
            state = on_every_device(TrainState(**restored), everywhere)
        start, meter = int(state.step), run.meter
        evaluated = {row["step"] for row in run.record.metrics if row["kind"] == "eval"}
        if start in recipe.eval_steps and start not in evaluated:  # stopped between a step and its evaluation
            run.checkpoint(state, _evaluate(run, evaluator, state))

        ### Train ###

        where = {"sharding": batch_sharding(mesh), "start": start, "stop": total}
        batches = data.train_batches(run.splits["train"], seed=recipe.seed, **_images(recipe), **where)
        inputs.callback(batches.close)
        eval_steps = frozenset(recipe.eval_steps)
        meter.resume()
        for step in range(start + 1, total + 1):
            run.stop_if_requested(state, "training")
            with run.saved_first(state), meter.measure("input_wait_seconds"):
                batch = next(batches)
            state, metrics = train_step(state, batch, run_key, learning_rates[step - 1])
            meter.add(step, metrics)  # reads those of the step before, so that the devices never wait for the host

            is_due = step in eval_steps
            if is_due or time.monotonic() - meter.saved_at > CHECKPOINT_SECONDS:
                meter.pause()
                run.checkpoint(state, _evaluate(run, evaluator, state) if is_due else None)
                meter.resume()
    return run.record


def _images(recipe: Recipe) -> dict:
    return {"batch": recipe.global_batch_size, "size": recipe.resolution, "augmentation": recipe.augmentation}


def _compile(recipe: Recipe, mesh: Mesh, key: jax.Array, run: Run):
    """The initial state, the compiled train step, and the evaluator, which is compiled too."""
    init, lowered, _, graphdef = lower_train_step(recipe, mesh)
    # Runs once, so it is not worth the compiler's time (a third of it, measured on CPU). On a TPU it makes no difference.
    options = {} if jax.default_backend() == "tpu" else {"xla_backend_optimization_level": 0}
    state = init.lower(key).compile(options)(key)
    train_step = lowered.compile()
    eval_mesh = mesh if len(run.eval_devices) == mesh.size else make_mesh(1, run.eval_devices)
    evaluator = Evaluator(graphdef, run.splits["eval"], mesh=eval_mesh, **_images(recipe))
    evaluator.compile((state.params, state.batch_stats))
    return state, train_step, evaluator


def _evaluate(run: Run, evaluator: Evaluator, state: TrainState) -> float:
    """Evaluates the weights and their moving average, records both, and returns top-1 of the average."""
    between_batches = SimpleNamespace(update=lambda _: run.stop_if_requested(state, "evaluation"))
    weights = (state.params, state.batch_stats), (state.ema_params, state.ema_batch_stats)
    with run.saved_first(state), run.meter.measure("eval_seconds"):
        raw, ema = evaluator(*weights, progress=between_batches)
    run.meter.add_evaluation(int(state.step), raw, ema)
    return ema.top1
