"""One recipe gives the same numbers on one device, on eight, and on two processes of four."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from effnetlib import GroupedBatchNorm, Recipe, Record, data, make_mesh
from effnetlib.data.prepare import prepare
from effnetlib.mesh import batch_sharding, replicated
from effnetlib.planning.collectives import parse_replica_groups, shapes
from effnetlib.step import lower_train_step, make_train_step

STEPS = 20


def losses(recipe, devices):
    mesh = make_mesh(recipe.num_groups, jax.devices()[:devices])
    init, step, _ = make_train_step(recipe)
    init_key, key = jax.device_put(tuple(jax.random.split(jax.random.key(0))), replicated(mesh))
    init = jax.jit(init, out_shardings=replicated(mesh)).lower(init_key)
    state = init.compile()(init_key)
    batches = data.train_batches(
        data.load("digits", "train"), seed=0, batch=recipe.global_batch_size, size=32, augmentation="shift",
        sharding=batch_sharding(mesh), start=0, stop=STEPS,
    )  # fmt: skip
    step = jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))
    out = []
    for at, batch in enumerate(batches):
        state, metrics = step(state, batch, key, jax.device_put(recipe.schedule(at), replicated(mesh)))
        out.append(float(metrics["loss"]))
    return out


SHELL = {
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "5",
    "JAX_LEGACY_PRNG_KEY": "error",
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_SOFTMAX_CUSTOM_JVP": "1",
    "JAX_DISABLE_JIT": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_DEBUG_NANS": "1",
    "JAX_CHECK_TRACER_LEAKS": "1",
    "JAX_TRANSFER_GUARD": "disallow",
    "FLAX_HIJAX_VARIABLE": "1",
}
TRAINS = """
import json, sys, effnetlib
effnetlib.simulate_devices(8)
effnetlib.train(effnetlib.Recipe(**json.loads(sys.argv[1])), sys.argv[2])
"""


def test_the_shell_changes_no_number(whole, tiny, tmp_path):
    command = [sys.executable, "-c", TRAINS, json.dumps(dataclasses.asdict(tiny)), tmp_path / "run"]
    subprocess.run(command, env=os.environ | SHELL, check=True, timeout=300)
    record = Record.load(tmp_path / "run")
    for name in ("loss", "top1"):
        for kind in ("train", "eval"):
            assert list(record.frame(kind)[name]) == list(whole.frame(kind)[name])
    assert whole.environment["settings"] == {}
    assert record.environment["settings"]["jax_default_prng_impl"] == "rbg"
    assert len(record.environment["settings"]) >= len(SHELL)


# A device's share of 64 on eight devices is 8: groups of 4 lie within a device, groups of 32 span four.
@pytest.mark.slow
@pytest.mark.parametrize(("preset", "group"), [("digits-64-rmsprop", 4), ("digits-64-lars", 32)])
def test_twenty_steps_on_one_and_on_eight_devices(preset, group):
    # A long warm-up: at a high learning rate training itself amplifies the last bit, by chance up to 1e-5 within 20 steps.
    recipe = Recipe.preset(preset).replace(batch_norm_batch_size=group, drop_path=0.2, warmup_epochs=8.0)
    np.testing.assert_allclose(losses(recipe, 8), losses(recipe, 1), rtol=1e-5)


def test_groups_within_a_device_need_no_collective_and_larger_ones_stay_within_their_group():
    def collectives(groups):
        norm = GroupedBatchNorm(8, num_groups=groups, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(norm)
        state = nnx.to_pure_dict(state)
        mesh = make_mesh(groups)
        x = jax.ShapeDtypeStruct((32, 4, 4, 8), "float32", sharding=batch_sharding(mesh))
        forward = jax.jit(lambda x: nnx.merge(graphdef, state)(x, train=True), out_shardings=batch_sharding(mesh))
        return [line for line in forward.lower(x).compile().as_text().splitlines() if "replica_groups=" in line]

    assert collectives(8) == [] and collectives(16) == []
    lines = collectives(2)
    assert lines and all(parse_replica_groups(line) == [[0, 1, 2, 3], [4, 5, 6, 7]] for line in lines)


# A device's share of 64 is 8: groups of 8 fill a device each, groups of 32 span four.
@pytest.mark.slow
@pytest.mark.parametrize(("group", "meeting"), [(8, None), (32, [[0, 1, 2, 3], [4, 5, 6, 7]])])
def test_no_collective_of_the_train_step_spans_more_than_its_group_but_for_the_gradient(group, meeting):
    recipe = Recipe.preset("digits-64-rmsprop").replace(batch_norm_batch_size=group)
    _, lowered, state, _ = lower_train_step(recipe, make_mesh(recipe.num_groups))
    text = lowered.compile().as_text()
    lines = [line for line in text.splitlines() if "replica_groups=" in line]
    assert lines and all(" all-reduce" in line for line in lines)  # no activation is gathered or exchanged
    within = [line for line in lines if parse_replica_groups(line) == meeting]
    assert bool(within) == bool(meeting)

    def numbers(lines):
        return sum(int(np.prod(shape)) for line in lines for _, shape in shapes(line))

    statistics = sum(leaf.size for leaf in jax.tree.leaves(state.batch_stats))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    # Two sums a channel forward and two backward, and of gamma's and beta's gradients what a group holds.
    assert numbers(within) <= 3 * statistics
    # Beyond a group go the gradient, the running statistics (a mean over the groups), the loss and top-1: no activation.
    beyond = numbers(line for line in lines if line not in within)
    assert parameters <= beyond <= parameters + statistics + 2


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_together(commands):
    """Runs processes side by side until all have ended well. They compile for themselves: jax's cache is not shared."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    processes = [
        subprocess.Popen([str(word) for word in command], env=environment, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    errors = [process.communicate(timeout=400)[1] for process in processes]
    assert not any(process.returncode for process in processes), errors


READER = """
import sys, jax, numpy
port, processes, process, folder, out = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // int(processes))
if int(processes) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
import os
from effnetlib import data, make_mesh
from effnetlib.mesh import batch_sharding
if int(process):
    os.scandir = None  # process 0 lists for all
stream = data.train_batches(data.load(folder, "train"), seed=1, batch=8, size=24, augmentation="autoaugment",
                            sharding=batch_sharding(make_mesh(2)), start=0, stop=5)
parts = {}
for step, batch in enumerate(stream):
    for name, array in batch.items():
        for shard in array.addressable_shards:
            parts[f"{name}/{step}/{shard.index[0].start or 0}"] = numpy.asarray(shard.data)
numpy.savez(f"{out}/{processes}-{process}.npz", **parts)
"""


@pytest.mark.slow
def test_the_stream_is_the_same_for_one_two_and_four_processes(tmp_path):
    from test_prepare import by_class

    by_class(tmp_path / "loose")
    prepare(tmp_path / "loose", tmp_path / "shards")
    streams = {}
    for processes, kind in ((1, "loose"), (2, "shards"), (4, "loose")):
        port = free_port()
        run_together(
            [sys.executable, "-c", READER, port, processes, i, tmp_path / kind, tmp_path] for i in range(processes)
        )
        parts = {}
        for i in range(processes):
            parts |= np.load(tmp_path / f"{processes}-{i}.npz")
        streams[processes] = parts
    assert len(streams[1]) == 2 * 5 * 4
    for other in (streams[2], streams[4]):
        assert other.keys() == streams[1].keys()
        for name, array in streams[1].items():
            np.testing.assert_array_equal(other[name], array)


WORKER = """
import sys, jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from effnetlib.runs import hosts
hosts.start(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
assert jax.device_count() == 8
sys.path.insert(0, sys.argv[3])
import test_norm
for groups in test_norm.GROUPS:
    test_norm.check_against_numpy(groups, test_norm.on_mesh(groups, jax.devices()))
from jax.experimental import multihost_utils
from effnetlib.mesh import make_mesh, on_every_device, replicated
multihost_utils.assert_equal = None  # nothing is compared across processes
placed = on_every_device({"a": np.arange(3.0), "b": np.int32(7)}, replicated(make_mesh(8)))
for shard in placed["a"].addressable_shards:
    np.testing.assert_array_equal(shard.data, [0, 1, 2])
assert placed["b"].shape == () and placed["b"].is_fully_replicated and placed["b"].addressable_data(0) == 7
"""


@pytest.mark.slow
def test_batch_norm_on_two_processes_of_four_devices_is_numpys():
    port = free_port()
    run_together([sys.executable, "-c", WORKER, port, i, Path(__file__).parent] for i in (0, 1))


def launched(hosts, devices, tiny, folder):
    """`tiny` under papermill on so many stand-ins for hosts, each with so many devices, into folder/outputs/run."""
    # No shared cache of compiled programs: only process 0 would find its own there.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PORT": str(free_port()),
        "EFFNETLIB_OUTPUTS": str(folder / "outputs"),
        "COPY": "cp -r",
        "COPY_TO": str(folder / "bucket"),
    }
    command = [Path(__file__).parent.parent / "notebooks/launch/local.sh", str(hosts)]
    for name in ("epochs", "eval_every_epochs", "warmup_epochs", "lr_per_256"):
        command += ["-p", name, str(getattr(tiny, name))]
    command += ["-p", "preset", "digits-64-rmsprop", "-p", "directory", "run", "-p", "simulated_devices", str(devices)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_four_hosts_are_stopped_and_two_others_go_on_with_the_losses_of_one_process(whole, tiny, tmp_path):
    run = tmp_path / "outputs/run"
    four = launched(4, 1, tiny, tmp_path)
    deadline = time.monotonic() + 400
    while not (run / "metrics.jsonl").exists() or '"kind": "eval"' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and four.poll() is None, four.communicate()[1]
        time.sleep(0.1)
    four.send_signal(signal.SIGTERM)
    _, said = four.communicate(timeout=200)
    assert four.returncode == 75 and all(f"host {i} ended with 75" in said for i in range(4)), said
    stopped = Record.load(run)
    assert stopped.status == "preempted" and (stopped.environment["processes"], stopped.environment["devices"]) == (
        4,
        4,
    )
    assert stopped.frame("eval")["nseen"].tolist() == [360]
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert 2 <= saved < tiny.total_steps

    two = launched(2, 4, tiny, tmp_path)
    _, said = two.communicate(timeout=400)
    assert two.returncode == 0, said
    record = Record.load(run)
    assert record.status == "completed" and record.recipe == tiny
    assert (record.environment["processes"], record.environment["devices"], record.result["eval_examples"]) == (
        2,
        8,
        360,
    )
    assert record.metrics[: len(stopped.metrics)] == stopped.metrics  # it went on, and did not begin anew
    np.testing.assert_allclose(record.frame("train")["loss"], whole.frame("train")["loss"], rtol=1e-5)
    assert {path.name for path in (tmp_path / "outputs/hosts").iterdir()} >= {"host0.ipynb", "host0.log", "host3.log"}
    copied = tmp_path / "bucket"
    assert any(Record.load(path.parent).result == record.result for path in copied.rglob("run.json"))


STOPS = """
import os, signal, sys, threading, time, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
port, process, folder = sys.argv[1:]
import effnetlib
from effnetlib.runs import hosts, meter
from effnetlib.runs.stopping import PreemptedError, Stop
hosts.start(f"localhost:{port}", 2, int(process))
recipe = effnetlib.Recipe.preset("digits-64-rmsprop").replace(image_size=16, epochs=2000.0, eval_every_epochs=1900.0)
assert recipe.total_steps // meter.LOGGED_STEPS > 200  # steps between logged ones
batches = effnetlib.data.train_batches
def asking(*arguments, **options):
    for step, batch in enumerate(batches(*arguments, **options)):
        if process == "1" and step == 40:
            print("at", time.time(), flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
effnetlib.data.train_batches = asking
requested = Stop.requested_anywhere
def timed(self, during):
    if reason := requested(self, during):
        print("at", time.time(), flush=True)
    return reason
Stop.requested_anywhere = timed
try:
    effnetlib.train(recipe, folder)
except PreemptedError as error:
    print(str(error).split(" of ")[0], flush=True)
    hosts.gather("end")
"""


@pytest.mark.slow
def test_two_hosts_stop_at_the_same_step_within_ten_seconds_of_a_signal_to_one_of_them(tmp_path):
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://localhost:9")  # nobody is there
    both = [
        subprocess.Popen(
            [sys.executable, "-c", STOPS, str(port), str(i), str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )  # fmt: skip
        for i in (0, 1)
    ]
    said = [process.communicate(timeout=300)[0].splitlines() for process in both]
    times = [[float(line[3:]) for line in lines if line.startswith("at ")] for lines in said]
    assert len(times[0]) == 1 and len(times[1]) == 2, said
    assert max(times[0][-1], times[1][-1]) - times[1][0] < 10  # from the signal to the decision in both
    assert said[0][-1] == said[1][-1] and said[0][-1].startswith("stopped at step"), said
    step = int(said[0][-1].rpartition(" ")[2])
    assert step >= 40 and (tmp_path / "run/checkpoints" / str(step)).is_dir()
    assert Record.load(tmp_path / "run").status == "preempted"


STOPPED_EARLY = """
import os, signal, sys, threading, time, jax
from types import SimpleNamespace
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
port, process, folder = sys.argv[1:]
import effnetlib
from effnetlib import train
from effnetlib.data import photographs
from effnetlib.mesh import batch_sharding, on_every_device, replicated
from effnetlib.runs import hosts
from effnetlib.runs.stopping import PreemptedError
hosts.start(f"localhost:{port}", 2, int(process))
recipe = effnetlib.Recipe.preset("digits-64-rmsprop").replace(image_size=16, epochs=20.0)

def stop(of):
    if process == of:
        os.kill(os.getpid(), signal.SIGTERM)

def stopped(recipe):
    global begun
    begun = time.monotonic()
    try:
        train(recipe, folder, max_minutes=1000)
    except PreemptedError as error:
        print(str(error).partition(":")[0], time.monotonic() - begun < 10, flush=True)

def slowly(walk):
    threading.Timer(0.5, stop, "0").start()
    time.sleep(100)
def waiting(place, make):
    threading.Timer(0.5, stop, "1").start()
    return from_first(place, make)
hosts.from_first, from_first = waiting, hosts.from_first
photographs._Walk.find = lambda walk: time.sleep(100)
stopped(recipe.replace(dataset=os.path.dirname(folder)))  # process 0 lists, process 1 waits for it and is asked to stop
hosts.from_first, photographs._Walk.find = from_first, slowly
stopped(recipe.replace(dataset=os.path.dirname(folder)))

def compiles(*_):
    global begun
    begun = time.monotonic()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    stop("1")
    time.sleep(0.2)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return SimpleNamespace(), None, SimpleNamespace(close=int)
effnetlib.training._compile, compile = compiles, effnetlib.training._compile
stopped(recipe)  # process 1 ends after its compilation, process 0 while it waits
effnetlib.training._compile = compile

hits, mesh = [], effnetlib.make_mesh(2)
numbers = on_every_device(np.arange(4.0), batch_sharding(mesh))
total = jax.jit(lambda numbers: numbers.sum(), out_shardings=replicated(mesh))
jax.monitoring.register_event_listener(lambda event, **_: "cache_hits" in event and hits.append(event))
for _ in range(2):
    jax.clear_caches()
    print("sum", float(total(numbers)), "programs found", len(hits))
    hosts.gather("found")
"""


@pytest.mark.slow
def test_two_hosts_stop_while_they_list_and_compile_and_find_the_programs_of_process_0(tmp_path):
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", STOPPED_EARLY, str(port), str(i), str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )  # fmt: skip
        for i in (0, 1)
    ]
    said = [process.communicate(timeout=200)[0].splitlines() for process in both]
    early = ["stopped before training (SIGTERM) True"] * 3
    said = [[line for line in lines if not line.startswith("[Gloo]")] for lines in said]
    assert said[0] == [*early, "sum 6.0 programs found 0", "sum 6.0 programs found 1"]
    # On CPU each process has keys of its own, and only process 0 writes.
    assert said[1] == [*early, "sum 6.0 programs found 0", "sum 6.0 programs found 0"]
    assert list((tmp_path / "outputs/.compiled").iterdir())


REFUSES = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
port, process, folder = sys.argv[1:]
import effnetlib
from effnetlib.runs import hosts
hosts.start(f"localhost:{port}", 2, int(process))
try:
    effnetlib.train(effnetlib.Recipe.preset("digits-64-lars"), folder)
except effnetlib.EffnetlibError as error:
    print(error, flush=True)
    hosts.gather("end")  # else jaxlib ends the one that is left
"""


def test_what_one_process_refuses_is_refused_by_all(tmp_path):
    (tmp_path / "file").write_text("")
    port = free_port()
    folders = (tmp_path / "file", tmp_path / "folder")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", REFUSES, str(port), str(i), str(folders[i])], stdout=subprocess.PIPE, text=True
        )
        for i in (0, 1)
    ]
    own, other = (process.communicate(timeout=120)[0] for process in both)
    assert (
        "is a file, where a folder is wanted" in own
        and "process 0 of 2 refused: directory" in other
        and own.strip()[-40:] in other
    )
