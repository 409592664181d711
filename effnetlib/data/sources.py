"""Sources: digits (embedded), CIFAR-10, and photographs such as ImageNet's, loose or in shards."""

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from effnetlib.data.images import decode
from effnetlib.data.photographs import Listing, check_classes, in_words, kept_listing, seen
from effnetlib.data.shards import NOTES, Shards, open_shards, shard_order
from effnetlib.errors import EffnetlibError, did_you_mean
from effnetlib.runs.paths import name_or_path, user_path

SPLITS = ("train", "eval", "test")
SUBSETS = ("all", "minival")
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
    "imagenet": DataInfo(1_281_167, 50_000, 1000),
}


@dataclass(frozen=True, eq=False)  # two are equal where they are the same object, which makes them keys
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
      origin: the folder or archive that photographs come from.
      unused: counts of what lies among or beside photographs and is not used.
    """

    size: int
    class_names: tuple[str, ...]
    fingerprint: str
    example: Callable[[int], tuple[np.ndarray, int]] = field(repr=False)
    encoded: Callable[[int], tuple[bytes, int, str]] | None = field(default=None, repr=False)
    origin: str = ""
    unused: dict[str, int] = field(default_factory=dict, repr=False)
    names: str = ""

    def __len__(self) -> int:
        return self.size


def cache_folder() -> Path:
    """Where downloaded sets lie: the environment variable EFFNETLIB_DATA, else ~/.cache/effnetlib."""
    return user_path(os.environ.get("EFFNETLIB_DATA") or "~/.cache/effnetlib", "EFFNETLIB_DATA", folder=True)


def describe(name: str, subset: str = "all") -> DataInfo:
    """The sizes of a data set: constants for the known ones, a listing for photographs (nothing is decoded)."""
    if name in KNOWN:
        info = KNOWN[name]
    elif subset == "minival":
        train = load(name, "train")
        info = DataInfo(len(train), 0, len(train.class_names))
    else:
        train, evaluation = load(name, "train"), load(name, "eval")
        check_classes(data_folder(name), {"train": train.class_names, "eval": evaluation.class_names})
        info = DataInfo(len(train), len(evaluation), len(train.class_names))
    held_out = _minival_size(info.train_examples, name) if subset == "minival" else 0
    if subset == "minival":
        return DataInfo(info.train_examples - held_out, held_out, info.num_classes)
    return info


def load(name: str, split: str, subset: str = "all") -> Split:
    """Opens a split of a data set: "train", "eval", or where a folder of photographs has one beside those, "test".

    Args:
      subset: "all", or "minival", the reference's hold-out: 20 of 1,024 shards of the training set are taken from it and
        are what "eval" means. It is drawn once for ever, the same for loose photographs and for shards of ours (TFDS's
        have an order of their own).

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
    example = functools.partial(_at, split.example, indices)
    encoded = split.encoded and functools.partial(_at, split.encoded, indices)
    return replace(split, size=len(indices), fingerprint=fingerprint, example=example, encoded=encoded)


def _at(read: Callable, indices: np.ndarray, index: int):
    return read(int(indices[index]))


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


CIFAR10_FINGERPRINTS = {"train": "72c15e60c081b70e", "eval": "8353b1fbf11acba6"}
CIFAR10_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "eval": ["test_batch.bin"]}


def _cifar10(split: str) -> Split:
    folder, names = cache_folder() / "cifar10", CIFAR10_FILES[split]
    examples = KNOWN["cifar10"].train_examples if split == "train" else KNOWN["cifar10"].eval_examples
    for path in (folder / name for name in names):
        if not path.is_file() or path.stat().st_size != 3073 * examples // len(names):
            problem = "is not whole" if path.is_file() else "is missing"
            raise EffnetlibError(f"{path} {problem}: get CIFAR-10 with `effnetlib data fetch cifar10`")
    records = np.concatenate([np.fromfile(folder / name, np.uint8).reshape(-1, 3073) for name in names])
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    classes = "airplane automobile bird cat deer dog frog horse ship truck"
    data = _in_memory(np.ascontiguousarray(images), records[:, 0], classes.split())
    if data.fingerprint != CIFAR10_FINGERPRINTS[split]:
        damaged = f"the {split} split in {folder} is damaged, or not CIFAR-10"
        raise EffnetlibError(f"{damaged}: get it with `effnetlib data fetch cifar10`")
    return data


IN_MEMORY = {"digits": _digits, "cifar10": _cifar10}


KAGGLE_INPUT = Path("/kaggle/input")
KAGGLE_IMAGENET = "imagenet-object-localization-challenge"


def data_folder(name: str) -> Path:
    """Where photographs of this name lie: the path itself, or a folder of the cache. On Kaggle, "imagenet" is the competition's
    where it is attached and the cache has none."""
    folder = user_path(name_or_path(name, "dataset"), "dataset", cache_folder(), folder=True)
    if name == "imagenet" and not folder.is_dir():
        return next((place for place in _kaggle_places() if place.is_dir()), folder)
    return folder


def _kaggle_places() -> list[Path]:
    return [KAGGLE_INPUT / "competitions" / KAGGLE_IMAGENET, KAGGLE_INPUT / KAGGLE_IMAGENET]  # now, and before


def _photographs(name: str, split: str) -> Split:
    root = data_folder(name)
    if root.is_dir() and (found := open_shards(root, split)):
        return _of_photographs(len(found.records), found, found.records.__getitem__)
    if (root / NOTES).is_dir():
        raise EffnetlibError(
            f"the preparation of {root} did not end: the same `effnetlib data prepare` goes on with it"
        )
    listing = kept_listing(root, split) if root.is_dir() else None
    if listing is not None:
        return _of_photographs(len(listing.photos), listing, listing.__getitem__)
    wanted = f"wanted is {root}/{{train,val}}/CLASS/*.jpg, or shards that `effnetlib data prepare` wrote"
    if root.exists():
        raise EffnetlibError(f"{root} holds no data set (seen: {seen(root)}): {wanted}")
    if os.sep not in name:
        wanted += " (EFFNETLIB_DATA names another place than the cache folder)"
    if name == "imagenet":
        places = ", ".join(map(str, _kaggle_places()))
        raise EffnetlibError(f"imagenet is not in {root} (nor, as on Kaggle, in {places}): {wanted}")
    raise EffnetlibError(f"there is no data set {name!r} ({did_you_mean(name, KNOWN)}): {wanted}")


def _of_photographs(size: int, found: Listing | Shards, encoded) -> Split:
    def example(index):
        photograph, label, name = encoded(index)
        return decode(photograph, name), label

    return Split(size, found.class_names, found.fingerprint, example, encoded, found.origin, found.unused, found.names)


def remark(splits: dict[str, Split]) -> str:
    """Where the photographs of splits come from, and what is not used, in a line; nothing of what is in memory."""
    origins = [f"{name} from {split.origin}" for name, split in splits.items() if split.origin]
    unused = {kind: count for split in splits.values() for kind, count in split.unused.items()}
    return f"photographs: {', '.join(origins)}{f'; not used: {in_words(unused)}' if unused else ''}" if origins else ""
