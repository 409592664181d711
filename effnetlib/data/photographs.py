"""Where photographs lie: the layouts in which people keep ImageNet, and any folder of the form `split/class/*.jpg`.

The files that are there say which layout it is, in this order:

* the official archives: `ILSVRC2012_img_train.tar` (one tar per class inside), `ILSVRC2012_img_val.tar` (flat);
* the Kaggle competition: `ILSVRC/Data/CLS-LOC/{train/WNID,val}/*.JPEG` (or `Data/…`) with `LOC_val_solution.csv`;
* folders: `train/CLASS/*` and `val/CLASS/*` (or `valid`, `validation`, …; see `split_of`), also one level down, in
  `images`, in `data` or in the only folder; `CLASS/images/*` and `val/images/*` with `val_annotations.txt` as in Tiny
  ImageNet. `test` is evaluated on where nothing else could be.

A flat validation split takes its labels from such a table, or from ImageNet's development kit
(`ILSVRC2012_devkit_t12.tar.gz`). Classes are numbered in the sorted order of their names, which for ImageNet's synsets is
the standard 0 … 999; where all names are whole numbers, in the order of the numbers. What lies there and is not used is
counted. `skip.txt` beside the splits names photographs to leave out.
"""

import contextlib
import csv
import hashlib
import io
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from effnetlib.errors import EffnetlibError, first_line, shown

# The suffixes of photographs, and the format that each promises.
FORMATS = dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG") | {
    ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}  # fmt: skip
