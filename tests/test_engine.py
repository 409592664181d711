"""What papermill's own engine leaves undone, and ours does."""

import json
import signal
import subprocess
import sys
import time

import nbformat
import pytest


def notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def start(source, out, *options):
    command = [sys.executable, "-m", "papermill", str(source), str(out), "--no-progress-bar", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def statuses(path):
    return [c["metadata"].get("papermill", {}).get("status") for c in json.loads(path.read_text())["cells"]]


SUICIDE = "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGKILL)"


def test_papermills_own_engine_marks_a_dead_kernels_cells_completed_and_says_nothing(tmp_path):
    process = start(notebook(tmp_path / "in.ipynb", SUICIDE, "2"), tmp_path / "out.ipynb")
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert statuses(tmp_path / "out.ipynb")[0] == "completed"
    assert "died" not in (tmp_path / "out.ipynb").read_text()


def test_a_dead_kernel_is_written_down(tmp_path):
    process = start(notebook(tmp_path / "in.ipynb", SUICIDE, "2"), tmp_path / "out.ipynb", "--engine", "effnetlib")
    process.communicate(timeout=60)
    assert process.returncode == 1
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert "An Exception was encountered" in executed.cells[0].source  # papermill's banner
    failed = next(cell for cell in executed.cells if cell.metadata.get("papermill", {}).get("status") == "failed")
    assert "the kernel died while this cell ran, killed by SIGKILL" in str(failed.outputs)
    assert "completed" not in statuses(tmp_path / "out.ipynb")


def test_a_cell_that_takes_too_long_is_written_down(tmp_path):
    source = notebook(tmp_path / "in.ipynb", "import time; time.sleep(600)")
    process = start(source, tmp_path / "out.ipynb", "--engine", "effnetlib", "--execution-timeout", "2")
    process.communicate(timeout=60)
    assert process.returncode == 1 and "CellTimeoutError" in (tmp_path / "out.ipynb").read_text()
    assert "failed" in statuses(tmp_path / "out.ipynb")


SAVES = """
import pathlib, time
from effnetlib.stopping import PreemptedError, Stop
with Stop(None) as stop:
    pathlib.Path("ready").touch()
    while not stop.asked():
        time.sleep(0.05)
    pathlib.Path("saved").touch()
raise PreemptedError(f"saved after {stop.asked()}")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_kernel_which_saves_and_the_exit_code_says_try_again(number, tmp_path):
    source = notebook(tmp_path / "in.ipynb", SAVES, "2")
    process = start(source, tmp_path / "out.ipynb", "--engine", "effnetlib", "--cwd", str(tmp_path))
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert (tmp_path / "saved").exists() and "passed on" in output
    assert f"saved after {number.name}" in (tmp_path / "out.ipynb").read_text()


def test_what_a_long_cell_says_is_logged_while_it_runs(tmp_path):
    lines = """
import time
from IPython.display import display
handle = display({"text/plain": "step 0 of 3"}, raw=True, display_id=True)
for step in (1, 2, 3):
    time.sleep(0.2)
    handle.update({"text/plain": f"step {step} of 3"}, raw=True)
"""
    source = notebook(tmp_path / "in.ipynb", lines)
    code = (
        "import sys; from papermill.__main__ import papermill; from effnetlib import engine; "
        "engine.LINE_SECONDS = 0.1; papermill(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out.ipynb"), "--engine", "effnetlib"]
    done = subprocess.run([*command, "--no-progress-bar"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "cell 1 of 1: step 3 of 3" in done.stderr, done.stderr


def test_a_kernel_asked_to_stop_before_it_can_save_is_to_be_tried_again_too(tmp_path):
    source = notebook(tmp_path / "in.ipynb", "import pathlib, time; pathlib.Path('ready').touch(); time.sleep(600)")
    process = start(source, tmp_path / "out.ipynb", "--engine", "effnetlib", "--cwd", str(tmp_path))
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and "killed by SIGTERM" in (tmp_path / "out.ipynb").read_text()
