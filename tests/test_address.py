"""The repository's address stands in one place, and one command writes it wherever else it is needed."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
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


def setup_cell(url):
    return (
        address.begin(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# x")]), "x.ipynb", url)
        .cells[1]
        .source
    )


def test_the_setup_cell_is_short():
    lines = setup_cell("https://github.com/me/fork").splitlines()
    assert len([line for line in lines if line]) == 6 and " clone -q " in lines[-3]


# Runs the setup cells of JSON, each in its own home and folder, as on Kaggle without effnetlib. Prints what each has printed.
OPENED_ALONE = """
import contextlib, importlib.util, io, json, os, sys
from IPython.core.interactiveshell import InteractiveShell
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "effnetlib" else find(name, *rest)
os.environ["KAGGLE_KERNEL_RUN_TYPE"], said = "Batch", []
for folder, cell in json.loads(sys.argv[1]):
    os.environ["HOME"] = f"{folder}/home"
    os.chdir(f"{folder}/here")
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        InteractiveShell.instance(colors="NoColor").run_cell(cell)
    said.append(printed.getvalue())
print(json.dumps(said))
"""
NOWHERE, OWNER = "file:///nowhere/effnetlib", "https://github.com/OWNER/effnetlib"


def test_a_notebook_takes_effnetlib_from_what_lies_beside_it(tmp_path):
    """A folder or a zip of it, beside the notebook or in an input of Kaggle's; else one sentence says what to do."""
    places = ("here", "input/mine", "input/datasets/me/mine")
    cases = [(NOWHERE, ""), (OWNER, ""), (OWNER, "input")]
    cases += [(url, place) for url in (OWNER, NOWHERE) for place in places]
    jobs = []
    for number, (url, place) in enumerate(cases):
        root = tmp_path / str(number)
        for name in ("home", "here", "input"):
            (root / name).mkdir(parents=True)
        folder = root / place / "effnetlib-main" if place else root / "elsewhere"
        (folder / "notebooks/tools").mkdir(parents=True)
        (folder / "notebooks/hosted.py").write_text("print('begun in', __file__, __name__)")
        if url == NOWHERE:
            shutil.make_archive(folder, "zip", folder.parent, folder.name)
            shutil.rmtree(folder)
        jobs.append((str(root), setup_cell(url).replace("/kaggle/input", f"{root}/input")))
    command = [sys.executable, "-c", OPENED_ALONE, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for (url, place), (root, _), said in zip(cases, jobs, json.loads(done.stdout), strict=True):
        if place:
            assert said == f"begun in {root}/home/effnetlib/notebooks/hosted.py __main__\n", place
        else:
            wanted = (
                "fatal: " if url == NOWHERE else "This copy of the notebook does not know where to fetch effnetlib: "
            )
            assert wanted in said and "beside this notebook" in said
            assert "SystemExit: no effnetlib: the line above says what to do" in said


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
