import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from click.testing import CliRunner

from effnetlib import EffnetlibError, Record
from effnetlib.__main__ import main
from effnetlib.runs.files import exclusive_lock
from effnetlib.runs.machine import usable_cores
from effnetlib.runs.paths import outputs_folder
from effnetlib.runs.progress import at_work
from effnetlib.suites.execute import _environment, _key, _pool, execute
from effnetlib.suites.outcome import Outcome
from effnetlib.suites.parameters import read_yaml
from effnetlib.suites.suite import load_suite

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SHORT = "preset: digits-64-rmsprop, image_size: 16, epochs: 0.25, eval_every_epochs: 0.25, warmup_epochs: 0.1"


@pytest.fixture
def folder(tmp_path):
    """A notebooks folder with the training notebook, one report, and one that always fails."""
    folder = tmp_path / "notebooks"
    (folder / "suites").mkdir(parents=True)
    for name in ("train", "07_throughput"):
        shutil.copy(NOTEBOOKS / f"{name}.ipynb", folder)
    broken = nbformat.read(NOTEBOOKS / "07_throughput.ipynb", as_version=4)
    broken.cells[-1] = nbformat.v4.new_code_cell("raise ValueError('on purpose')")
    nbformat.write(broken, folder / "broken.ipynb")
    return folder


def write(folder, text):
    path = folder / "suites/small.yaml"
    path.write_text(text)
    return path


def test_numbers_with_an_exponent_are_numbers(folder):
    suite = load_suite(
        write(folder, "runs: [{name: a, parameters: {preset: digits-64-lars, lars_weight_decay: 1e-4}}]")
    )
    assert suite.runs[0].parameters["lars_weight_decay"] == 1e-4


def test_numbers_are_those_of_yaml_1_2():
    texts = {"1e-3": 0.001, "1.5e3": 1500.0, "1.e3": 1000.0, "-12": -12, "010": 10, "1:30": "1:30", "no": "no"}
    assert {text: read_yaml(text, "x") for text in texts} == texts


