"""How the engine `effnetlib` runs a notebook: the kernel it starts, and the client that runs the cells."""

import collections
import os
import signal
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

# A kernel of several waits in jax's barrier at its end, up to 300 seconds, until all have come. If one were killed before,
# jax would end the others. Jupyter sends SIGTERM after half of this time.
TOGETHER_SECONDS = 2 * 330.0
LAST_LINES = 200  # of a kernel's output: enough for stack traces of C++ and Python, and the reason before them
# Prefixes of stack-trace lines. The reason is printed before them.
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
        # Output of C++ must come by our pipe, because a dying kernel cannot send it as a message. ipykernel would end at
        # once with its parent, but `follow` lets a run save. ipykernel does not watch a parent_handle of 1.
        command += ["--IPKernelApp.capture_fd_output=False", "--IPKernelApp.parent_handle=1"]
        environment = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONUTF8": "1"}
        return KernelSpec(argv=command, env=environment, display_name=kernel_name, language="python")


class _Client(PapermillNotebookClient):
    """Runs the cells. nbclient and papermill call its methods."""

    preempted = kernel_lost = False
    shown = 0.0

    def execute(self, **kwargs):
        with Children() as self.children:
            try:
                super().execute(**kwargs)
            except DeadKernelError:  # after the last cell, nbclient asks the dead kernel once more
                if not self.kernel_lost:
                    raise
        # A signal before the training ends the cell with an error. That is a stop too, not a failure.
        outputs = [output for cell in self.nb.cells for output in cell.get("outputs", ())]
        self.preempted |= bool(self.children.asked) and any(output.output_type == "error" for output in outputs)
        return self.nb

    def create_kernel_manager(self):
        manager = super().create_kernel_manager()
        manager.kernel_spec_manager = _OurInterpreter()
        return manager

    def start_new_kernel(self, **kwargs):
        read, write = os.pipe()
        super().start_new_kernel(stdout=write, stderr=write, **kwargs)
        if os.environ.get("EFFNETLIB_PROCESSES", "1") != "1":
            self.km.shutdown_wait_time = TOGETHER_SECONDS
        os.close(write)
        self.children.add(self.km.provisioner.process)
        self.last_lines = collections.deque(maxlen=LAST_LINES)
        self.listener = threading.Thread(target=self._listen, args=(read,), daemon=True)
        self.listener.start()

    def start_new_kernel_client(self):
        try:
            return super().start_new_kernel_client()
        except RuntimeError as error:
            failed = f"the notebook's kernel did not start: {error}{self._last_words()}"
            raise FailedError(f"{failed}; --start-timeout SECONDS gives it more time") from None

    def _listen(self, read: int) -> None:
        with open(read, encoding="utf-8", errors="replace") as output:
            for line in output:
                self.last_lines.append(line.rstrip())
                say(line, end="", err=True)

    def _last_words(self) -> str:
        self.listener.join(1.0)
        lines = [line for line in list(self.last_lines) if line and not line.lstrip().startswith(TRACE)]
        return f"; its last words: {lines[-1][:300]}" if lines else ""

    def execute_cell(self, cell, cell_index, **kwargs):
        self.shown = time.monotonic()
        try:
            return super().execute_cell(cell, cell_index, **kwargs)
        except CellExecutionError as error:
            self.preempted = error.ename == "PreemptedError"
            if not self.preempted:
                self.km.shutdown_wait_time = 5.0  # the others may wait for this one in vain
            raise
        except (DeadKernelError, CellTimeoutError) as error:
            name, reason, process = type(error).__name__, str(error), self.km.provisioner.process
            if isinstance(error, DeadKernelError):
                code = process.poll()
                killer = f", killed by {signal.Signals(-code).name}" if code is not None and code < 0 else ""
                reason = f"the kernel died while this cell ran{killer}{self._last_words()}"
            self.kernel_lost = True
            process.kill()  # a kernel with a slow cell is busy, and would not answer
            # Papermill decides by the outputs whether a notebook failed.
            failed = nbformat.v4.new_output("error", ename=name, evalue=reason, traceback=[f"{name}: {reason}"])
            self.nb.cells[cell_index].outputs.append(failed)
            raise CellExecutionError(reason, name, reason) from error

    def process_message(self, msg, cell, cell_index):
        content = msg["content"]
        text = content.get("text") or content.get("data", {}).get("text/plain", "")
        if text and time.monotonic() - self.shown >= LINE_SECONDS:
            self.shown = time.monotonic()
            logger.info(f"cell {cell_index + 1} of {len(self.nb.cells)}: {text.strip().splitlines()[-1][:300]}")
        return super().process_message(msg, cell, cell_index)


class ClientEngine(NBClientEngine):
    @classmethod
    def execute_notebook(cls, nb, kernel_name, progress_bar=True, **options):
        # The bar would raise on a closed pipe.
        return super().execute_notebook(nb, kernel_name, progress_bar=progress_bar and os.isatty(2), **options)

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, start_timeout=60, execution_timeout=None, **options):
        options.pop("input_path", None)
        times = {"startup_timeout": start_timeout, "timeout": execution_timeout}
        client = _Client(nb_man, **options | times, kernel_name=kernel_name, log=logger)
        client.execute()
        if client.preempted:
            raise SystemExit(TRY_AGAIN)
