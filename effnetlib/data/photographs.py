"""Layouts of photographs: the usual forms of ImageNet, and any folder of the form `split/class/*.jpg`.

* The official archives: `ILSVRC2012_img_train.tar` (one tar per class inside), `ILSVRC2012_img_val.tar` (flat).
* Folders: `train/CLASS/*` and `val/CLASS/*` (or `valid`, `dev`, …; see `split_of`). They may lie one level down, or as in
  Kaggle's competition. A folder `images` in between is allowed. `test` is the evaluation split if nothing else could be.

A flat validation split takes its labels from Kaggle's table, Tiny ImageNet's table, or ImageNet's development kit. Classes
are numbered in the sorted order of their names, or by number if all names are whole numbers. Unused files and folders are
counted. `skip.txt` beside the splits names photographs to leave out, one path per line.
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from effnetlib.data.split import Split, shown
from effnetlib.data.workers import Packed
from effnetlib.errors import EffnetlibError, first_line
from effnetlib.runs.progress import at_work, say

# The format of each suffix.
FORMATS = dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG") | dict.fromkeys((".tif", ".tiff"), "TIFF")
FORMATS |= {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
SUFFIXES = tuple(FORMATS)
SPLIT_NAMES = {
    "train": ("train", "training"),
    "eval": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
ANNOTATIONS = "val_annotations.txt"  # the labels of Tiny ImageNet
# Prefixes of ignored names: files of operating systems, and that table.
JUNK = (".", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "$Recycle.Bin", ANNOTATIONS)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
WNID = re.compile(r"n\d{8}")
WHOLE = 1000  # classes of the full ImageNet
TARS = {"train": "ILSVRC2012_img_train.tar", "eval": "ILSVRC2012_img_val.tar"}
KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
DEVKIT = "ILSVRC2012_devkit_t12"
SOLUTION = "LOC_val_solution.csv"
SKIP = "skip.txt"
BESIDE = (SOLUTION, f"ILSVRC/{SOLUTION}", f"{DEVKIT}.tar.gz", SKIP)
WANTED = {
    "train": "train/CLASS/*.jpg",
    "eval": "val/CLASS/*.jpg with the classes of train, or the setting subset=minival, which holds out a part of train",
    "test": "test/CLASS/*.jpg with the classes of train",
}


LISTING_THREADS = 32
LOOSE_FILES = 50_000  # beyond it, reading one by one over a network is warned of
NETWORK = ("fuse", "nfs", "cifs", "smb", "9p", "ceph", "lustre")


class MissingSplit(EffnetlibError):
    """The layout is recognised, but it lacks this split."""


class Photo(NamedTuple):
    """One file (`offset` 0), or a part of an archive. `name` is its full path; `size` is its bytes when listed."""

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


class _Files:
    """Reads photographs by index: bytes, label and name."""

    def __init__(self, photos: Sequence[Photo]):
        self.photos = photos

    def __call__(self, index: int) -> tuple[bytes, int, str]:
        photo = self.photos[index]
        return photo.read(), photo.label, photo.name

    def __getstate__(self):
        return {"photos": Packed(self.photos)}  # one copy for all worker processes


def split_of(name: str) -> str | None:
    """The split that a folder (or TFDS split) of this name holds; None if it is not the name of a split.

    >>> split_of("Training_Set"), split_of("valid"), split_of("TEST"), split_of("extras")
    ('train', 'eval', 'test', None)
    """
    stem = re.sub(r"[-_ ]?(set|split|data|images)$", "", name.lower())
    return next((split for split, names in SPLIT_NAMES.items() if stem in names), None)


def in_words(counts: dict[str, int]) -> str:
    """Counts as words for a sentence.

    >>> in_words({"extras/": 1, "valid/**/*.gif": 12})
    'extras/, valid/**/*.gif (12)'
    """
    words = [shown(name) + (f" ({count:,})" if count != 1 else "") for name, count in sorted(counts.items())]
    return ", ".join(words[:8]) + (f" and {len(words) - 8:,} kinds more" if len(words) > 8 else "") or "nothing"


def _some(names: Iterable[str]) -> str:
    words = [shown(name) if name.isascii() else f"{name} ({name!a})" for name in names]
    return ", ".join(words[:5]) + ", …" * (len(words) > 5)


def check_classes(place: object, classes: dict[str, tuple[str, ...]]) -> None:
    """Raises an error if the splits have different classes. `classes` maps splits to class names."""
    (first, wanted), *others = classes.items()
    for other, found in others:
        only = {first: sorted(set(wanted) - set(found)), other: sorted(set(found) - set(wanted))}
        if differ := "; ".join(f"only {split} has {_some(names)}" for split, names in only.items() if names):
            hint = "for a class without photographs to evaluate on, make an empty folder"
            raise EffnetlibError(f"the classes of {place} differ: {differ} ({hint})")


_LISTINGS: dict[tuple[Path, str], tuple[dict[Path, int], Split]] = {}


def list_photographs(root: Path, split: str) -> Split | None:
    """Lists a split ("train", "eval" or "test") of the data set at `root`, ordered by class and name.
    Returns None if no layout is recognised. No photograph is opened. `unused` is like `{"valid/**/*.gif": 12, "extras/": 1}`.

    Listing a million files takes minutes. So the last three listings are cached until a folder that was read changes.
    (Overwriting a file changes no folder. Then only its size in the listing is old.)

    Raises:
      MissingSplit: a layout is recognised, but it lacks this split.
      EffnetlibError: something in the layout is missing or wrong.
    """
    mtimes, listing = _LISTINGS.get((root, split), ({}, None))
    with contextlib.suppress(OSError):
        if listing and all(os.stat(place).st_mtime_ns == mtime for place, mtime in mtimes.items()):
            return listing
    began = time.time_ns()
    try:
        with ThreadPoolExecutor(LISTING_THREADS) as threads, at_work(f"listing {root}"):
            walk = _Walk(root, split, threads)
            listing = walk.find()
    except UnicodeError as error:
        raise EffnetlibError(f"a file in {root} has a name or a text that is not UTF-8: {error}") from None
    except tarfile.TarError as error:
        raise EffnetlibError(f"an archive in {root} is damaged, or not whole: {error}") from None
    except OSError as error:
        raise EffnetlibError(f"{error.filename or root} cannot be read: {error.strerror}") from None
    if listing and len(listing) > LOOSE_FILES and (kind := mounted_by(root)):
        say(
            f"{root} holds {len(listing):,} loose photographs on a mounted {kind}, which reads them one by one over the network: "
            "`effnetlib data prepare` writes them into shards, and a copy of those on a local disk is read many times as fast"
        )
    # File times have steps of up to 10 ms: a second change within a step is invisible. So fresh folders are not cached.
    if listing and began - max(walk.mtimes.values()) > 100_000_000:
        _LISTINGS[root, split] = walk.mtimes, listing
        for oldest in list(_LISTINGS)[:-3]:
            del _LISTINGS[oldest]
    return listing


def mounted_by(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of the file system at `folder` if it lies behind a network or FUSE, such as "fuse.gcsfuse"; else empty."""
    kinds = {}
    with contextlib.suppress(OSError):  # no such table outside Linux
        for line in mounts.read_text().splitlines():
            _, place, kind, *_ = line.split()
            kinds[Path(place.replace("\\040", " "))] = kind
    folder = folder.resolve()
    kind = next((kinds[place] for place in (folder, *folder.parents) if place in kinds), "")
    return kind if kind.startswith(NETWORK) and kind != "fuseblk" else ""  # that is a local disk


