"""Sources: digits (embedded), CIFAR-10, and photographs such as ImageNet (loose files or shards)."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effnetlib.data.photographs import check_classes, in_words, list_photographs, seen
from effnetlib.data.shards import MANIFEST, open_shards, read_manifest, shard_order
from effnetlib.data.split import Split
from effnetlib.errors import EffnetlibError, did_you_mean
from effnetlib.runs.paths import name_or_path, user_path

SPLITS = ("train", "eval", "test")
SUBSETS = ("all", "minival")
MINIVAL_SHARDS, REFERENCE_SHARDS = 20, 1024


@dataclass(frozen=True)
class DataInfo:
    """Sizes of a data set: training examples, evaluation examples, classes."""

    train_examples: int
    eval_examples: int
    num_classes: int


KNOWN = {
    "digits": DataInfo(1437, 360, 10),
    "cifar10": DataInfo(50_000, 10_000, 10),
    "imagenette": DataInfo(9_469, 3_925, 10),
    "imagenette-320": DataInfo(9_469, 3_925, 10),
    "imagenet": DataInfo(1_281_167, 50_000, 1000),
}


def cache_folder() -> Path:
    """The folder of downloaded sets: the environment variable EFFNETLIB_DATA, else ~/.cache/effnetlib."""
    return user_path(os.environ.get("EFFNETLIB_DATA") or "~/.cache/effnetlib", "EFFNETLIB_DATA", folder=True)


def describe(name: str, subset: str = "all") -> DataInfo:
    """The sizes of a data set. Known sets have constants; other photographs are listed, not decoded."""
    if name in KNOWN:
        info, held_out = KNOWN[name], 0
        if subset == "minival":
            held_out = _held_out(info.train_examples, name)
        return DataInfo(info.train_examples - held_out, held_out or info.eval_examples, info.num_classes)
    train, evaluation = load(name, "train", subset), load(name, "eval", subset)
    check_classes(data_folder(name), {"train": train.class_names, "eval": evaluation.class_names})
    return DataInfo(len(train), len(evaluation), len(train.class_names))


def load(name: str, split: str, subset: str = "all") -> Split:
    """Opens a split of a data set.

    Args:
      split: "train" or "eval"; also "test" for photographs that have all three.
      subset: "all" or "minival". With "minival", 20/1,024 of the training set become "eval", as in the released code. The
        choice is fixed. It is the same for loose photographs and our shards; TFDS's shards have another order.

    Raises:
      EffnetlibError: the set is unknown, missing (the message says how to get it), or of the wrong size.
    """
    if split not in SPLITS:
        raise EffnetlibError(f"there is no split {split!r}: {did_you_mean(split, SPLITS)}")
    if subset == "minival" and split != "test":
        whole = load(name, "train")
        held_out, drawn = _held_out(len(whole), name), shard_order(len(whole))
        return whole.select(drawn[held_out:] if split == "train" else drawn[:held_out])
    if name in IN_MEMORY and split == "test":
        raise EffnetlibError(f"{name} has no test split, only train and eval")
    data = IN_MEMORY[name](split) if name in IN_MEMORY else _photographs(name, split)
    if name in KNOWN and split != "test":
        wanted = KNOWN[name].train_examples if split == "train" else KNOWN[name].eval_examples
        if len(data) != wanted:
            hint = "complete it, or give its path as the data set, which accepts any size"
            raise EffnetlibError(
                f"the {split} split of {name} should have {wanted:,} examples, and has {len(data):,}: {hint}"
            )
    return data


def _held_out(examples: int, name: str) -> int:
    size = examples * MINIVAL_SHARDS // REFERENCE_SHARDS
    if not size:
        raise EffnetlibError(
            f"{name} has {examples} training examples, too few to hold out 20 of every 1,024 (minival)"
        )
    return size


def _digits(split: str) -> Split:
    from sklearn.datasets import load_digits  # a slow import that only this set needs

    digits = load_digits()
    # Every fifth example, sorted by class, is for evaluation. The split is fixed, and stratified to within one example.
    order = np.argsort(digits.target, kind="stable")
    is_eval = np.arange(len(order)) % 5 == 0
    chosen = order[is_eval if split == "eval" else ~is_eval]
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return Split.in_memory(pixels, digits.target[chosen], map(str, range(10)))


CIFAR10_FINGERPRINTS = {"train": "72c15e60c081b70e", "eval": "8353b1fbf11acba6"}
CIFAR10_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "eval": ["test_batch.bin"]}


def _cifar10(split: str) -> Split:
    folder, classes = cache_folder() / "cifar10", "airplane automobile bird cat deer dog frog horse ship truck"
    with contextlib.suppress(OSError, ValueError):
        records = np.concatenate(
            [np.fromfile(folder / name, np.uint8).reshape(-1, 3073) for name in CIFAR10_FILES[split]]
        )
        images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        data = Split.in_memory(images, records[:, 0], classes.split())
        if data.fingerprint == CIFAR10_FINGERPRINTS[split]:
            return data
    get = "get CIFAR-10 with `effnetlib data fetch cifar10`"
    raise EffnetlibError(f"the {split} split of CIFAR-10 in {folder} is missing or damaged: {get}")


IN_MEMORY = {"digits": _digits, "cifar10": _cifar10}

KAGGLE_INPUT = Path("/kaggle/input")
# Kaggle mounts the competition at the first place today; the second is the older one.
COMPETITION = [f"{folder}imagenet-object-localization-challenge" for folder in ("competitions/", "")]


def data_folder(name: str) -> Path:
    """The folder of a set of photographs: the path itself, or a folder of the cache.

    If the cache has no "imagenet", what is attached on Kaggle is used: shards of it, or the competition's folder.
    """
    folder = user_path(name_or_path(name, "dataset"), "dataset", cache_folder(), folder=True)
    if name != "imagenet" or folder.is_dir():
        return folder
    # At most four levels deep: a deeper search would list every photograph of a data set.
    manifests = (path for levels in range(1, 5) for path in sorted(KAGGLE_INPUT.glob("*/" * levels + MANIFEST)))
    places = (path.parent for path in manifests if _is_imagenet(path.parent))
    return next(places, next(filter(Path.is_dir, map(KAGGLE_INPUT.joinpath, COMPETITION)), folder))


def _is_imagenet(shards: Path) -> bool:
    with contextlib.suppress(EffnetlibError):  # another program's manifest.json
        return read_manifest(shards)["splits"]["train"]["examples"] == KNOWN["imagenet"].train_examples
    return False


def _photographs(name: str, split: str) -> Split:
    from effnetlib.runs import hosts  # imports jax, which worker processes do not need

    return hosts.from_first(f"listing of {split} in {name}", lambda: _open(name, split))


def _open(name: str, split: str) -> Split:
    root = data_folder(name)
    if root.is_dir():
        if found := open_shards(root, split):
            return found
        if found := list_photographs(root, split):
            return found
    wanted = f"wanted is {root}/{{train,val}}/CLASS/*.jpg, or shards that `effnetlib data prepare` wrote"
    if root.exists():
        raise EffnetlibError(f"{root} holds no data set (seen: {seen(root)}): {wanted}")
    if os.sep not in name:
        wanted += " (EFFNETLIB_DATA sets another cache folder)"
    if name == "imagenet":
        places = ", ".join(f"{KAGGLE_INPUT}/{place}" for place in COMPETITION)
        raise EffnetlibError(f"imagenet is not in {root} (nor, as on Kaggle, in {places}): {wanted}")
    if name in KNOWN:
        raise EffnetlibError(f"{root} is missing: get it with `effnetlib data fetch {name}`")
    raise EffnetlibError(f"there is no data set {name!r} ({did_you_mean(name, KNOWN)}): {wanted}")


def remark(splits: dict[str, Split]) -> str:
    """One line: where the photographs come from and what is not used. Empty for sets in memory."""
    origins = [f"{name} from {split.origin}" for name, split in splits.items() if split.origin]
    unused = {kind: count for split in splits.values() for kind, count in split.unused.items()}
    return f"photographs: {', '.join(origins)}{f'; not used: {in_words(unused)}' if unused else ''}" if origins else ""
