import ast
import dataclasses
import json
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from flax import nnx

from effnetlib import EfficientNet, Recipe, weights
from effnetlib.parameters import notebook_parameters
from effnetlib.recipe import TRAIN_PARAMETERS
from effnetlib.suite import load_suite

FOLDER = Path(__file__).parent.parent / "notebooks"
PUBLISHED = FOLDER.parent / "outputs/published/laptop"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip the outputs"
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
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


def test_the_training_notebook_has_every_field_of_the_recipe():
    seen = set(papermill.inspect_notebook(str(FOLDER / "train.ipynb")))
    assert seen == set(TRAIN_PARAMETERS) and seen > {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("path", sorted((FOLDER / "suites").glob("*.yaml")), ids=lambda path: path.stem)
def test_suites_are_valid(path):
    assert load_suite(path).runs


def test_reports_read_runs_of_the_laptop_suite_unless_told_otherwise():
    runs = [run["name"] for run in yaml.safe_load((FOLDER / "suites/laptop.yaml").read_text())["runs"]]
    for path in NOTEBOOKS:
        for name, parameter in papermill.inspect_notebook(str(path)).items():
            if name in ("runs", "pair"):
                assert set(ast.literal_eval(parameter["default"])) <= set(runs)


def test_a_mistyped_parameter_is_seen_inside_the_notebook():
    cells = [
        "print(1); other = 2",
        "import ast\nsuite: str = 'laptop'",
        "# Parameters\nsuite = 'mine'",
        "the caller's own",
    ]
    assert notebook_parameters({"suite": "mine", "other": 2, "In": cells}, ["suite", "runs"]) == {"suite": "mine"}
    cells[2] = "# Parameters\nsiute = 'mine'"
    with pytest.raises(ValueError, match="no parameter 'siute': did you mean suite?"):
        notebook_parameters({"suite": "laptop", "siute": "mine", "In": cells}, ["suite"])


def _execute(notebook, outputs, **parameters):
    return papermill.execute_notebook(
        FOLDER / f"{notebook}.ipynb", outputs / f"{notebook}.ipynb", parameters, kernel_name="python3",
        cwd=FOLDER, progress_bar=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS if path.stem not in ("train", "10_pretrained")])
def test_every_report_draws_the_published_records(name, tmp_path, monkeypatch):
    outputs = tmp_path / "outputs"
    shutil.copytree(PUBLISHED / "runs", outputs / "laptop/runs")
    notebook = _execute(name, outputs, suite="laptop")
    images = [o for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", ())]
    assert images and all(o.metadata["image/png"]["alt"] for o in images)
    assert not [o for c in notebook.cells for o in c.get("outputs", ()) if o.get("name") == "stderr"]


@pytest.mark.slow
def test_pretrained_weights_are_evaluated_and_drawn(tmp_path):
    model = EfficientNet("nano", 10)
    found = tuple(nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))
    weights.write(tmp_path / "mine.safetensors", found, "nano", 10)
    settings = dict(weights=[str(tmp_path / "mine.safetensors")], dataset="digits", batch_size=64, augmentation="shift")
    notebook = _execute("10_pretrained", tmp_path, **settings)
    html = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "360" in html and "top1.png" not in html
    (result,) = (tmp_path / "outputs/pretrained").glob("nano-*.json")
    assert json.loads(result.read_text())["result"]["nseen"] == 360
    assert (tmp_path / "outputs/pretrained/top1.png").exists()
