"""Sources: digits (embedded), CIFAR-10, Fashion-MNIST, and folders of photographs such as ImageNet's."""

import gzip
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from effnetlib.data.images import decode
from effnetlib.errors import EffnetlibError, did_you_mean

SPLITS = ("train", "eval")
EVAL_FOLDERS = ("val", "validation", "test")
PHOTOGRAPHS = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class DataInfo:
    """Sizes of a data set: examples to train on and to evaluate, and classes."""

    train_examples: int
    eval_examples: int
    num_classes: int


KNOWN = {
    "digits": DataInfo(1437, 360, 10),
    "cifar10": DataInfo(50_000, 10_000, 10),
    "fashion_mnist": DataInfo(60_000, 10_000, 10),
    "imagenet": DataInfo(1_281_167, 50_000, 1000),
}


@dataclass(frozen=True)
class Split:
    """One split of a data set, by random access.

    Attributes:
      labels: int32 ``[examples]``.
      class_names: the names of the labels.
      fingerprint: sixteen hex digits of a SHA-256. Over every pixel and label where the set is in memory; over names
        and sizes of the files where it is a folder.
      image: ``image(index)`` is uint8 ``[height, width, 3]``.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str
    image: Callable[[int], np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)


def cache_folder() -> Path:
    """Where downloaded sets lie: the environment variable EFFNETLIB_DATA, else ~/.cache/effnetlib."""
    return Path(os.environ.get("EFFNETLIB_DATA") or Path.home() / ".cache" / "effnetlib").expanduser()


def describe(name: str) -> DataInfo:
    """The sizes of a data set: constants for the known ones, a listing for a folder (nothing is decoded)."""
    if name in KNOWN:
        return KNOWN[name]
    train, evaluation = _list_folder(name, "train"), _list_folder(name, "eval")
    if train[2] != evaluation[2]:
        odd = ", ".join(sorted(set(train[2]) ^ set(evaluation[2]))[:5])
        raise EffnetlibError(f"the data set {name} has classes that only one of its splits knows: {odd}")
    return DataInfo(len(train[0]), len(evaluation[0]), len(train[2]))


def load(name: str, split: str) -> Split:
    """Opens the "train" or "eval" split of a data set.

    Raises:
      EffnetlibError: the set is unknown, missing (the sentence says how to get it), or not of the size it should be.
    """
    if split not in SPLITS:
        raise EffnetlibError(f"there is no split {split!r}: {did_you_mean(split, SPLITS)}")
    if name == "digits":
        data = _digits(split)
    elif name == "cifar10":
        data = _cifar10(split)
    elif name == "fashion_mnist":
        data = _fashion_mnist(split)
    else:
        data = _folder(name, split)
    if name in KNOWN:
        wanted = KNOWN[name].train_examples if split == "train" else KNOWN[name].eval_examples
        if len(data) != wanted:
            raise EffnetlibError(f"the {split} split of {name} should have {wanted:,} examples, and has {len(data):,}")
    return data


def _in_memory(images: np.ndarray, labels: np.ndarray, class_names) -> Split:
    """A split over ``images``: uint8 ``[examples, height, width]`` (grey) or ``[..., 3]``."""
    labels = labels.astype(np.int32)
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes() + labels.tobytes()).hexdigest()[:16]

    def image(index):
        pixels = images[index]
        return np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels

    return Split(labels, tuple(class_names), digest, image)


def _digits(split: str) -> Split:
    from sklearn.datasets import load_digits  # a slow import that only this set needs

    digits = load_digits()
    # Sorted by class, every fifth example is for evaluation: stratified to within one, and fixed for ever.
    order = np.argsort(digits.target, kind="stable")
    is_eval = np.arange(len(order)) % 5 == 0
    chosen = order[is_eval if split == "eval" else ~is_eval]
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return _in_memory(pixels, digits.target[chosen], map(str, range(10)))


def _cifar10(split: str) -> Split:
    folder = cache_folder() / "cifar10"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    if not all((folder / name).is_file() for name in names):
        raise EffnetlibError(f"CIFAR-10 is not in {folder}: get it with `effnetlib data fetch cifar10`")
    records = np.concatenate([np.fromfile(folder / name, np.uint8).reshape(-1, 3073) for name in names])
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    classes = "airplane automobile bird cat deer dog frog horse ship truck"
    return _in_memory(np.ascontiguousarray(images), records[:, 0], classes.split())


def _fashion_mnist(split: str) -> Split:
    folder = cache_folder() / "fashion_mnist"
    prefix = "train" if split == "train" else "t10k"
    paths = [folder / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if not all(path.is_file() for path in paths):
        raise EffnetlibError(f"Fashion-MNIST is not in {folder}: get it with `effnetlib data fetch fashion_mnist`")
    images, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths)
    classes = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot"
    return _in_memory(images[16:].reshape(-1, 28, 28), labels[8:], classes.split())


def _folder(name: str, split: str) -> Split:
    paths, labels, classes, digest = _list_folder(name, split)

    def image(index):
        return decode(paths[index].read_bytes(), str(paths[index]))

    return Split(np.array(labels, np.int32), tuple(classes), digest, image)


def _list_folder(name: str, split: str):
    """Paths, labels, class names and fingerprint of `split/class/*.jpg`, all in sorted order."""
    root = Path(name).expanduser() if os.sep in name else cache_folder() / name
    folders = ("train",) if split == "train" else EVAL_FOLDERS
    folder = next((root / choice for choice in folders if (root / choice).is_dir()), None)
    if folder is None:
        known = did_you_mean(name, KNOWN)
        raise EffnetlibError(
            f"there is no data set {name!r} ({known}): a folder would be {root}/{{train,val}}/CLASS/*.jpg "
            "(EFFNETLIB_DATA names another place than the cache folder)"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    paths, labels, digest = [], [], hashlib.sha256()
    for label, class_name in enumerate(classes):
        for entry in sorted(os.scandir(folder / class_name), key=lambda entry: entry.name):
            if entry.name.lower().endswith(PHOTOGRAPHS):
                paths.append(Path(entry.path))
                labels.append(label)
                digest.update(f"{class_name}/{entry.name} {entry.stat().st_size}\n".encode())
    if not paths:
        raise EffnetlibError(f"{folder} holds no photographs: CLASS/*.jpg is wanted in it")
    return paths, labels, classes, digest.hexdigest()[:16]
