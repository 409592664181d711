import ast
import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import seaborn as sns
import yaml
from flax import nnx
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from papermill.parameterize import parameterize_notebook
from test_prepare import by_class
from traitlets.config import Config

from effnetlib import EfficientNet, EffnetlibError, Recipe, Record
from effnetlib.data.prepare import prepare
from effnetlib.data.split import shown
from effnetlib.reports import paper
from effnetlib.reports.html import render_html
from effnetlib.reports.tables import styled
from effnetlib.runs import checkpoints
from effnetlib.runs.record import environment
from effnetlib.suites.parameters import TRAIN_OPTIONS, TRAIN_PARAMETERS, notebook_parameters
from effnetlib.suites.suite import load_suite
from effnetlib.weights import files

FOLDER = Path(__file__).parents[2] / "notebooks"
PUBLISHED = FOLDER.parent / "outputs/published/laptop"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
READ_NO_SUITE = ("09_pod_plan", "10_pretrained", "11_photographs", "15_adding_an_optimizer")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip the outputs"
    for tag in ("parameters", "answer"):
        assert sum(tag in cell.metadata.get("tags", []) for cell in code) == 1, tag
    assert notebook.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells) <= 25
    assert "widgets" not in notebook.metadata


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_is_seen_by_papermill_with_type_and_help(path):
    notebook = nbformat.read(path, as_version=4)
    source = next(c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    assigned = [node.target.id for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)]
    seen = papermill.inspect_notebook(str(path))
    assert list(seen) == assigned
    assert all(parameter["inferred_type_name"] != "None" and parameter["help"] for parameter in seen.values())


def test_the_training_notebook_names_every_option_and_no_more_settings_than_people_change():
    seen = list(papermill.inspect_notebook(str(FOLDER / "train.ipynb")))
    assert {"preset", *TRAIN_OPTIONS} <= set(seen) <= set(TRAIN_PARAMETERS) and len(seen) <= 14


def after(*cells, **values):
    """What a kernel's `globals()` hold while the last of these cells runs. `values` were assigned by any other way."""
    namespace = {"In": list(cells)}
    for cell in cells[:-1]:
        with contextlib.suppress(Exception):
            exec(cell, namespace)
    return namespace | values


def test_a_setting_may_be_injected_that_the_parameters_cell_does_not_name():
    cells = [
        "preset: str = 'a'\nsettings: dict = {}",
        "momentum = 0.5",
        "# Parameters\nwarmup_epochs = 1.0",
        "import effnetlib",
    ]
    found = notebook_parameters(after(*cells), TRAIN_PARAMETERS)
    assert found == {"preset": "a", "settings": {}, "warmup_epochs": 1.0}  # and not the user's own momentum


