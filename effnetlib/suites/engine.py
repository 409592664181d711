"""The papermill engine `effnetlib`: what papermill's own does, and in addition it

* passes the signals that end a process on to the kernel and waits for it, so that a run can save (papermill's own leaves it
  alone);
* runs every notebook in the interpreter that papermill runs in, with the same effnetlib, whatever kernels are installed;
* writes a kernel that died, or a cell that took too long, down as failed, with papermill's banner on top of the notebook
  (papermill's own marks every cell "completed"), and with the kernel's last words;
* logs now and then what a long cell last said, progress lines that are shown in place included;
* ends with exit code 75, "try again", where the notebook stopped because it was asked to.

Papermill finds it by name, through the entry point in pyproject.toml: ``papermill --engine effnetlib IN.ipynb OUT.ipynb``.
"""

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path


class Engine:
    """What the entry point names. Papermill looks for it while it is being imported itself, so it is defined before that."""

    @staticmethod
    def execute_notebook(nb, kernel_name, **options):
        if not os.isatty(2):
            options["progress_bar"] = False  # it raises where a pipe was closed
        return _Engine.execute_notebook(nb, kernel_name, **options)

    @staticmethod
    def nb_kernel_name(nb, name=None):
        return _Engine.nb_kernel_name(nb, name)

    @staticmethod
    def nb_language(nb, language=None):
        return _Engine.nb_language(nb, language)


import nbformat  # noqa: E402
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager  # noqa: E402
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError  # noqa: E402
from papermill.clientwrap import PapermillNotebookClient  # noqa: E402
from papermill.engines import NBClientEngine  # noqa: E402
from papermill.log import logger  # noqa: E402
from papermill.utils import merge_kwargs, remove_args  # noqa: E402

from effnetlib.errors import FailedError  # noqa: E402
from effnetlib.runs.progress import LINE_SECONDS, say  # noqa: E402
from effnetlib.runs.stopping import TRY_AGAIN, Children, follow  # noqa: E402

LAST_LINES = 200  # of a kernel's output: a stack trace of C++ and one of Python, and what came before them
# How the lines of such traces begin. What they tell of is said before them.
TRACE = ("@", "***", "File ", "Thread 0x", "Current thread ", "Extension modules: ", "Fatal Python error: ", "<", "...")
ROOT = str(Path(__file__).parents[2])
KERNEL = f"""
import os, sys
sys.path.insert(0, {ROOT!r})
from effnetlib.runs.stopping import follow
if {ROOT!r} in sys.path[1:]: del sys.path[0]
follow(int(os.environ["JPY_PARENT_PID"]))
from ipykernel.kernelapp import launch_new_instance
launch_new_instance()
"""

if "EFFNETLIB_PARENT" in os.environ:
    follow(int(os.environ.pop("EFFNETLIB_PARENT")))


def _has_error(cell) -> bool:
    return any(output.output_type == "error" for output in cell.get("outputs", ()))


class _OurInterpreter(KernelSpecManager):
    def get_kernel_spec(self, kernel_name):
        command = [sys.executable, "-P", "-c", KERNEL, "-f", "{connection_file}"]
        # ipykernel would send to the notebook what C++ writes, but is dead before it can; and it would end at once with its
        # parent, where `follow` lets a run save: 1 is a parent that it does not watch.
        command += ["--IPKernelApp.capture_fd_output=False", "--IPKernelApp.parent_handle=1"]
        environment = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONUTF8": "1"}
        return KernelSpec(argv=command, env=environment, display_name=kernel_name, language="python")


