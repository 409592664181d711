"""Where photographs lie: the layouts in which people keep ImageNet, and any folder of the form `split/class/*.jpg`.

A layout is told from the files that are there, in this order:

* the official archives: `ILSVRC2012_img_train.tar` (a tar a class inside), `ILSVRC2012_img_val.tar` (flat);
* the Kaggle competition: `ILSVRC/Data/CLS-LOC/{train/WNID,val}/*.JPEG` (or `Data/…`) with `LOC_val_solution.csv`;
* folders: `train/CLASS/*` and `val/CLASS/*` (or `valid`, `validation`, …; see `split_of`), also one level down, in
  `images`, in `data` or in the only folder; `CLASS/images/*` and `val/images/*` with `val_annotations.txt` as in Tiny
  ImageNet. `test` is evaluated on where nothing else could be.

ImageNet's flat validation split takes its labels from `LOC_val_solution.csv` or from the official development kit
(`ILSVRC2012_devkit_t12.tar.gz`). Classes are numbered in the sorted order of their names, which for ImageNet's synsets is
the standard 0 … 999; where all names are whole numbers, in the order of the numbers. What lies there and is not used is
counted.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from effnetlib.data.workers import Packed
from effnetlib.errors import EffnetlibError, first_line, shown

SUFFIXES = (".jpg", ".jpeg", ".png")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "eval": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
# What systems put between the photographs.
JUNK = (".", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "$Recycle.Bin")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
WNID = re.compile(r"n\d{8}")
WHOLE = 1000  # synsets
TARS = {"train": "ILSVRC2012_img_train.tar", "eval": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"
SOLUTION = "LOC_val_solution.csv"
LABELS = (SOLUTION, f"ILSVRC/{SOLUTION}", f"{DEVKIT}.tar.gz")
ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet's
WANTED = {
    "train": "train/CLASS/*.jpg",
    "eval": "val/CLASS/*.jpg with the classes of train, or the setting subset=minival, which holds out a part of train",
    "test": "test/CLASS/*.jpg with the classes of train",
}


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

    `fingerprint` is over names and sizes, `names` over names alone; `layout` names what was found; `is_imagenet` says whether it
    must be the whole of ILSVRC 2012; `origin` is the folder or archive of the split; `unused` counts what lies in it or beside the
    splits and is not used, such as `{"valid/**/*.webp": 12, "extras/": 1}`.
    """

    class_names: tuple[str, ...]
    photos: list[Photo]
    fingerprint: str
    names: str
    layout: str
    is_imagenet: bool
    origin: str
    unused: dict[str, int]

    def __getstate__(self):
        return vars(self) | {"photos": Packed(self.photos)}  # for worker processes

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        photo = self.photos[index]
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

    >>> in_words({"extras/": 1, "valid/**/*.webp": 12})
    'extras/, valid/**/*.webp (12)'
    """
    words = [shown(name) + (f" ({count:,})" if count != 1 else "") for name, count in sorted(counts.items())]
    return ", ".join(words[:8]) + (f" and {len(words) - 8:,} kinds more" if len(words) > 8 else "") or "nothing"


def check_classes(place: object, classes: dict[str, tuple[str, ...]]) -> None:
    """Refuses splits whose classes differ; `classes` has the names of each split's."""
    (first, wanted), *others = classes.items()
    for other, found in others:
        if found != wanted:
            only = []
            for split, names in ((first, set(wanted) - set(found)), (other, set(found) - set(wanted))):
                words = [shown(name) if name.isascii() else f"{name} ({name!a})" for name in sorted(names)[:5]]
                if names:
                    only.append(f"only {split} has {', '.join(words)}{', …' * (len(names) > 5)}")
            raise EffnetlibError(
                f"the classes of {place} differ: {'; '.join(only)} (for a class without photographs to evaluate on, make an "
                "empty folder)"
            )


_KEPT: dict[tuple[Path, str], tuple[dict[Path, int], Listing]] = {}


def kept_listing(root: Path, split: str) -> Listing | None:
    """What `list_photographs` returned last, while no folder that it read has changed since: listing a million files takes
    minutes. (A file that is written over under its own name changes no folder. Only its size in the listing is then old.)
    """
    changed, listing = _KEPT.get((root, split), ({}, None))
    with contextlib.suppress(OSError):
        if listing and all(os.stat(place).st_mtime_ns == when for place, when in changed.items()):
            return listing
    return list_photographs(root, split)


