"""Compiles the programs of a run for TPUs that are not there, with the compiler that an image carries: `make images`.

    PYTHON tests/images/compile.py IMAGE [--only PRESET@TOPOLOGY …]

PYTHON is that of an environment like the image's. IMAGE is its name in outputs/published/images.json, where each program is
added as soon as it is compiled: seconds of one core, bytes of memory per device, and the exchanges with their groups of devices.
What is there already is not compiled again, unless a version has changed. `lock` is the compiler that the project asks for.
An old compiler takes minutes for nano and much longer for B0. So this is run by hand, and not with the tests.
"""

import argparse
import fcntl
import importlib.metadata
import json
import platform
import re
import time
from collections import Counter

import jax
from jax._src.interpreters import pxla

from effnetlib.evaluation import lower_eval_step
from effnetlib.mesh import make_mesh
from effnetlib.planning import topology
from effnetlib.planning.collectives import KINDS, parse_replica_groups
from effnetlib.planning.plan import hbm_bytes
from effnetlib.recipe import Recipe
from effnetlib.runs.files import write_atomically
from effnetlib.runs.machine import pinned
from effnetlib.runs.paths import published_folder
from effnetlib.runs.progress import at_work, say
from effnetlib.step import lower_train_step

RECORD = published_folder() / "images.json"
# nano; then B0, each on the slice that its preset is for.
CASES = ("digits-64-lars@v5e:1x1", "digits-64-lars@v5e:2x4", "colab@v5e:1x1", "kaggle@v5e:2x4")
PROGRAMS = ("init", "train", "eval")
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy")


def allow_an_old_compiler() -> None:
    """Lets jax compile ahead with a libtpu that it was not made for. A session with a TPU needs none of this.

    jax asks the compiler for the usual layout of each array. An old libtpu dies of that question (SIGSEGV).
    """
    topology.check_compiler = lambda: None
    pxla.is_default_layout = lambda *_: True


def lowered(case: str, name: str) -> jax.stages.Lowered:
    """A program of PRESET@TOPOLOGY as `train` compiles it."""
    preset, slice_name = case.split("@")
    recipe, devices = Recipe.preset(preset), topology.devices_of(slice_name)
    mesh = make_mesh(recipe.num_groups, devices)
    init, train, state, graphdef = lower_train_step(recipe, mesh)
    if name == "init":
        return init.lower(jax.random.key(0))
    shapes = dict(batch=recipe.global_batch_size, size=recipe.resolution, mesh=mesh)
    weights = state.params, state.batch_stats
    return train if name == "train" else lower_eval_step(graphdef, weights, **shapes)


def exchanges(text: str) -> list[dict]:
    """The collectives of a compiled program, counted by kind and groups of devices.

    jax 0.10.2 reads the groups of an old libtpu as none: "replica_groups={}". Then `groups` is null.
    """
    counts = Counter()
    for line in text.splitlines():
        if found := re.search(rf" ({'|'.join(KINDS)})(?:-start)?\(.*replica_groups=", line):
            groups = None if "replica_groups={}" in line else parse_replica_groups(line)
            counts[found[1], json.dumps(groups)] += 1
    return [dict(kind=kind, groups=json.loads(groups), count=count) for (kind, groups), count in sorted(counts.items())]


def compile_one(case: str, name: str) -> dict:
    """The row of the record for a program."""
    program = lowered(case, name)
    start = time.process_time()
    with at_work(f"{case}: {name}", seconds=60):
        program = program.compile()
    seconds = time.process_time() - start  # of all threads: another process on the machine does not count
    memory = program.memory_analysis()
    return dict(
        case=case, program=name, core_seconds=round(seconds, 1), hbm_bytes=hbm_bytes(program),
        temp_bytes=memory.temp_size_in_bytes, exchanges=exchanges(program.as_text()),
    )  # fmt: skip


def add(image: str, row: dict | None = None) -> list[tuple[str, str]]:
    """Adds a row to the record of an image. Returns the case and the name of each program that is still missing."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    with open(__file__) as lock:  # several images may be compiled for at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        known = record.get(image, {})
        rows = known["programs"] if known.get("versions") == versions else []
        rows = sorted(
            [*rows, *filter(None, [row])], key=lambda r: (CASES.index(r["case"]), PROGRAMS.index(r["program"]))
        )
        done = {(each["case"], each["program"]) for each in rows}
        missing = [(case, name) for case in CASES for name in PROGRAMS if (case, name) not in done]
        record[image] = dict(
            versions=versions, programs=rows, not_finished=[f"{case}: {name}" for case, name in missing]
        )
        write_atomically(RECORD, json.dumps(record, indent=1) + "\n")
    return missing


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("image")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu, which compiles, would look for a TPU
    allow_an_old_compiler()
    for case, name in add(options.image):
        if case in options.only:
            with pinned():
                row = compile_one(case, name)
            add(options.image, row)
            say(f"{case}: {name}, {row['core_seconds']:,.0f} s of a core, {row['hbm_bytes'] / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
