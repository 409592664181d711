"""A run's checkpoints: `DIRECTORY/checkpoints/STEP`, with the train state and the clock, written by Orbax."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from effnetlib.errors import EffnetlibError

Weights = tuple[dict, dict]  # (params, batch_stats): nested dicts of float32 arrays, as in a train state

FOLDER = "checkpoints"


def open_checkpoints(directory: Path) -> ocp.CheckpointManager:
    """The checkpoints of a run's folder. The state is replicated, so process 0 alone writes it, and each reads it for
    itself."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, create=False, enable_async_checkpointing=True, multiprocessing_options=alone
    )
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: dict, timing: dict | None = None) -> None:
    """Begins to write a state (host arrays by name, see `TrainState`) and the clock; `wait_until_finished` ends it."""
    items = {"state": ocp.args.StandardSave(state), "timing": ocp.args.JsonSave(dict(timing or {}))}
    checkpoints.save(step, args=ocp.args.Composite(**items))


def restore(checkpoints: ocp.CheckpointManager, template: dict) -> tuple[dict, dict]:
    """State and clock of the latest checkpoint, the state as host arrays with the structure of `template`."""
    abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), template)
    restored = checkpoints.restore(
        checkpoints.latest_step(),
        args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), timing=ocp.args.JsonRestore()),
    )
    return restored.state, restored.timing


def latest_weights(directory: Path) -> tuple[int, Weights]:
    """Step and moving average of the latest checkpoint in a folder: the weights that evaluation means.

    Raises:
      EffnetlibError: the folder holds no checkpoint.
    """
    if not (directory / FOLDER).is_dir():
        raise EffnetlibError(f"{directory} holds no checkpoint")
    with open_checkpoints(directory) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise EffnetlibError(f"{directory} holds no checkpoint")
        # Nothing says what the optimizer's state looks like, so the tree comes as it was written, its keys as text.
        state = checkpoints.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    return step, tuple(_with_numbered_blocks(state[name]) for name in ("ema_params", "ema_batch_stats"))


def _with_numbered_blocks(tree: dict) -> dict:
    flat = flatten_dict(tree)
    return unflatten_dict({tuple(int(k) if k.isdigit() else k for k in path): leaf for path, leaf in flat.items()})
