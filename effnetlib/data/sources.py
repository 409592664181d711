"""Sources: digits (embedded), CIFAR-10, Fashion-MNIST, and photographs such as ImageNet's, loose or in shards."""

import gzip
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from effnetlib.data.images import decode
from effnetlib.data.photographs import Listing, list_photographs
from effnetlib.data.shards import NOTES, open_shards, shard_order
from effnetlib.errors import EffnetlibError, did_you_mean

SPLITS = ("train", "eval", "test")
SUBSETS = ("all", "half", "minival")
MINIVAL_SHARDS, REFERENCE_SHARDS = 20, 1024


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
    """One split of a data set, by random access, in an order that is the set's own (class by class for photographs).

    Attributes:
      size: examples.
      class_names: the names of the labels.
      fingerprint: sixteen hex digits of a SHA-256. Over every pixel and label where the set is in memory or in shards of
        ours; over names and sizes of the files where they are loose.
      names: the same over the names of loose files alone; empty for other sets.
      example: ``example(index)`` is an image, uint8 ``[height, width, 3]``, and its label.
      encoded: ``encoded(index)`` is a photograph's file as bytes, its label and its name; None for sets in memory.
    """

    size: int
    class_names: tuple[str, ...]
    fingerprint: str
    example: Callable[[int], tuple[np.ndarray, int]] = field(repr=False)
    encoded: Callable[[int], tuple[bytes, int, str]] | None = field(default=None, repr=False)
    names: str = ""

    def __len__(self) -> int:
        return self.size


def cache_folder() -> Path:
    """Where downloaded sets lie: the environment variable EFFNETLIB_DATA, else ~/.cache/effnetlib."""
    return Path(os.environ.get("EFFNETLIB_DATA") or Path.home() / ".cache" / "effnetlib").expanduser()


def describe(name: str, subset: str = "all") -> DataInfo:
    """The sizes of a data set: constants for the known ones, a listing for photographs (nothing is decoded)."""
    if name in KNOWN:
        info = KNOWN[name]
    elif subset == "minival":
        train = load(name, "train")
        info = DataInfo(len(train), 0, len(train.class_names))
    else:
        train, evaluation = load(name, "train"), load(name, "eval")
        if train.class_names != evaluation.class_names:
            odd = ", ".join(sorted(set(train.class_names) ^ set(evaluation.class_names))[:5])
            raise EffnetlibError(f"the data set {name} has classes that only one of its splits knows: {odd}")
        info = DataInfo(len(train), len(evaluation), len(train.class_names))
    held_out = _minival_size(info.train_examples, name) if subset == "minival" else 0
    if subset == "minival":
        return DataInfo(info.train_examples - held_out, held_out, info.num_classes)
    return DataInfo(info.train_examples // 2, info.eval_examples, info.num_classes) if subset == "half" else info


def load(name: str, split: str, subset: str = "all") -> Split:
    """Opens a split of a data set: "train", "eval", or where a folder of photographs has one beside those, "test".

    Args:
      subset: "all"; "half", training on a random half; or "minival", the reference's hold-out: 20 of 1,024 shards of the
        training set are taken from it and are what "eval" means. Both are drawn once for ever, the same for loose
        photographs and for shards of ours (TFDS's have an order of their own).

    Raises:
      EffnetlibError: the set is unknown, missing (the sentence says how to get it), or not of the size it should be.
    """
    if split not in SPLITS:
        raise EffnetlibError(f"there is no split {split!r}: {did_you_mean(split, SPLITS)}")
    if subset == "minival" and split != "test":
        whole = load(name, "train")
        held_out = _minival_size(len(whole), name)
        drawn = shard_order(len(whole))
        return _select(whole, drawn[held_out:] if split == "train" else drawn[:held_out])
    if name in IN_MEMORY:
        if split == "test":
            raise EffnetlibError(f"{name} has no test split beside the one it is evaluated on")
        data = IN_MEMORY[name](split)
    else:
        data = _photographs(name, split)
    if name in KNOWN and split != "test":
        wanted = KNOWN[name].train_examples if split == "train" else KNOWN[name].eval_examples
        if len(data) != wanted:
            raise EffnetlibError(f"the {split} split of {name} should have {wanted:,} examples, and has {len(data):,}")
    if subset == "half" and split == "train":
        return _select(data, shard_order(len(data))[: len(data) // 2])
    return data


def _minival_size(examples: int, name: str) -> int:
    size = examples * MINIVAL_SHARDS // REFERENCE_SHARDS
    if not size:
        raise EffnetlibError(
            f"{name} has {examples} training examples, too few to hold out 20 of every 1,024 (minival)"
        )
    return size


def _select(split: Split, indices: np.ndarray) -> Split:
    """Part of a split, in its order."""
    indices = np.sort(indices)
    fingerprint = hashlib.sha256(split.fingerprint.encode() + indices.astype(np.int64).tobytes()).hexdigest()[:16]
    encoded = split.encoded and (lambda index: split.encoded(int(indices[index])))

    def example(index):
        return split.example(int(indices[index]))

    return replace(split, size=len(indices), fingerprint=fingerprint, example=example, encoded=encoded)


def _in_memory(images: np.ndarray, labels: np.ndarray, class_names) -> Split:
    """A split over ``images``: uint8 ``[examples, height, width]`` (grey) or ``[..., 3]``."""
    labels = labels.astype(np.int32)
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes() + labels.tobytes()).hexdigest()[:16]

    def example(index):
        pixels = images[index]
        return np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels, int(labels[index])

    return Split(len(labels), tuple(class_names), digest, example)


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


IN_MEMORY = {"digits": _digits, "cifar10": _cifar10, "fashion_mnist": _fashion_mnist}


KAGGLE_IMAGENET = Path("/kaggle/input/imagenet-object-localization-challenge")


def data_folder(name: str) -> Path:
    """Where photographs of this name lie: the path itself, or a folder of the cache. On Kaggle, "imagenet" is the competition's
    where it is attached and the cache has none."""
    if os.sep in name:
        return Path(name).expanduser()
    folder = cache_folder() / name
    attached = name == "imagenet" and not folder.is_dir() and KAGGLE_IMAGENET.is_dir()
    return KAGGLE_IMAGENET if attached else folder


def _photographs(name: str, split: str) -> Split:
    root = data_folder(name)
    if shards := open_shards(root, split):
        records, class_names, fingerprint = shards.records, shards.class_names, shards.fingerprint
        return _of_photographs(len(records), class_names, fingerprint, records.__getitem__)
    if (root / NOTES).is_dir():
        raise EffnetlibError(
            f"the preparation of {root} did not end: the same `effnetlib data prepare` goes on with it"
        )
    listing = list_photographs(root, split) if root.is_dir() else None
    if listing is None:
        known = did_you_mean(name, KNOWN)
        raise EffnetlibError(
            f"there is no data set {name!r} ({known}): a folder would be {root}/{{train,val}}/CLASS/*.jpg, or shards that "
            "`effnetlib data prepare` wrote (EFFNETLIB_DATA names another place than the cache folder)"
        )
    return _of_listing(listing)


def _of_listing(listing: Listing) -> Split:
    photos = listing.photos

    def encoded(index):
        return photos[index].read(), photos[index].label, photos[index].name

    return _of_photographs(len(photos), listing.class_names, listing.fingerprint, encoded, listing.names)


def _of_photographs(size: int, class_names, fingerprint: str, encoded, names: str = "") -> Split:
    def example(index):
        photograph, label, name = encoded(index)
        return decode(photograph, name), label

    return Split(size, tuple(class_names), fingerprint, example, encoded, names)
