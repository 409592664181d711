"""The papermill engine `effnetlib`: ``papermill --engine effnetlib IN.ipynb OUT.ipynb``. It extends papermill's own engine:

* It passes signals on to the kernel and waits, so that a run can save.
* It runs every notebook in papermill's own interpreter, with the same effnetlib, whatever kernels are installed.
* It marks a dead kernel, or a cell that took too long, as failed. The notebook then shows papermill's banner and the
  kernel's last words. (Papermill's own engine marks every cell "completed".)
* It logs the latest output of a long cell from time to time, even if a line changes in place.
* It ends with exit code 75, "try again", if the notebook was asked to stop.

Papermill imports this module during its own import. So `client`, which needs papermill, is imported at its first use.
"""

import os

from effnetlib.runs.stopping import follow

if "EFFNETLIB_PARENT" in os.environ:
    follow(int(os.environ.pop("EFFNETLIB_PARENT")))


class _Engine:
    def __getattr__(self, name):
        from effnetlib.suites.client import ClientEngine

        return getattr(ClientEngine, name)


Engine = _Engine()  # the entry point in pyproject.toml; papermill calls its methods
