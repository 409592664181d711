"""What is seen of a run in a notebook, with the kernel that JupyterLab would start."""

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

import effnetlib
from effnetlib import Record
from effnetlib.runs import progress
from effnetlib.runs.progress import Progress, at_work, say

CELL = """
import effnetlib
recipe = effnetlib.Recipe.preset("digits-64-rmsprop").replace(
    image_size=16, epochs={epochs}, eval_every_epochs=0.25, warmup_epochs=0.1
)
record = effnetlib.train(recipe, {directory!r})
"""


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel()
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(kernel, code, watched=True, stop_after=None):
    """Runs a cell: every change of each place on the screen, by its id, and the reply. `stop_after`: pushes the stop button
    at the first line of progress that matches."""
    manager, client = kernel
    places, stopped = {}, False

    def seen(message):
        nonlocal stopped
        content = message["content"]
        if message["msg_type"] in ("display_data", "update_display_data"):
            places.setdefault(content["transient"]["display_id"], []).append(content["data"])
            if stop_after and not stopped and re.search(stop_after, content["data"].get("text/plain", "")):
                stopped = True
                manager.interrupt_kernel()  # twice would be "at once"

    reply = client.execute_interactive(code, allow_stdin=watched, timeout=300, output_hook=seen)
    return list(places.values()), reply["content"]


@pytest.mark.slow
def test_a_cell_shows_progress_in_place_and_goes_on_after_the_stop_button(kernel, tmp_path):
    cell = CELL.format(epochs=2.0, directory=str(tmp_path / "run"))
    (lines, *_), reply = run(kernel, cell, stop_after=r"step [12]\d of 44")
    assert re.fullmatch(r"step \d+ of 44 · [\d,]+ images/s · \d+:\d\d left · loss [\d.]+.*", lines[-1]["text/plain"])
    assert reply["ename"] == "PreemptedError"
    assert re.fullmatch(
        r"stopped at step \d+ of 44 \(SIGINT\); saved: run the same command or cell again to go on",
        reply["evalue"],
    )
    assert Record.load(tmp_path / "run").status == "preempted"
    (lines, curve), reply = run(kernel, cell)
    assert reply["status"] == "ok" and "top1 0." in lines[-1]["text/plain"] and "0:00 left" in lines[-1]["text/plain"]
    record = Record.load(tmp_path / "run")
    assert record.status == "completed" and len(record.frame("eval")) == 8
    assert 2 <= len(curve) <= 8 and all("image/png" in drawn for drawn in curve)


@pytest.mark.slow
def test_a_notebook_that_nobody_watches_keeps_one_line(kernel, tmp_path):
    places, reply = run(kernel, CELL.format(epochs=0.25, directory=str(tmp_path / "run")), watched=False)
    assert reply["status"] == "ok" and len(places) == 1 and "step 5 of 5" in places[0][-1]["text/plain"]


def test_without_a_notebook_progress_is_a_line(capsys):
    shown = Progress(total=4, done=2, images=64)
    shown.update(4, loss=0.5)
    shown.draw([1.0], [0.5])
    assert re.fullmatch(r"step 4 of 4 · [\d,]+ images/s · 0:00 left · loss 0.5\n", capsys.readouterr().out)


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_work_that_takes_long_says_so_in_place_on_a_terminal_and_in_lines_elsewhere(term, monkeypatch, capsys):
    monkeypatch.setattr(progress.os, "isatty", lambda _: True)
    monkeypatch.setattr(progress, "IN_PLACE_SECONDS", 0.01)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", term)
    states, said = iter(["step 1 of 1,000", "go"]), []
    with at_work("run a", lambda: said.append(next(states, "end")) or said[-1], seconds=0.01):
        while "go" not in said:
            time.sleep(0.01)
    lines = {"dumb": "run a · 0:00 · step 1 of 1,000\nrun a · 0:00 · go\n",
             "xterm": "\r\x1b[Krun a · 0:00 · ste…\r\x1b[Krun a · 0:00 · go"}  # fmt: skip
    out, err = capsys.readouterr()
    assert err.startswith(lines[term]) and err.endswith("\n" if term == "dumb" else "\r\x1b[K")
    assert out == ""


def closed_pipe(encoding="utf-8"):
    read, write = os.pipe()
    os.close(read)
    return open(write, "w", encoding=encoding)


def closed_file():
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize(
    ("stream", "taken"),
    [
        (closed_pipe, True),  # `| head`: nobody misses it
        (lambda: open("/dev/full", "w"), False),
        (closed_file, False),
        (lambda: None, True),  # what Python makes of `>&-`
    ],
)
def test_a_line_for_people_never_raises(stream, taken, monkeypatch):
    stream = stream()
    monkeypatch.setattr(sys, "stdout", stream)
    assert say("step 1 · loss 0.5") is taken
    Progress(total=1, done=0, images=64).update(1, loss=0.5)
    if stream is not None and not stream.closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.close()


def test_characters_that_a_terminal_does_not_know_become_question_marks(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert say("4 × 2 · 1 ± 0") is True
    assert written.getvalue() == b"4 ? 2 ? 1 ? 0\n"


@pytest.mark.parametrize("stream", [closed_pipe, lambda: open("/dev/full", "w")])
def test_output_that_is_lost_changes_no_exit_code_and_shows_no_traceback(stream):
    code = "import sys; from effnetlib.runs.progress import say; sys.stdout.write('kept back until the end'); say('·'); sys.exit(75)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=stream().detach(), stderr=subprocess.PIPE, text=True, env=buffered
    )
    assert (done.returncode, done.stderr) == (75, "")


def test_every_line_for_people_is_said():
    for path in Path(effnetlib.__file__).parent.rglob("*.py"):
        if path.name != "progress.py":
            assert not re.search(r"(?<!>>> )\bprint\(|click\.echo\(", path.read_text(encoding="utf-8")), path
