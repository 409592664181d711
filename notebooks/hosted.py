"""A notebook that is opened alone, on Colab or Kaggle: adds what effnetlib needs and the image lacks, and shows what there is.

A notebook's first cell runs this file where effnetlib is not installed. Nothing that the image has is changed, above all its jax:
another one would not fit its libtpu.
"""

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))  # this process does not see what it installs

from effnetlib.errors import EffnetlibError, FailedError  # noqa: E402
from effnetlib.runs.progress import say  # noqa: E402

NOT_ADDED = ("jupyterlab",)  # there is a front end already, or nobody would run this
SAME_MODULE = {"opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")}
SHOWN = ("effnetlib", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "ipykernel")
TPU_SIGNS = ("TPU_ACCELERATOR_TYPE", "COLAB_TPU_1VM", "COLAB_TPU_ADDR", "ISTPUVM")


class Devices(NamedTuple):
    """How many devices jax has, and what they are."""

    count: int
    platform: str
    kind: str


def begin() -> None:
    """Installs this checkout and what it lacks, prints versions and devices, and checks the accelerator.

    Raises:
      EffnetlibError: pip could not add something, or there is an accelerator and jax runs on the CPU.
    """
    added = install()
    devices = _devices()
    say(table(added, devices))
    check_accelerator(devices)


def install() -> list[str]:
    """Adds what effnetlib needs and is not there, and lets pip change nothing else; then effnetlib itself, last, so that it
    is installed only where all is. Returns the names of what was added."""
    added, needed = [], _needs()
    while lacking := [each for each in needed if not _is_there(each.name)]:
        _pip(*(f"{each.name}{each.specifier}" for each in lacking))
        added += [each.name for each in lacking]
        needed = [need for each in lacking for need in _parse(importlib.metadata.requires(each.name) or ())]
    _pip("--editable", str(CHECKOUT))
    return added


def table(added: Iterable[str], devices: Devices) -> str:
    """Versions, devices and what was added, as lines of text; says where a version is below what effnetlib asks for."""
    lines = [("python", platform.python_version())]
    asked = {each.name: each.specifier for each in _needs()}
    for name in SHOWN:
        version = _version(name)
        low = version and name in asked and not asked[name].contains(version, prereleases=True)
        lines.append((name, f"{version}, but {asked[name]} is wanted" if low else version or "none"))
    lines += [
        ("devices", f"{devices.count} x {devices.kind}"),
        ("added", ", ".join(f"{name} {_version(name)}" for name in added) or "nothing"),
    ]
    return "\n".join(f"{name:18}{value}" for name, value in lines)


def check_accelerator(devices: Devices) -> None:
    """Raises EffnetlibError if this session was given an accelerator and jax has only the CPU all the same."""
    given = accelerator_given()
    if given and devices.platform == "cpu":
        raise EffnetlibError(
            f"this session was given a {given}, but jax {_version('jax')} runs on the CPU: restart it, with no other notebook "
            "on the same machine (JAX_PLATFORMS=cpu is how to do without the accelerator)"
        )


def accelerator_given() -> str:
    """The kind of accelerator that was chosen for this session of Colab or Kaggle, "TPU" or "GPU"; empty where none was, or
    where JAX_PLATFORMS asks for the CPU."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return ""
    hosted = "COLAB_RELEASE_TAG" in os.environ or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
    kaggle = os.environ.get("KAGGLE_ACCELERATOR_TYPE", "").upper()
    if any(map(os.environ.get, TPU_SIGNS)) or kaggle.startswith("TPU"):
        return "TPU"
    if hosted and (glob("/dev/accel*") or glob("/dev/vfio/[0-9]*")):
        return "TPU"
    if os.environ.get("COLAB_GPU") == "1" or kaggle.startswith(("GPU", "NVIDIA")):
        return "GPU"
    return "GPU" if hosted and glob("/dev/nvidia[0-9]*") else ""


def _devices() -> Devices:
    """The devices, as another process sees them: this one would hold a TPU, and no `!effnetlib …` could use it."""
    look = "import effnetlib.runs.hosts as h; d = h.wait_for_devices(); print(len(d), d[0].platform, d[0].device_kind, sep=';')"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, cwd=CHECKOUT)
    if done.returncode:
        raise FailedError(done.stderr.strip().splitlines()[-1].partition(": ")[2])
    count, platform_name, kind = done.stdout.splitlines()[-1].split(";")
    return Devices(int(count), platform_name, kind)


def _needs() -> list:
    """What pyproject.toml asks for: effnetlib is not installed yet."""
    return _parse(tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"])


def _parse(requirements: Iterable[str]) -> list:
    """Requirements that hold here: not those of extras, nor of another platform."""
    from packaging.requirements import Requirement

    parsed = map(Requirement, requirements)
    return [
        each
        for each in parsed
        if each.name not in NOT_ADDED and (not each.marker or each.marker.evaluate({"extra": ""}))
    ]


def _is_there(name: str) -> bool:
    return any(_version(each) for each in (name, *SAME_MODULE.get(name, ())))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip(*what: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *what]
    done = subprocess.run(command, capture_output=True, text=True)
    importlib.invalidate_caches()
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if "error: " in line.lower()] or [
            f"code {done.returncode}"
        ]
        raise FailedError(
            f"pip could not install {', '.join(what)}: {said[0].removeprefix('ERROR: ')} (on Kaggle, is the session's internet "
            "on?)"
        )


if __name__ == "__main__":
    begin()
