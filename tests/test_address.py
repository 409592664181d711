"""The repository's address stands in one place, and one command writes it wherever else it is needed."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def load(root):
    spec = importlib.util.spec_from_file_location("address", root / "notebooks/tools/address.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


address = load(ROOT)


def test_every_file_holds_the_address_that_the_project_states():
    for path, text in address.files(address.stated()).items():
        assert path.read_text() == text, f"{path} differs from what `make address` writes"


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://github.com/me/fork.git", "https://github.com/me/fork"),
        ("https://me:secret@github.com/me/fork/", "https://github.com/me/fork"),
        ("https://git.example.org:8443/me/fork", "https://git.example.org:8443/me/fork"),
        ("git@github.com:me/fork.git", "https://github.com/me/fork"),
        ("ssh://git@github.com:22/me/fork.git", "https://github.com/me/fork"),
        ("/srv/fork.git", "file://localhost/srv/fork.git"),
        ("file:///srv/fork.git", "file://localhost/srv/fork.git"),
    ],
)
def test_an_address_is_one_that_anybody_can_read(url, public):
    assert address.public(url) == public


def test_a_fork_is_rewritten_by_one_command_once(tmp_path):
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")

    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    def run():
        return subprocess.run(
            [sys.executable, "notebooks/tools/address.py"], cwd=tmp_path, capture_output=True, text=True
        )  # fmt: skip

    git("init")
    done = run()
    assert done.returncode == 1 and done.stderr.startswith("address: there is no remote named origin")
    git("remote", "add", "origin", "git@github.com:somebody/fork.git")
    changed = run().stdout.splitlines()
    assert changed.pop() == "https://github.com/somebody/fork"
    assert set(changed) == {
        "README.md",
        "pyproject.toml",
        *(f"notebooks/{p.name}" for p in (ROOT / "notebooks").glob("*.ipynb")),
    }
    old = address.stated()
    for name in changed:
        text = (tmp_path / name).read_text()
        assert "github.com/somebody/fork" in text and old not in text and old.replace("https://", "github/") not in text
    assert run().stdout == "https://github.com/somebody/fork\n"
    assert load(tmp_path).stated() == "https://github.com/somebody/fork"
    # Kaggle and Colab read from GitHub alone.
    git("remote", "set-url", "origin", "/srv/fork.git")
    run()
    assert "The repository: file://localhost/srv/fork.git" in (tmp_path / "notebooks/train.ipynb").read_text()