SUFFIXES = tuple(FORMATS)
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

    ``listing[index]`` is a photograph's bytes, label and name. `fingerprint` is over names and sizes, `names` over names
    alone; `is_imagenet` says whether it must be the whole of ILSVRC 2012; `origin` is the folder or archive of the split;
    `unused` counts what lies in it or beside the splits and is not used, such as `{"valid/**/*.gif": 12, "extras/": 1}`.
    """

    class_names: tuple[str, ...]
    photos: list[Photo]
    fingerprint: str
    names: str
    is_imagenet: bool
    origin: str
    unused: dict[str, int]

    def __len__(self) -> int:
        return len(self.photos)

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
        if found != wanted:
            only = {first: sorted(set(wanted) - set(found)), other: sorted(set(found) - set(wanted))}
            raise EffnetlibError(
                f"the classes of {place} differ: "
                f"{'; '.join(f'only {split} has {_some(names)}' for split, names in only.items() if names)} (for a class "
                "without photographs to evaluate on, make an empty folder)"
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

    def find(self) -> Listing | None:
        root = self.root
        for path in (root, *(root / name for name in (*TARS.values(), *BESIDE))):
            if path.exists():
                self.changed[path] = path.stat().st_mtime_ns
        if (root / SKIP).is_file():
            lines = (root / SKIP).read_bytes().decode(errors="surrogateescape").splitlines()
            self.skip = {str(root / line.partition("\t")[0]) for line in lines if line.strip()}
        tars = {split: root / name for split, name in TARS.items() if (root / name).is_file()}
        kaggle = [base for base in (root / "ILSVRC/Data/CLS-LOC", root / "Data/CLS-LOC") if base.is_dir()]
        bases = [root] if tars else kaggle or self._bases()
        if len(bases) > 1:
            raise EffnetlibError(f"{root} holds several data sets: name one of {', '.join(map(str, bases))}")
        if not bases:
            return None
        places = tars or self._places(bases[0])
        used = {place.name for place in places.values()} | set(BESIDE)
        self.unused.update(beside(root, bases[0], used.__contains__))
        classes = _numbered(self._classes(places["train"])) if "train" in places else []
        if "test" in places:
            self._settle_test(bases[0], places, classes)
        if self.split not in places:
            there = in_words(self.unused + Counter(map(self._where, places.values())))
            wanted = ({**WANTED, **TARS} if tars else WANTED)[self.split]
            raise MissingSplit(f"{bases[0]} has no {self.split} split (seen: {there}): wanted is {wanted}")
        return self._listing(places[self.split], classes, bool(tars or kaggle))

    def _bases(self) -> list[Path]:
        folders = self._scan(self.root)[0]
        if any(split_of(entry.name) for entry in folders):
            return [self.root]
        likely = [e for e in folders if len(folders) == 1 or e.name.lower() in ("images", "data", "dataset")]
        return [Path(e.path) for e in likely if any(split_of(i.name) == "train" for i in self._scan(Path(e.path))[0])]

    def _places(self, base: Path) -> dict[str, Path]:
        places: dict[str, Path] = {}
        for entry in self._scan(base)[0]:
            if kind := split_of(entry.name):
                if kind in places:
                    both = f"{shown(places[kind].name)} and {shown(entry.name)}"
                    raise EffnetlibError(
                        f"{base} has {both}, and each could be the {kind} split: leave one of them there"
                    )
                places[kind] = Path(entry.path)
        return places

    def _settle_test(self, base: Path, places: dict[str, Path], classes: list[str]) -> None:
        """Takes `test` out of `places` where its folders are no classes; makes it "eval" where nothing else could be."""
        inside, *files = self._open(places["test"])
        names = {entry.name for entry in inside}
        if not names & set(classes or names):
            test = places.pop("test")
            self.unused.update(_tally(self._where(test), sum(files, inside)) or {self._where(test): 0})
            return
        if "eval" in places or self.split == "train":
            return
        test = places["test"]
        if self.split == "test":
            raise MissingSplit(f"{test} is what {self.root} evaluates on: it has no test split beside it")
        near = [entry for folder in {base, self.root} for kind in self._scan(folder) for entry in kind]
        known = {base, *base.parents, *places.values()}
        rivals = {e.name for e in near if e.is_dir() and Path(e.path) not in known and self._may_be_eval(e, classes)}
        archives = (e.name for e in near if e.name.lower().endswith(ARCHIVES))
        rivals |= {name for name in archives if split_of(name.partition(".")[0]) == "eval"}
        if rivals:
            raise EffnetlibError(
                f"{base} has no val folder, and {', '.join(map(shown, sorted(rivals)))} could be evaluated on just as "
                f"{test.name} could: unpack archives, and rename the folder to evaluate on to val"
            )
        places["eval"] = test

    def _may_be_eval(self, folder: os.DirEntry, classes: list[str]) -> bool:
        """Whether a folder, or one in it, holds folders with names of classes, in whatever case."""
        inside = [entry for entry in self._scan(Path(folder.path))[0] if entry.is_dir()]
        below = [entry for place in inside for entry in self._scan(Path(place.path))[0]]
        return not {entry.name.casefold() for entry in inside + below}.isdisjoint(map(str.casefold, classes))

    def _scan(self, folder: Path) -> tuple[list[os.DirEntry], list[os.DirEntry], list[os.DirEntry]]:
        """(folders, photographs, other files), each sorted. A link to nothing is a folder: it cannot be passed over."""
        self.changed[folder] = os.stat(folder).st_mtime_ns
        folders, photos, others = [], [], []
        with os.scandir(folder) as entries:
            for entry in sorted((e for e in entries if not e.name.startswith(JUNK)), key=lambda entry: entry.name):
                lost = entry.is_symlink() and not os.path.exists(entry.path)
                if entry.name.lower().endswith(SUFFIXES) and (entry.is_file() or lost):
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

    def _classes(self, place: Path) -> Iterable[str]:
        return _archived(place, inside=False)[0] if place.is_file() else (e.name for e in self._open(place)[0])

    def _keep(self, name: str) -> bool:
        if name in self.skip:
            self.skipped.add(name)
        return name not in self.skip

    def _files(self, entries: Iterable[os.DirEntry]) -> list[tuple]:
        return [(e.name, e.path, e.path, e.stat().st_size, 0) for e in entries if self._keep(e.path)]

    def _groups(self, place: Path) -> tuple[dict[str, list[tuple]], list[tuple]]:
        """The photographs of a split by class, and those in no class, each (file name, name, path, bytes, offset)."""
        if place.is_file():
            groups, loose = _archived(place)
            groups = {name: [file for file in files if self._keep(file[1])] for name, files in groups.items()}
            return groups, [file for file in loose if self._keep(file[1])]
        groups, where = {}, self._where(place)
        folders, loose, others = self._open(place)
        for entry in folders:
            nested, found, rest = self._open(Path(entry.path))
            if not found:
                if self.split == "train":
                    raise EffnetlibError(
                        f"the class folder {entry.path} holds no {', '.join(SUFFIXES)} (seen: {seen(Path(entry.path))}): "
                        "fill it, or take it away"
                    )
                self.unused[f"{where}{entry.name}/"] = 0
            groups[entry.name] = self._files(found)
            self.unused.update(_tally(f"{where}**/", nested + rest))
        self.unused.update(_tally(where, (entry for entry in others if entry.name != ANNOTATIONS)))
        return groups, self._files(loose)

    def _listing(self, place: Path, classes: list[str], is_imagenet: bool) -> Listing:
        groups, loose = self._groups(place)
        if loose and self.split == "eval" and not any(groups.values()):
            class_of = _validation_labels(self.root, place, [name for name, *_ in loose], classes)
            class_names, groups = classes or sorted(set(class_of.values())), {}
            for file in loose:
                groups.setdefault(class_of[file[0]], []).append(file)
        else:
            class_names = _numbered(groups)
            self.unused.update(self._where(place) + _kind(name) for name, *_ in loose)
        photos = [
            Photo(name, label, path, size, offset)
            for label, class_name in enumerate(class_names)
            for _, name, path, size, offset in sorted(groups.get(class_name, ()))
        ]
        if not photos:
            there = f" in class folders (seen: {seen(place)}): wanted is CLASS/*.jpg in it" if place.is_dir() else ""
            raise EffnetlibError(f"{place} holds no photographs{there}")
        if strays := sorted(name for name in self.skip - self.skipped if name.startswith(f"{place}/")):
            raise EffnetlibError(f"{self.root / SKIP} names {strays[0]}, which is no photograph: take the line out")
        if self.skipped:
            self.unused[f"photographs that {SKIP} names"] = len(self.skipped)
        fingerprint, names = hashlib.sha256(), hashlib.sha256()
        for photo in photos:
            name = f"{class_names[photo.label]}/{photo.file_name}"
            fingerprint.update(f"{name} {photo.size}\n".encode())
            names.update(f"{name}\n".encode())
        return Listing(
            class_names=tuple(class_names),
            photos=photos,
            fingerprint=fingerprint.hexdigest()[:16],
            names=names.hexdigest()[:16],
            is_imagenet=is_imagenet or (len(class_names) == WHOLE and all(map(WNID.fullmatch, class_names))),
            origin=self._where(place),
            unused=dict(self.unused),
        )


def _numbered(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: that of the numbers where all are whole numbers, else as text is sorted."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _archived(path: Path, inside: bool = True) -> tuple[dict[str, list[tuple]], list[tuple]]:
    """What `_Walk._groups` says of an archive: each archive in it is a class, which is read only if `inside`."""
    groups, loose = {}, []

    def files(archive, prefix, offset, into):
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name.endswith(".tar"):
                class_name = name.removesuffix(".tar")
                groups[class_name] = []
                if inside:
                    with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                        files(inner, f"{prefix}/{class_name}", member.offset_data, groups[class_name])
            elif member.isfile() and name.lower().endswith(SUFFIXES):
                into.append((name, f"{prefix}/{name}", str(path), member.size, offset + member.offset_data))
            archive.members.clear()  # or it keeps a million of them

    try:
        with tarfile.open(path, "r:") as outer:
            files(outer, path, 0, loose)
    except tarfile.TarError as error:
        raise EffnetlibError(f"{path} is damaged, or not whole: {error}") from None
    return groups, loose


# Labels of a flat validation split


def _validation_labels(root: Path, place: Path, names: list[str], classes: list[str]) -> dict[str, str]:
    """The class of each file name in `place`.

    Raises:
      EffnetlibError: no file of labels was found, or it cannot be read, or does not fit the photographs or the classes.
    """
    tables = [(place / ANNOTATIONS, _from_table), *((root / name, _from_table) for name in BESIDE[:2])]
    known = None
    for path, labels in (*tables, (root / f"{DEVKIT}.tar.gz", _from_kit)):
        if path.is_file():
            try:
                known = labels(path)
            except Exception as error:  # text that is none, a damaged archive or matrix: each library has its own kinds
                raise EffnetlibError(f"the validation labels in {path} cannot be read: {first_line(error)}") from None
            break
    if known is None:
        wanted = f"wanted is {place.name}/CLASS/*.jpg with the classes of train" + f" ({_some(classes)})" * bool(
            classes
        )
        if names[0].startswith("ILSVRC2012_val_"):
            wanted = f"put {SOLUTION} (Kaggle) or {DEVKIT}.tar.gz (official) into {root}"
        raise EffnetlibError(
            f"the {len(names):,} photographs in {place} lie in no class folders, and nothing says what they show: {wanted}"
        )
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
    return {f"ILSVRC2012_val_{n:08}": wnids[int(number)] for n, number in enumerate(truth.split(), 1)}
