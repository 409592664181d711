"""Executing a suite: notebooks with parameters, through papermill, one process a run; then the reports.

What became of a run is what its record says, never what papermill says: papermill marks
the cells of a killed kernel as completed.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from effnetlib.data.sources import cache_folder
from effnetlib.errors import EffnetlibError, FailedError, did_you_mean
from effnetlib.reports.html import outcome, render_html, render_index
from effnetlib.runs.files import exclusive_lock, make_writable, write_atomically
from effnetlib.runs.machine import usable_cores
from effnetlib.runs.paths import outputs_folder, published_folder
from effnetlib.runs.progress import LINE_SECONDS, duration, say
from effnetlib.runs.record import Record
from effnetlib.runs.stopping import TRY_AGAIN, Children
from effnetlib.suites.suite import Entry, Suite
from effnetlib.suites.tuning import tuned

POLL_SECONDS = 0.5
START_SECONDS = 60


@dataclass
class Outcome:
    """What became of an entry: `status` is "completed", "failed", "preempted" (stopped because it was asked to; the same
    command goes on with it) or "skipped" (finished earlier)."""

    entry: Entry
    status: str
    seconds: float = 0.0
    error: str = ""


def execute(suite: Suite, only: str | None = None, start_timeout: int = START_SECONDS) -> list[Outcome]:
    """Executes a suite and renders its reports; goes on after a failure. The signals that end a process are passed on to all
    that is under way, and end the suite after it.

    Args:
      suite: what to execute.
      only: the name of the one run or report to execute, or a pattern of names such as "lars-*".
      start_timeout: seconds that a notebook's kernel may take to start.

    Returns:
      What became of each entry, up to one that was preempted.

    Raises:
      EffnetlibError: `only` names nothing, the outputs folder cannot be written, or another process executes a suite there.
    """
    entries = [*suite.runs, *suite.reports]
    if only is not None:
        entries = [entry for entry in entries if fnmatchcase(entry.name, only)]
        if not entries:
            known = [entry.name for entry in (*suite.runs, *suite.reports)]
            raise EffnetlibError(f"the suite {suite.name} has no entry {only!r}: {did_you_mean(only, known)}")
    for folder in {"executed", "logs"} | {"runs" for entry in entries if entry.is_run}:
        make_writable(suite.directory / folder, "the outputs folder")
    prefixes = {entry: f"[{number}/{len(entries)}] {entry.name}" for number, entry in enumerate(entries, 1)}
    with exclusive_lock(suite.directory, "executing a suite in"), Children() as children:

        def settle(entry: Entry) -> Outcome | None:
            if children.asked:
                return None
            prefix = prefixes[entry]
            try:
                entry = tuned(suite, entry)
                papermill = functools.partial(_run_papermill, suite, entry, prefix, children, start_timeout)
                settled = _execute_entry(suite, entry, papermill)
            except FailedError as error:  # its search is not complete
                settled = Outcome(entry, "failed", error=str(error))
            say(f"{prefix}: {_describe(settled)}")
            return settled

        # A run has the machine to itself, for its speed is part of the record; reports share it.
        settled = [settle(entry) for entry in entries if entry.is_run]
        with ThreadPoolExecutor(usable_cores()) as pool:
            settled += pool.map(settle, [entry for entry in entries if not entry.is_run])
        render_index(suite.directory, suite.directory.name)
    begun = [each for each in settled if each]
    if len(begun) < len(entries) and not any(each.status == "preempted" for each in begun):
        begun.append(Outcome(entries[len(begun)], "preempted"))  # the signal came between two entries
    return begun


def _execute_entry(suite: Suite, entry: Entry, papermill: Callable[[Path], int]) -> Outcome:
    executed = suite.directory / "executed" / f"{entry.name}.ipynb"
    key = _key(suite, entry)
    html = suite.directory / f"{entry.name}.html"
    before = outcome(suite.directory, entry.name)
    if before == _outcome(entry, key, "") and executed.exists() and html.exists() and not _error(entry):
        return Outcome(entry, "skipped")
    start = time.perf_counter()
    if entry.is_run and (error := _other_recipe(entry)):
        return Outcome(entry, "failed", error=error)  # the finished run's pages stay as they are
    code = papermill(executed)
    error = _error(entry, code, suite.directory / "logs" / f"{entry.name}.log")
    write_atomically(executed.with_suffix(".json"), json.dumps(_outcome(entry, key, error)))
    if executed.exists():
        render_html(suite.directory, entry.name)
    status = "preempted" if code == TRY_AGAIN else "failed" if error else "completed"
    return Outcome(entry, status, time.perf_counter() - start, error)


def _outcome(entry: Entry, key: str, error: str) -> dict:
    """What `render.outcome` reads."""
    return {"run": entry.is_run, "key": key, "error": error}


def _key(suite: Suite, entry: Entry) -> str:
    """Changes when the entry must be executed anew: its notebook or parameters, and for a report also the library that
    draws it, a record that it reads, or a published plan."""
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


def _other_recipe(entry: Entry) -> str:
    """Why the run's folder cannot take the entry, if it holds another recipe's record; else empty."""
    directory = entry.directory
    if not (directory / "run.json").exists():
        return ""
    try:
        record = Record.load(directory)
    except EffnetlibError as error:
        return str(error)
    if record.recipe == entry.recipe:
        return ""
    return f"{directory} holds the record of another recipe: give the run another name, or delete that folder"


def _error(entry: Entry, code: int = 0, log: Path | None = None) -> str:
    """Why an entry does not count as completed; empty if it does. For a run its record decides."""
    said = _last_error(log) if code else ""
    died = f"papermill ended with {code}, see {log}" if code else ""
    if entry.is_run:
        try:
            record = Record.load(entry.directory)
        except EffnetlibError as error:
            return said or died or str(error)
        if record.status != "completed":
            return said or record.error or died or f"the record says {record.status}"
    return said or died


def _last_error(log: Path) -> str:
    """The last line of a log that names an exception."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line for line in lines if line.split(":", 1)[0].endswith(("Error", "Exception", "Interrupt"))]
    return named[-1] if named else ""