class _Client(PapermillNotebookClient):
    """Runs the cells. Its methods are called by nbclient."""

    kernel_lost = False
    preempted = False
    shown = 0.0

    def execute(self, **kwargs):
        self.reset_execution_trackers()
        with Children() as children, self.setup_kernel(**kwargs):
            children.add(self._process)
            self.papermill_execute_cells()
            # A kernel that was asked to stop before it trained dies of it, which is no failure either.
            self.preempted |= bool(children.asked) and any(map(_has_error, self.nb.cells))
            if not self.kernel_lost:
                info = self.wait_for_reply(self.kc.kernel_info())
                self.nb.metadata["language_info"] = info["content"]["language_info"]
                self.set_widgets_metadata()
        return self.nb

    def create_kernel_manager(self):
        manager = super().create_kernel_manager()
        manager.kernel_spec_manager = _OurInterpreter()
        return manager

    def start_new_kernel(self, **kwargs):
        read, write = os.pipe()
        super().start_new_kernel(stdout=write, stderr=write, **kwargs)
        os.close(write)
        self.last_lines = collections.deque(maxlen=LAST_LINES)
        self.listener = threading.Thread(target=self._listen, args=(read,), daemon=True)
        self.listener.start()

    def start_new_kernel_client(self):
        try:
            return super().start_new_kernel_client()
        except RuntimeError as error:
            raise FailedError(
                f"the notebook's kernel did not start: {error}{self._last_words()}; --start-timeout SECONDS gives it more time"
            ) from None

    def _listen(self, read: int) -> None:
        with open(read, encoding="utf-8", errors="replace") as output:
            for line in output:
                self.last_lines.append(line.rstrip())
                say(line, end="", err=True)

    def _last_words(self) -> str:
        self.listener.join(1.0)
        told = [line for line in list(self.last_lines) if line and not line.lstrip().startswith(TRACE)]
        return f"; its last words: {told[-1][:300]}" if told else ""

    @property
    def _process(self) -> subprocess.Popen:
        return self.km.provisioner.process

    def papermill_execute_cells(self):
        for index, cell in enumerate(self.nb.cells):
            self.shown = time.monotonic()
            try:
                self.nb_man.cell_start(cell, index)
                self.execute_cell(cell, index)
            except CellExecutionError as error:
                self.preempted = error.ename == "PreemptedError"
                self.nb_man.cell_exception(self.nb.cells[index], cell_index=index, exception=error)
                break
            except (DeadKernelError, CellTimeoutError) as error:
                self.kernel_lost = True
                self._write_down(self.nb.cells[index], error)
                self.nb_man.cell_exception(self.nb.cells[index], cell_index=index, exception=error)
                break
            finally:
                self.nb_man.cell_complete(self.nb.cells[index], cell_index=index)

    def _write_down(self, cell, error):
        """An error output is what papermill looks for when it decides whether a notebook failed."""
        name, what = type(error).__name__, str(error)
        if isinstance(error, DeadKernelError):
            code = self._process.poll()
            how = f", killed by {signal.Signals(-code).name}" if code is not None and code < 0 else ""
            what = f"the kernel died while this cell ran{how}{self._last_words()}"
        cell.outputs.append(nbformat.v4.new_output("error", ename=name, evalue=what, traceback=[f"{name}: {what}"]))

    def process_message(self, msg, cell, cell_index):
        content = msg["content"]
        text = content.get("text") or content.get("data", {}).get("text/plain", "")
        if text and time.monotonic() - self.shown >= LINE_SECONDS:
            self.shown = time.monotonic()
            logger.info(f"cell {cell_index + 1} of {len(self.nb.cells)}: {text.strip().splitlines()[-1][:300]}")
        return super().process_message(msg, cell, cell_index)


class _Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(
        cls, nb_man, kernel_name, log_output=False, stdout_file=None, stderr_file=None, start_timeout=60,
        execution_timeout=None, **kwargs,
    ):  # fmt: skip
        kwargs = remove_args(["input_path", "timeout", "startup_timeout"], **kwargs)
        client = _Client(
            nb_man,
            **merge_kwargs(
                kwargs,
                timeout=execution_timeout,
                startup_timeout=start_timeout,
                kernel_name=kernel_name,
                log=logger,
                log_output=log_output,
                stdout_file=stdout_file,
                stderr_file=stderr_file,
            ),
        )
        client.execute()
        if client.preempted:
            raise SystemExit(TRY_AGAIN)
