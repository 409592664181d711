"""Chaos: real small runs, killed, signalled and damaged at random, must end as if nothing had happened.

    python tests/chaos.py [--faults 50] [--minutes 15] [--seed 0] [--record FILE]

Each fault strikes a process of its own; then the same run is started again. When a run has completed, its last state and its
metrics are compared to the bit (all but clock times) with those of a run that was never touched, and another one begins.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STRIKES = (
    "killed during a step",
    "killed during an evaluation",
    "killed while a checkpoint was written",
    "killed right after a checkpoint",
    "killed while the record was written",
    "SIGTERM",
    "SIGINT",
)
DAMAGES = ("", "", "truncated checkpoint file", "missing checkpoint file", "half a line of metrics")
CLOCK = ("seconds", "images_per_second", "input_wait_share")
AGAIN = 75  # the exit code of a run that was stopped and may be started again


def recipe():
    import effnetlib

    return effnetlib.Recipe.preset("digits-64-rmsprop").replace(epochs=1.0, eval_every_epochs=0.25, warmup_epochs=0.5)


def worker(folder: str, strike: str, at: int) -> None:
    """Trains in `folder`; at the at-th chance, strikes itself."""
    import importlib

    import effnetlib
    from effnetlib.runs import run
    from effnetlib.runs.stopping import PreemptedError

    evaluate = importlib.import_module("effnetlib.evaluation")
    chances = iter(range(1, 10**6))

    def now(number=signal.SIGKILL):
        if next(chances) == at:
            os.kill(os.getpid(), number)

    def before_each(original, number=signal.SIGKILL):
        def wrapped(*arguments, **options):
            for item in original(*arguments, **options):
                now(number)
                yield item

        return wrapped

    if strike in ("killed during a step", "SIGTERM", "SIGINT"):
        number = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(strike, signal.SIGKILL)
        effnetlib.data.train_batches = before_each(effnetlib.data.train_batches, number)
    elif strike == "killed during an evaluation":
        evaluate.eval_batches = before_each(evaluate.eval_batches)
    elif strike.endswith(("checkpoint was written", "right after a checkpoint")):
        save = run.save

        def striking(checkpoints, *arguments):
            save(checkpoints, *arguments)
            if strike.endswith("after a checkpoint"):
                checkpoints.wait_until_finished()
            now()

        run.save = striking
    elif strike == "killed while the record was written":
        replace = os.replace

        def replacing(source, target):
            if str(target).endswith(("run.json", "metrics.jsonl")):
                now()
            replace(source, target)

        os.replace = replacing
    try:
        effnetlib.train(recipe(), folder)
    except PreemptedError:
        sys.exit(AGAIN)


def damage(folder: Path, kind: str, rng: random.Random) -> bool:
    """Damages what a run left; whether there was anything to damage."""
    if kind == "half a line of metrics":
        if not (folder / "metrics.jsonl").exists():
            return False
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"kind": "train", "st')
        return True
    steps = sorted((int(path.name), path) for path in folder.glob("checkpoints/*") if path.name.isdigit())
    if len(steps) < 2:
        return False  # nothing could go on without the only one
    files = sorted(path for path in steps[-1][1].rglob("*") if path.is_file() and path.stat().st_size)
    if not files:
        return False
    file = rng.choice(files)
    if kind.startswith("missing"):
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    return True


def outcome(folder: Path):
    """The last state, by name, and the metrics without the clock."""
    import jax

    from effnetlib import Record
    from effnetlib.runs import checkpoints

    with checkpoints.open_checkpoints(folder) as manager:
        step = manager.latest_step()
        items = checkpoints.ocp.args.Composite(state=checkpoints.ocp.args.StandardRestore())
        state = manager.restore(step, args=items).state
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in Record.load(folder).metrics]
    return step, leaves, rows


def differences(one, other) -> list[str]:
    """Names of what is not equal to the bit."""
    wrong = [] if one[0] == other[0] and one[2] == other[2] else ["step or metrics"]
    if one[1].keys() != other[1].keys():
        return [*wrong, "the tree of the state"]
    return wrong + [name for name, leaf in one[1].items() if leaf.tobytes() != other[1][name].tobytes()]


def chaos(faults: int, minutes: float, seed: int, folder: Path, say=print) -> dict:
    """Strikes so many times, or until the time is up; returns what happened."""
    rng, start = random.Random(seed), time.monotonic()
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }

    def run(place: Path, strike: str, at: int) -> int:
        command = [sys.executable, __file__, "worker", str(place), strike, str(at)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, AGAIN, -signal.SIGKILL):
            raise RuntimeError(f"after {strike!r} the run did not go on:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return done.returncode

    if run(folder / "untouched", "none", 0):
        raise RuntimeError("the untouched run did not complete")
    wanted = outcome(folder / "untouched")
    struck, damaged, fallbacks = collections.Counter(), collections.Counter(), 0
    lost, completed, runs = [], 0, 0
    while sum(struck.values()) + sum(damaged.values()) < faults or (runs and completed < runs):
        late = time.monotonic() - start > 60 * minutes
        enough = sum(struck.values()) + sum(damaged.values()) >= faults or late
        if completed == runs:
            if enough:
                break
            runs += 1
        place = folder / f"run-{runs}"
        strike = "none" if enough else rng.choice(STRIKES)
        # One of the early chances, so that a run is struck several times before it ends.
        code = run(place, strike, rng.randint(1, 4 if "step" not in strike and "SIG" not in strike else 9))
        fallbacks = len(list(folder.glob("run-*/checkpoints/damaged-*")))
        if code == 0:
            completed += 1
            lost += [f"{place.name}: {name}" for name in differences(outcome(place), wanted)]
            say(
                f"{place.name} completed after {sum(struck.values())} strikes in all, lost so far: {len(lost)}",
                flush=True,
            )
            continue
        struck[strike] += 1
        if (kind := rng.choice(DAMAGES)) and damage(place, kind, rng):
            damaged[kind] += 1
    return {
        "seed": seed,
        "faults": sum(struck.values()) + sum(damaged.values()),
        "strikes": dict(struck),
        "damages": dict(damaged),
        "runs_completed": completed,
        "recoveries": sum(struck.values()),
        "checkpoints_fallen_back_from": fallbacks,
        "lost": lost,
        "seconds": round(time.monotonic() - start),
    }


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    from effnetlib.runs.files import write_atomically
    from effnetlib.runs.record import environment

    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    result = chaos(options.faults, options.minutes, options.seed, folder) | {"environment": environment()}
    text = json.dumps(result, indent=2)
    print(text)
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.record, text + "\n")
    shutil.rmtree(folder)
    sys.exit(bool(result["lost"]))


if __name__ == "__main__":
    main()
