"""What our own parts cost, each beside the same without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .contestant import ROOT, Contestant, ContestantError
from .measurement import Measurement, in_turn, ratio

DATA_LIBRARIES = (
    "array_record",
    "cv2",
    "h5py",
    "orbax",
    "pandas",
    "PIL",
    "simplejpeg",
    "sklearn",
    "tensorstore",
)
SIMULATED = "the eight devices are simulated on the cores of one CPU, so using more of them cannot be faster"


def _output(arguments: list[str], environ: dict | None = None) -> str:
    """What a Python prints that runs to its end."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | (environ or {}), capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ContestantError(
            f"{' '.join(arguments)[:80]} ended with code {done.returncode}: {(said or ['nothing said'])[-1]}"
        )
    return done.stdout


class Runs:
    """Whole small runs, each in a process and a folder of its own; what one has compiled no other compiles."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.environ = cache | {"EFFNETLIB_OUTPUTS": str(folder)}

    @property
    def name(self) -> str:
        """Of the present run's folder; a bare number papermill would take for one."""
        return f"run-{self.count}"

    def _timing(self, arguments):
        _output(arguments, self.environ)
        run = json.loads((self.folder / self.name / "run.json").read_text())
        return run["timing"] | {"steps": run["data"]["total_steps"]}

    def plain(self, parameters: dict, devices: int | None = None, eval_devices: int | None = None) -> dict:
        """The clock of a run by `effnetlib.train`."""
        self.count += 1
        simulate = f"effnetlib.simulate_devices({devices}); " if devices else ""
        program = (
            f"import effnetlib; from effnetlib.suites.parameters import train_recipe; {simulate}effnetlib.train(train_recipe({parameters!r}), "
            f"{str(self.folder / self.name)!r}, eval_devices={eval_devices})"
        )
        return self._timing(["-c", program])

    def papermill(self, parameters: dict) -> dict:
        """The clock of the same run by train.ipynb under papermill."""
        self.count += 1
        given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
        notebook = ["notebooks/train.ipynb", str(self.folder / f"{self.name}.ipynb"), "--no-progress-bar"]
        return self._timing(["-m", "papermill", *notebook, *given, "-p", "directory", self.name])


def papermill(runs: Runs, rounds: int) -> list[Measurement]:
    parameters = {"preset": "digits-64-rmsprop", "epochs": 20, "eval_every_epochs": 20}

    def milliseconds(timing):
        return 1e3 * timing["train_seconds"] / timing["steps"]

    runs.plain(parameters)  # compiles
    plain, notebook = in_turn(
        "ms",
        rounds,
        {
            "nano step of a whole run: effnetlib.train": lambda: milliseconds(runs.plain(parameters)),
            "nano step of a whole run: train.ipynb under papermill": lambda: milliseconds(runs.papermill(parameters)),
        },
    )
    return [plain, notebook, ratio("nano step of a whole run: papermill over plain", notebook, plain, at_most=1.02)]


def evaluation(runs: Runs, rounds: int) -> list[Measurement]:
    parameters = {"preset": "digits-64-rmsprop", "epochs": 3, "eval_every_epochs": 0.25}

    def share(eval_devices):
        timing = runs.plain(parameters, devices=8, eval_devices=eval_devices)
        return 100 * timing["eval_seconds"] / (timing["eval_seconds"] + timing["train_seconds"])

    share(8), share(1)  # compile
    on_all, on_one = in_turn(
        "%",
        rounds,
        {"evaluation's share: on all 8 devices": lambda: share(8), "evaluation's share: on 1 of 8": lambda: share(1)},
        SIMULATED,
    )
    return [on_all, on_one, ratio("evaluation's share: on 1 over on all", on_one, on_all, note=SIMULATED)]


def _ours(*arguments: str, **environ: str) -> Contestant:
    return Contestant(f"effnetlib ({arguments[0]})", sys.executable, ["tests.bench.ours", *arguments], environ)


def batch_norm_groups(rounds: int) -> list[Measurement]:
    with _ours("groups", "--group", "8") as local, _ours("groups", "--group", "32") as grouped:
        rates = in_turn(
            "images/s",
            rounds,
            {
                "nano on 8 devices: batch norm on each device": lambda: local.round(50),
                "nano on 8 devices: batch norm in groups of 4 devices": lambda: grouped.round(50),
            },
            SIMULATED,
        )
    return [*rates, ratio("nano on 8 devices: time of a step, grouped over local", *rates, note=SIMULATED)]


def loop(rounds: int) -> list[Measurement]:
    with _ours("loop") as contestant:
        bare, around = in_turn(
            "ms",
            rounds,
            {
                "nano step: by itself": lambda: 1e3 * contestant.round("bare"),
                "nano step: in the loop, all of them logged": lambda: 1e3 * contestant.round("loop"),
            },
        )
    return [bare, around, ratio("nano step: in the loop over by itself", around, bare)]


def checkpoints(rounds: int) -> list[Measurement]:
    with _ours("checkpoint") as contestant:
        times = [contestant.round() for _ in range(rounds)]
    held_up = Measurement("checkpoint of B0: time that the loop waits", "s", [each[0] for each in times])
    on_disk = Measurement("checkpoint of B0: time until it is on disk", "s", [each[1] for each in times])
    return [held_up, on_disk, ratio("checkpoint of B0: waits over on disk", held_up, on_disk)]


def compilation(folder: Path, rounds: int) -> list[Measurement]:
    def seconds(**environ):
        with _ours("first_step", **environ) as contestant:
            return contestant.facts["seconds"]

    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    seconds(**cache)  # fills it
    without, cached = in_turn(
        "s",
        rounds,
        {
            "B0 until its first step is done: no compilation cache": lambda: seconds(
                JAX_ENABLE_COMPILATION_CACHE="false"
            ),
            "B0 until its first step is done: compiled before": lambda: seconds(**cache),
        },
    )
    return [without, cached, ratio("B0 until its first step is done: no cache over compiled before", without, cached)]


def imports(rounds: int) -> list[Measurement]:
    """Fresh processes. The names make the parts load that `import effnetlib` puts off."""
    programs = {
        "import of jax, flax and optax": "import jax, flax.nnx, optax",
        "import of effnetlib with its model, norm and optimizers": (
            "import effnetlib; effnetlib.EfficientNet, effnetlib.GroupedBatchNorm, effnetlib.lars"
        ),
        "import of effnetlib with recipes, training and data": "import effnetlib; effnetlib.train",
    }
    loaded = {}

    def seconds(name):
        program = (
            f"import json, sys, time; start = time.perf_counter(); {programs[name]}; "
            "print(json.dumps([time.perf_counter() - start, list(sys.modules)]))"
        )
        value, loaded[name] = json.loads(_output(["-c", program]))
        return value

    measurements = in_turn("s", rounds, {name: lambda name=name: seconds(name) for name in programs})
    for each in measurements[1:]:
        found = [library for library in DATA_LIBRARIES if library in loaded[each.name]]
        each.note = f"data libraries loaded by the {each.name}: {', '.join(found) or 'none'}"
    measurements[1].at_most = 2.0
    return measurements
