"""Eight simulated devices for every test, and one compilation cache, so that equal programs are compiled once."""

import functools
import os
import signal
from types import SimpleNamespace

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many programs that run a few steps each. Without the costly passes XLA compiles them three times as fast.
# `make reproduce` and the benchmarks run what users run. Processes that a test starts inherit this.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import jax

import effnetlib
from effnetlib import evaluation, training

effnetlib.simulate_devices(8)
# In the background of a shell it is ignored, by this process and by all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # one for all workers
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(shared / "compiled"))
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.fixture(scope="session", autouse=True)
def programs():
    """Equal programs are also traced once in a process. `train` then compiles what it compiled before in no time."""

    class Once:
        def __init__(self, lowered):
            self.compile = functools.cache(lowered.compile)

    @functools.cache
    def lower_train(recipe, mesh):
        init, lowered, state, graphdef = lower_train_step(recipe, mesh)

        @functools.cache
        def compiled_init(options):
            return init.lower(jax.random.key(0)).compile(dict(options))

        start = SimpleNamespace(compile=lambda options: compiled_init(tuple(options.items())))
        return SimpleNamespace(lower=lambda key: start), Once(lowered), state, graphdef

    def lower_eval(graphdef, weights, **where):
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(weights))
        key = (graphdef, shapes, *where.items())
        if key not in lowered_evaluations:
            lowered_evaluations[key] = Once(lower_eval_step(graphdef, weights, **where))
        return lowered_evaluations[key]

    lowered_evaluations = {}
    lower_train_step, lower_eval_step = training.lower_train_step, evaluation.lower_eval_step
    training.lower_train_step, evaluation.lower_eval_step = lower_train, lower_eval


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Outputs and downloads of a test go to a folder of its own."""
    monkeypatch.setenv("EFFNETLIB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("EFFNETLIB_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def tiny():
    """A recipe of eleven steps on real digits."""
    # A quarter of the preset's learning rate, at which training does not amplify rounding: from 1 device to 8 the losses
    # differ by 3e-7, and by 1e-6 under jax 0.7.2, whose sums over a batch on CPU are one running sum (1e-5 off in the stem's
    # statistics). At the preset's it would be 1e-5 and 4e-5.
    return effnetlib.Recipe.preset("digits-64-rmsprop").replace(
        epochs=0.5, eval_every_epochs=0.25, warmup_epochs=0.4, lr_per_256=0.008
    )


@pytest.fixture(scope="session")
def whole(tiny, compiled, tmp_path_factory):
    """The record of `tiny`, trained to its end on eight devices. Leave its folder as it is."""
    return effnetlib.train(tiny, tmp_path_factory.mktemp("whole"))
