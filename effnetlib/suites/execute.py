"""Executing a suite: notebooks with parameters, through papermill, one process for each; the runs first, then the reports.

What became of a run is what its record says, never what papermill says: papermill marks
the cells of a killed kernel as completed.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from effnetlib.data.sources import cache_folder
from effnetlib.errors import EffnetlibError, FailedError, did_you_mean
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
# As `python -m papermill`. A schema of Jupyter's would build a grammar of addresses, which takes a second, and is not used.
PAPERMILL = "import sys; sys.modules['rfc3987_syntax'] = None; from papermill.__main__ import papermill; papermill()"


def execute(suite: Suite, only: str | None = None, start_timeout: int = START_SECONDS) -> list[Outcome]:
    """Executes a suite and renders its reports. It goes on after a failure. The signals that end a process are passed on to
    all notebooks that are running, and end the suite after them.

    Args:
      suite: what to execute.
      only: the name of the one run or report to execute, or a pattern of names such as "lars-*".
      start_timeout: seconds that a notebook's kernel may take to start.

    Returns:
      What became of each entry, up to one that was preempted.

    Raises:
      EffnetlibError: `only` names nothing, the outputs folder cannot be written, or another process executes a suite there.
    """
    known = [*suite.runs, *suite.reports]
    entries = [entry for entry in known if only is None or fnmatchcase(entry.name, only)]
    if only is not None and not entries:
        names = [entry.name for entry in known]
        raise EffnetlibError(f"the suite {suite.name} has no entry {only!r}: {did_you_mean(only, names)}")
    for folder in {"executed", "logs"} | {"runs" for entry in entries if entry.is_run}:
        make_writable(suite.directory / folder, "the outputs folder")
    prefixes = {entry: f"[{number}/{len(entries)}] {entry.name}" for number, entry in enumerate(entries, 1)}
    running = {}  # the prefixes of entries, with their logs

    def state() -> str:
        said = [(prefix, _last_line(log, lambda line: line.startswith("cell "))) for prefix, log in [*running.items()]]
        return "; ".join(f"{prefix}: {line or 'starting'}" for prefix, line in said)

    with contextlib.ExitStack() as block:
        block.enter_context(exclusive_lock(suite.directory, "executing a suite in"))
        children = block.enter_context(Children())
        tell = block.enter_context(at_work(suite.name, state))

        def settle(entry: Entry) -> Outcome | None:
            if children.asked:
                return None
            running[prefixes[entry]] = _log(suite, entry)
            outcome = _execute_entry(suite, entry, children, start_timeout)
            del running[prefixes[entry]]
            tell(f"{prefixes[entry]}: {_describe(outcome, entry)}")
            return outcome

        settled = []
        for cores, group in itertools.groupby(entries, key=lambda entry: entry.cores):
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
    """Threads for so many entries, as many as there are cores for. Each thread has an equal share of the cores, and at least
    `cores` of them. None: one thread has all.

    What a thread starts runs on its share, and a record says how many cores that is: so speeds can still be compared.
    """
    if cores is None or not hasattr(os, "sched_setaffinity"):  # macOS has none
        return ThreadPoolExecutor(1)
    there = sorted(os.sched_getaffinity(0))
    there = random.sample(there, min(len(there), usable_cores()))  # any of them, where a quota allows fewer
    count = max(1, min(entries, len(there) // cores))
    shares = queue.SimpleQueue()
    for number in range(count):
        shares.put(there[number::count])
    return ThreadPoolExecutor(count, initializer=lambda: os.sched_setaffinity(0, shares.get()))


def _execute_entry(suite: Suite, entry: Entry, children: Children, start_timeout: int) -> Outcome:
    executed = suite.directory / "executed" / f"{entry.name}.ipynb"
    html = suite.directory / f"{entry.name}.html"
    try:
        entry = tuned(suite, entry)
    except FailedError as error:  # its search is not complete
        return Outcome(entry.name, entry.is_run, "failed", error=str(error))
    key = _key(suite, entry)
    before = Outcome.read(suite.directory, entry.name)
    finished = before.key == key and not before.error and executed.exists() and html.exists()
    if finished and not _error(entry):
        return Outcome(entry.name, entry.is_run, "skipped")
    try:
        _check_folder(entry)
    except EffnetlibError as error:  # the finished run's pages stay as they are
        return Outcome(entry.name, entry.is_run, "failed", error=str(error))
    start = time.perf_counter()
    code = _run_papermill(suite, entry, executed, children, start_timeout)
    error = _error(entry, code, _log(suite, entry))
    status = "preempted" if code == TRY_AGAIN else "failed" if error else "completed"
    outcome = Outcome(entry.name, entry.is_run, status, time.perf_counter() - start, error, key)
    outcome.write(suite.directory)
    if executed.exists():
        render_html(suite.directory, entry.name)
    return outcome


def _key(suite: Suite, entry: Entry) -> str:
    """Changes when the entry must be executed again: with its notebook or its parameters. For a report also with the library
    that draws it, with a record that it reads, and with a published plan."""
    files = [suite.notebook_path(entry)]
    if not entry.is_run:
        runs = suite.directory / "runs"
        named = (runs / run / "run.json" for run in entry.parameters.get("runs", ()))  # may lie in another suite
        files += sorted(Path(__file__).parents[1].rglob("*.py"))
        files += sorted({*runs.glob("*/run.json"), *(path for path in named if path.is_file())})
        files += sorted((published_folder() / "plans").glob("*.json"))
    digest = hashlib.sha256(json.dumps(dict(entry.parameters), sort_keys=True).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _check_folder(entry: Entry) -> None:
    """Raises EffnetlibError if a run's folder holds the record of another recipe, or one that cannot be read."""
    if not entry.is_run or not (entry.directory / "run.json").exists():
        return
    if Record.load(entry.directory).recipe != entry.recipe:
        raise EffnetlibError(
            f"{entry.directory} holds the record of another recipe: give the run another name, or delete that folder"
        )