def test_papermill_lists_every_parameter_of_the_training_notebook_with_its_type_and_what_it_means():
    command = [sys.executable, "-m", "papermill", "--help-notebook", str(FOLDER / "train.ipynb")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in papermill.inspect_notebook(str(FOLDER / "train.ipynb")):
        assert re.search(rf"^  {name}: (Optional\[)?(str|int|float|dict)\]? \(default .*\)\s+\w", listed, re.M), name


@pytest.mark.parametrize("path", sorted((FOLDER / "suites").glob("*.yaml")), ids=lambda path: path.stem)
def test_suites_are_valid(path):
    assert load_suite(path).runs


def test_reports_read_runs_of_the_laptop_suite_unless_told_otherwise():
    runs = [run["name"] for run in yaml.safe_load((FOLDER / "suites/laptop.yaml").read_text())["runs"]]
    for path in NOTEBOOKS:
        for name, parameter in papermill.inspect_notebook(str(path)).items():
            if name in ("runs", "pair", "decays", "warmups"):
                assert set(ast.literal_eval(parameter["default"])) <= set(runs)


def test_a_mistyped_parameter_is_seen_inside_the_notebook():
    cells = [
        "print(1); other = 2",
        "import ast\nsuite: str = 'laptop'",
        "# Parameters\nsuite = 'mine'",
        "the caller's own",
    ]
    assert notebook_parameters(after(*cells), ["suite", "runs"]) == {"suite": "mine"}
    cells[2] = "# Parameters\nsiute = 'mine'"
    with pytest.raises(ValueError, match="no parameter 'siute': did you mean suite?"):
        notebook_parameters(after(*cells), ["suite"])


def test_the_training_notebook_refuses_what_it_does_not_know(execute):
    with pytest.raises(EffnetlibError, match="there is no parameter 'sede': did you mean seed?"):
        execute("train", preset="digits-64-rmsprop", sede=4)


SEEN = ["1", "from typing import Optional\nsuite: str = 'laptop'\nhours: Optional[float] = None"]
INJECTED, IMPORT = "# Parameters\nsuite = 'mine'\nhours = 8", "import effnetlib"


@pytest.mark.parametrize(
    "mine",
    ["lr = 0.1", "lr: float = 0.1", "import numpy\nx = 3", "suite_too: str = 'a'", "a.b: int = 3", "%cd x", "x = (",
     "# Parameters of mine\nlr = 0.1", "\0"],
)  # fmt: skip
def test_a_cell_of_the_users_own_holds_no_parameters(mine):
    """Wherever it was run, before the import or between two imports; JupyterLab and Colab keep all that was run in `In`."""
    for cells in ([*SEEN, INJECTED, mine, IMPORT], [mine, *SEEN, INJECTED, IMPORT, mine, IMPORT]):
        got = notebook_parameters(after(*cells), ["suite", "hours"])
        assert got == {"suite": "mine", "hours": 8.0} and type(got["hours"]) is float


def test_what_is_run_once_more_is_checked_once_more():
    bad = "# Parameters\nsiute = 'mine'"
    for cells in ([*SEEN, bad, IMPORT], [*SEEN, bad, IMPORT, IMPORT], [*SEEN, bad, IMPORT, "lr = 0.1", IMPORT]):
        with pytest.raises(ValueError, match="no parameter 'siute': did you mean suite?"):
            notebook_parameters(after(*cells), ["suite", "hours"])
        with pytest.raises(ValueError, match="hours must be float or None, and is 'x'"):
            notebook_parameters(after(*SEEN, IMPORT, "hours = 'x'", IMPORT), ["suite", "hours"])
    corrected = after(*SEEN, bad, IMPORT, INJECTED, IMPORT)
    assert notebook_parameters(corrected, ["suite", "hours"])["suite"] == "mine"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [("suite", 3, r"suite must be str, and is 3 \(int\)"), ("count", True, r"count must be int or None, and is True \(bool\)"),
     ("count", 2.0, "count must be int or None"), ("hours", "8", "hours must be float"), ("runs", "a", "runs must be list"),
     ("hours", float("nan"), "hours must be a finite number")],
)  # fmt: skip
def test_a_parameter_is_what_its_cell_says_it_is(name, value, sentence):
    cells = [
        "suite: str = 'a'\nhours: float = 1.0\ncount: int | None = None\nruns: list = []",
        "hours = 8",
        "caller",
    ]
    known = ["suite", "hours", "count", "runs"]
    got = notebook_parameters(after(*cells), known)
    assert got == {"suite": "a", "hours": 8.0, "count": None, "runs": []} and type(got["hours"]) is float
    with pytest.raises(ValueError, match=sentence):
        notebook_parameters(after(*cells, **{name: value}), known)