def seen(folder: Path) -> str:
    """The content of a folder, in words."""
    return in_words(beside(folder, folder, lambda _: False))


def beside(root: Path, base: Path, used: Callable[[str], object]) -> Counter:
    """Counts what lies in the folders from `root` to `base`, except the path to `base` and names that are `used(name)`."""
    counts, place, where = Counter(), root, ""
    for step in (*base.relative_to(root).parts, None):
        with os.scandir(place) as entries:
            others = [e for e in entries if e.name != step and not e.name.startswith(JUNK) and not used(e.name)]
            folders, files = ([e.name for e in others if e.is_dir() is is_folder] for is_folder in (True, False))
            counts += _tally(where, folders, (), files)
        if step:
            place, where = place / step, f"{where}{step}/"
    return counts


def _tally(where: str, folders: Iterable[str], photos: Iterable[Photo], others: Iterable[str]) -> Counter:
    """Counts folders by name and files by suffix."""
    files = (os.path.splitext(name)[1].lower() for name in (*(photo.name for photo in photos), *others))
    kinds = [*(f"{name}/" for name in folders), *(f"*{suffix or ' without a suffix'}" for suffix in files)]
    return Counter(where + kind for kind in kinds)


class _Place(NamedTuple):
    """A folder, or an archive that begins at `offset` of the file `tar`. Then `path` is only its name."""

    path: Path
    tar: Path | None = None
    offset: int = 0


