"""A run's checkpoints: Orbax writes the train state and the clock to `DIRECTORY/checkpoints/STEP`."""

import contextlib
import json
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from effnetlib.errors import EffnetlibError, FailedError, first_line
from effnetlib.runs.hosts import gather, is_main_process, raise_together
from effnetlib.runs.progress import say

Weights = tuple[dict, dict]  # (params, batch_stats): nested dicts of float32 arrays, as in a train state

FOLDER = "checkpoints"


class _Checkpoints(ocp.CheckpointManager):
    def metrics(self, step):
        """The top-1 that `save` wrote with the clock. None if it is missing or damaged."""
        try:
            return {"top1": float(json.loads((self.directory / str(step) / "timing/metadata").read_text())["top1"])}
        except Exception:
            return None


def open_checkpoints(directory: Path) -> ocp.CheckpointManager:
    """Opens the checkpoints of a run's folder. It keeps the last two and the best. Each process has the whole state, so only
    process 0 writes. Each process reads on its own."""
    process, policies = jax.process_index(), ocp.checkpoint_managers
    single = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
    )
    best = policies.BestN(get_metric_fn=lambda m: m["top1"], n=1, keep_checkpoints_without_metrics=False)
    keep = policies.AnyPreservationPolicy([policies.LatestN(2), best])
    options = ocp.CheckpointManagerOptions(preservation_policy=keep, create=False, multiprocessing_options=single)
    (directory / FOLDER).mkdir(exist_ok=True)
    return _Checkpoints((directory / FOLDER).absolute(), options=options)


def save(
    checkpoints: ocp.CheckpointManager, step: int, state: dict, timing: dict | None = None, top1: float | None = None
) -> None:
    """Starts to write a state (host arrays by name, see `TrainState`) and the clock; `finish` waits for the end. The best
    checkpoint has the highest `top1`; None means not evaluated. Raises OSError."""
    metrics = None if top1 is None else {"top1": top1}
    items = {"state": ocp.args.StandardSave(state), "timing": ocp.args.JsonSave((timing or {}) | (metrics or {}))}
    with _os_errors():
        checkpoints.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)


def finish(checkpoints: ocp.CheckpointManager) -> None:
    """Waits until the checkpoint is on disk. Raises OSError."""
    with _os_errors():
        checkpoints.wait_until_finished()


@contextlib.contextmanager
def _os_errors():
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # TensorStore raises ValueError on a full disk
        raise OSError(f"a checkpoint cannot be written: {str(error)[-200:]}") from error


def restore(checkpoints: ocp.CheckpointManager, template: dict) -> tuple[dict, dict] | None:
    """Returns state and clock of the latest readable checkpoint, or None if there is no checkpoint.

    The state is host arrays with the structure of `template`. Later, unreadable checkpoints are moved aside, and a line
    names each. Process 0 chooses the checkpoint, and all processes read it.

    Raises:
      FailedError: there are checkpoints, but none can be read. Nothing is moved.
    """
    abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), template)
    folder = Path(checkpoints.directory)

    def read(step):
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), timing=ocp.args.JsonRestore())
        restored = checkpoints.restore(step, args=items)
        if jax.tree.map(np.shape, restored.state) != jax.tree.map(np.shape, abstract):  # Orbax does not check
            raise ValueError("its arrays have other shapes than this program's")
        restored.timing.pop("top1", None)
        return restored.state, restored.timing

    found, step, failed = None, -1, {}
    with raise_together():
        if is_main_process():
            for candidate in sorted(checkpoints.all_steps(), reverse=True):
                try:
                    found, step = read(candidate), candidate
                    break
                except Exception as error:  # Orbax may raise anything on a damaged file
                    failed[candidate] = first_line(error)
            if failed and not found:
                raise FailedError(
                    f"no checkpoint in {folder} can be read (that of step {max(failed)}: {failed[max(failed)]}); "
                    "nothing was moved: repair them, or go back to the versions that wrote them, and run it again"
                )
            for candidate, error in failed.items():
                say(f"the checkpoint of step {candidate} cannot be read, falling back to {step}: {error}")
                (folder / str(candidate)).rename(folder / f"damaged-{candidate}-{time.time_ns()}")
            checkpoints.reload()
    step = max(gather("checkpoint", step))
    if not is_main_process():
        checkpoints.reload()
        found = read(step) if step >= 0 else None
    return found


def latest_weights(directory: Path, best: bool = False) -> tuple[int, Weights]:
    """Returns the step and the moving average of the weights, which evaluation uses. They come from the latest readable
    checkpoint, or with `best` from the one with the highest top-1. A line names each later, unreadable one.

    Raises:
      EffnetlibError: there is no checkpoint, none was evaluated (`best`), or none can be read.
    """
    wrong = f"{directory} holds no checkpoint"
    if not (directory / FOLDER).is_dir():
        raise EffnetlibError(wrong)
    with open_checkpoints(directory) as checkpoints:
        steps = sorted(checkpoints.all_steps(), reverse=True)
        if best:
            scores = {step: found["top1"] for step in steps if (found := checkpoints.metrics(step))}
            steps = sorted(scores, key=scores.get)[-1:]
            wrong += " whose top-1 was measured"
        for step in steps:
            try:  # no template, because the optimizer is unknown here; so all keys arrive as text
                state = checkpoints.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
                return step, tuple(_with_numbered_blocks(state[name]) for name in ("ema_params", "ema_batch_stats"))
            except Exception as error:  # Orbax may raise anything on a damaged file
                reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
                wrong = f"the checkpoint of step {step} in {directory} is damaged: {reason}"
                if step != steps[-1]:
                    say(f"{wrong}; the one before is taken instead")
    raise EffnetlibError(wrong)


def _with_numbered_blocks(tree: dict) -> dict:
    flat = flatten_dict(tree)
    return unflatten_dict({tuple(int(k) if k.isdigit() else k for k in path): leaf for path, leaf in flat.items()})
