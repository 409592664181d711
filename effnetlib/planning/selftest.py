"""`effnetlib selftest`: whether this machine computes what it should, and how fast its parts are, in about a minute.

A check returns what was expected, what was found, and whether that is right. Speed never fails. It is shown beside what a
published plan asks for, where one is for the devices here.
"""

import contextlib
import functools
import importlib.metadata
import platform
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import simplejpeg
from flax import nnx

from effnetlib import data
from effnetlib.errors import first_line
from effnetlib.mesh import batch_sharding, make_mesh, on_every_device, replicated
from effnetlib.norm import GroupedBatchNorm
from effnetlib.ops.depthwise import depthwise_conv
from effnetlib.ops.pointwise import full_conv, pointwise_conv
from effnetlib.planning.plan import Plan, find_plan, load_plans
from effnetlib.planning.topology import GIB
from effnetlib.recipe import Recipe
from effnetlib.runs.checkpoints import latest_weights
from effnetlib.runs.hosts import wait_for_devices
from effnetlib.runs.machine import keep_compiled, pinned, usable_cores
from effnetlib.runs.paths import published_folder
from effnetlib.runs.progress import at_work, say
from effnetlib.runs.record import Record
from effnetlib.runs.stopping import PreemptedError
from effnetlib.step import lower_train_step
from effnetlib.training import train

FLOAT32, TF32 = 1e-5, 5e-4  # largest relative errors of products; that of bfloat16 is above both
SECONDS = 2.0  # per measurement of the input
PACKAGES = ("Python", "effnetlib", "jax", "jaxlib", "libtpu", "flax", "orbax-checkpoint", "numpy")


def selftest() -> bool:
    """Makes every check on the devices of this process, and prints a table. Returns whether all is right. A check that raises
    is a failed row."""
    keep_compiled()  # the checks share programs
    say(f"{'':8}{'check':14}{'expected':36}found")
    right = []
    for check in (versions, devices, products, groups, steps, resume, memory, transfer, digits, photographs):
        try:
            quiet = contextlib.redirect_stdout(sys.stderr)
            with pinned(), at_work(f"checking {check.__name__}", seconds=5.0), quiet:
                expected, found, ok = check()
        except Exception as error:  # anything may be wrong with a machine
            expected, found, ok = "no error", f"{type(error).__name__}: {first_line(error)}", False
        say(f"{'ok' if ok else 'FAILED':8}{check.__name__:14}{expected:36}{found}")
        right.append(ok)
    return all(right)


def versions():
    """What is installed."""
    here = {each.name: each.version for each in importlib.metadata.distributions()} | {
        "Python": platform.python_version()
    }
    return "", ", ".join(f"{name} {here[name]}" for name in PACKAGES if name in here), True


def devices():
    """The devices and the host. Busy devices are waited for."""
    found = wait_for_devices()
    return "", f"{len(found)} x {found[0].device_kind} ({found[0].platform}), {usable_cores()} cores", True


def products():
    """The library's convolutions and their gradients by the kernel, in float32, against float64 on the host."""
    cases = [
        (lambda x, kernel: full_conv(x, kernel, 1), (3, 3, 3, 16)),
        *((lambda x, kernel: pointwise_conv(x, kernel[0, 0]), (1, 1, channels, 16)) for channels in (8, 128)),
        *((lambda x, kernel: depthwise_conv(x, kernel[:, :, None], 1), (3, 3, channels)) for channels in (8, 128)),
    ]  # narrow and wide: a TPU has a form for each
    worst = max(_product_error(*case) for case in cases)
    kind = "" if worst <= FLOAT32 else ": it is TF32" if worst <= TF32 else ": it is bfloat16"
    return f"within {FLOAT32:g} of float64", f"{worst:.1e}{kind}", worst <= FLOAT32