def list_photographs(root: Path, split: str) -> Listing | None:
    """Lists a split ("train", "eval" or "test") of the data set at `root`; None where no layout is recognised.

    Raises:
      MissingSplit: a layout is recognised, and has no such split.
      EffnetlibError: what is missing or wrong in it.
    """
    walk = _Walk(root, split)
    try:
        listing = walk.find()
    except UnicodeError as error:
        raise EffnetlibError(f"a file in {root} has a name or a text that is not UTF-8: {error}") from None
    except OSError as error:
        raise EffnetlibError(f"{error.filename or root} cannot be read: {error.strerror}") from None
    # Times in a file system have steps of up to 10 ms: a change within the step of the last one would not be seen.
    if listing and time.time_ns() - max(walk.changed.values()) > 100_000_000:
        _KEPT[root, split] = walk.changed, listing
        for oldest in list(_KEPT)[:-3]:
            del _KEPT[oldest]
    return listing


def seen(root: Path) -> str:
    """What lies in a folder, in words."""
    return in_words(beside(root, root, lambda _: False))


def tally(where: str, entries: Iterable[os.DirEntry]) -> Counter:
    """Counts folders by their names, and files by their suffixes."""
    kinds = (
        f"{e.name}/" if e.is_dir() else f"*{os.path.splitext(e.name)[1].lower() or ' without a suffix'}"
        for e in entries
    )
    return Counter(where + kind for kind in kinds)


def beside(root: Path, base: Path, used) -> Counter:
    """Counts what lies in the folders from `root` down to `base`, apart from the way there and from what is `used(name)`."""
    counts, place, where = Counter(), root, ""
    for step in (*base.relative_to(root).parts, None):
        with os.scandir(place) as entries:
            counts += tally(
                where, (e for e in entries if e.name != step and not e.name.startswith(JUNK) and not used(e.name))
            )
        if step:
            place, where = place / step, f"{where}{step}/"
    return counts


