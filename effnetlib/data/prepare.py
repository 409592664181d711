"""From photographs in any layout to ArrayRecord shards with a manifest, and the check of such a folder.

A shard is written beside its final name and renamed when it is whole; then a line of a journal says what is in it. So a run
that was killed goes on where it stood, and nothing that is there is ever damaged. The manifest comes last.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from effnetlib.data import photographs
from effnetlib.data.images import Unreadable, read
from effnetlib.data.photographs import FORMATS, SPLIT_NAMES, Listing, MissingSplit, Photo
from effnetlib.data.shards import JOURNAL, MANIFEST, SCHEMA, encode_record, read_manifest, shard_order
from effnetlib.errors import EffnetlibError, FailedError, first_line
from effnetlib.runs.files import exclusive_lock, write_atomically
from effnetlib.runs.machine import usable_cores
from effnetlib.runs.progress import Progress

IMAGENET = {"train": 1_281_167, "eval": 50_000}
IMAGENET_SHARDS = {"train": 1024, "eval": 128}  # the reference's
PHOTOGRAPHS_A_SHARD = 1250
KEPT = ("JPEG", "PNG")  # formats whose bytes go into shards as they are


class Refused(Exception):
    """Why a photograph goes into no shard; `convertible` if a JPEG can be made of it."""

    def __init__(self, reason: str, convertible: bool = False):
        super().__init__(reason)
        self.convertible = convertible


def accept(photo: Photo, convert: bool) -> tuple[bytes, bool]:
    """The bytes of a photograph for a shard, and whether `convert` made them, after it was decoded as a whole.

    They are those of the file. `convert` makes an RGB JPEG of the best quality where shards do not hold the format, as the
    reference's script does of PNG and CMYK; a JPEG stays as it is.

    Raises:
      Refused: it is unreadable, CMYK, of a format that its name does not say, or of one that shards do not hold.
    """
    try:
        encoded = photo.read()
        kind, pixels = read(encoded)
    except EffnetlibError as error:
        raise Refused(str(error)) from None
    except Unreadable as error:
        raise Refused(f"unreadable, or cut off ({error})" if encoded else "an empty file") from None
    named = FORMATS[Path(photo.name).suffix.lower()]
    if kind == named and kind in KEPT:
        return encoded, False
    if not convert:
        posing = "a CMYK photograph" if kind.startswith("CMYK") else f"a {kind} posing as a {named}"
        raise Refused(f"a {kind}" if kind == named else posing, convertible=True)
    if kind == "JPEG":
        return encoded, True
    try:
        Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG", quality=100, subsampling=0)
    except Exception as error:  # too wide for a JPEG, or for the memory
        raise Refused(f"no JPEG can be made of it ({first_line(error)})") from None
    return out.getvalue(), True


@dataclass(frozen=True)
class _Shard:
    split: str
    file: str
    places: list[int]  # of its photographs in canonical order
    photos: list[Photo]
    members: str  # a hash of their names and sizes


def prepare(
    source: Path, dest: Path, *, convert: bool = False, partial: bool = False, skip_unreadable: bool = False
) -> dict:
    """Writes the photographs of every split of `source` into ArrayRecord shards in `dest`; returns the manifest.

    Running it again goes on where it stopped, writes what is missing, and adds splits that are new in the source.

    Args:
      source: a folder in any layout of `effnetlib.data.photographs`.
      dest: the folder to write; made if need be.
      convert: make RGB JPEGs of photographs that are no JPEG or PNG, or CMYK, or of another format than their name says;
        otherwise they are refused.
      partial: take an ImageNet that is not whole.
      skip_unreadable: leave out what cannot be read. The manifest names it, and the fingerprint is of what is left.

    Raises:
      EffnetlibError: the source is none, or lacks something; `dest` holds something else, or lies where the source's
        photographs are, or another process is writing to it.
      FailedError: photographs are refused (all are named), or there is no room.
    """
    listings = _list(source, partial)
    for listing in listings.values():
        listing.unused.pop(os.path.relpath(dest, source) + "/", None)
    taken = {name for names in SPLIT_NAMES.values() for name in names}
    taken |= {listing.origin.partition("/")[0] for listing in listings.values()}
    if any(dest.resolve().is_relative_to((source / name).resolve()) for name in taken):
        raise EffnetlibError(f"{dest} lies among the photographs of {source}: name a folder beside them")
    try:
        with exclusive_lock(dest, "preparing"):
            return _prepare(dest, listings, convert, skip_unreadable)
    except OSError as error:
        raise FailedError(
            f"{error.filename or dest} could not be written ({error.strerror}): once that is mended, the same command goes on"
        ) from None


def _list(source: Path, partial: bool) -> dict[str, Listing]:
    if not source.is_dir():
        raise EffnetlibError(f"there is no folder {source}")
    listings, missing = {}, {}
    for split in SPLIT_NAMES:
        try:
            listings[split] = photographs.list_photographs(source, split)
        except MissingSplit as error:
            missing[split] = error
    if None in listings.values():
        raise EffnetlibError(
            f"{source} is no layout of photographs (seen: {photographs.seen(source)}): wanted are {photographs.TARS['train']}, "
            "ILSVRC/Data/CLS-LOC, or train/CLASS/*.jpg in it"
        )
    if "train" in missing and not (partial and listings):
        raise missing["train"]
    if not partial and listings["train"].is_imagenet:
        for split, wanted in IMAGENET.items():
            if split in missing:
                raise EffnetlibError(f"{missing[split]}: complete it, or take what is there with --partial")
            if len(listings[split]) != wanted:
                raise EffnetlibError(
                    f"{source} should hold the {wanted:,} photographs of ImageNet's {split} split, and holds "
                    f"{len(listings[split]):,}: complete it, or take what is there with --partial"
                )
    photographs.check_classes(source, {split: listing.class_names for split, listing in listings.items()})
    return listings


def _divide(split: str, listing: Listing) -> Iterator[_Shard]:
    count, order = len(listing), shard_order(len(listing)).tolist()
    of = (listing.is_imagenet and IMAGENET_SHARDS.get(split)) or max(1, -(-count // PHOTOGRAPHS_A_SHARD))
    for number in range(of):
        places = order[count * number // of : count * (number + 1) // of]
        photos = [listing.photos[place] for place in places]
        text = "\n".join(f"{photo.label}/{photo.file_name} {photo.size}" for photo in photos)
        members = hashlib.sha256(text.encode()).hexdigest()[:32]
        yield _Shard(split, f"{split}-{number:05}-of-{of:05}.array_record", places, photos, members)


def _prepare(dest: Path, listings: dict[str, Listing], convert: bool, skip_unreadable: bool) -> dict:
    shards = [shard for split, listing in listings.items() for shard in _divide(split, listing)]
    before = read_manifest(dest)["splits"] if (dest / MANIFEST).is_file() else {}
    if any(split not in listings or listings[split].fingerprint != before[split]["listing"] for split in before):
        raise EffnetlibError(f"{dest} holds another data set: name another folder, or delete that one")
    known = {about["file"]: about for split in before.values() for about in split["shards"]}
    journal = dest / JOURNAL
    for line in journal.read_text().splitlines() if journal.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a crash cut the line off: its shard is made again
            about = json.loads(line)
            known[about["file"]] = about
    journal.touch()
    for leftover in dest.glob(".*-?????-of-?????.array_record*"):
        leftover.unlink()

    def is_whole(shard):
        path, about = dest / shard.file, known.get(shard.file)
        return about and about["members"] == shard.members and path.is_file() and path.stat().st_size == about["bytes"]

    todo = [shard for shard in shards if not is_whole(shard)]
    needed, free = sum(photo.size for shard in todo for photo in shard.photos), shutil.disk_usage(dest).free
    if needed > free:
        raise FailedError(f"the shards need {needed / 2**30:.1f} GiB, and {dest} has {free / 2**30:.1f} GiB free")
    refused = []
    write = functools.partial(_write_shard, dest, convert=convert, skip_unreadable=skip_unreadable)
    for shard, (about, wrong) in _each(todo, [len(shard.photos) for shard in todo], write):
        known[shard.file] = about
        refused += wrong
    if refused:
        _refuse(dest / "refused.txt", refused)
    (dest / "refused.txt").unlink(missing_ok=True)
    splits = {
        split: _describe(listing, [known[shard.file] for shard in shards if shard.split == split])
        for split, listing in listings.items()
    }
    manifest = {
        "schema": SCHEMA,
        "unused": {kind: count for listing in listings.values() for kind, count in listing.unused.items()},
        "splits": splits,
        "classes": list(next(iter(listings.values())).class_names),
    }
    write_atomically(dest / MANIFEST, json.dumps(manifest) + "\n")
    # Of an earlier, unfinished preparation of fewer or more photographs. What else lies there is not ours.
    for stale in known.keys() - {shard.file for shard in shards}:
        (dest / stale).unlink(missing_ok=True)
    journal.unlink()
    return manifest


def _describe(listing: Listing, shards: list[dict]) -> dict:
    """What the manifest says of a split."""
    skipped = {place for about in shards for place, *_ in about.get("skipped", ())}
    labels = [photo.label for place, photo in enumerate(listing.photos) if place not in skipped]
    return {
        "examples": len(labels),
        "examples_a_class": np.bincount(labels, minlength=len(listing.class_names)).tolist(),
        "fingerprint": hashlib.sha256("".join(about["records"] for about in shards).encode()).hexdigest()[:16],
        "listing": listing.fingerprint,
        "origin": listing.origin,
        "shards": shards,
    }


def _each(shards: list, sizes: list[int], work) -> Iterator[tuple]:
    """(shard, `work(shard)`), in threads, with the progress in photographs."""
    progress, seen = Progress(sum(sizes), 0, 1, unit="photograph"), 0
    with ThreadPoolExecutor(usable_cores()) as pool:
        try:
            for shard, size, done in zip(shards, sizes, pool.map(work, shards), strict=True):
                yield shard, done
                seen += size
                progress.update(seen)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _refuse(path: Path, refused: list[tuple[str, Refused]]) -> None:
    text = "".join(f"{name}\t{reason}\n" for name, reason in refused)
    write_atomically(path, text.encode(errors="surrogateescape"))  # names as the disk has them
    hints = [
        ("--convert makes JPEGs", any(reason.convertible for _, reason in refused)),
        (
            "replace what is unreadable, or leave it out with --skip-unreadable",
            any(not r.convertible for _, r in refused),
        ),
    ]
    named = "; ".join(f"{name}: {reason}" for name, reason in refused[:10])
    more = f"; and {len(refused) - 10} more" if len(refused) > 10 else ""
    raise FailedError(
        f"{len(refused)} photographs are refused, all listed in {path} ({'; '.join(hint for hint, due in hints if due)}): "
        f"{named}{more}"
    )


def _write_shard(dest: Path, shard: _Shard, *, convert: bool, skip_unreadable: bool) -> tuple[dict, list]:
    """Writes one shard, and into the journal what the manifest is to say of it. Returns that, and (name, reason) of each
    photograph that is refused: then there is no shard."""
    temporary, path = dest / f".{shard.file}", dest / shard.file
    refused, skipped, converted, records = [], [], [], hashlib.sha256()
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for place, photo in zip(shard.places, shard.photos, strict=True):
            try:
                encoded, is_converted = accept(photo, convert)
            except Refused as reason:
                if skip_unreadable and not reason.convertible:
                    skipped.append((place, photo.name, str(reason)))
                else:
                    refused.append((photo.name, reason))
                continue
            if is_converted:
                converted.append(photo.name)
            record = encode_record(encoded, photo.label, photo.file_name)
            records.update(hashlib.sha256(record).digest())
            writer.write(record)
        writer.close()
        if refused:
            temporary.unlink()
            return {}, refused
        reader = ArrayRecordReader(str(temporary))
        if reader.num_records() != len(shard.photos) - len(skipped):
            raise OSError(f"{reader.num_records()} of {len(shard.photos) - len(skipped)} records arrived")
        reader.close()
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise FailedError(
            f"the shard {path} could not be written ({reason}): once that is mended, the same command goes on"
        ) from None
    about = {
        "file": shard.file,
        "examples": len(shard.photos) - len(skipped),
        "bytes": temporary.stat().st_size,
        "sha256": _sha256(temporary),
        "records": records.hexdigest()[:32],
        "members": shard.members,
        "converted": converted,
        "skipped": skipped,
    }
    os.replace(temporary, path)
    with open(dest / JOURNAL, "a") as journal:
        journal.write(f"\n{json.dumps(about)}")  # first the line's end, which a crash may have cut off
    return about, []


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(dest: Path) -> list[str]:
    """Reads every shard of a prepared folder and compares it with the manifest; returns what is wrong, a sentence each.

    Raises:
      EffnetlibError: there is no readable manifest.
    """
    if not (dest / MANIFEST).is_file():
        hint = "its preparation did not end: run it again" if (dest / JOURNAL).exists() else "prepare it first"
        raise EffnetlibError(f"{dest} has no {MANIFEST}: {hint}")
    shards = [shard for about in read_manifest(dest)["splits"].values() for shard in about["shards"]]

    def problem(shard):
        path = dest / shard["file"]
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != shard["bytes"] or _sha256(path) != shard["sha256"]:
            return f"{path} is damaged: its bytes are not those that were written"
        return None

    return [wrong for _, wrong in _each(shards, [shard["examples"] for shard in shards], problem) if wrong]
