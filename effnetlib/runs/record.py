"""Records: all that happened in a run, as `run.json` and `metrics.jsonl` in the run's folder."""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import jax
import pandas as pd

from effnetlib.errors import EffnetlibError, first_line
from effnetlib.recipe import Recipe
from effnetlib.runs.files import write_atomically
from effnetlib.runs.hosts import is_main_process
from effnetlib.runs.machine import usable_cores
from effnetlib.runs.paths import user_path

SCHEMA = 1
SECTIONS = ("status", "environment", "data", "timing", "result", "error")
# With this flag in XLA_FLAGS a simulated device computes on one core only. A real device shares no cores either.
ONE_CORE_A_DEVICE = "--xla_cpu_multi_thread_eigen=false"


@dataclass
class Record:
    """One run. The fields are those of `run.json`; `metrics` are the lines of `metrics.jsonl`.

    `status` is "running", "completed", "failed" or "preempted". Every process keeps the record, but only process 0 writes it.

    Each row of the metrics has ``kind``, ``step``, ``epoch`` and ``seconds``. The seconds are the paper's clock, which starts
    after compilation. A "train" row also has loss, top1, grad_norm, param_norm and lr; and of the training time so far,
    images_per_second and input_wait_share. An "eval" row also has nseen; top1, top5 and loss of the raw weights; ema_top1,
    ema_top5 and ema_loss of their moving average.
    """

    directory: Path
    recipe: Recipe
    status: str = "running"
    environment: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    timing: dict = field(default_factory=dict)
    result: dict = field(default_factory=dict)
    error: str | None = None
    metrics: list[dict] = field(default_factory=list)
    as_read: dict = field(default_factory=dict, repr=False, compare=False)  # also holds fields of other versions

    @classmethod
    def load(cls, directory: Path | str) -> "Record":
        """Reads a run's folder, whatever version or optimizer wrote it. The recipe is not checked. A last line of metrics is
        dropped if a crash cut it off. Raises EffnetlibError if there is no readable record."""
        directory = user_path(directory, "the run")
        log, metrics = directory / "metrics.jsonl", []
        try:
            run = json.loads((directory / "run.json").read_text())
            sections = {name: run[name] for name in SECTIONS if run.get(name) is not None}
            recipe = _recipe(dict(run["recipe"]), run.get("recipe_hash"))
            lines = log.read_bytes().splitlines() if log.exists() else []
        except FileNotFoundError:
            raise EffnetlibError(f"{directory} holds no record (run.json is missing)") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged = f"{directory / 'run.json'} is damaged ({first_line(error)})"
            raise EffnetlibError(f"{damaged}: repair it, or delete the folder") from None
        with contextlib.suppress(ValueError):
            metrics.extend(map(json.loads, lines))  # stops at a line that was cut off
        return cls(directory, recipe, **sections, metrics=metrics, as_read=run)

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def point(self) -> str:
        """The name without its seed: `lars-64-seed0` and `lars-64-seed1` are two runs of the point `lars-64`."""
        return re.sub(r"-seed\d+$", "", self.name)

    @property
    def devices_share_cores(self) -> bool:
        """Whether the devices are simulated and each computes on all cores. Then no device is ever idle."""
        simulated = self.environment["platform"] == "cpu" and self.environment["devices"] > 1
        return simulated and ONE_CORE_A_DEVICE not in self.environment.get("xla_flags", "")

    def save(self) -> None:
        """Writes `run.json`."""
        run = {"schema": SCHEMA, "status": "", "recipe": {}, "recipe_hash": self.recipe.hash} | self.as_read
        run["recipe"] = run["recipe"] | asdict(self.recipe)
        run |= {name: getattr(self, name) for name in SECTIONS}
        if not self.error:
            del run["error"]
        self._write("run.json", json.dumps(run, indent=2) + "\n")

    def _write(self, name: str, content: str) -> None:
        if is_main_process():
            write_atomically(self.directory / name, content)

    def log(self, **row) -> None:
        """Appends a row to the metrics, here and on disk."""
        row = {name: float(f"{value:.8g}") if isinstance(value, float) else value for name, value in row.items()}
        self.metrics.append(row)
        if is_main_process():
            with open(self.directory / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        """Drops the rows after `step`. A resumed run writes them again."""
        self.metrics = [row for row in self.metrics if row["step"] <= step]
        self._write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.metrics))

    def frame(self, kind: str) -> pd.DataFrame:
        """The "train" or "eval" rows as a table."""
        return pd.DataFrame([row for row in self.metrics if row["kind"] == kind])

    def summarize(self) -> None:
        """Fills `result` from the evaluations. The peak is the moving average's, as in the reference."""
        rows = [row for row in self.metrics if row["kind"] == "eval"]
        peak, last = max(rows, key=lambda row: row["ema_top1"]), rows[-1]
        self.result = {
            "evaluated_weights": "ema",
            "peak_top1": peak["ema_top1"], "peak_top5": peak["ema_top5"],
            "peak_step": peak["step"], "peak_epoch": peak["epoch"],
            "final_top1": last["ema_top1"], "final_top5": last["ema_top5"],
            "raw_peak_top1": max(row["top1"] for row in rows), "raw_final_top1": last["top1"],
            "eval_examples": last["nseen"], "seconds_to_peak": peak["seconds"],
            "images_per_second": self.timing["images"] / self.timing["train_seconds"],
            "input_wait_share": self.input_wait_share,
        }  # fmt: skip

    @property
    def input_wait_share(self) -> float:
        """Share of the training time spent waiting for a batch. An accelerator was idle for at most this share."""
        return self.timing["input_wait_seconds"] / self.timing["train_seconds"]


def load_records(folder: Path | str) -> list[Record]:
    """Loads the records of all runs in a folder, sorted by name. Leaves out an unreadable one with a warning."""
    records = []
    for path in sorted(user_path(folder, "the folder").glob("*/run.json")):
        try:
            records.append(Record.load(path.parent))
        except EffnetlibError as error:
            warnings.warn(str(error), stacklevel=2)
    return records


def environment() -> dict:
    """Versions, devices and the commit of the code, for a record."""
    cpus, devices = Path("/proc/cpuinfo"), jax.devices()
    cpu = re.search(r"model name\s*: (.+)", cpus.read_text()) if cpus.exists() else None  # macOS has no /proc
    cpu = cpu[1] if cpu else platform.processor() or "unknown CPU"
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "effnetlib")},
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "host": f"{platform.system()} {platform.machine()}, {cpu}, {usable_cores()} cores",
        "xla_flags": " ".join(filter(None, (os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")))),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "git_commit": _git_commit(),
    }


@functools.cache
def _git_commit() -> str | None:
    """The commit of this package's checkout, with "+changes" if the package was edited. None outside a checkout."""
    package = Path(__file__).parents[1]
    if not (package.parent / ".git").exists():
        return None
    git = functools.partial(subprocess.check_output, cwd=package, text=True, stderr=subprocess.DEVNULL)
    try:
        changed = "+changes" if git(["git", "status", "--porcelain", "--", "."]) else ""
        return git(["git", "rev-parse", "HEAD"]).strip() + changed
    except (OSError, subprocess.CalledProcessError):  # git is missing, or does not trust the checkout
        return None


def _recipe(known: dict, hash: str | None) -> Recipe:
    """The recipe in a record of any version. It is not checked, drops unknown fields, and keeps the recorded hash."""
    recipe = object.__new__(Recipe)
    vars(recipe).update({f.name: known.get(f.name, f.default) for f in fields(Recipe)})
    vars(recipe).update({"hash": hash} if hash else {})
    return recipe
