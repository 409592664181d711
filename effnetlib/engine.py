"""The papermill engine `effnetlib`: what papermill's own does, and in addition it

* passes SIGTERM and SIGINT on to the kernel and waits for it, so that a run can save (papermill's own leaves it alone);
* writes a kernel that died, or a cell that took too long, down as failed, with papermill's banner on top of the notebook
  (papermill's own marks every cell "completed");
* logs now and then what a long cell last said, progress lines that are shown in place included;
* ends with exit code 75, "try again", where the notebook stopped because it was asked to.

Papermill finds it by name, through the entry point in pyproject.toml: ``papermill --engine effnetlib IN.ipynb OUT.ipynb``.
"""

import signal
import subprocess
import time


class Engine:
    """What the entry point names. Papermill looks for it while it is being imported itself, so it is defined before that."""

    @staticmethod
    def execute_notebook(nb, kernel_name, **options):
        return _Engine.execute_notebook(nb, kernel_name, **options)

    @staticmethod
    def nb_kernel_name(nb, name=None):
        return _Engine.nb_kernel_name(nb, name)

    @staticmethod
    def nb_language(nb, language=None):
        return _Engine.nb_language(nb, language)


import nbformat  # noqa: E402
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError  # noqa: E402
from papermill.clientwrap import PapermillNotebookClient  # noqa: E402
from papermill.engines import NBClientEngine  # noqa: E402
from papermill.log import logger  # noqa: E402
from papermill.utils import merge_kwargs, remove_args  # noqa: E402

from effnetlib.stopping import TRY_AGAIN, signals_to  # noqa: E402

LINE_SECONDS = 15.0


def _has_error(cell) -> bool:
    return any(output.output_type == "error" for output in cell.get("outputs", ()))


class _Client(PapermillNotebookClient):
    """Runs the cells. Its methods are called by nbclient."""

    kernel_lost = False
    preempted = False
    shown = 0.0

    def execute(self, **kwargs):
        self.reset_execution_trackers()
        with self.setup_kernel(**kwargs), signals_to(self._process) as passed:
            self.papermill_execute_cells()
            # A kernel that was asked to stop before it trained dies of it, which is no failure either.
            self.preempted |= bool(passed) and any(map(_has_error, self.nb.cells))
            if not self.kernel_lost:
                info = self.wait_for_reply(self.kc.kernel_info())
                self.nb.metadata["language_info"] = info["content"]["language_info"]
                self.set_widgets_metadata()
        return self.nb

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
        code = self._process.poll()
        how = f", killed by {signal.Signals(-code).name}" if code is not None and code < 0 else ""
        what = f"the kernel died while this cell ran{how}" if isinstance(error, DeadKernelError) else str(error)
        name = type(error).__name__
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
