"""Every notebook alone, from top to bottom, on an image like Colab's or Kaggle's: `make rehearse IMAGE=colab`.

    python tests/rehearse.py colab|kaggle [--python PYTHON] [--only NOTEBOOK …]

Builds a fresh environment with the versions of tests/images/IMAGE.txt and a repository that stands for GitHub's: a copy of what
is committed, its address written by `notebooks/tools/address.py`. Each notebook is copied into an empty folder and run there, with effnetlib
taken out again before the next one. Then the first cell is looked at where effnetlib is there already, and where jax runs on
the CPU of a session that was given a TPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
IMAGES = {
    "colab": ("python3.13", {"COLAB_RELEASE_TAG": "rehearsal", "COLAB_GPU": ""}),
    "kaggle": ("python3.12", {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}),
}
# What needs photographs, weights or records that no repository holds, or not yet: it stops with one sentence that says so.
STOPS = ["10_pretrained", "11_photographs"]
if not (ROOT / "outputs/published/cifar10").exists():
    STOPS.append("12_learning_rates")

# nbclient is in both images, papermill in one.
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    nbclient.NotebookClient(notebook, timeout=None).execute()
except nbclient.exceptions.CellExecutionError:
    pass  # it stands in the notebook
nbformat.write(notebook, "executed.ipynb")
"""
FIRST = "01_model"  # a quick one, for what is looked at after the others


class Image:
    """A fresh environment like the image's, and the repository that its notebooks fetch effnetlib from."""

    def __init__(self, name: str, python: str, scratch: Path):
        self.scratch, self.name = scratch, name
        self.python = scratch / "image/bin/python"
        self.home = scratch / "home"
        self.home.mkdir()
        self.environment = {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith(("EFFNETLIB", "JAX", "PYTHON", "VIRTUAL"))
            },
            **IMAGES[name][1],
            "HOME": str(self.home),
        }
        self._call(python, "-m", "venv", scratch / "image")
        self.pip("install", "--requirement", ROOT / f"tests/images/{name}.txt")
        self.before = self.packages()
        self.fork = scratch / "fork"
        self._call("git", "clone", "--quiet", ROOT, self.fork)
        self._call("git", "clone", "--quiet", "--bare", ROOT, scratch / "effnetlib.git")
        git = ("git", "-C", self.fork, "-c", "user.name=rehearsal", "-c", "user.email=rehearsal")
        self._call(*git, "remote", "set-url", "origin", scratch / "effnetlib.git")
        self._call(sys.executable, self.fork / "notebooks/tools/address.py")
        self._call(*git, "commit", "--quiet", "--all", "--message=address")
        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        self._call(*git, "tag", f"v{version}")
        self._call(*git, "push", "--quiet", "--tags", "origin", "HEAD")

    def _call(self, *command, environment=None) -> str:
        return subprocess.run(
            [*map(str, command)], check=True, env=environment, stdout=subprocess.PIPE, text=True
        ).stdout

    def pip(self, *arguments) -> str:
        command = [self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
        return self._call(*command, environment=self.environment)

    def packages(self) -> dict[str, str]:
        return dict(line.split("==") for line in self.pip("freeze").splitlines() if "==" in line)

    def forget(self) -> None:
        """As if effnetlib had never been fetched."""
        self.pip("uninstall", "--yes", "effnetlib")
        shutil.rmtree(self.home / "effnetlib", ignore_errors=True)

    def run(self, notebook: str, **environment) -> tuple[list, str]:
        """Runs a notebook alone; returns its cells and the error that it ended with, if any."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch, prefix=f"{notebook}-"))
        shutil.copy(self.fork / f"notebooks/{notebook}.ipynb", folder)
        command = [self.python, "-c", RUN, f"{notebook}.ipynb"]
        with open(folder / "log", "w") as log:
            subprocess.run(command, cwd=folder, env=self.environment | environment, stdout=log, stderr=log)
        cells = nbformat.read(folder / "executed.ipynb", as_version=4).cells
        errors = [o for cell in cells for o in cell.get("outputs", ()) if o.output_type == "error"]
        return cells, f"{errors[0].ename}: {errors[0].evalue}" if errors else ""


def setup_output(cells: list) -> str:
    """What the first cell printed, or the error that it stopped with."""
    outputs = next(cell.outputs for cell in cells if cell.id == "setup")
    return "".join(o.get("text", "") or f"{o.ename}: {o.evalue}" for o in outputs)


def rehearse(image: Image, notebooks: list[str]) -> list[str]:
    """Runs the notebooks; returns what is wrong."""
    wrong = []

    def check(condition, what):
        if not condition:
            wrong.append(what)
            print(f"WRONG: {what}", flush=True)

    for notebook in notebooks:
        start = time.perf_counter()
        cells, error = image.run(notebook)
        print(f"{notebook:28}{time.perf_counter() - start:6.0f} s  {error or 'to the end'}", flush=True)
        check(error.startswith("EffnetlibError: ") if notebook in STOPS else not error, f"{notebook}: {error}")
        check(
            cells and "devices           1 x cpu" in setup_output(cells), f"{notebook}: the first cell shows no table"
        )
        if notebook == notebooks[0] and cells:
            print(setup_output(cells), flush=True)
        image.forget()
    image.run(FIRST)
    cells, error = image.run(FIRST)
    check(cells and not error and not setup_output(cells), "the first cell is not silent where effnetlib is installed")
    image.forget()
    cells, _ = image.run(FIRST, TPU_ACCELERATOR_TYPE="v5e-1")
    said = setup_output(cells) if cells else ""
    print(said.splitlines()[-1] if said else "nothing", flush=True)
    fell_back = f"EffnetlibError: this session was given a TPU, but jax {image.before['jax']} runs on the CPU"
    check(fell_back in said, "no stop without the TPU")
    after = image.packages()
    check(image.before.items() <= after.items(), "the versions of the image changed")
    print("added:", ", ".join(f"{name} {version}" for name, version in after.items() if name not in image.before))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("image", choices=IMAGES)
    parser.add_argument("--python", help="the image's Python; python3.13 for colab, python3.12 for kaggle")
    parser.add_argument("--only", nargs="+", help="notebooks, without their suffix")
    options = parser.parse_args()
    python = options.python or IMAGES[options.image][0]
    wanted = IMAGES[options.image][0]
    show = [python, "-c", "import sys; print('python%d.%d' % sys.version_info[:2])"]
    found = shutil.which(python) and subprocess.run(show, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if not found or found.stdout.strip() != wanted:
        sys.exit(f"rehearse: the image has {wanted}, and {python} is not that or does not run: name one with --python")
    notebooks = options.only or sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    with tempfile.TemporaryDirectory() as scratch:
        wrong = rehearse(Image(options.image, python, Path(scratch)), notebooks)
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
