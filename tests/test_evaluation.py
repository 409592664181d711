import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effnetlib import evaluate, make_mesh
from effnetlib.data import load
from effnetlib.data.images import eval_image, normalize
from effnetlib.data.sources import Split
from effnetlib.evaluation import masked_sums


def first(split, count):
    return Split(count, split.class_names, "", split.example)


class Linear(nnx.Module):
    """A model small enough to evaluate by hand."""

    def __init__(self):
        self.layer = nnx.Linear(3 * 64, 10, rngs=nnx.Rngs(0))

    def __call__(self, images):
        return self.layer(images.reshape(len(images), -1))


def by_hand(split):
    images, labels = zip(*(split.example(i) for i in range(len(split))), strict=True)
    images, labels = jnp.stack([eval_image(image, 8, "none") for image in images]), np.array(labels)
    logits = np.asarray(Linear()(normalize(images)), np.float64)
    order = np.argsort(-logits, -1)
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(split)), labels]
    return (order[:, 0] == labels).sum(), (order[:, :5] == labels[:, None]).any(-1).sum(), nll.sum()


@pytest.mark.parametrize("count", [7, 8, 9, 16, 17])
@pytest.mark.parametrize("devices", [1, 8])
def test_counts_are_exact_whatever_the_batch_and_the_devices(count, devices):
    split = first(load("digits", "eval"), count)
    mesh = make_mesh(devices, jax.devices()[:devices])
    result = evaluate(Linear(), split, batch=8, size=8, augmentation="none", mesh=mesh)
    ncorrect, ncorrect5, loss = by_hand(split)
    assert (result.nseen, result.ncorrect, result.ncorrect5) == (count, ncorrect, ncorrect5)
    assert result.loss_sum == pytest.approx(loss, rel=1e-4)
    assert result.top1 == ncorrect / count


def test_masked_rows_count_for_nothing():
    logits = jnp.array([[9.0, 0.0], [0.0, 9.0], [jnp.nan, jnp.nan]])
    sums = masked_sums(logits, jnp.array([0, 0, 0]), jnp.array([True, True, False]))
    assert {name: int(value) for name, value in sums.items()} == {
        "nseen": 2,
        "ncorrect": 1,
        "ncorrect5": 2,
        "loss_sum": 9,
    }


def test_a_wrong_count_is_not_reported(monkeypatch):
    split = first(load("digits", "eval"), 8)
    monkeypatch.setattr(sys.modules["effnetlib.evaluation"], "eval_batches", lambda split, **_: iter(()))
    with pytest.raises(RuntimeError, match="counted 0 examples, not the 8"):
        evaluate(Linear(), split, batch=8, size=8, augmentation="none")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process is kept to one core on Linux only")
def test_two_devices_on_one_core_do_not_wait_for_ever():
    # Several weights, whose programs do not depend on one another, and a model for which the devices meet often.
    code = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import effnetlib
        effnetlib.simulate_devices(2)
        from flax import nnx
        from effnetlib.data import load
        from effnetlib.data.sources import Split
        from effnetlib.evaluation import Evaluator

        class Meeting(nnx.Module):
            def __init__(self):
                self.layer = nnx.Linear(192, 10, rngs=nnx.Rngs(0))

            def __call__(self, images):
                images = images.reshape(len(images), -1)
                for _ in range(24):
                    images = images - images.mean(0)
                return self.layer(images)

        graphdef, params = nnx.split(Meeting(), nnx.Param)
        split = Split(200, [], "", load("digits", "eval").example)
        mesh = effnetlib.make_mesh(2)
        evaluator = Evaluator(graphdef, split, batch=2, size=8, augmentation="none", mesh=mesh)
        for _ in range(3):
            print([result.nseen for result in evaluator(*[(nnx.to_pure_dict(params),)] * 4)])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.stdout == 3 * "[200, 200, 200, 200]\n", done.stderr[-500:]