def _error(entry: Entry, code: int = 0, log: Path | None = None) -> str:
    """Why an entry does not count as completed; empty if it does. For a run its record decides."""
    said = _last_line(log, _names_an_error) if code else ""
    died = f"papermill ended with {code}, see {log}" if code else ""
    if entry.is_run:
        try:
            record = Record.load(entry.directory)
        except EffnetlibError as error:
            return said or died or str(error)
        if record.status != "completed":
            return said or record.error or died or f"the record says {record.status}"
    return said or died


def _names_an_error(line: str) -> bool:
    return line.split(":", 1)[0].endswith(("Error", "Exception", "Interrupt"))


def _log(suite: Suite, entry: Entry) -> Path:
    return suite.directory / "logs" / f"{entry.name}.log"


def _last_line(log: Path, wanted: Callable[[str], bool]) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next(filter(wanted, reversed(lines)), "")


def _run_papermill(suite: Suite, entry: Entry, executed: Path, children: Children, start_timeout: int) -> int:
    command = [sys.executable, "-c", PAPERMILL, str(suite.notebook_path(entry)), str(executed), "--kernel", "python3"]
    command += ["--engine", "effnetlib", "--no-progress-bar", "--cwd", str(suite.notebooks)]
    command += ["--start-timeout", str(start_timeout)]
    command += ["--parameters_yaml", yaml.safe_dump(dict(entry.parameters))]
    with open(_log(suite, entry), "w") as log:
        # In a session of its own a terminal's Ctrl-C reaches it once, through us.
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, env=_kernel_environment(entry), start_new_session=True)
        children.add(process)
        code = process.wait()
    # Asked to stop before papermill could pass it on, it ends in its own way; the suite is to stop all the same.
    return TRY_AGAIN if children.asked and code else code


def _kernel_environment(entry: Entry) -> dict:
    # The suite may be executed from anywhere: the kernels get the same folders. Programs compiled by one run serve the
    # next ones, where they are the same.
    outputs = outputs_folder().absolute()
    environment = os.environ | {
        "EFFNETLIB_PARENT": str(os.getpid()),  # papermill's engine ends with us
        "PYTHONUTF8": "1",
        "EFFNETLIB_OUTPUTS": str(outputs),
        "EFFNETLIB_DATA": str(cache_folder().absolute()),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(outputs / ".compiled")),
    }
    # An accelerator belongs to one process.
    return environment | {"JAX_PLATFORMS": "cpu"} if entry.cores else environment


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
    """The closing table: a line for each entry, and the counts."""
    width = max((len(each.name) for each in outcomes), default=0)
    lines = [
        f"{each.name:<{width}}  {each.status:<9}  {duration(each.seconds):>7}  {each.error}".rstrip()
        for each in outcomes
    ]
    counts = Counter(each.status for each in outcomes)
    shown = ["completed", "skipped", *(["preempted"] if counts["preempted"] else []), "failed"]
    return "\n".join([*lines, ", ".join(f"{counts[status]} {status}" for status in shown)])
