"""Executes a suite with papermill, one process per notebook: first the runs, then the reports.

A run's record decides its outcome, not papermill, because papermill marks the cells of a killed kernel as completed.
"""

import contextlib
import hashlib
import itertools
import json
import os
import queue
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from effnetlib.data.sources import cache_folder
from effnetlib.errors import EffnetlibError, did_you_mean, require
from effnetlib.reports.html import render_html, render_index
from effnetlib.runs.files import exclusive_lock, make_writable
from effnetlib.runs.machine import usable_cores
from effnetlib.runs.paths import outputs_folder, published_folder
from effnetlib.runs.progress import at_work, duration
from effnetlib.runs.record import Record
from effnetlib.runs.stopping import TRY_AGAIN, Children
from effnetlib.suites.outcome import Outcome
from effnetlib.suites.suite import Entry, Suite
from effnetlib.suites.tuning import tuned

START_SECONDS = 60
OVERVIEW = "00_overview"  # says what the reports above it say
# `python -m papermill`, without a grammar that Jupyter's schemas would build: it takes a second and is never used.
PAPERMILL = "import sys; sys.modules['rfc3987_syntax'] = None; from papermill.__main__ import papermill; papermill()"


def execute(suite: Suite, only: str | None = None, start_timeout: int = START_SECONDS) -> list[Outcome]:
    """Executes a suite and renders its reports. Returns the outcome of each entry, up to a preempted one.

    After a failure the next entry follows. A signal is passed on to all running notebooks, and the suite ends after them.
    `only` is the name of one run or report, or a pattern of names such as "lars-*". A kernel has `start_timeout` seconds to
    start.

    Raises:
      EffnetlibError: `only` names nothing, the outputs folder is not writable, or another process executes a suite there.
    """
    known = [*suite.runs, *suite.reports]
    entries = [entry for entry in known if only is None or fnmatchcase(entry.name, only)]
    nearest = "" if entries else did_you_mean(only, [entry.name for entry in known])
    require(entries or only is None, f"the suite {suite.name} has no entry {only!r}: {nearest}")
    for folder in {"executed", "logs"} | {"runs" for entry in entries if entry.is_run}:
        make_writable(suite.directory / folder, "the outputs folder")
    prefixes = {entry: f"[{number}/{len(entries)}] {entry.name}" for number, entry in enumerate(entries, 1)}
    running = []

    def state() -> str:
        logs = {entry: [line for line in _log_lines(suite, entry) if line.startswith("cell ")] for entry in [*running]}
        return "; ".join(f"{prefixes[entry]}: {lines[-1] if lines else 'starting'}" for entry, lines in logs.items())

    with contextlib.ExitStack() as block:
        block.enter_context(exclusive_lock(suite.directory, "executing a suite in"))
        children = block.enter_context(Children())
        tell = block.enter_context(at_work(suite.name, state))

        def settle(entry: Entry) -> Outcome | None:
            if children.asked:
                return None
            running.append(entry)
            outcome = _execute_entry(suite, entry, children, start_timeout)
            running.remove(entry)
            tell(f"{prefixes[entry]}: {_describe(outcome, entry)}")
            return outcome

        settled = []
        # A report needs all runs, a tuned run its whole search, and the overview the reports. None starts while these run.
        kinds = itertools.groupby(entries, key=lambda e: (e.is_run, e.cores, bool(e.tuned), e.notebook == OVERVIEW))
        for (_, cores, *_), group in kinds:
            group = list(group)
            with _pool(cores, len(group)) as pool:
                settled += pool.map(settle, group)
        render_index(suite.directory, suite.directory.name)
    begun = [outcome for outcome in settled if outcome]
    if len(begun) < len(entries) and not any(outcome.status == "preempted" for outcome in begun):
        missed = entries[settled.index(None)]  # the signal came between two entries
        begun.append(Outcome(missed.name, missed.is_run, "preempted"))
    return begun


