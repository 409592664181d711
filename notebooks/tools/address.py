"""Writes the repository's address, that of git's remote `origin`, wherever it stands: `make address`, once in a fork.

The one place that states it is pyproject.toml. From there come the two cells that begin every notebook after its title, the
badges and the setup, and the README's badges.
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
# Nothing happens where effnetlib is installed. On Colab and Kaggle it is fetched, and what the image lacks is added.
from importlib import metadata

try:
    metadata.version("effnetlib")
except metadata.PackageNotFoundError:
    import subprocess
    import sys
    from pathlib import Path

    address = "ADDRESS"
    checkout = Path.cwd().parent
    if not (checkout / "notebooks/hosted.py").exists():
        checkout = Path.home() / "effnetlib-checkout"
    if not checkout.exists() and subprocess.run(["git", "clone", "--quiet", "--depth=1", address, checkout]).returncode:
        raise SystemExit(f"{address} cannot be fetched: on Kaggle, switch the session's internet on") from None
    sys.path += [str(checkout), str(checkout / "notebooks")]
    import hosted

    hosted.begin()"""


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


def begin(notebook, name: str, address: str):
    """The notebook with its badges and setup right after the title, new or renewed."""
    cells = [cell for cell in notebook.cells if cell.id not in ("badges", "setup")]
    first = [
        nbformat.v4.new_markdown_cell(badges(address, name), id="badges"),
        nbformat.v4.new_code_cell(SETUP.replace("ADDRESS", address), id="setup"),
    ]
    notebook.cells = [cells[0], *first, *cells[1:]]
    return notebook


def files(address: str) -> dict[Path, str]:
    """Every file that holds the address, as it should be."""
    project, readme = ROOT / "pyproject.toml", ROOT / "README.md"
    wanted = {
        project: re.sub(r'(?m)^Repository = ".*"$', f'Repository = "{address}"', project.read_text()),
        readme: re.sub(
            r"(?s)(<!-- badges -->\n).*?(<!-- / -->)",
            lambda match: f"{match[1]}{badges(address, 'train.ipynb')}\n{match[2]}",
            readme.read_text(),
        ),
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