def _product_error(op, shape):
    """The largest error of ``op(x, kernel)`` and of its gradient, as a share of the largest value."""
    rng, (size, _, channels, *filters) = np.random.default_rng(0), shape
    x, kernel = np.float32(rng.normal(size=(4, 8, 8, channels))), np.float32(rng.normal(size=shape))
    pixels, weights, out = ("bhwc", "cf", "bhwf") if filters else ("bhwc", "c", "bhwc")
    padded = np.pad(np.float64(x), [(0, 0), *[(size // 2, size // 2)] * 2, (0, 0)])
    taps = {(i, j): padded[:, i : i + 8, j : j + 8] for i, j in np.ndindex(size, size)}
    y = sum(np.einsum(f"{pixels},{weights}->{out}", part, kernel[tap]) for tap, part in taps.items())
    dkernel = np.reshape([np.einsum(f"{pixels},{out}->{weights}", part, y) for part in taps.values()], shape)
    ours = jax.jit(lambda x, kernel, dy: (op(x, kernel), jax.vjp(op, x, kernel)[1](dy)[1]))(x, kernel, np.float32(y))
    return max(abs(ours[i] - wanted).max() / abs(wanted).max() for i, wanted in enumerate((y, dkernel)))


def groups():
    """Batch norm over groups of 1, 2, 4 … devices, against numpy."""
    count, errors = jax.device_count(), {}
    x = np.float32(np.random.default_rng(0).normal(2, 3, (4 * count, 3, 3, 8)))
    for members in (n for n in range(1, count + 1) if count % n == 0):
        mesh = make_mesh(count // members)
        run = jax.jit(functools.partial(_normalize, count // members), out_shardings=replicated(mesh))
        parts = np.split(np.float64(x), count // members)
        wanted = [(part - part.mean((0, 1, 2))) / np.sqrt(part.var((0, 1, 2)) + 1e-3) for part in parts]
        errors[members] = np.abs(run(on_every_device(x, batch_sharding(mesh))) - np.concatenate(wanted)).max()
    worst = max(errors, key=errors.get)
    found = f"{errors[worst]:.1e} in groups of {worst}"
    return f"numpy's, in groups of {', '.join(map(str, errors))}", found, errors[worst] < 1e-4


def _normalize(groups, x):
    return GroupedBatchNorm(x.shape[-1], num_groups=groups, rngs=nnx.Rngs(0))(x, train=True)


def _short_recipe() -> Recipe:
    """A dozen steps of nano on digits."""
    short = dict(epochs=0.5, eval_every_epochs=0.25, warmup_epochs=0.4, lr_per_256=0.008)
    batch = 8 * jax.device_count()  # where the preset's 64 do not divide over the devices
    short |= dict(global_batch_size=batch, batch_norm_batch_size=8) if 64 % jax.device_count() else {}
    return Recipe.preset("digits-64-rmsprop").replace(**short)


def _batches(split, recipe: Recipe, batch: int, mesh, stop: int):
    images = dict(batch=batch, size=recipe.resolution, augmentation=recipe.augmentation, sharding=batch_sharding(mesh))
    return contextlib.closing(data.train_batches(split, seed=0, start=0, stop=stop, **images))


def steps():
    """Two train steps on all devices and on one. The state is donated: its arrays must be gone."""
    recipe, losses, left, first = _short_recipe(), [], 0, None
    for count in sorted({1, jax.device_count()}, reverse=True):
        mesh = make_mesh(recipe.num_groups, jax.devices()[:count])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Some donated buffers were not usable")
            init, lowered, _, _ = lower_train_step(recipe, mesh)
            step = lowered.compile()
        key = jax.jit(lambda: jax.random.key(0), out_shardings=replicated(mesh))()
        first = jax.device_get(init(key)) if first is None else first
        state = on_every_device(first, replicated(mesh))
        with _batches(data.load("digits", "train"), recipe, recipe.global_batch_size, mesh, 2) as batches:
            for batch in batches:
                before, (state, metrics) = state, step(state, batch, key, np.float32(1e-3))
                left += sum(not leaf.is_deleted() for leaf in jax.tree.leaves(before))
        losses.append(float(metrics["loss"]))
    apart = abs(losses[0] / losses[-1] - 1)
    ok = apart < 1e-4 and not left
    return "all devices as one, state donated", f"losses {apart:.1e} apart, {left} arrays left", ok


def resume():
    """A run is cut off after its first evaluation, stopped, and resumed. It must end like a run that was left alone."""
    recipe = _short_recipe()
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = train(recipe, Path(folder, "whole")), Path(folder, "cut")
        shutil.copytree(whole.directory, cut)
        for step in recipe.eval_steps[1:]:
            shutil.rmtree(cut / f"checkpoints/{step}")
        record = Record.load(cut)
        record.status = "running"
        record.save()
        with contextlib.suppress(PreemptedError):
            train(recipe, cut, max_minutes=0.0)
        status = Record.load(cut).status
        train(recipe, cut)
        pairs = zip(*(jax.tree.leaves(latest_weights(each)) for each in (cut, whole.directory)), strict=True)
        differ = sum(not np.array_equal(*pair) for pair in pairs)
    ok = not differ and status == "preempted"
    return "the same bits after a stop", f"{differ} arrays differ; the stop was {status}", ok


def memory():
    """Free memory of a device."""
    stats, plan = jax.devices()[0].memory_stats(), _plan("colab") or _plan("kaggle")
    free = stats and stats["bytes_limit"] - stats["bytes_in_use"]
    need = f"{plan.hbm_bytes / GIB:.2f} GiB" if plan else ""
    return need, f"{free / GIB:.2f} GiB free" if free else "not known", not (plan and free) or free >= plan.hbm_bytes


def transfer():
    """The time to put 128 images of 224 pixels on each device."""
    mesh, images = make_mesh(jax.device_count()), np.zeros((128 * jax.device_count(), 224, 224, 3), np.uint8)
    for _ in range(2):  # the first time may be slower
        start = time.perf_counter()
        jax.block_until_ready(on_every_device(images, batch_sharding(mesh)))
    return "", f"{images.nbytes / 1e6:,.0f} MB in {time.perf_counter() - start:.3f} s", True


def digits():
    """How fast the host makes images from memory, as for the preset `colab`."""
    return _input_rate(data.load("digits", "train"), "colab")


def photographs():
    """How fast the host makes images from JPEGs of 120 KB, as for the preset `kaggle`."""
    coarse = np.random.default_rng(0).integers(0, 256, (16, 96, 128, 3), np.uint8)
    files = [simplejpeg.encode_jpeg(np.kron(image, np.ones((4, 4, 1), np.uint8)), quality=70) for image in coarse]
    return _input_rate(data.Split.of_photographs(10**6, ["one"], "", functools.partial(_photograph, files)), "kaggle")


def _photograph(files, index):
    return files[index % len(files)], 0, "a made-up photograph"


def _input_rate(split, preset: str):
    batch, plan = 32 * jax.device_count(), _plan(preset)
    with _batches(split, Recipe.preset(preset), batch, make_mesh(jax.device_count()), 10**6) as batches:
        next(batches)  # the workers have started
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() < start + SECONDS:
            jax.block_until_ready(next(batches))
            count += batch
        rate = count / (time.perf_counter() - start)
    return f"{plan.images_per_second:,.0f} images/s keep the chips busy" if plan else "", f"{rate:,.0f} images/s", True


def _plan(preset: str) -> Plan | None:
    """The published plan of `colab` on one chip of v5e or of `kaggle` on eight, if these are the devices here."""
    topology = {"colab": "v5e:1x1", "kaggle": "v5e:2x4"}[preset]
    plan = find_plan(load_plans(published_folder() / "plans"), Recipe.preset(preset), topology)
    here = jax.devices()[0].device_kind, jax.device_count()
    return plan if plan and here == ("TPU v5 lite", plan.devices) else None