def _pool(cores: int | None, entries: int) -> ThreadPoolExecutor:
    """A pool of min(entries, usable cores // `cores`) threads. Each has an equal share of the cores. None: one thread has all.
    A process runs on the share of the thread that starts it. Its record states the number of cores."""
    if cores is None or not hasattr(os, "sched_setaffinity"):  # macOS has none
        return ThreadPoolExecutor(1)
    usable = sorted(os.sched_getaffinity(0))
    usable = random.sample(usable, min(len(usable), usable_cores()))  # a quota may allow fewer: take any of them
    count = max(1, min(entries, len(usable) // cores))
    shares = queue.SimpleQueue()
    for number in range(count):
        shares.put(usable[number::count])
    return ThreadPoolExecutor(count, initializer=lambda: os.sched_setaffinity(0, shares.get()))


def _execute_entry(suite: Suite, entry: Entry, children: Children, start_timeout: int) -> Outcome:
    def outcome(status: str, **more) -> Outcome:
        return Outcome(entry.name, entry.is_run, status, **more)

    executed = suite.directory / "executed" / f"{entry.name}.ipynb"
    try:
        entry = tuned(suite, entry)
        key, before = _key(suite, entry), Outcome.read(suite.directory, entry.name)
        rendered = executed.exists() and (suite.directory / f"{entry.name}.html").exists()
        if rendered and before.key == key and not before.error and not _error(suite, entry):
            return outcome("skipped")
        if entry.is_run and (entry.directory / "run.json").exists():
            other = f"{entry.directory} holds the record of another recipe"
            same = Record.load(entry.directory).recipe == entry.recipe
            require(same, f"{other}: give the run another name, or delete that folder")
    except EffnetlibError as error:  # keeps the pages of a finished run
        return outcome("failed", error=str(error))
    start = time.perf_counter()
    code = _run_papermill(suite, entry, executed, children, start_timeout)
    error = _error(suite, entry, code)
    status = "preempted" if code == TRY_AGAIN else "failed" if error else "completed"
    done = outcome(status, seconds=time.perf_counter() - start, error=error, key=key)
    done.write(suite.directory)
    if executed.exists():
        render_html(suite.directory, entry.name)
    return done


def _key(suite: Suite, entry: Entry) -> str:
    """A hash of an entry's inputs. If it changes, the entry is executed again. The inputs are the notebook and its parameters,
    and for a report also the library, the records and the published plans."""
    files = [suite.notebook_path(entry)]
    if not entry.is_run:
        runs = suite.directory / "runs"
        named = (runs / run / "run.json" for run in entry.parameters.get("runs", ()))  # paths may lead to another suite
        files += sorted(Path(__file__).parents[1].rglob("*.py"))
        files += sorted({*runs.glob("*/run.json"), *(path for path in named if path.is_file())})
        files += sorted((published_folder() / "plans").glob("*.json"))
    if entry.notebook == OVERVIEW:
        files += sorted(path for path in suite.directory.glob("executed/*.ipynb") if path.stem != OVERVIEW)
    digest = hashlib.sha256(json.dumps(dict(entry.parameters), sort_keys=True).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _error(suite: Suite, entry: Entry, code: int = 0) -> str:
    """Why an entry is not completed after papermill ended with `code`; empty if it is. A run's record decides."""
    kinds, logged, recorded, status = ("Error", "Exception", "Interrupt"), "", "", ""
    died = f"papermill ended with {code}, see {_log(suite, entry)}" if code else ""
    for line in _log_lines(suite, entry) if code else ():
        logged = line if line.split(":", 1)[0].endswith(kinds) else logged
    if entry.is_run:
        try:
            record = Record.load(entry.directory)
            if record.status != "completed":
                recorded, status = record.error, f"the record says {record.status}"
        except EffnetlibError as error:
            status = str(error)
    return logged or recorded or died or status


def _log(suite: Suite, entry: Entry) -> Path:
    return suite.directory / "logs" / f"{entry.name}.log"


def _log_lines(suite: Suite, entry: Entry) -> list[str]:
    log = _log(suite, entry)
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []


def _run_papermill(suite: Suite, entry: Entry, executed: Path, children: Children, start_timeout: int) -> int:
    command = [sys.executable, "-c", PAPERMILL, str(suite.notebook_path(entry)), str(executed), "--kernel", "python3"]
    command += ["--engine", "effnetlib", "--no-progress-bar", "--cwd", str(suite.notebooks)]
    command += ["--start-timeout", str(start_timeout), "--parameters_yaml", yaml.safe_dump(dict(entry.parameters))]
    with open(_log(suite, entry), "w") as log:
        # It gets a session of its own, so that Ctrl-C in a terminal reaches it only once, through us.
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, env=_environment(entry), start_new_session=True)
        children.add(process)
        code = process.wait()
    # A signal that comes before papermill can pass it on gives another code. The suite must stop all the same.
    return TRY_AGAIN if children.asked and code else code


def _environment(entry: Entry) -> dict:
    # Kernels run in another folder, so our folders are absolute. EFFNETLIB_PARENT makes papermill's engine end with us.
    ours = {"EFFNETLIB_OUTPUTS": str(outputs_folder().absolute()), "EFFNETLIB_DATA": str(cache_folder().absolute())}
    ours |= {"EFFNETLIB_PARENT": str(os.getpid()), "PYTHONUTF8": "1"}
    ours |= {"JAX_PLATFORMS": "cpu"} if entry.cores else {}  # an accelerator belongs to one process
    return os.environ | ours


def _describe(outcome: Outcome, entry: Entry) -> str:
    if outcome.status == "skipped":
        return "finished before, not executed again"
    text = f"{outcome.status} in {duration(outcome.seconds)}"
    if outcome.error:
        return f"{text}: {outcome.error}"
    if entry.is_run:
        result = Record.load(entry.directory).result
        return f"{text} · peak top-1 {result['peak_top1']:.1%} · {result['images_per_second']:,.0f} images/s"
    return text


def summary(outcomes: Sequence[Outcome]) -> str:
    """The closing table: one line per entry, and the counts."""
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    lines = [f"{o.name:<{width}}  {o.status:<9}  {duration(o.seconds):>7}  {o.error}" for o in outcomes]
    counts = Counter(outcome.status for outcome in outcomes)
    shown = ["completed", "skipped", *(["preempted"] if counts["preempted"] else []), "failed"]
    return "\n".join([*map(str.rstrip, lines), ", ".join(f"{counts[status]} {status}" for status in shown)])
