"""Where photographs lie: the layouts in which people keep ImageNet, and any folder of the form `split/class/*.jpg`.

A layout is told from the files that are there, in this order:

* the official archives: `ILSVRC2012_img_train.tar` (a tar a class inside), `ILSVRC2012_img_val.tar` (flat);
* the Kaggle competition: `ILSVRC/Data/CLS-LOC/{train/WNID,val}/*.JPEG` (or `Data/…`) with `LOC_val_solution.csv`;
* folders: `train/CLASS/*` and `val/CLASS/*` (or `validation`, `test`), or a flat `val/*`.

A flat validation split takes its labels from `LOC_val_solution.csv`, from the official development kit
(`ILSVRC2012_devkit_t12.tar.gz`, or extracted), or from `imagenet_2012_validation_synset_labels.txt`, a synset a line.
Classes are numbered in the sorted order of their names, which for ImageNet's synsets is the standard 0 … 999.
"""

import csv
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from effnetlib.errors import EffnetlibError, first_line

SUFFIXES = (".jpg", ".jpeg", ".png")
FOLDERS = {"train": ("train",), "eval": ("val", "validation", "test"), "test": ("test",)}
WNID = re.compile(r"n\d{8}")
WHOLE = 1000  # synsets
TARS = {"train": "ILSVRC2012_img_train.tar", "eval": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"


class MissingSplit(EffnetlibError):
    """The layout is recognised, but this split of it is not there."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One file (`offset` 0), or a part of an archive: `name` is what to call it, `size` its bytes when it was listed."""

    name: str
    label: int
    path: str
    size: int
    offset: int = 0

    @property
    def file_name(self) -> str:
        return self.name.rpartition("/")[2]

    def read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size) if self.offset else file.read()
        except OSError as error:
            raise EffnetlibError(f"{self.name} cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class Listing:
    """The photographs of a split in canonical order (class by class, by name), before any is opened.

    `fingerprint` is over names and sizes, `names` over names alone; `layout` names what was found; `is_imagenet` says whether it must be the whole of
    ILSVRC 2012.
    """

    class_names: tuple[str, ...]
    photos: list[Photo]
    fingerprint: str
    names: str
    layout: str
    is_imagenet: bool


def list_photographs(root: Path, split: str) -> Listing | None:
    """Lists a split ("train", "eval" or "test") of the data set at `root`; None where no layout is recognised.

    Raises:
      MissingSplit: a layout is recognised, and has no such split.
      EffnetlibError: what is missing or wrong in it.
    """
    try:
        return _list(root, split)
    except UnicodeError as error:
        raise EffnetlibError(f"a file in {root} has a name or a text that is not UTF-8: {error}") from None
    except OSError as error:
        raise EffnetlibError(f"{error.filename or root} cannot be read: {error.strerror}") from None


def _list(root: Path, split: str) -> Listing | None:
    if any((root / name).is_file() for name in TARS.values()):
        return _official(root, split)
    for base in (root / "ILSVRC/Data/CLS-LOC", root / "Data/CLS-LOC"):
        if base.is_dir():
            return _folders(base, root, split, "the Kaggle competition's folders", is_imagenet=True)
    if any((root / name).is_dir() for names in FOLDERS.values() for name in names):
        return _folders(root, root, split, "folders", is_imagenet=False)
    return None


def _listing(class_names, photos: list[Photo], layout: str, is_imagenet: bool) -> Listing:
    digest, names = hashlib.sha256(), hashlib.sha256()
    for photo in photos:
        name = f"{class_names[photo.label]}/{photo.file_name}"
        digest.update(f"{name} {photo.size}\n".encode())
        names.update(f"{name}\n".encode())
    whole = is_imagenet or (len(class_names) == WHOLE and all(map(WNID.fullmatch, class_names)))
    return Listing(tuple(class_names), photos, digest.hexdigest()[:16], names.hexdigest()[:16], layout, whole)


# Folders


def _folders(base: Path, root: Path, split: str, layout: str, is_imagenet: bool) -> Listing:
    folder = next((base / name for name in FOLDERS[split] if (base / name).is_dir()), None)
    if folder is None:
        raise MissingSplit(f"{base} has no {' or '.join(FOLDERS[split])} folder, which the {split} split would be in")
    if split == "test" and not any((base / name).is_dir() for name in FOLDERS["eval"][:-1]):
        raise MissingSplit(f"{folder} is what {root} evaluates on: it has no test split beside it")
    classes = _class_folders(folder)
    files = list(_images(folder))
    if files and split != "train" and not any(next(_images(folder / name), None) for name in classes):
        if split == "test":
            raise MissingSplit(f"the photographs in {folder} lie in no class folders: nothing says what they show")
        return _flat(folder, files, _train_classes(base), root, layout, is_imagenet)
    photos = []
    for label, name in enumerate(classes):
        before = len(photos)
        for entry in _images(folder / name):
            photos.append(Photo(entry.path, label, entry.path, entry.stat().st_size))
        if len(photos) == before and split == "train":
            raise EffnetlibError(f"the class folder {folder / name} holds no photographs: fill it, or take it away")
    if not photos:
        raise EffnetlibError(f"{folder} holds no photographs: CLASS/*.jpg is wanted in it")
    return _listing(classes, photos, layout, is_imagenet)


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _train_classes(base: Path) -> list[str]:
    return _class_folders(base / "train") if (base / "train").is_dir() else []


def _images(folder: Path) -> Iterator[os.DirEntry]:
    entries = (e for e in os.scandir(folder) if e.name.lower().endswith(SUFFIXES) and not e.name.startswith("."))
    return iter(sorted(entries, key=lambda entry: entry.name))


def _flat(folder: Path, files, classes, root: Path, layout: str, is_imagenet: bool) -> Listing:
    by_name = _validation_labels(root, [entry.name for entry in files])
    classes = classes or sorted(set(by_name.values()))
    labelled = _in_order(by_name, classes, [(entry.name, entry) for entry in files])
    photos = [Photo(entry.path, label, entry.path, entry.stat().st_size) for label, _, entry in labelled]
    return _listing(classes, photos, layout, is_imagenet)


def _in_order(by_name: dict[str, str], classes: list[str], named: list[tuple]) -> list[tuple]:
    """(label, name, value) sorted, of (name, value)."""
    numbers = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(by_name.values()) - set(numbers))
    if unknown:
        raise EffnetlibError(f"the validation labels name classes that the training split does not have: {unknown[:5]}")
    return sorted(((numbers[by_name[name]], name, value) for name, value in named), key=lambda item: item[:2])


