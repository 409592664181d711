"""What papermill's own engine leaves undone, and ours does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from test_invariance import free_port

import effnetlib


def notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def start(source, out, *options, **settings):
    command = [sys.executable, "-m", "papermill", str(source), str(out), "--no-progress-bar", *options]
    # libtpu ignores SIGHUP, and where a test has loaded it the child would inherit that.
    settings = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)} | settings
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)


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
from effnetlib.runs.stopping import PreemptedError, Stop
with Stop(None) as stop:
    pathlib.Path("ready").touch()
    while not stop.requested():
        time.sleep(0.05)
    pathlib.Path("saved").touch()
raise PreemptedError(f"saved after {stop.requested()}")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_the_kernel_which_saves_and_the_exit_code_says_try_again(number, tmp_path):
    source = notebook(tmp_path / "in.ipynb", SAVES, "2")
    process = start(source, tmp_path / "out.ipynb", "--engine", "effnetlib", "--cwd", str(tmp_path))
    wait_for(tmp_path / "ready", process)
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
        "import sys; from papermill.__main__ import papermill; from effnetlib.suites import client; "
        "client.LINE_SECONDS = 0.1; papermill(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out.ipynb"), "--engine", "effnetlib"]
    done = subprocess.run([*command, "--no-progress-bar"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "cell 1 of 1: step 3 of 3" in done.stderr, done.stderr


def test_a_kernel_asked_to_stop_before_it_can_save_is_to_be_tried_again_too(tmp_path):
    source = notebook(tmp_path / "in.ipynb", "import pathlib, time; pathlib.Path('ready').touch(); time.sleep(600)")
    process = start(source, tmp_path / "out.ipynb", "--engine", "effnetlib", "--cwd", str(tmp_path))
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and "killed by SIGTERM" in (tmp_path / "out.ipynb").read_text()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    source = notebook(
        tmp_path / "in.ipynb",
        SAVES.replace("ready", "begun").replace(
            "while not", "pathlib.Path('ready').touch(); import os\n    while not os.path.exists('go') and not"
        ),
    )
    options = ("--engine", "effnetlib", "--cwd", str(tmp_path))
    nohup = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = start(source, tmp_path / "out.ipynb", *options, **nohup)
    wait_for(tmp_path / "ready", process)
    (kernel,) = psutil.Process(process.pid).children()
    for pid in (process.pid, kernel.pid):
        os.kill(pid, signal.SIGHUP)
    time.sleep(0.5)
    (tmp_path / "go").touch()
    output, _ = process.communicate(timeout=60)
    assert '"evalue": "saved after "' in (tmp_path / "out.ipynb").read_text() and "passed on" not in output


def test_a_kernel_whose_papermill_is_killed_saves_and_ends(tmp_path):
    source = notebook(tmp_path / "in.ipynb", SAVES)
    process = start(source, tmp_path / "out.ipynb", "--engine", "effnetlib", "--cwd", str(tmp_path))
    wait_for(tmp_path / "ready", process)
    (kernel,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=60)
    assert psutil.wait_procs([kernel], timeout=20)[1] == []
    assert (tmp_path / "saved").exists()


def test_the_kernel_is_the_interpreter_that_runs_papermill_whatever_the_shell_says(tmp_path):
    spec = tmp_path / "share/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "stale", "language": "python"}))
    code = """
