import ast
import dataclasses
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

from effnetlib import Recipe
from effnetlib.execute import load_suite
from effnetlib.parameters import TRAIN_OPTIONS, check_parameters, notebook_parameters

FOLDER = Path(__file__).parent.parent / "notebooks"
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
    fields = [field.name for field in dataclasses.fields(Recipe)]
    assert set(papermill.inspect_notebook(str(FOLDER / "train.ipynb"))) == {"preset", *TRAIN_OPTIONS, *fields}


@pytest.mark.parametrize("path", sorted((FOLDER / "suites").glob("*.yaml")), ids=lambda path: path.stem)
def test_suites_are_valid(path):
    assert load_suite(path).runs


def test_reports_name_only_runs_of_the_laptop_suite():
    runs = [run["name"] for run in yaml.safe_load((FOLDER / "suites/laptop.yaml").read_text())["runs"]]
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            for node in ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ():
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "suite_records":
                    assert {argument.value for argument in node.args[1:]} <= set(runs)


def test_a_mistyped_parameter_is_seen_inside_the_notebook():
    namespace = {"suite": "laptop", "siute": "x", "In": [], "_hidden": 1, "module": ast}
    assert notebook_parameters(namespace) == {"suite": "laptop", "siute": "x"}
    with pytest.raises(ValueError, match="no parameter 'siute': did you mean suite?"):
        check_parameters(notebook_parameters(namespace), ["suite"])
