"""The project's own files agree with one another."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def test_conda_environment_is_the_projects():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(item for item in environment["dependencies"] if str(item).startswith("python"))
    assert python == f"python{PROJECT['requires-python']}"
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    assert pip == [*wanted, "--editable ."]


def test_the_lock_holds_every_dependency_by_version_and_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    locked = {canonical(line) for line in lock.splitlines() if "==" in line}
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    assert {canonical(requirement) for requirement in wanted} <= locked
    assert "://" not in lock and "index" not in lock.replace("importlib", "")


def test_make_help_lists_every_target():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} == set(targets)


def test_an_old_python_is_refused_in_one_sentence(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text("")
    done = subprocess.run(["make", "env", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "effnetlib needs Python 3.11 or newer" in done.stderr


@pytest.mark.parametrize("word", ["paper", "laptop", "papermill"])
def test_the_readme_speaks_of(word):
    assert word in (ROOT / "README.md").read_text()
