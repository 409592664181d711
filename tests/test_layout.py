"""The method stands alone at the top of the library, and the library stays small."""

import ast
from pathlib import Path

import effnetlib

ROOT = Path(effnetlib.__file__).parent
METHOD = sorted(path for path in ROOT.glob("*.py") if path.name != "__main__.py")  # the command line calls everything
BESIDE = {"ops", "data", "runs"}
METHOD_LINES, ALL_LINES = 1_500, 9_105


def imported(path):
    """The parts of effnetlib that a file imports, by the first name after it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        if names == ["effnetlib"]:
            names = [f"effnetlib.{name.name}" for name in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("effnetlib."))


def test_the_method_imports_nothing_of_the_workbench():
    assert {"recipe", "model", "norm", "optim", "schedules", "mesh", "step", "evaluation", "training"} <= {
        path.stem for path in METHOD
    }
    own = {path.stem for path in METHOD}
    for path in METHOD:
        assert set(imported(path)) <= own | BESIDE, path.name


def test_data_runs_and_ops_import_nothing_of_suites_planning_reports_and_weights():
    for folder in BESIDE:
        for path in ROOT.glob(f"{folder}/*.py"):
            assert not set(imported(path)) & {"suites", "planning", "reports", "weights"}, path


def test_the_library_is_small():
    def lines(paths):
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)

    assert lines(ROOT.glob("*.py")) <= METHOD_LINES and lines(ROOT.rglob("*.py")) <= ALL_LINES