class _Walk:
    """One listing in the making: when each folder that it read was changed, and what in them is not used."""

    def __init__(self, root: Path, split: str):
        self.root, self.split, self.layout = root, split, "folders"
        self.changed: dict[Path, int] = {}
        self.unused: Counter = Counter()

    def find(self) -> Listing | None:
        for path in (self.root, *(self.root / name for name in (*TARS.values(), *LABELS))):
            if path.exists():
                self.changed[path] = path.stat().st_mtime_ns
        if any((self.root / name).is_file() for name in TARS.values()):
            return self._official()
        for base in (self.root / "ILSVRC/Data/CLS-LOC", self.root / "Data/CLS-LOC"):
            if base.is_dir():
                self.layout = "the Kaggle competition's folders"
                return self._folders(base)
        folders = self._scan(self.root)[0]
        bases = [self.root] if any(split_of(entry.name) for entry in folders) else []
        for entry in () if bases else folders:
            likely = len(folders) == 1 or entry.name.lower() in ("images", "data", "dataset")
            if likely and any(split_of(inner.name) == "train" for inner in self._scan(Path(entry.path))[0]):
                bases.append(Path(entry.path))
        if len(bases) > 1:
            raise EffnetlibError(f"{self.root} holds several data sets: name one of {', '.join(map(str, bases))}")
        return self._folders(bases[0]) if bases else None

    def _listing(self, class_names: list[str], photos: list[Photo], origin: str) -> Listing:
        digest, names = hashlib.sha256(), hashlib.sha256()
        for photo in photos:
            name = f"{class_names[photo.label]}/{photo.file_name}"
            digest.update(f"{name} {photo.size}\n".encode())
            names.update(f"{name}\n".encode())
        whole = self.layout != "folders" or (len(class_names) == WHOLE and all(map(WNID.fullmatch, class_names)))
        fingerprint, names = digest.hexdigest()[:16], names.hexdigest()[:16]
        return Listing(tuple(class_names), photos, fingerprint, names, self.layout, whole, origin, dict(self.unused))

    def _scan(self, folder: Path) -> tuple[list[os.DirEntry], list[os.DirEntry], list[os.DirEntry]]:
        """(folders, photographs, other files), each sorted. A link to nothing is a folder: it cannot be passed over."""
        self.changed[folder] = os.stat(folder).st_mtime_ns
        folders, photos, others = [], [], []
        with os.scandir(folder) as entries:
            for entry in sorted((e for e in entries if not e.name.startswith(JUNK)), key=lambda entry: entry.name):
                if entry.is_dir():
                    folders.append(entry)
                elif entry.name.lower().endswith(SUFFIXES) and (entry.is_file() or not os.path.exists(entry.path)):
                    photos.append(entry)  # no pipe or socket, but a link to nothing, which reading names
                else:
                    (folders if entry.is_symlink() and not os.path.exists(entry.path) else others).append(entry)
        return folders, photos, others

    def _open(self, folder: Path):
        """What `_scan` finds; where that is a folder `images` and no photographs, what is in there (as in Tiny ImageNet)."""
        folders, photos, others = self._scan(folder)
        if photos or [entry.name for entry in folders] != ["images"]:
            return folders, photos, others
        folders, photos, more = self._scan(folder / "images")
        return folders, photos, others + more

    def _where(self, folder: Path) -> str:
        return f"{folder.relative_to(self.root).as_posix()}/"

    def _folders(self, base: Path) -> Listing:
        (folders, _, beneath), split = self._scan(base), self.split
        places: dict[str, Path] = {}
        for entry in folders:
            if kind := split_of(entry.name):
                if kind in places:
                    both = f"{shown(places[kind].name)} and {shown(entry.name)}"
                    raise EffnetlibError(
                        f"{base} has {both}, and each could be the {kind} split: leave one of them there"
                    )
                places[kind] = Path(entry.path)
        used = {place.name for place in places.values()} | set(LABELS)
        self.unused.update(beside(self.root, base, used.__contains__))
        classes = _numbered(entry.name for entry in self._open(places["train"])[0]) if "train" in places else []
        if "test" in places:
            inside, *files = self._open(places["test"])
            named = {entry.name for entry in inside}
            if not named & set(classes or named):
                where = self._where(places.pop("test"))
                self.unused.update(tally(where, itertools.chain(inside, *files)) or {where: 0})
        if "test" in places and "eval" not in places and split != "train":
            if split == "test":
                raise MissingSplit(f"{places['test']} is what {self.root} evaluates on: it has no test split beside it")
            above, _, more = self._scan(self.root)
            others = {Path(entry.path) for entry in (*folders, *above)} - {base, *base.parents, *places.values()}
            rivals = {folder.name for folder in others if self._may_be_eval(folder, classes)}
            rivals |= {e.name for e in (*beneath, *more) if e.name.lower().endswith(ARCHIVES)
                       and split_of(e.name.partition(".")[0]) == "eval"}  # fmt: skip
            if rivals:
                raise EffnetlibError(
                    f"{base} has no val folder, and {', '.join(map(shown, sorted(rivals)))} could be evaluated on just as "
                    f"{places['test'].name} could: unpack archives, and rename the folder to evaluate on to val"
                )
            places["eval"] = places["test"]
        if split not in places:
            there = in_words(self.unused + Counter(map(self._where, places.values())))
            raise MissingSplit(f"{base} has no {split} split (seen: {there}): wanted is {WANTED[split]}")
        return self._by_class(places[split], classes)

    def _may_be_eval(self, folder: Path, classes: list[str]) -> bool:
        """Whether a folder, or one in it, holds folders with names of classes, in whatever case."""
        inside = [Path(entry.path) for entry in self._scan(folder)[0] if entry.is_dir()]
        below = (entry.name for place in inside for entry in self._scan(place)[0])
        names = {name.casefold() for name in classes}
        return any(name.casefold() in names for name in itertools.chain((place.name for place in inside), below))

    def _by_class(self, place: Path, classes: list[str]) -> Listing:
        where = self._where(place)
        folders, loose, others = self._open(place)
        paths, photos = {entry.name: Path(entry.path) for entry in folders}, []
        names = _numbered(paths)
        for label, name in enumerate(names):
            nested, found, rest = self._open(paths[name])
            if self.split == "train" and not found:
                raise EffnetlibError(
                    f"the class folder {paths[name]} holds no {', '.join(SUFFIXES)} (seen: "
                    f"{in_words(tally('', [*nested, *rest]))}): fill it, or take it away"
                )
            photos += [Photo(entry.path, label, entry.path, entry.stat().st_size) for entry in found]
            self.unused.update(tally(f"{where}**/", [*nested, *rest]) | ({} if found else {f"{where}{name}/": 0}))
        self.unused.update(tally(where, [entry for entry in others if entry.name != ANNOTATIONS]))
        if loose and not photos and self.split == "eval":
            return self._flat(place, loose, classes)
        self.unused.update(tally(where, loose))
        if not photos:
            there = in_words(tally("", [*folders, *loose, *others]))
            raise EffnetlibError(
                f"{place} holds no photographs in class folders (seen: {there}): wanted is CLASS/*.jpg in it"
            )
        return self._listing(names, photos, where)

    def _flat(self, place: Path, loose, classes: list[str]) -> Listing:
        by_name = _validation_labels(self.root, place, [entry.name for entry in loose], classes)
        classes = classes or sorted(set(by_name.values()))
        labelled = _in_order(by_name, classes, [(entry.name, entry) for entry in loose])
        photos = [Photo(entry.path, label, entry.path, entry.stat().st_size) for label, _, entry in labelled]
        return self._listing(classes, photos, self._where(place))

    def _official(self) -> Listing:
        root, split, self.layout = self.root, self.split, "the official archives"
        self.unused.update(beside(root, root, lambda name: name in (*TARS.values(), *LABELS)))
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
                by_name = _validation_labels(root, root, [name for name, *_ in members], [])
                classes = sorted(set(by_name.values()))
                if (root / TARS["train"]).is_file():
                    inner = (m.name for m in _members(root / TARS["train"]))
                    classes = sorted(Path(name).stem for name in inner if name.endswith(".tar"))
                labelled = _in_order(by_name, classes, [(name, (offset, size)) for name, offset, size in members])
                numbers = {name: label for label, name in enumerate(classes)}
                found = [(classes[label], name, *place) for label, name, place in labelled]
        except tarfile.TarError as error:
            raise EffnetlibError(f"{path} is damaged, or not whole: {error}") from None
        photos = [
            Photo(f"{path}/{name}", numbers[group], str(path), size, offset) for group, name, offset, size in found
        ]
        if not photos:
            raise EffnetlibError(f"{path} holds no photographs")
        return self._listing(classes, photos, TARS[split])