class _Walk:
    """Makes one listing. Collects modification times, counts of unused files, and the photographs that `skip.txt` names."""

    def __init__(self, root: Path, split: str, threads: ThreadPoolExecutor):
        self.root, self.split, self.threads = root, split, threads
        self.mtimes: dict[Path, int] = {}
        self.unused: Counter = Counter()
        self.skip: set[str] = set()
        self.skipped: set[str] = set()

    def find(self) -> Split | None:
        root = self.root
        for path in (root, *(root / name for name in (*TARS.values(), *BESIDE))):
            if path.exists():
                self.mtimes[path] = path.stat().st_mtime_ns
        if (root / SKIP) in self.mtimes:
            lines = (root / SKIP).read_bytes().decode(errors="surrogateescape").splitlines()
            self.skip = {str(root / line.partition("\t")[0]) for line in lines if line.strip()}
        folders = self._scan(_Place(root))[0]
        inner = [name for name in folders if len(folders) == 1 or name.lower() in ("images", "data", "dataset")]
        bases = [base for base in (root, *(root / name for name in (*KAGGLE, *inner))) if base.is_dir()]
        found = {base: self._places(base) for base in bases}
        tars = {split: _Place(root / name, root / name) for split, name in TARS.items() if (root / name).is_file()}
        found = {root: tars or found[root]} if tars or found[root] else {base: at for base, at in found.items() if at}
        if len(found) > 1:
            raise EffnetlibError(f"{root} holds several data sets: name one of {', '.join(map(str, found))}")
        if not found:
            return None
        ((base, places),) = found.items()
        used = {place.path.name for place in places.values()} | set(BESIDE)
        self.unused.update(beside(root, base, used.__contains__))
        classes = _numbered(self._open(places["train"])[0]) if "train" in places else []
        if "test" in places:
            self._settle_test(base, places, classes)
        if self.split not in places:
            there = in_words(self.unused + Counter(map(self._where, places.values())))
            wanted = (WANTED | (TARS if tars else {}))[self.split]
            raise MissingSplit(f"{base} has no {self.split} split (seen: {there}): wanted is {wanted}")
        return self._listing(places[self.split], classes)

    def _places(self, base: Path) -> dict[str, _Place]:
        places: dict[str, _Place] = {}
        for name, place in self._scan(_Place(base))[0].items():
            if (kind := split_of(name)) in places:
                both = f"{shown(places[kind].path.name)} and {shown(name)}"
                raise EffnetlibError(f"{base} has {both}, and each could be the {kind} split: leave one of them there")
            places |= {kind: place} if kind else {}
        return places

    def _settle_test(self, base: Path, places: dict[str, _Place], classes: list[str]) -> None:
        """Removes `test` from `places` if its folders are not classes. Makes it "eval" if nothing else could be."""
        test = places["test"]
        folders, photos, others = self._open(test)
        if not folders.keys() & set(classes or folders):
            del places["test"]
            where = self._where(test)
            self.unused.update(_tally(where, folders, photos, others) or {where: 0})
        elif "eval" not in places and self.split == "test":
            raise MissingSplit(f"{self.root} evaluates on {test.path}: it has no test split beside it")
        elif "eval" not in places and self.split == "eval":
            rivals, lower = set(), set(map(str.casefold, classes))
            known = {base, *base.parents, *(place.path for place in places.values())}
            for folders, _, files in map(self._scan, (_Place(self.root), _Place(base))):
                for name, place in folders.items():
                    inside = self._open(place)[0] if place.path not in known and place.path.is_dir() else ()
                    if any(inner.casefold() in lower or split_of(inner) == "eval" for inner in inside):
                        rivals.add(name)
                archives = (name for name in files if name.lower().endswith(ARCHIVES))
                rivals |= {name for name in archives if split_of(name.partition(".")[0]) == "eval"}
            if rivals:
                could = f"{', '.join(map(shown, sorted(rivals)))} could be evaluated on just as {test.path.name} could"
                hint = "unpack archives, and rename the folder to evaluate on to val"
                raise EffnetlibError(f"{base} has no val folder, and {could}: {hint}")
            places["eval"] = test

    def _scan(self, place: _Place) -> tuple[dict[str, _Place], list[Photo], list[str]]:
        """(folders, photographs without their labels, names of other files), in sorted order for a folder.

        A broken link counts as a folder or a photograph. It is not ignored: reading it raises an error with its name.
        """
        if place.tar:
            return self._scan_archive(place)
        self.mtimes[place.path] = os.stat(place.path).st_mtime_ns
        folders, photos, others = {}, [], []
        with os.scandir(place.path) as entries:
            entries = sorted((e for e in entries if not e.name.startswith(JUNK)), key=lambda entry: entry.name)
            # An entry keeps its status. A mounted bucket needs a request for each.
            tasks = min(LISTING_THREADS, len(entries))
            list(self.threads.map(_find_status, (entries[i::tasks] for i in range(tasks))))
            for entry in entries:
                lost = entry.is_symlink() and not os.path.exists(entry.path)
                if entry.name.lower().endswith(SUFFIXES) and (entry.is_file() or lost):  # no pipe or socket
                    if self._keep(entry.path):
                        photos.append(Photo(entry.path, 0, entry.path, entry.stat().st_size))
                elif entry.is_dir() or lost:
                    folders[entry.name] = _Place(place.path / entry.name)
                else:
                    others.append(entry.name)
        return folders, photos, others

    def _scan_archive(self, place: _Place) -> tuple[dict[str, _Place], list[Photo], list[str]]:
        folders, photos, others = {}, [], []
        with open(place.tar, "rb") as file:
            file.seek(place.offset)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    path = place.path / member.name.rpartition("/")[2]
                    if path.suffix == ".tar":  # an archive in an archive is a folder
                        folders[path.stem] = _Place(place.path / path.stem, place.tar, member.offset_data)
                    elif member.isfile() and path.name.lower().endswith(SUFFIXES) and self._keep(str(path)):
                        photos.append(Photo(str(path), 0, str(place.tar), member.size, member.offset_data))
                    archive.members.clear()  # else a million members stay in memory
        return folders, photos, others

    def _keep(self, path: str) -> bool:
        if path in self.skip:
            self.skipped.add(path)
        return path not in self.skip

    def _open(self, place: _Place):
        """Like `_scan`. If there is only a folder `images`, and no photograph, scans that (as in Tiny ImageNet)."""
        folders, photos, others = self._scan(place)
        if photos or folders.keys() != {"images"}:
            return folders, photos, others
        folders, photos, more = self._scan(folders["images"])
        return folders, photos, others + more

    def _where(self, place: _Place) -> str:
        return place.path.relative_to(self.root).as_posix() + "/" * (place.tar is None)

    def _listing(self, place: _Place, classes: list[str]) -> Split:
        folders, loose, others = self._open(place)
        groups, where = {}, self._where(place)
        for name, folder in folders.items():
            nested, groups[name], rest = self._open(folder)
            if not groups[name]:
                if self.split == "train":
                    there = f"{', '.join(SUFFIXES)} (seen: {in_words(_tally('', nested, (), rest))})"
                    raise EffnetlibError(f"the class folder {folder.path} holds no {there}: fill it, or remove it")
                self.unused[f"{where}{name}/"] = 0
            self.unused.update(_tally(f"{where}**/", nested, (), rest))
        if loose and self.split == "eval" and not any(groups.values()):
            with contextlib.suppress(OSError):  # there is none
                self.mtimes[place.path / ANNOTATIONS] = (place.path / ANNOTATIONS).stat().st_mtime_ns
            class_of = _validation_labels(self.root, place.path, [photo.file_name for photo in loose], classes)
            groups = {name: [] for name in classes or class_of.values()}
            for photo in loose:
                groups[class_of[photo.file_name]].append(photo)
            loose = []
        if not any(groups.values()):
            there = in_words(_tally("", folders, loose, others))
            raise EffnetlibError(
                f"{place.path} holds no photographs in class folders (seen: {there}): wanted is CLASS/*.jpg in it"
            )
        self.unused.update(_tally(where, (), loose, others))
        inside, rest = f"{self.root}/", self.skip - self.skipped
        if strays := sorted(name for name in rest if name.startswith(f"{place.path}/") or not name.startswith(inside)):
            raise EffnetlibError(f"{self.root / SKIP} names {strays[0]}, which is no photograph here: remove the line")
        if self.skipped:
            self.unused[f"photographs that {SKIP} names"] = len(self.skipped)
        class_names = _numbered(groups)
        photos = [p._replace(label=label) for label, name in enumerate(class_names) for p in sorted(groups[name])]
        names = [f"{class_names[photo.label]}/{photo.file_name}" for photo in photos]
        sizes = [f"{name} {photo.size}" for name, photo in zip(names, photos, strict=True)]
        fingerprint, names = (
            hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()[:16] for lines in (sizes, names)
        )
        about = {"origin": where, "unused": dict(self.unused), "names": names}
        return Split.of_photographs(len(photos), class_names, fingerprint, _Files(photos), **about)