def _run_papermill(
    suite: Suite, entry: Entry, prefix: str, children: Children, start_timeout: int, executed: Path
) -> int:
    command = [sys.executable, "-m", "papermill", str(suite.notebook_path(entry)), str(executed), "--kernel", "python3"]
    command += ["--engine", "effnetlib", "--no-progress-bar", "--cwd", str(suite.notebooks)]
    command += ["--start-timeout", str(start_timeout)]
    command += ["--parameters_yaml", yaml.safe_dump(dict(entry.parameters))]
    environment = _kernel_environment(entry)
    start = time.perf_counter()
    with open(suite.directory / "logs" / f"{entry.name}.log", "w") as log, _StatusLine(prefix) as status:
        # In a session of its own a terminal's Ctrl-C reaches it once, through us.
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, env=environment, start_new_session=True)
        children.add(process)
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if entry.is_run:
                status.show(functools.partial(_live, entry, start))
    # Asked to stop before papermill could pass it on, it ends in its own way; the suite is to stop all the same.
    return TRY_AGAIN if children.asked and process.returncode else process.returncode


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
    # Several reports are drawn at once, and an accelerator belongs to one process.
    return environment if entry.is_run else environment | {"JAX_PLATFORMS": "cpu"}


def _live(entry: Entry, start: float) -> str:
    """The state of a run from the last line of its metrics."""
    elapsed = duration(time.perf_counter() - start)
    directory = entry.directory
    try:
        run = json.loads((directory / "run.json").read_text())
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        train = [row for row in rows if row["kind"] == "train"][-1]
        total, batch = run["data"]["total_steps"], run["recipe"]["global_batch_size"]
    except (OSError, ValueError, LookupError):
        return f"{elapsed} · starting and compiling"
    left = (total - train["step"]) * batch / max(train["images_per_second"], 1e-9)
    evals = [row["ema_top1"] for row in rows if row["kind"] == "eval"]
    top1 = f" · top-1 {evals[-1]:.1%}" if evals else ""
    return (
        f"{elapsed} · step {train['step']:,} of {total:,} · {train['images_per_second']:,.0f} images/s · "
        f"{duration(left)} left · loss {train['loss']:.3f}{top1}"
    )


class _StatusLine:
    """One line, in place on a terminal, and now and then in a log."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.terminal = os.isatty(1) and os.environ.get("TERM", "dumb") != "dumb"
        self.shown = time.perf_counter()

    def __enter__(self):
        return self

    def show(self, text: Callable[[], str]) -> None:
        """Shows what `text` returns, if it is time to; only then is it called, for it reads files beside the run."""
        now = time.perf_counter()
        if self.terminal:
            line, width = f"{self.prefix}: {text()}", shutil.get_terminal_size().columns - 1
            say(f"\r\x1b[K{line if len(line) <= width else line[: width - 1] + '…'}", end="")
        elif now - self.shown >= LINE_SECONDS:
            self.shown = now
            say(f"{self.prefix}: {text()}")

    def __exit__(self, *_):
        if self.terminal:
            say("\r\x1b[K", end="")


def _describe(outcome: Outcome) -> str:
    if outcome.status == "skipped":
        return "finished before, not executed again"
    text = f"{outcome.status} in {duration(outcome.seconds)}"
    if outcome.error:
        return f"{text}: {outcome.error}"
    if outcome.entry.is_run:
        result = Record.load(outcome.entry.directory).result
        return f"{text} · peak top-1 {result['peak_top1']:.1%} · {result['images_per_second']:,.0f} images/s"
    return text


def table(outcomes: list[Outcome]) -> str:
    """The closing table: a line an entry, and the count."""
    width = max((len(outcome.entry.name) for outcome in outcomes), default=0)
    lines = [
        f"{outcome.entry.name:<{width}}  {outcome.status:<9}  {duration(outcome.seconds):>7}  {outcome.error}".rstrip()
        for outcome in outcomes
    ]
    counts = {
        status: sum(o.status == status for o in outcomes) for status in ("completed", "skipped", "preempted", "failed")
    }
    shown = [f"{count} {status}" for status, count in counts.items() if count or status != "preempted"]
    return "\n".join([*lines, ", ".join(shown)])
