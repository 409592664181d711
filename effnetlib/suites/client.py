"""How the engine `effnetlib` runs a notebook: the kernel that it starts, and the client that runs the cells."""

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine
from papermill.log import logger

from effnetlib.errors import FailedError
from effnetlib.runs.progress import LINE_SECONDS, say
from effnetlib.runs.stopping import TRY_AGAIN, Children

LAST_LINES = 200  # of a kernel's output: enough for a stack trace of C++, one of Python, and what came before them
# How the lines of stack traces begin. The reason is said before them.
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


class _OurInterpreter(KernelSpecManager):
    def get_kernel_spec(self, kernel_name):
        command = [sys.executable, "-P", "-c", KERNEL, "-f", "{connection_file}"]
        # What C++ writes comes to us by the pipe: a kernel that dies could no longer send it. ipykernel would end at once
        # with its parent, where `follow` lets a run save: 1 is a parent that it does not watch.
        command += ["--IPKernelApp.capture_fd_output=False", "--IPKernelApp.parent_handle=1"]
        environment = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONUTF8": "1"}
        return KernelSpec(argv=command, env=environment, display_name=kernel_name, language="python")


class _Client(PapermillNotebookClient):
    """Runs the cells. nbclient and papermill call its methods."""

    kernel_lost = False
    preempted = False
    shown = 0.0

    def execute(self, **kwargs):
        self.reset_execution_trackers()
        with Children() as children, self.setup_kernel(**kwargs):
            children.add(self._process)
            self.papermill_execute_cells()
            # A kernel that was asked to stop before it trained dies of it, which is no failure either.
            outputs = [output for cell in self.nb.cells for output in cell.get("outputs", ())]
            self.preempted |= bool(children.asked) and any(output.output_type == "error" for output in outputs)
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
            except (CellExecutionError, DeadKernelError, CellTimeoutError) as error:
                self.preempted = getattr(error, "ename", "") == "PreemptedError"
                if not isinstance(error, CellExecutionError):
                    self.kernel_lost = True
                    self._write_down(self.nb.cells[index], error)
                self.nb_man.cell_exception(self.nb.cells[index], cell_index=index, exception=error)
                break
            finally:
                self.nb_man.cell_complete(self.nb.cells[index], cell_index=index)

    def _write_down(self, cell, error):
        """Gives the cell an error output, which is what papermill looks for when it decides whether a notebook failed."""
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


class ClientEngine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, start_timeout=60, execution_timeout=None, **options):
        options.pop("input_path", None)
        times = {"startup_timeout": start_timeout, "timeout": execution_timeout}
        client = _Client(nb_man, **options | times, kernel_name=kernel_name, log=logger)
        client.execute()
        if client.preempted:
            raise SystemExit(TRY_AGAIN)
