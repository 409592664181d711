"""Our side: a recipe's very train step, ready to run; and as contestants what is around it.

python -m tests.bench.ours first_step|loop|checkpoint|groups [--group 8]
"""

import argparse
import importlib
import itertools
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np

from effnetlib import Recipe, make_mesh, simulate_devices
from effnetlib.evaluation import EvalResult
from effnetlib.mesh import batch_sharding, replicated
from effnetlib.runs.checkpoints import open_checkpoints, save
from effnetlib.step import lower_train_step, make_train_step

from .contestant import serve
from .steps import images_per_second

LR = np.float32(1e-3)


class Training:
    """A recipe's compiled step, a state, and one batch that is on the devices already."""

    def __init__(self, recipe: Recipe, devices: int | None = None):
        mesh = make_mesh(recipe.num_groups, jax.devices()[:devices])
        everywhere = replicated(mesh)
        self.recipe = recipe
        self.key = jax.device_put(jax.random.key(recipe.seed), everywhere)
        init, lowered, _, _ = lower_train_step(recipe, mesh)
        self.init = init.lower(self.key).compile({"xla_backend_optimization_level": 0})  # runs once
        self.step = lowered.compile()
        self.state = self.init(self.key)
        rng, size, batch = np.random.default_rng(0), recipe.resolution, recipe.global_batch_size
        images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
        labels = rng.integers(0, recipe.data.num_classes, batch, np.int32)
        self.batch = jax.device_put({"images": images, "labels": labels}, batch_sharding(mesh))

    def run(self, steps: int) -> None:
        """So many steps, and nothing but them."""
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch, self.key, LR)
        jax.block_until_ready((self.state, metrics))


def groups(group: int):
    """Images per second on eight simulated devices, with `group` examples per batch-norm group."""
    simulate_devices(8)
    bench = Training(Recipe.preset("digits-64-rmsprop").replace(batch_norm_batch_size=group))
    bench.run(3)
    return {}, lambda steps: images_per_second(bench.run, steps, bench.recipe.global_batch_size)


def first_step(_):
    """Seconds from a recipe to the end of its first step."""
    start = time.perf_counter()
    Training(Recipe.preset("b0-32-rmsprop").replace(image_size=32, precision="float32")).run(1)
    return {"seconds": time.perf_counter() - start}, None


def loop(_):
    """Seconds a step: of the bare step, or of the loop around it, which asks whether to stop, reads the metrics, shows progress
    and logs a row at every step."""
    epochs = 4.5  # 101 steps: few enough that all of them are logged
    recipe = Recipe.preset("digits-64-rmsprop").replace(epochs=epochs, eval_every_epochs=epochs)
    bench = Training(recipe)
    bench.run(3)

    training = importlib.import_module("effnetlib.training")
    evaluator = Mock(return_value=[EvalResult(1, 1, 1, 0.0)] * 2)
    training._compile = lambda *_: (bench.init(bench.key), bench.step, evaluator)
    training.data.train_batches = lambda *_, **__: (bench.batch for _ in itertools.count())

    def around():
        with tempfile.TemporaryDirectory() as folder:
            record = training.train(recipe, folder)
        assert len(record.frame("train")) == recipe.total_steps
        return record.timing["train_seconds"] / recipe.total_steps

    def bare():
        start = time.perf_counter()
        bench.run(recipe.total_steps)
        return (time.perf_counter() - start) / recipe.total_steps

    return {}, lambda what: {"bare": bare, "loop": around}[what]()


def checkpoint(_):
    """Of B0's state: seconds that saving holds the loop up, and seconds until it is on disk."""
    recipe = Recipe.preset("b0-32-rmsprop")
    state = jax.jit(make_train_step(recipe)[0])(jax.random.key(0))
    folder = tempfile.TemporaryDirectory()
    checkpoints = open_checkpoints(Path(folder.name))
    steps = itertools.count(1)

    def do_round(_):
        fresh = jax.block_until_ready(jax.tree.map(lambda x: x + 0, state))
        start = time.perf_counter()
        host_state = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), vars(fresh))
        save(checkpoints, next(steps), host_state)
        held_up = time.perf_counter() - start
        checkpoints.wait_until_finished()
        return held_up, time.perf_counter() - start

    do_round(None)
    return {"folder": folder.name}, do_round


CONTESTANTS = {"first_step": first_step, "groups": groups, "loop": loop, "checkpoint": checkpoint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("--group", type=int, help="examples a batch-norm group")
    options = parser.parse_args()
    serve(lambda: CONTESTANTS[options.name](options.group))


if __name__ == "__main__":
    main()