# The official archives


def _official(root: Path, split: str) -> Listing:
    if split not in TARS:
        raise MissingSplit(f"the official archives in {root} have no {split} split")
    path = root / TARS[split]
    if not path.is_file():
        raise MissingSplit(f"{root} lacks {TARS[split]}, the archive of its {split} split")
    try:
        if split == "train":
            found = list(_nested(path))
            classes = sorted({class_name for class_name, *_ in found})
            numbers = {name: label for label, name in enumerate(classes)}
            found.sort(key=lambda item: item[:2])
        else:
            images = (m for m in _members(path) if m.name.lower().endswith(SUFFIXES))
            members = [(m.name.rpartition("/")[2], m.offset_data, m.size) for m in images]
            by_name = _validation_labels(root, [name for name, *_ in members])
            classes = sorted(set(by_name.values()))
            if (root / TARS["train"]).is_file():
                classes = sorted(Path(m.name).stem for m in _members(root / TARS["train"]) if m.name.endswith(".tar"))
            labelled = _in_order(by_name, classes, [(name, (offset, size)) for name, offset, size in members])
            numbers = {name: label for label, name in enumerate(classes)}
            found = [(classes[label], name, *place) for label, name, place in labelled]
    except tarfile.TarError as error:
        raise EffnetlibError(f"{path} is damaged, or not whole: {error}") from None
    photos = [Photo(f"{path}/{name}", numbers[group], str(path), size, offset) for group, name, offset, size in found]
    if not photos:
        raise EffnetlibError(f"{path} holds no photographs")
    return _listing(classes, photos, "the official archives", is_imagenet=True)


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isfile():
                yield member
            archive.members.clear()  # or it keeps a million of them


