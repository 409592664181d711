"""Where photographs lie: the layouts in which people keep ImageNet, and any folder of the form `split/class/*.jpg`.

* The official archives: `ILSVRC2012_img_train.tar` (one tar per class inside), `ILSVRC2012_img_val.tar` (flat).
* Folders: `train/CLASS/*` and `val/CLASS/*` (or `valid`, `dev`, …; see `split_of`), also one level down, and where the Kaggle
  competition has them. `images` between the two is passed through. `test` is evaluated on where nothing else could be.

A flat validation split takes its labels from Kaggle's table, Tiny ImageNet's, or ImageNet's development kit. Classes are
numbered in the sorted order of their names; where all are whole numbers, in the order of the numbers. What lies there and
is not used is counted. `skip.txt` beside the splits names photographs to leave out, one path per line.
"""

import contextlib
import csv
import functools
import hashlib
import io
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from effnetlib.data.split import Split
from effnetlib.errors import EffnetlibError, first_line, shown

# The suffixes of photographs, and the format that each promises.
FORMATS = dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG") | dict.fromkeys((".tif", ".tiff"), "TIFF")
FORMATS |= {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "eval": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
JUNK = (".", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "$Recycle.Bin")  # what systems put between them
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
WNID = re.compile(r"n\d{8}")
WHOLE = 1000  # synsets
TARS = {"train": "ILSVRC2012_img_train.tar", "eval": "ILSVRC2012_img_val.tar"}
KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
DEVKIT = "ILSVRC2012_devkit_t12"
SOLUTION = "LOC_val_solution.csv"
ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet's
SKIP = "skip.txt"
BESIDE = (SOLUTION, f"ILSVRC/{SOLUTION}", f"{DEVKIT}.tar.gz", SKIP)
WANTED = {
    "train": "train/CLASS/*.jpg",
    "eval": "val/CLASS/*.jpg with the classes of train, or the setting subset=minival, which holds out a part of train",
    "test": "test/CLASS/*.jpg with the classes of train",
}


class MissingSplit(EffnetlibError):
    """The layout is recognised, but this split of it is not there."""


class Photo(NamedTuple):
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


def _encoded(photos: list[Photo], index: int) -> tuple[bytes, int, str]:
    photo = photos[index]
    return photo.read(), photo.label, photo.name


def split_of(name: str) -> str | None:
    """The split that a folder (or a split of TFDS) of this name holds, if any.

    >>> split_of("Training_Set"), split_of("valid"), split_of("TEST"), split_of("extras")
    ('train', 'eval', 'test', None)
    """
    stem = re.sub(r"[-_ ]?(set|split|data|images)$", "", name.lower())
    return next((split for split, names in SPLIT_NAMES.items() if stem in names), None)


def in_words(counts: dict[str, int]) -> str:
    """What was counted, for a sentence.

    >>> in_words({"extras/": 1, "valid/**/*.gif": 12})
    'extras/, valid/**/*.gif (12)'
    """
    words = [shown(name) + (f" ({count:,})" if count != 1 else "") for name, count in sorted(counts.items())]
    return ", ".join(words[:8]) + (f" and {len(words) - 8:,} kinds more" if len(words) > 8 else "") or "nothing"


def _some(names: Iterable[str]) -> str:
    words = [shown(name) if name.isascii() else f"{name} ({name!a})" for name in names]
    return ", ".join(words[:5]) + ", …" * (len(words) > 5)


def check_classes(place: object, classes: dict[str, tuple[str, ...]]) -> None:
    """Refuses splits whose classes differ; `classes` has the names of each split's."""
    (first, wanted), *others = classes.items()
    for other, found in others:
        only = {first: sorted(set(wanted) - set(found)), other: sorted(set(found) - set(wanted))}
        if differ := "; ".join(f"only {split} has {_some(names)}" for split, names in only.items() if names):
            hint = "for a class without photographs to evaluate on, make an empty folder"
            raise EffnetlibError(f"the classes of {place} differ: {differ} ({hint})")


_KEPT: dict[tuple[Path, str], tuple[dict[Path, int], Split]] = {}


def list_photographs(root: Path, split: str) -> Split | None:
    """Lists a split ("train", "eval" or "test") of the data set at `root`, class by class, by name; None where no layout is
    recognised. No photograph is opened. `unused` is such as `{"valid/**/*.gif": 12, "extras/": 1}`.

    Listing a million files takes minutes, so the last listings are kept while no folder that was read has changed. (A file that
    is written over under its own name changes no folder. Only its size in the listing is then old.)

    Raises:
      MissingSplit: a layout is recognised, and has no such split.
      EffnetlibError: what is missing or wrong in it.
    """
    changed, listing = _KEPT.get((root, split), ({}, None))
    with contextlib.suppress(OSError):
        if listing and all(os.stat(place).st_mtime_ns == when for place, when in changed.items()):
            return listing
    walk = _Walk(root, split)
    try:
        listing = walk.find()
    except UnicodeError as error:
        raise EffnetlibError(f"a file in {root} has a name or a text that is not UTF-8: {error}") from None
    except tarfile.TarError as error:
        raise EffnetlibError(f"an archive in {root} is damaged, or not whole: {error}") from None
    except OSError as error:
        raise EffnetlibError(f"{error.filename or root} cannot be read: {error.strerror}") from None
    # Times in a file system have steps of up to 10 ms: a change within the step of the last one would not be seen.
    if listing and time.time_ns() - max(walk.changed.values()) > 100_000_000:
        _KEPT[root, split] = walk.changed, listing
        for oldest in list(_KEPT)[:-3]:
            del _KEPT[oldest]
    return listing


def seen(folder: Path) -> str:
    """What lies in a folder, in words."""
    return in_words(beside(folder, folder, lambda _: False))


def beside(root: Path, base: Path, used: Callable[[str], object]) -> Counter:
    """Counts what lies in the folders from `root` down to `base`, apart from the way there and from what is `used(name)`."""
    counts, place, where = Counter(), root, ""
    for step in (*base.relative_to(root).parts, None):
        with os.scandir(place) as entries:
            others = [e for e in entries if e.name != step and not e.name.startswith(JUNK) and not used(e.name)]
            counts += _tally(where, others)
        if step:
            place, where = place / step, f"{where}{step}/"
    return counts


def _tally(where: str, entries: Iterable[os.DirEntry]) -> Counter:
    """Counts folders by their names, and files by their suffixes."""
    return Counter(where + (f"{entry.name}/" if entry.is_dir() else _kind(entry.name)) for entry in entries)


def _kind(name: str) -> str:
    return f"*{os.path.splitext(name)[1].lower() or ' without a suffix'}"


class _Walk:
    """One listing in the making: when each place that it read was changed, what is not used, what `skip.txt` leaves out."""

    def __init__(self, root: Path, split: str):
        self.root, self.split = root, split
        self.changed: dict[Path, int] = {}
        self.unused: Counter = Counter()
        self.skip: set[str] = set()
        self.skipped: set[str] = set()

    def find(self) -> Split | None:
        root = self.root
        for path in (root, *(root / name for name in (*TARS.values(), *BESIDE))):
            if path.exists():
                self.changed[path] = path.stat().st_mtime_ns
        if (root / SKIP) in self.changed:
            lines = (root / SKIP).read_bytes().decode(errors="surrogateescape").splitlines()
            self.skip = {str(root / line.partition("\t")[0]) for line in lines if line.strip()}
        folders = [entry.name for entry in self._scan(root)[0]]
        inner = [name for name in folders if len(folders) == 1 or name.lower() in ("images", "data", "dataset")]
        bases = [root, *(root / name for name in (*KAGGLE, *inner))]
        found = {base: self._places(base) for base in bases if base.is_dir()}
        tars = {split: root / name for split, name in TARS.items() if root / name in self.changed}
        found = {root: tars or found[root]} if tars or found[root] else {base: at for base, at in found.items() if at}
        if len(found) > 1:
            raise EffnetlibError(f"{root} holds several data sets: name one of {', '.join(map(str, found))}")
        if not found:
            return None
        ((base, places),) = found.items()
        used = {place.name for place in places.values()} | set(BESIDE)
        self.unused.update(beside(root, base, used.__contains__))
        classes = self._classes(places["train"]) if "train" in places else []
        if "test" in places:
            self._settle_test(base, places, classes)
        if self.split not in places:
            there = in_words(self.unused + Counter(map(self._where, places.values())))
            wanted = (WANTED | (TARS if tars else {}))[self.split]
            raise MissingSplit(f"{base} has no {self.split} split (seen: {there}): wanted is {wanted}")
        return self._listing(places[self.split], classes)

    def _places(self, base: Path) -> dict[str, Path]:
        places: dict[str, Path] = {}
        for name in (entry.name for entry in self._scan(base)[0]):
            if (kind := split_of(name)) in places:
                both = f"{shown(places[kind].name)} and {shown(name)}"
                raise EffnetlibError(f"{base} has {both}, and each could be the {kind} split: leave one of them there")
            if kind:
                places[kind] = base / name
        return places

    def _settle_test(self, base: Path, places: dict[str, Path], classes: list[str]) -> None:
        """Takes `test` out of `places` where its folders are no classes; makes it "eval" where nothing else could be."""
        test = places["test"]
        inside, *files = self._open(test)
        names = {entry.name for entry in inside}
        if not names & set(classes or names):
            del places["test"]
            self.unused.update(_tally(self._where(test), sum(files, inside)) or {self._where(test): 0})
        elif "eval" not in places and self.split == "test":
            raise MissingSplit(f"{test} is what {self.root} evaluates on: it has no test split beside it")
        elif "eval" not in places and self.split == "eval":
            near = {Path(e.path): e for folder in (self.root, base) for kind in self._scan(folder) for e in kind}
            others = near.keys() - {base, *base.parents, *places.values()}
            if rivals := ", ".join(
                sorted(shown(each.name) for each in others if self._may_be_eval(near[each], classes))
            ):
                could = f"{rivals} could be evaluated on just as {test.name} could"
                hint = "unpack archives, and rename the folder to evaluate on to val"
                raise EffnetlibError(f"{base} has no val folder, and {could}: {hint}")
            places["eval"] = test

    def _may_be_eval(self, entry: os.DirEntry, classes: list[str]) -> bool:
        """Whether a folder, or one in it, holds folders with names of classes; whether an archive has the name of the split."""
        if not entry.is_dir():
            return entry.name.lower().endswith(ARCHIVES) and split_of(entry.name.partition(".")[0]) == "eval"
        inside = self._scan(Path(entry.path))[0]
        below = [e for place in inside if place.is_dir() for e in self._scan(Path(place.path))[0]]
        return not {e.name.casefold() for e in inside + below}.isdisjoint(map(str.casefold, classes))

    def _scan(self, folder: Path) -> tuple[list[os.DirEntry], list[os.DirEntry], list[os.DirEntry]]:
        """(folders, photographs, other files), each sorted. A link to nothing is a folder: it cannot be passed over."""
        self.changed[folder] = os.stat(folder).st_mtime_ns
        folders, photos, others = [], [], []
        with os.scandir(folder) as entries:
            for entry in sorted((e for e in entries if not e.name.startswith(JUNK)), key=lambda entry: entry.name):
                lost = entry.is_symlink() and not os.path.exists(entry.path)
                if entry.path in self.skip:
                    self.skipped.add(entry.path)
                elif entry.name.lower().endswith(tuple(FORMATS)) and (entry.is_file() or lost):
                    photos.append(entry)  # no pipe or socket, but a link to nothing, which reading names
                else:
                    (folders if entry.is_dir() or lost else others).append(entry)
        return folders, photos, others

    def _open(self, folder: Path):
        """What `_scan` finds; where that is a folder `images` and no photographs, what is in there (as in Tiny ImageNet)."""
        folders, photos, others = self._scan(folder)
        if photos or [entry.name for entry in folders] != ["images"]:
            return folders, photos, others
        folders, photos, more = self._scan(folder / "images")
        return folders, photos, others + more

    def _where(self, place: Path) -> str:
        return place.relative_to(self.root).as_posix() + "/" * (not place.is_file())

    def _classes(self, place: Path) -> list[str]:
        if place.is_file():
            return _numbered(name for name, _ in _archived(place, inside=False))
        return _numbered(entry.name for entry in self._open(place)[0])

    def _groups(self, place: Path) -> tuple[dict[str, list[Photo]], list[Photo]]:
        """The photographs of a split by class, and those in no class; their labels are not known yet."""
        groups, where = {}, self._where(place)
        if place.is_file():
            for class_name, photo in _archived(place):
                if photo.name in self.skip:
                    self.skipped.add(photo.name)
                else:
                    groups.setdefault(class_name, []).append(photo)
            return groups, groups.pop("", [])
        folders, loose, others = self._open(place)
        for folder in folders:
            nested, found, rest = self._open(Path(folder.path))
            if not found and self.split == "train":
                there = f"{', '.join(FORMATS)} (seen: {seen(Path(folder.path))})"
                raise EffnetlibError(f"the class folder {folder.path} holds no {there}: fill it, or take it away")
            groups[folder.name] = [Photo(e.path, 0, e.path, e.stat().st_size) for e in found]
            self.unused.update(_tally(f"{where}**/", nested + rest) | ({} if found else {f"{where}{folder.name}/": 0}))
        self.unused.update(_tally(where, (entry for entry in others if entry.name != ANNOTATIONS)))
        return groups, [Photo(e.path, 0, e.path, e.stat().st_size) for e in loose]

    def _listing(self, place: Path, classes: list[str]) -> Split:
        groups, loose = self._groups(place)
        if loose and self.split == "eval" and not any(groups.values()):
            class_of = _validation_labels(self.root, place, [photo.file_name for photo in loose], classes)
            groups = {name: [] for name in classes or class_of.values()}
            for photo in loose:
                groups[class_of[photo.file_name]].append(photo)
        else:
            self.unused.update(self._where(place) + _kind(photo.name) for photo in loose)
        if not any(groups.values()):
            there = f" in class folders (seen: {seen(place)}): wanted is CLASS/*.jpg in it" if place.is_dir() else ""
            raise EffnetlibError(f"{place} holds no photographs{there}")
        if strays := sorted(name for name in self.skip - self.skipped if name.startswith(f"{place}/")):
            raise EffnetlibError(f"{self.root / SKIP} names {strays[0]}, which is no photograph: take the line out")
        if self.skipped:
            self.unused[f"photographs that {SKIP} names"] = len(self.skipped)
        class_names, photos = _numbered(groups), []
        fingerprint, names = hashlib.sha256(), hashlib.sha256()
        for label, class_name in enumerate(class_names):
            for photo in sorted(groups[class_name]):
                photos.append(photo._replace(label=label))
                fingerprint.update(f"{class_name}/{photo.file_name} {photo.size}\n".encode())
                names.update(f"{class_name}/{photo.file_name}\n".encode())
        return Split.of_photographs(
            len(photos),
            class_names,
            fingerprint.hexdigest()[:16],
            functools.partial(_encoded, photos),
            origin=self._where(place),
            unused=dict(self.unused),
            names=names.hexdigest()[:16],
            photos=photos,
        )


def _numbered(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: that of the numbers where all are whole numbers, else as text is sorted."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _archived(path: Path, class_name: str = "", inner=None, offset: int = 0, inside: bool = True):
    """(class name, photograph) of an archive. An archive in it is a class, of which one photograph is None if not `inside`."""
    with tarfile.open(path, "r:", inner) as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name.endswith(".tar") and inside:
                yield from _archived(path, name[:-4], archive.extractfile(member), member.offset_data)
            elif name.endswith(".tar"):
                yield name[:-4], None
            elif member.isfile() and name.lower().endswith(tuple(FORMATS)):
                where = os.path.join(path, class_name, name)
                yield class_name, Photo(where, 0, str(path), member.size, offset + member.offset_data)
            archive.members.clear()  # or it keeps a million of them


def _validation_labels(root: Path, place: Path, names: list[str], classes: list[str]) -> dict[str, str]:
    """The class of each file name in `place`, a split without class folders.

    Raises:
      EffnetlibError: no file of labels was found, or it cannot be read, or does not fit the photographs or the classes.
    """
    kit = root / f"{DEVKIT}.tar.gz"
    path = next(
        (path for path in (place / ANNOTATIONS, *(root / name for name in BESIDE[:2]), kit) if path.is_file()), None
    )
    if path is None:
        wanted = f"wanted is {place.name}/CLASS/*.jpg with the classes of train" + f" ({_some(classes)})" * bool(
            classes
        )
        if names[0].startswith("ILSVRC2012_val_"):
            wanted = f"put {SOLUTION} (Kaggle) or {kit.name} (official) into {root}"
        there = f"the {len(names):,} photographs in {place} lie in no class folders, and nothing says what they show"
        raise EffnetlibError(f"{there}: {wanted}")
    try:
        known = _from_kit(path) if path == kit else _from_table(path)
    except Exception as error:  # text that is none, a damaged archive or matrix: each library raises its own kinds
        raise EffnetlibError(f"the validation labels in {path} cannot be read: {first_line(error)}") from None
    found = {name: known.get(name) or known.get(name.rpartition(".")[0]) for name in names}
    if missing := [name for name in names if not found[name]]:
        raise EffnetlibError(f"{path} has no label for {len(missing):,} of {len(names):,} photographs: {missing[:3]}")
    if classes and (unknown := sorted(set(found.values()) - set(classes))):
        raise EffnetlibError(f"{path} names classes that the training split does not have: {_some(unknown)}")
    return found


def _from_table(path: Path) -> dict[str, str]:
    """Of a table whose first column is the file's name, with its suffix or without, and whose second begins with the class."""
    with open(path, newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix == ".txt" else ",")
        return {row[0]: row[1].split()[0] for row in rows if len(row) >= 2 and row[1].split()}


def _from_kit(path: Path) -> dict[str, str]:
    """Of the development kit, whose n-th number is the class of `ILSVRC2012_val_0000000n`."""
    from scipy.io import loadmat

    with tarfile.open(path) as archive:
        truth, meta = (
            archive.extractfile(f"{DEVKIT}/data/{name}").read()
            for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat")
        )
    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    return {
        f"ILSVRC2012_val_{n:08}": wnids.get(int(number), f"number {int(number)}")
        for n, number in enumerate(truth.split(), 1)
    }
