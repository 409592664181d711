"""Writes the repository's address, that of git's remote `origin`, wherever it stands: `make address`, once in a fork.

The one place that states it is pyproject.toml. From there come the badges under every notebook's title, the setup cell after it, and
the README's badges.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import nbformat

ROOT = Path(__file__).parent.parent.parent
SETUP = """\
import importlib.util, os, runpy, sys

if importlib.util.find_spec("effnetlib") is None:  # Colab and Kaggle fetch it; elsewhere the kernel is another one
    assert {"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"} & {*os.environ}, "no effnetlib here: start with `make lab`"
    !FETCH
    os.path.exists(os.path.expanduser("~/effnetlib")) or sys.exit("no effnetlib: the line above says what to do")
    runpy.run_path(os.path.expanduser("~/effnetlib/notebooks/hosted.py"), run_name="__main__")"""
# Where somebody may have put a checkout or a zip of it: beside the notebook, or in an input of Kaggle's, whose folders have been
# at two places. Nothing deeper is looked into: it could be a million photographs.
INPUTS = "/kaggle/input/*", "/kaggle/input/datasets/*/*"
FOLDERS = " ".join(f"{place}/notebooks/tools" for place in ("effnetlib*", *INPUTS, *(f"{each}/*" for each in INPUTS)))
ZIPS = " ".join(f"{place}effnetlib*.zip" for place in ("", *(f"{each}/" for each in INPUTS)))
# In a notebook, $$ is the shell's $, but not where the line has an apostrophe.
COPY = (
    f'for at in {FOLDERS}; do test -d ~/effnetlib || cp -r "$$at/../.." ~/effnetlib; done 2> /dev/null; '
    f'for at in {ZIPS}; do test -d ~/effnetlib || (python3 -m zipfile -e "$$at" ~/zip && mv ~/zip/* ~/effnetlib); done 2> /dev/null; '
    "test -d ~/effnetlib || "
)
CLONE = "git -c advice.detachedHead=false clone -q --depth=1 --branch=VERSION ADDRESS ~/effnetlib || "
BESIDE = "put the folder effnetlib-main, or a zip of it, beside this notebook (on Kaggle: attach it as an input), and run this cell again."
NOT_CLONED = f'echo "effnetlib was not fetched. On Kaggle, switch the internet on. Without it, {BESIDE}"'
NO_ADDRESS = f'echo "This copy of the notebook does not know where to fetch effnetlib: {BESIDE}"'


def stated() -> str:
    """The address that pyproject.toml states."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def remote() -> str:
    """The address of `origin`, as anybody can read it: over https, without a user's name, token or `.git`."""
    done = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit("address: there is no remote named origin: git remote add origin https://github.com/OWNER/effnetlib")
    return public(done.stdout.strip())


def public(url: str) -> str:
    """
    >>> public("git@github.com:me/fork.git"), public("https://me:token@github.com/me/fork")
    ('https://github.com/me/fork', 'https://github.com/me/fork')
    >>> public("ssh://git@example.org:2222/me/fork.git"), public("/srv/fork.git")
    ('https://example.org/me/fork', 'file://localhost/srv/fork.git')
    """
    if short := re.fullmatch(r"(?:[^@/]*@)?([^:/]+):(?!//)(.+)", url):
        url = f"ssh://{short[1]}/{short[2]}"
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return f"file://localhost{(ROOT / parts.path).resolve()}"  # setuptools takes no address without a host
    host = parts.hostname if parts.scheme == "ssh" else parts.netloc.rpartition("@")[2]
    return f"https://{host}{parts.path.removesuffix('/').removesuffix('.git')}"


def badges(address: str, notebook: str) -> str:
    """Links that open a notebook in Colab and in Kaggle, which both read from GitHub alone."""
    if not address.startswith("https://github.com/"):
        return f"The repository: {address}"
    file = f"{address}/blob/main/notebooks/{notebook}"
    colab = file.replace("https://github.com/", "https://colab.research.google.com/github/")
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src={file})"
    )


def with_badges(text: str, address: str, notebook: str) -> str:
    """The text with its badges between their marks, which come under the title where they are not there yet."""
    marked = f"<!-- badges -->\n{badges(address, notebook)}\n<!-- / -->"
    if "<!-- badges -->" not in text:
        return re.sub(r"^(# .*)\n", lambda title: f"{title[1]}\n\n{marked}\n", text, count=1)
    return re.sub(r"(?s)<!-- badges -->\n.*?<!-- / -->", lambda _: marked, text, count=1)


def begin(notebook, name: str, address: str):
    """The notebook with badges under its title, and then the setup cell, new or renewed."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    is_known = "/OWNER/" not in address  # the placeholder of a project that has no address yet
    fetch = COPY + (CLONE.replace("VERSION", f"v{version}") + NOT_CLONED if is_known else NO_ADDRESS)
    setup = SETUP.replace("FETCH", fetch.replace("ADDRESS", address))
    first, *rest = (cell for cell in notebook.cells if cell.id not in ("badges", "setup"))
    first.source = with_badges(first.source, address, name)
    notebook.cells = [first, nbformat.v4.new_code_cell(setup, id="setup"), *rest]
    return notebook


def files(address: str) -> dict[Path, str]:
    """Every file that holds the address, as it should be."""
    project, readme = ROOT / "pyproject.toml", ROOT / "README.md"
    wanted = {
        project: re.sub(r'(?m)^Repository = ".*"$', f'Repository = "{address}"', project.read_text()),
        readme: with_badges(readme.read_text(), address, "train.ipynb"),
    }
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        wanted[path] = nbformat.writes(begin(nbformat.read(path, as_version=4), path.name, address)) + "\n"
    return wanted


if __name__ == "__main__":
    address = remote()
    for path, text in files(address).items():
        if path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(ROOT))
    print(address)
