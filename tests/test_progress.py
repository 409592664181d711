"""What is seen of a run in a notebook, with the kernel that JupyterLab would start."""

import re

import pytest
from jupyter_client.manager import start_new_kernel

from effnetlib import Record
from effnetlib.progress import Progress

CELL = """
import effnetlib
recipe = effnetlib.Recipe.preset("digits-64-lars").replace(epochs={epochs}, eval_every_epochs=0.25, warmup_epochs=0.1)
record = effnetlib.train(recipe, {directory!r})
"""


@pytest.fixture
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
    (lines, *_), reply = run(kernel, cell, stop_after=r"step 1\d of 44")
    assert re.fullmatch(r"step \d+ of 44 · [\d,]+ images/s · \d+:\d\d left · loss [\d.]+.*", lines[-1]["text/plain"])
    assert reply["ename"] == "PreemptedError"
    assert re.fullmatch(
        r"stopped at step \d+ of 44 \(SIGINT\); saved, and the same command or cell, run again, goes on",
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
    progress = Progress(total=4, done=2, images=64)
    progress.update(4, loss=0.5)
    progress.draw([1.0], [0.5])
    assert re.fullmatch(r"step 4 of 4 · [\d,]+ images/s · 0:00 left · loss 0.5\n", capsys.readouterr().out)