def _find_status(entries: list[os.DirEntry]) -> None:
    for entry in entries:
        with contextlib.suppress(OSError):  # a link to nothing
            entry.stat()


def _numbered(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: numeric if all are whole numbers, else sorted as text."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _validation_labels(root: Path, place: Path, names: list[str], classes: list[str]) -> dict[str, str]:
    """The class of each file name in `place`, a split without class folders.

    Raises:
      EffnetlibError: there is no label file, it cannot be read, or it does not fit the photographs or the classes.
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
    except Exception as error:  # damaged text, archive or matrix: each library raises its own kinds
        raise EffnetlibError(f"the validation labels in {path} cannot be read: {first_line(error)}") from None
    found = {name: known.get(name) or known.get(name.rpartition(".")[0]) for name in names}
    if missing := [name for name in names if not found[name]]:
        raise EffnetlibError(f"{path} has no label for {len(missing):,} of {len(names):,} photographs: {missing[:3]}")
    if classes and (unknown := sorted(set(found.values()) - set(classes))):
        raise EffnetlibError(f"{path} names classes that the training split does not have: {_some(unknown)}")
    return found


def _from_table(path: Path) -> dict[str, str]:
    """Reads a table. Column 1 is the file name, with or without suffix. Column 2 begins with the class."""
    with open(path, newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix == ".txt" else ",")
        return {row[0]: row[1].split()[0] for row in rows if len(row) >= 2 and row[1].split()}


def _from_kit(path: Path) -> dict[str, str]:
    """Reads the development kit. Its n-th number is the class of `ILSVRC2012_val_0000000n`."""
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