import sys, effnetlib, matplotlib.pyplot as plt
plt.plot([1, 2]); plt.show()
print(sys.executable, effnetlib.__file__)
"""
    shell = {"JUPYTER_PATH": str(tmp_path / "share"), "MPLBACKEND": "module://backend_interagg"}
    source, out = notebook(tmp_path / "in.ipynb", code), tmp_path / "out.ipynb"
    process = start(source, out, "--engine", "effnetlib", "-k", "python3", env={**os.environ, **shell})
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert f"{sys.executable} {effnetlib.__file__}" in out.read_text() and "image/png" in out.read_text()


def test_another_checkout_on_the_path_does_not_take_the_place_of_papermills(tmp_path):
    other = tmp_path / "other/effnetlib"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise RuntimeError('another checkout')")
    source, out = notebook(tmp_path / "in.ipynb", "import effnetlib; print(effnetlib.__file__)"), tmp_path / "out.ipynb"
    root = str(Path(effnetlib.__file__).parent.parent)
    code = (
        f"import sys; sys.path.insert(0, {root!r}); from papermill.__main__ import papermill; papermill(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(source), str(out), "--engine", "effnetlib"]
    shell = {**os.environ, "PYTHONPATH": str(other.parent)}
    done = subprocess.run(command, env=shell, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and effnetlib.__file__ in out.read_text(), done.stderr


def test_the_last_words_of_a_dying_kernel_are_kept(tmp_path):
    source, out = notebook(tmp_path / "in.ipynb", "import jax; jax.devices()"), tmp_path / "out.ipynb"
    process = start(source, out, "--engine", "effnetlib", env={**os.environ, "XLA_FLAGS": "--xla_no_such_flag=1"})
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "XLA_FLAGS: --xla_no_such_flag=1" in output
    (error,) = [each for cell in nbformat.read(out, 4).cells for each in cell.get("outputs", ()) if "ename" in each]
    assert re.fullmatch("the kernel died .*; its last words: .*XLA_FLAGS: --xla_no_such_flag=1.*", error.evalue)


def test_stack_traces_do_not_hide_the_last_words(tmp_path):
    code = "import os; os.write(2, b'F0000 00:00 x.cc:1] Check failed: a == b\\n*** Check failure stack trace: ***\\n    @  0x7f  f()\\n'); os.abort()"
    process = start(notebook(tmp_path / "in.ipynb", code), tmp_path / "out.ipynb", "--engine", "effnetlib")
    process.communicate(timeout=60)
    assert (
        "killed by SIGABRT; its last words: F0000 00:00 x.cc:1] Check failed: a == b"
        in (tmp_path / "out.ipynb").read_text()
    )


def test_a_kernel_that_does_not_start_in_time_names_the_setting(tmp_path):
    slow = "import sys, time\nif any('IPKernelApp' in each for each in sys.orig_argv): time.sleep(60)"
    (tmp_path / "sitecustomize.py").write_text(slow)
    shell = {**os.environ, "PYTHONPATH": str(tmp_path)}
    options = ("--engine", "effnetlib", "--start-timeout", "1")
    process = start(notebook(tmp_path / "in.ipynb", "1"), tmp_path / "out.ipynb", *options, env=shell)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "FailedError: the notebook's kernel did not start: " in output
    assert output.strip().endswith("--start-timeout SECONDS gives it more time")


def test_nobody_reads_what_papermill_says(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook(tmp_path / "in.ipynb", "1 + 1")),
        str(tmp_path / "out.ipynb"),
    ]
    done = subprocess.run([*command, "--engine", "effnetlib"], stdout=write, stderr=write, timeout=60)
    os.close(write)
    assert done.returncode == 0 and statuses(tmp_path / "out.ipynb") == ["completed"]


TRAINED = """
import os, time
from effnetlib.runs import hosts
hosts.start()
hosts.gather("trained")
"""
DRAWS = "time.sleep(float(os.environ['SECONDS'])); assert os.environ['SECONDS'] != '0.5'; print('drawn')"


def two_hosts(tmp_path, *seconds):
    """A notebook on two hosts. After the training each takes its own time to draw; in half a second it fails."""
    source, port = notebook(tmp_path / "in.ipynb", TRAINED, DRAWS), free_port()
    ours = {"EFFNETLIB_COORDINATOR": f"localhost:{port}", "EFFNETLIB_PROCESSES": "2"}
    for i, each in enumerate(map(str, seconds)):
        environment = os.environ | ours | {"EFFNETLIB_PROCESS": str(i), "SECONDS": each}
        yield start(source, tmp_path / f"out{i}.ipynb", "--engine", "effnetlib", env=environment)


# Jupyter would kill a kernel that waits for the other one 2.5 seconds after its last cell.
@pytest.mark.parametrize("seconds", [(0, 5), (5, 0)], ids=["host 0 first", "host 1 first"])
def test_a_host_whose_notebook_ends_first_does_not_end_the_other(seconds, tmp_path):
    both = list(two_hosts(tmp_path, *seconds))
    said = [process.communicate(timeout=90)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all("drawn" in str(nbformat.read(tmp_path / f"out{i}.ipynb", 4).cells[-1].outputs) for i in (0, 1))


def test_a_host_whose_notebook_fails_says_so_at_once(tmp_path):
    other, failing = two_hosts(tmp_path, 300, 0.5)
    assert failing.wait(timeout=90) == 1 and other.poll() is None
    other.kill()
