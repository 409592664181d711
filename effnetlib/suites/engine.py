"""The papermill engine `effnetlib`, by name: ``papermill --engine effnetlib IN.ipynb OUT.ipynb``. It does what papermill's
own does, and in addition it

* passes the signals that end a process on to the kernel and waits for it, so that a run can save;
* runs every notebook in the interpreter that papermill runs in, with the same effnetlib, whatever kernels are installed;
* marks a kernel that died, or a cell that took too long, as failed, with papermill's banner on top of the notebook and
  the kernel's last words (papermill's own marks every cell "completed");
* logs now and then what a long cell last said, also where a line changes in place;
* ends with exit code 75, "try again", where the notebook stopped because it was asked to.

Papermill loads this module while it is being imported itself, so `client`, which needs papermill, is imported when used.
"""

import os

from effnetlib.runs.stopping import follow

if "EFFNETLIB_PARENT" in os.environ:
    follow(int(os.environ.pop("EFFNETLIB_PARENT")))


class _Engine:
    def __getattr__(self, name):
        from effnetlib.suites.client import ClientEngine

        return getattr(ClientEngine, name)


Engine = _Engine()  # what the entry point in pyproject.toml names; papermill calls its methods