def _numbered(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: that of the numbers where all are whole numbers, else as text is sorted."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _in_order(by_name: dict[str, str], classes: list[str], named: list[tuple]) -> list[tuple]:
    """(label, name, value) sorted, of (name, value)."""
    numbers = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(by_name.values()) - set(numbers))
    if unknown:
        raise EffnetlibError(f"the validation labels name classes that the training split does not have: {unknown[:5]}")
    return sorted(((numbers[by_name[name]], name, value) for name, value in named), key=lambda item: item[:2])


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


def _validation_labels(root: Path, place: Path, names: list[str], classes: list[str]) -> dict[str, str]:
    """The class of each file name in `place`.

    Raises:
      EffnetlibError: no file of labels was found, or it cannot be read, or does not fit the photographs.
    """
    try:
        for path in (place / ANNOTATIONS, root / SOLUTION, root / "ILSVRC" / SOLUTION):
            if path.is_file():
                return _from_table(path, names)
        kit = root / f"{DEVKIT}.tar.gz"
        if kit.is_file():
            return _from_kit(kit, names)
    except EffnetlibError:
        raise
    except Exception as error:  # text that is none, a damaged archive or matrix: each library raises its own kinds
        raise EffnetlibError(f"the validation labels beside {root} cannot be read: {first_line(error)}") from None
    if names[0].startswith("ILSVRC2012_val_"):
        wanted = f"put {SOLUTION} (Kaggle) or {DEVKIT}.tar.gz (official) into {root}"
    else:
        known = ", ".join(map(shown, classes[:5])) + ", …" * (len(classes) > 5)
        wanted = f"wanted is {place.name}/CLASS/*.jpg with the classes of train" + f" ({known})" * bool(classes)
    raise EffnetlibError(
        f"the {len(names):,} photographs in {place} lie in no class folders, and nothing says what they show: {wanted}"
    )


def _from_table(path: Path, names: list[str]) -> dict[str, str]:
    """Of a table whose first column is the file's name, with its suffix or without, and whose second begins with the class."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file, delimiter="\t" if path.suffix == ".txt" else ","))
    known = {row[0].partition(".")[0]: row[1].split()[0] for row in rows if len(row) >= 2 and row[1].split()}
    missing = [name for name in names if name.rpartition(".")[0] not in known]
    if missing:
        raise EffnetlibError(f"{path} has no label for {len(missing):,} of {len(names):,} photographs: {missing[:3]}")
    return {name: known[name.rpartition(".")[0]] for name in names}


def _from_kit(path: Path, names: list[str]) -> dict[str, str]:
    """The n-th number belongs to the photograph whose name ends in n: `ILSVRC2012_val_00000001.JPEG` is the first."""
    from scipy.io import loadmat

    with tarfile.open(path) as archive:
        truth, meta = (
            archive.extractfile(f"{DEVKIT}/data/{name}").read()
            for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat")
        )
    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    numbers = [int(number) for number in truth.split()]
    if unknown := sorted(set(numbers) - set(wnids)):
        raise EffnetlibError(f"{path} numbers classes that its meta.mat does not name: {unknown[:5]}")
    out = {}
    for name in names:
        place = re.search(r"(\d+)\.\w+$", name)
        if not place or not 1 <= int(place[1]) <= len(numbers):
            raise EffnetlibError(f"{path} has {len(numbers):,} labels, and none for {name}")
        out[name] = wnids[numbers[int(place[1]) - 1]]
    return out