def _nested(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """(class, name, offset, size) of the photographs in the archives of an archive."""
    with tarfile.open(path, "r:") as outer:
        for inner in outer:
            if not inner.name.endswith(".tar"):
                continue
            class_name = Path(inner.name).stem
            with tarfile.open(fileobj=outer.extractfile(inner), mode="r:") as archive:
                for member in archive:
                    if member.isfile():
                        name = f"{class_name}/{member.name.rpartition('/')[2]}"
                        yield class_name, name, inner.offset_data + member.offset_data, member.size


# Labels of a flat validation split


def _validation_labels(root: Path, names: list[str]) -> dict[str, str]:
    """The synset of each file name.

    Raises:
      EffnetlibError: no file of labels was found, or it cannot be read, or does not fit the photographs.
    """
    try:
        return _read_validation_labels(root, names)
    except EffnetlibError:
        raise
    except Exception as error:  # text that is none, a damaged archive or matrix: each library raises its own kinds
        raise EffnetlibError(f"the validation labels beside {root} cannot be read: {first_line(error)}") from None


def _read_validation_labels(root: Path, names: list[str]) -> dict[str, str]:
    for place in (root, root / "ILSVRC", root / DEVKIT / "data", root / DEVKIT):
        if (place / "LOC_val_solution.csv").is_file():
            return _from_csv(place / "LOC_val_solution.csv", names)
        if (place / "ILSVRC2012_validation_ground_truth.txt").is_file():
            truth = place / "ILSVRC2012_validation_ground_truth.txt"
            return _from_kit(truth.read_text(), _read_meta(place / "meta.mat"), names, truth)
        if (place / "imagenet_2012_validation_synset_labels.txt").is_file():
            path = place / "imagenet_2012_validation_synset_labels.txt"
            return _by_position(path.read_text().split(), names, path)
    kit = root / f"{DEVKIT}.tar.gz"
    if kit.is_file():
        with tarfile.open(kit) as archive:
            truth, meta = (
                archive.extractfile(f"{DEVKIT}/data/{name}").read()
                for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat")
            )
        return _from_kit(truth.decode(), meta, names, kit)
    raise EffnetlibError(
        f"the validation photographs in {root} lie in no class folders, and nothing says what they show: put "
        f"LOC_val_solution.csv (Kaggle) or {DEVKIT}.tar.gz (official) beside them"
    )


def _from_csv(path: Path, names: list[str]) -> dict[str, str]:
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    known = {row[0]: row[1].split()[0] for row in rows[1:] if len(row) >= 2 and row[1].split()}
    missing = [name for name in names if name.rpartition(".")[0] not in known]
    if missing:
        raise EffnetlibError(f"{path} has no label for {len(missing):,} of {len(names):,} photographs: {missing[:3]}")
    return {name: known[name.rpartition(".")[0]] for name in names}


def _read_meta(path: Path) -> bytes:
    if not path.is_file():
        raise EffnetlibError(f"{path} is missing: the ground truth beside it numbers classes that only it can name")
    return path.read_bytes()


def _from_kit(truth: str, meta: bytes, names: list[str], path: Path) -> dict[str, str]:
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    numbers = [int(number) for number in truth.split()]
    if unknown := sorted(set(numbers) - set(wnids)):
        raise EffnetlibError(f"{path} numbers classes that its meta.mat does not name: {unknown[:5]}")
    return _by_position([wnids[number] for number in numbers], names, path)


def _by_position(synsets: list[str], names: list[str], path: Path) -> dict[str, str]:
    """The n-th synset belongs to the photograph whose name ends in n: `ILSVRC2012_val_00000001.JPEG` is the first."""
    out = {}
    for name in names:
        number = re.search(r"(\d+)\.\w+$", name)
        if not number or not 1 <= int(number[1]) <= len(synsets):
            raise EffnetlibError(f"{path} has {len(synsets):,} labels, and none for {name}")
        out[name] = synsets[int(number[1]) - 1]
    return out