def _drawn(notebook, kinds=("image/png", "image/svg+xml")):
    """The alternative texts of the figures that a notebook shows; none may lack one."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    texts = [
        output.metadata.get(kind, {}).get("alt")
        for output in outputs
        for kind in kinds
        if kind in output.get("data", ())
    ]
    assert all(texts)
    return texts


@pytest.fixture
def execute(monkeypatch):
    """Executes a notebook's cells in this process, with papermill's parameters: its outputs, and what it wrote to stderr.

    That kernels and papermill's own process do the same is tested in test_execute and test_engine.
    """
    monkeypatch.chdir(FOLDER)
    settings = Config({"HistoryManager": {"enabled": False}, "InteractiveShell": {"colors": "nocolor"}})

    def run(name, **parameters):
        notebook = parameterize_notebook(papermill.iorw.load_notebook_node(f"{name}.ipynb"), parameters)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                with capture_output() as captured, warnings.catch_warnings():
                    warnings.filterwarnings("ignore", category=DeprecationWarning)
                    shell.display_trap.hook = sys.displayhook  # the capturing one, for a cell's last value
                    shell.run_cell(cell.source, store_history=True).raise_error()
                shown = [{"data": each.data, "metadata": each.metadata or {}} for each in captured.outputs]
                cell.outputs = [nbformat.from_dict({"output_type": "display_data", **each}) for each in shown]
                for stream in ("stdout", "stderr"):
                    if text := getattr(captured, stream):
                        cell.outputs.append(nbformat.v4.new_output("stream", name=stream, text=text))
        return notebook

    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(config=settings)
    with mpl.rc_context():
        yield run
    InteractiveShell.clear_instance()
    plt.close("all")


def _outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS if path.stem not in ("train", *READ_NO_SUITE)])
def test_every_report_draws_the_published_records(name, execute, tmp_path, monkeypatch):
    # To count the parameters of B0 to B7 takes ten seconds. They are tested in test_model.
    monkeypatch.setattr("effnetlib.planning.flops.count_params", {"nano": 1, **paper.trainable_parameters()}.get)
    suite = "cifar10" if name in ("12_learning_rates", "16_reality_check") else "laptop"  # which of them has a search
    shutil.copytree(PUBLISHED.parent / suite / "runs", tmp_path / "outputs" / suite / "runs")
    notebook = execute(name, suite=suite)
    assert _drawn(notebook)
    assert not [output for output in _outputs(notebook) if output.get("name") == "stderr"]


def test_the_companion_page_is_what_make_publish_writes(execute, tmp_path):
    notebook = execute("00_overview")
    assert len(_drawn(notebook)) >= 5
    assert not [output for output in _outputs(notebook) if output.get("name") == "stderr"]
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", ())]
    executed = tmp_path / "outputs/overview/executed"
    executed.mkdir(parents=True)
    nbformat.write(notebook, executed / "00_overview.ipynb")
    written = (PUBLISHED.parent / "index.html").read_text()

    def text(page):
        return re.sub(r"(?s)<style.*?</style>|<[^>]*>|Out\[\d+\]:", " ", page).split()

    assert text(render_html(tmp_path / "outputs/overview", "00_overview", home="").read_text()) == text(written), (
        "make publish"
    )


def test_the_pod_plan_draws_the_published_plans(execute, tmp_path):
    shutil.copytree(PUBLISHED.parent / "plans", tmp_path / "outputs/published/plans")
    notebook = execute("09_pod_plan")
    assert len(_drawn(notebook)) == 2
    assert not [output for output in _outputs(notebook) if output.get("name") == "stderr"]
    tables = "".join(output["data"].get("text/html", "") for output in _outputs(notebook) if "data" in output)
    assert ">1,024</td>" in tables and "1,024.00" not in tables


def _random_weights(num_classes):
    def init():
        model = EfficientNet("nano", num_classes)
        return tuple(nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))

    return jax.device_get(jax.jit(init)())


def test_pretrained_weights_are_evaluated_and_drawn(execute, tmp_path):
    files.write(tmp_path / "mine.safetensors", _random_weights(10), "nano", 10)
    settings = dict(weights=[str(tmp_path / "mine.safetensors")], dataset="digits", batch_size=64, augmentation="shift")
    html = "".join(map(str, _outputs(execute("10_pretrained", **settings))))
    assert "360" in html and "top1.png" not in html
    (result,) = (tmp_path / "outputs/pretrained").glob("nano-*.json")
    assert json.loads(result.read_text())["result"]["nseen"] == 360
    assert (tmp_path / "outputs/pretrained/top1.png").exists()


ODD_NAMES = ["Äpfel", "A\u0308pfel", "$a_b$", "<b>*x*</b>", "$\\frac$"]


@pytest.mark.parametrize("classes", [5, 30, 400, 1000])
def test_the_confusion_is_legible_quick_and_no_markup(classes, tmp_path):
    cells = {cell.id: cell.source for cell in nbformat.read(FOLDER / "11_photographs.ipynb", as_version=4).cells}
    rng, drawn, table = np.random.default_rng(0), [], []
    labels = np.repeat(np.arange(classes), 10)
    guesses = np.where(rng.random(len(labels)) < 0.5, labels, rng.integers(0, classes, len(labels)))
    guesses[:3] = 1  # of class 0
    names = [shown(name) for name in (ODD_NAMES * classes)[:classes]]
    sns.set_theme(style="whitegrid", rc={"text.parse_math": False})

    def show(figure, path, alt):
        figure.savefig(tmp_path / "x.png", dpi=110)
        drawn.append((figure, alt))
        plt.close(figure)

    known = dict(
        np=np,
        pd=pd,
        sns=sns,
        plt=plt,
        labels=labels,
        guesses=guesses,
        names=names,
        split="eval",
        suite="s",
        show=show,
        styled=styled,
    )
    began = time.monotonic()
    for cell in ("11-09", "11-09b", "11-10"):
        body = ast.parse(cells[cell]).body
        exec(compile(ast.Module(body[:-1], []), cell, "exec"), known)
        table.append(eval(compile(ast.Expression(body[-1].value), cell, "eval"), known))
    assert time.monotonic() - began < 30  # it was two minutes for 400
    (figure, alt), ticks = drawn[0], drawn[0][0].axes[0].get_xticklabels()
    assert len(ticks) == (classes if classes <= 30 else 0) and f"{classes} classes" in alt
    assert len(figure.axes[0].texts) == (classes**2 if classes <= 15 else 0)
    if classes == 5:
        assert [tick.get_text() for tick in ticks] == ["Äpfel", r"'A\u0308pfel'", "$a_b$", "<b>*x*</b>", "$\\frac$"]
    for each in table[1:]:
        html = each.to_html()
        assert "<b>" not in html and html.count("<tr>") <= 32
    assert known["pairs"][0]["photographs"] >= 3 and (
        known["pairs"][0]["true"],
        known["pairs"][0]["predicted"],
    ) == tuple(names[:2])


@pytest.mark.parametrize("with_test", [True, False])
def test_photographs_are_augmented_predicted_and_counted(with_test, execute, tmp_path):
    by_class(tmp_path / "in")
    if with_test:
        shutil.copytree(tmp_path / "in/val", tmp_path / "in/test")
    prepare(tmp_path / "in", tmp_path / "data/photos")
    # A made-up run, with weights that nobody trained: the notebook reads records and checkpoints, and must draw any.
    directory = tmp_path / "outputs/photos/runs/photos"
    directory.mkdir(parents=True)
    record = Record(directory, Recipe.preset("photos").replace(global_batch_size=4, batch_norm_batch_size=4))
    record.environment = environment() | {"eval_devices": 1}
    record.data = {"num_classes": 3}
    record.timing = {"images": 8, "train_seconds": 2.0, "input_wait_seconds": 1.0}
    for step in (1, 2):
        row = dict(step=step, epoch=step / 3, loss=1.0 / step, seconds=float(step))
        record.log(kind="train", **row, top1=0.5, lr=0.1, images_per_second=4.0)
        record.log(kind="eval", **row, nseen=6, top1=0.5, top5=1.0, ema_top1=0.5, ema_top5=1.0, ema_loss=1.0)
    record.summarize()
    record.status = "completed"
    record.save()
    params, batch_stats = _random_weights(3)
    with checkpoints.open_checkpoints(directory) as manager:
        checkpoints.save(manager, 2, {"ema_params": params, "ema_batch_stats": batch_stats})
    notebook = execute("11_photographs", suite="photos", run="photos", split="test")
    outputs = _outputs(notebook)
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/markdown", "") for output in outputs)
    assert ("There is no test split" in text) == (not with_test)
    assert f"of 6 photographs of the {'test' if with_test else 'eval'} split right: top-1" in text
    assert "waited for images more than 5%" in text and "worst in photos: 50%" in text
    assert len(_drawn(notebook)) == len(_drawn(notebook, ["image/jpeg"])) == 2


@pytest.mark.slow
def test_an_optimizer_that_only_a_notebook_knows_trains_beside_lars(tmp_path):
    """In a kernel of papermill's own: what the notebook adds to the library must not reach the tests."""
    settings = dict(directory="mine", epochs=0.2, lars_rates=[1.0], lamb_rates=[0.04])
    notebook = papermill.execute_notebook(
        FOLDER / "15_adding_an_optimizer.ipynb", tmp_path / "out.ipynb", settings, cwd=FOLDER, progress_bar=False
    )
    assert _drawn(notebook)
    said = "".join(output["text"] for output in _outputs(notebook) if output.get("name") == "stderr")
    assert not [line for line in said.splitlines() if "Waiting for previous save" not in line]  # Orbax, on a busy disk
    runs = [json.loads(path.read_text()) for path in sorted((tmp_path / "outputs/mine/runs").glob("*/run.json"))]
    assert [(run["recipe"]["optimizer"], run["status"]) for run in runs] == [
        ("lamb", "completed"),
        ("lars", "completed"),
    ]
    with pytest.raises(EffnetlibError, match="optimizer 'lamb' is unknown"):
        Recipe(**runs[0]["recipe"])