def test_a_path_in_settings_begins_where_the_command_runs(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = write(folder, "runs: [{name: a, parameters: {preset: photos, settings: {dataset: ./sets/one}}}]")
    assert load_suite(path).runs[0].recipe.dataset == str(tmp_path / "sets/one")


def test_a_suite_file_that_lies_beside_no_notebooks_says_where_it_should_lie(tmp_path):
    (tmp_path / "small.yaml").write_text("runs: [{name: a, parameters: {preset: digits-64-lars}}]")
    with pytest.raises(EffnetlibError, match="no notebooks in .*: a suite file lies in the folder suites/"):
        load_suite(tmp_path / "small.yaml")


def test_one_entry_may_be_a_run_for_each_combination_of_values(folder):
    text = "runs: [{name: 'b{global_batch_size}-{seed}', parameters: {preset: digits-64-lars, momentum: 0.5}, "
    runs = load_suite(write(folder, text + "each: {global_batch_size: [64, 128], seed: [0, 1]}}]")).runs
    assert [run.name for run in runs] == ["b64-0", "b64-1", "b128-0", "b128-1"]
    wanted = {"preset": "digits-64-lars", "momentum": 0.5, "global_batch_size": 128, "seed": 0}
    assert runs[2].parameters == {**wanted, "directory": "small/runs/b128-0"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("runs: [", "is not YAML"),
        ("- a", "a mapping with the keys reports, runs is wanted"),
        ("rnus: []", "there is no key 'rnus': did you mean runs?"),
        ("runs: [{parameters: {}}]", "an entry lacks the key 'name'"),
        ("runs: [{name: a, parameters: [1]}]", r"a: parameters must be a mapping, and is \[1\]"),
        ("runs: []\nruns: []", "duplicate key .runs"),
        ("runs: [{name: a, parameters: {preset: digits-64-lars, seed: 1, seed: 2}}]", "duplicate key .seed"),
        ("runs: [{name: a, parameters: {preset: digits-64-lars, seed: 1, settings: {seed: 2}}}]", "seed is given twice, as"),
        ("runs: [{name: a, parameters: {preset: digits-64-lars, settings: abc}}]", "settings must map the names of settings"),
        ("runs: [{name: a, parameters: {preset: digits-64-lars, settings: {1: 2}}}]", "settings must map the names"),
        ("runs: [{name: a, parameters: {preset: [a]}}]", "there is no preset ..'a'.."),
        ("runs: [{name: a, parameters: {preset: digits-64-lars, seed: 1:30}}]", "seed must be int, and is '1:30'"),
        ("runs: [{name: a, parameters: {preset: digits-64-lars, max_minutes: abc}}]", "max_minutes must be float or None"),
        ("runs: [{name: a, parameters: {preset: digits-64-lars, global_batch_size: 100000000000000000000}}]", "below 2,147,483,648"),
        (f"runs: [{{name: a, parameters: {{preset: digits-64-lars, epochs: {'9' * 400}}}}}]", "epochs must be a finite number"),
        ("runs: [{name: false, parameters: {preset: digits-64-lars}}]", r"name must be text \(put it in quotation marks\), and is False"),
        (f"runs: [{{name: {'a' * 101}, parameters: {{preset: digits-64-lars}}}}]", "at most 100 letters"),
        ("runs: 5", "runs must be a list, and is 5"),
        ("runs: [{name: a/b, parameters: {preset: digits-64-lars}}]", "'a/b' cannot name a run"),
        ("runs: [{name: a, parameters: {preset: digits-64-lars, directory: x}}]", "a: leave directory out"),
        ("reports: [{name: 07_throughput, parameters: {suit: x}}]", "no parameter 'suit': did you mean suite?"),
        ("runs: [{name: a, parameters: {}}]", "a: the parameter 'preset' is missing"),
        ("runs: [{name: a, parameters: {preset: digits-64-lras}}]", "a: there is no preset 'digits-64-lras': did you mean digits-64-lars?"),
        ("runs: [{name: a, parameters: {preset: digits-64-lars, sed: 1}}]", "a: there is no parameter 'sed': did you mean seed?"),
        ("runs: [{name: a, parameters: {preset: digits-64-lars, seed: x}}]", r"a: seed must be int, and is 'x' \(str\)"),
        ("runs: [{name: a, parameters: {preset: digits-64-lars, global_batch_size: -1}}]", "a: global_batch_size must be above 0"),
        ("runs: [{name: a, cores: 0, parameters: {preset: digits-64-lars}}]", "a: cores must be a number above 0, and is 0"),
        ("reports: [{name: 07_throughput, cores: 1}]", "there is no key 'cores'"),
        ("runs: [{name: 'a{seed}', each: {seed: 1}}]", "each must be a mapping of parameters to lists of values"),
        ("runs: [{name: a, each: {seed: [0, 1]}}]", "the name 'a' must hold {seed}"),
        ("runs: [{name: 'a{sed}', parameters: {preset: digits-64-lars}, each: {sed: [0, 1]}}]", "a0: there is no parameter 'sed'"),
        ("reports: [07_throughputs]", "there is no notebook '07_throughputs': did you mean 07_throughput?"),
        (f"runs: [{{name: a, parameters: {{{SHORT}}}}}, {{name: a, parameters: {{{SHORT}}}}}]", "two entries are named 'a'"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_suite_is_found_before_anything_runs(folder, text, sentence):
    path = write(folder, text)
    with pytest.raises(EffnetlibError, match=sentence) as caught:
        load_suite(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    done = CliRunner().invoke(main, ["run", str(path)])
    assert done.exit_code == 2 and done.output.startswith(f"effnetlib: {caught.value}")
    assert not outputs_folder().exists()


def test_bad_usage_of_the_command_line(folder):
    path = write(folder, f"runs: [{{name: fast, parameters: {{{SHORT}}}}}]")
    cases = [
        (["run", str(path), "--only", "fsat"], "the suite small has no entry 'fsat': did you mean fast?"),
        (["run", str(path), "--set", "seed"], "--set wants KEY=VALUE, not 'seed'"),
        (["run", str(path), "--set", "seed=["], "--set seed=[ is not YAML: while parsing"),
        (["run", str(path), "--set", "global_batchsize=32"], "did you mean global_batch_size?"),
        (["run", str(path.with_name("none.yaml"))], "cannot be read: No such file"),
        (["report", str(folder)], "holds no executed notebooks"),
        (["data", "fetch", "cifar"], "did you mean cifar10?"),
    ]
    for arguments, sentence in cases:
        done = CliRunner().invoke(main, arguments)
        assert (done.exit_code, done.exception.__class__) == (2, SystemExit), done.output
        assert sentence in done.output and len(done.output.splitlines()) == 1


def test_a_report_is_drawn_anew_when_a_plan_has_been_published(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("effnetlib.suites.execute.published_folder", lambda: tmp_path)
    suite = load_suite(write(folder, f"runs: [{{name: fast, parameters: {{{SHORT}}}}}]\nreports: [07_throughput]"))
    before = [_key(suite, entry) for entry in (*suite.runs, *suite.reports)]
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans/b0.json").write_text("{}")
    after = [_key(suite, entry) for entry in (*suite.runs, *suite.reports)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False]


def test_the_overview_is_drawn_anew_after_another_report(folder):
    shutil.copy(NOTEBOOKS / "00_overview.ipynb", folder)
    suite = load_suite(write(folder, "reports: [07_throughput, 00_overview]"))
    executed = outputs_folder() / "small/executed"
    executed.mkdir(parents=True)
    before = [_key(suite, entry) for entry in suite.reports]
    (executed / "07_throughput.ipynb").write_text("{}")
    after = [_key(suite, entry) for entry in suite.reports]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False]


def test_an_unwritable_outputs_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFNETLIB_OUTPUTS", str(tmp_path / "file"))
    suite = load_suite(write(folder, f"runs: [{{name: fast, parameters: {{{SHORT}}}}}]"))
    with pytest.raises(EffnetlibError, match="EFFNETLIB_OUTPUTS .* is a file, where a folder is wanted"):
        execute(suite)
    monkeypatch.setenv("EFFNETLIB_OUTPUTS", "/proc/outputs")
    with pytest.raises(EffnetlibError, match="the outputs folder .* cannot be written"):
        execute(suite)


def test_a_report_alone_makes_no_folder_of_runs(folder, monkeypatch):
    suite = load_suite(write(folder, f"runs: [{{name: fast, parameters: {{{SHORT}}}}}]\nreports: [07_throughput]"))
    monkeypatch.setattr("effnetlib.suites.execute._run_papermill", lambda *_: 0)
    assert [each.name for each in execute(suite, "07_throughput")] == ["07_throughput"]
    assert suite.directory.is_dir() and not (suite.directory / "runs").exists()


@pytest.fixture
def drawn(tmp_path):
    """A suite of two reports; their code is to be given."""

    def write(code):
        cells = [
            nbformat.v4.new_code_cell('suite = ""', metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(code),
        ]
        kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
        (tmp_path / "suites").mkdir()
        for name in "ab":
            stub = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
            nbformat.write(stub, tmp_path / f"{name}.ipynb")
        path = tmp_path / "suites/small.yaml"
        path.write_text("reports: [a, b]  # two · no more", encoding="utf-8")
        return [sys.executable, "-m", "effnetlib", "run", str(path)]

    return write


SAVES = """
import os, pathlib, time
from effnetlib.runs.stopping import PreemptedError, Stop
with Stop(None) as stop:
    pathlib.Path(f"ready-{os.getpid()}").touch()
    while not stop.requested():
        time.sleep(0.05)
    pathlib.Path(f"saved-{os.getpid()}").touch()
raise PreemptedError("saved")
"""


def begun(command, folder):
    """The process of a suite of two reports that are both under way, and all that it has started."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_ends_a_suite_while_reports_are_drawn_lets_them_save_and_leaves_no_process(drawn, number, tmp_path):
    process, started = begun(drawn(SAVES), tmp_path)
    assert len(started) == 4
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert psutil.wait_procs(started, timeout=30)[1] == []
    assert len(list(tmp_path.glob("saved-*"))) == 2
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 75 and "2 preempted, 0 failed" in output


def test_a_signal_between_two_entries_begins_nothing_more(drawn, monkeypatch):
    suite = load_suite(drawn("1")[-1])
    # In this thread, as it is with runs.
    monkeypatch.setattr(
        "effnetlib.suites.execute.ThreadPoolExecutor", lambda *_, **__: nullcontext(SimpleNamespace(map=map))
    )
    monkeypatch.setattr("effnetlib.suites.execute.render_html", lambda *_: signal.raise_signal(signal.SIGUSR1))
    first, second = execute(suite)
    assert (first.status, second.name, second.status) == ("completed", "b", "preempted")
    assert not (suite.directory / "executed/b.ipynb").exists()


def test_neither_output_nor_the_shell_ends_a_suite(drawn):
    shell = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "MPLBACKEND": "no such backend"}
    run = [*drawn("import matplotlib.pyplot; print('·')"), "--only", "a"]
    report = [*run[:3], "report", str(outputs_folder() / "small")]
    for command in (run, report):
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=shell, timeout=120)
        assert (done.returncode, done.stderr) == (0, b"")
        assert "·" in (outputs_folder() / "small/a.html").read_text(encoding="utf-8")


def test_closed_standard_streams_do_not_end_a_suite(drawn):
    command = f"{shlex.join(drawn('1'))} --only a <&- >&- 2>&-"
    assert subprocess.run(command, shell=True, timeout=120).returncode == 0
    assert (outputs_folder() / "small/a.html").exists()


def test_a_suite_that_is_being_executed_is_not_executed_a_second_time(drawn):
    path = drawn("1")[-1]
    directory = outputs_folder() / "small"
    for name, text in {
        "logs/a.log": "of the first",
        "executed/a.ipynb": (Path(path).parent.parent / "a.ipynb").read_text(),
    }.items():
        (directory / name).parent.mkdir(parents=True)
        (directory / name).write_text(text)
    sentence = f"process {os.getpid()} on {platform.node()} is executing a suite in {directory} at this moment: wait for it, or stop it"
    with exclusive_lock(directory, "executing a suite in"):
        second = CliRunner().invoke(main, ["run", path])
        report = CliRunner().invoke(main, ["report", str(directory)])
    assert (second.exit_code, report.exit_code) == (2, 2)
    assert sentence in second.output and f"process {os.getpid()}" in report.output
    assert (directory / "logs/a.log").read_text() == "of the first" and not (directory / "a.html").exists()


def test_a_finished_entry_has_a_line_of_its_own_beside_the_one_that_changes_in_place(monkeypatch, capsys):
    monkeypatch.setattr("effnetlib.runs.progress.os.isatty", lambda _: True)
    monkeypatch.setenv("TERM", "xterm")
    with at_work("small", lambda: "step 1 of 2") as tell:
        tell("[1/2] a: completed")
        assert capsys.readouterr() == ("[1/2] a: completed\n", "\r\x1b[K")


BESIDE = """
import os, pathlib, time
cores = sorted(os.sched_getaffinity(0))
pathlib.Path(f"begun-{suite}-{os.getpid()}-{cores}").touch()
while len(list(pathlib.Path(".").glob("begun-*"))) < 2:
    time.sleep(0.05)
"""


@pytest.mark.skipif(usable_cores() < 2 or not hasattr(os, "sched_getaffinity"), reason="wants two cores of its own")
def test_entries_that_say_how_many_cores_they_use_run_beside_one_another_each_on_its_own(drawn, tmp_path, capsys):
    suite = load_suite(drawn(BESIDE)[-1])
    before = os.sched_getaffinity(0)
    assert [each.status for each in execute(suite)] == ["completed"] * 2
    one, other = ({*json.loads(path.name.split("-")[-1])} for path in tmp_path.glob("begun-*"))
    assert one and other and not one & other and one | other <= before == os.sched_getaffinity(0)


@pytest.mark.skipif(usable_cores() < 2 or not hasattr(os, "sched_getaffinity"), reason="wants two cores of its own")
def test_tuned_runs_wait_for_the_whole_search_and_reports_for_all_runs(folder, monkeypatch):
    each = f"cores: 1, parameters: {{{SHORT}}}"
    runs = f"[{{name: search-1, {each}}}, {{name: best, tuned: {{lr_per_256: search}}, {each}}}]"
    suite = load_suite(write(folder, f"runs: {runs}\nreports: [07_throughput]"))
    under_way, beside = [], []

    def execute_entry(_, entry, *__):
        beside.append([*under_way, entry.name])
        under_way.append(entry.name)
        time.sleep(0.3)
        under_way.remove(entry.name)
        return Outcome(entry.name, entry.is_run, "skipped")

    monkeypatch.setattr("effnetlib.suites.execute._execute_entry", execute_entry)
    execute(suite)
    assert beside == [["search-1"], ["best"], ["07_throughput"]]
    shutil.copy(NOTEBOOKS / "00_overview.ipynb", folder)
    beside.clear()
    execute(load_suite(write(folder, "reports: [07_throughput, broken, 00_overview]")))
    assert beside[-1] == ["00_overview"] and len(beside) == 3  # it says what the other reports say


def test_runs_without_cores_have_the_machine_to_themselves_and_the_others_are_on_the_cpu(folder):
    text = "runs: [{name: a, cores: 1, parameters: {preset: digits-64-lars}}, {name: b, parameters: {preset: colab}}]"
    first, second = load_suite(write(folder, text)).runs
    assert (first.cores, second.cores) == (1, None)
    assert _environment(first)["JAX_PLATFORMS"] == "cpu"
    assert _environment(second).get("JAX_PLATFORMS") == os.environ.get("JAX_PLATFORMS")
    pools = [_pool(None, 9), _pool(1, 1), _pool(1, 10**6), _pool(10**6, 9)]
    assert [pool._max_workers for pool in pools] == [1, 1, usable_cores(), 1]


@pytest.mark.slow
def test_a_suite_runs_skips_goes_on_and_counts_its_failures(folder):
    path = write(folder, f"runs: [{{name: fast, parameters: {{{SHORT}}}}}]\nreports: [broken, 07_throughput]")
    done = CliRunner().invoke(main, ["run", str(path)])
    assert done.exit_code == 1, done.output
    assert "1 failed" in done.output and "ValueError: on purpose" in done.output
    record = Record.load(outputs_folder() / "small/runs/fast")
    assert record.status == "completed" and record.result["eval_examples"] == 360
    index = (outputs_folder() / "small/index.html").read_text()
    assert "fast.html" in index and "07_throughput.html" in index
    assert "FAILED" in (outputs_folder() / "small/broken.html").read_text()
    (folder / "broken.ipynb").write_text((folder / "07_throughput.ipynb").read_text())
    start = time.perf_counter()
    again = CliRunner().invoke(main, ["run", str(path)])
    assert again.exit_code == 0, again.output
    assert "1 completed, 2 skipped, 0 failed" in again.output
    assert time.perf_counter() - start < 60
    page = (outputs_folder() / "small/fast.html").read_bytes()
    other = CliRunner().invoke(main, ["run", str(path), "--only", "fast", "--set", "seed=9"])
    assert other.exit_code == 1 and "holds the record of another recipe" in other.output
    assert (outputs_folder() / "small/fast.html").read_bytes() == page


@pytest.mark.slow
def test_a_run_that_is_interrupted_is_preempted_and_goes_on_and_so_is_one_whose_suite_is_killed(folder):
    long = SHORT.replace("epochs: 0.25", "epochs: 200", 1)
    path = write(folder, f"runs: [{{name: long, parameters: {{{long}}}}}, {{name: never, parameters: {{{SHORT}}}}}]")
    command = [sys.executable, "-m", "effnetlib", "run", str(path)]
    run = outputs_folder() / "small/runs/long"

    def start_and_wait(more_than):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size <= more_than:
            assert time.monotonic() < deadline and process.poll() is None, "the run did not begin"
            time.sleep(0.1)
        return process

    process = start_and_wait(0)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "1 preempted, 0 failed" in output and "the same command goes on" in output
    assert Record.load(run).status == "preempted" and not run.with_name("never").exists()
    command += ["--only", "long"]
    process = start_and_wait((run / "metrics.jsonl").stat().st_size)  # it goes on
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=120)
    assert len(started) == 2 and psutil.wait_procs(started, timeout=60)[1] == []
    assert Record.load(run).status == "preempted"


DIES = """
import os, pathlib, signal, effnetlib
folder = pathlib.Path(os.environ["EFFNETLIB_OUTPUTS"], directory)
folder.mkdir(parents=True)
effnetlib.Record(folder, effnetlib.Recipe.preset(preset)).save()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_whose_kernel_is_killed_has_failed(folder):
    cells = [nbformat.v4.new_code_cell('preset = directory = ""', metadata={"tags": ["parameters"]})]
    cells.append(nbformat.v4.new_code_cell(DIES))
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    stub = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(stub, folder / "train.ipynb")
    path = write(folder, "runs: [{name: dies, parameters: {preset: digits}}]")
    done = CliRunner().invoke(main, ["run", str(path)])
    assert done.exit_code == 1 and "1 failed" in done.output, done.output
    assert Record.load(outputs_folder() / "small/runs/dies").status == "running"
    assert "FAILED" in (outputs_folder() / "small/dies.html").read_text()
    executed = json.loads((outputs_folder() / "small/executed/dies.ipynb").read_text())
    assert "failed" in {cell["metadata"].get("papermill", {}).get("status") for cell in executed["cells"]}


@pytest.mark.slow
def test_the_training_notebook_works_with_plain_papermill(tmp_path):
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(NOTEBOOKS / "train.ipynb"), str(out), "--no-progress-bar"]
    for name, value in dict(preset="digits-64-rmsprop", image_size=16, seed=3, epochs=0.2, warmup_epochs=0.1).items():
        command += ["-p", name, str(value)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (record,) = [Record.load(path.parent) for path in outputs_folder().glob("runs/*/run.json")]
    assert record.status == "completed"
    assert (record.recipe.warmup_epochs, record.recipe.seed) == (0.1, 3)
