"""Converts photographs in any layout to ArrayRecord shards with a manifest, and checks such a folder.

A shard is written under a temporary name. When it is complete, it is renamed and listed in the manifest. So a killed run
can continue, and existing shards are never damaged.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from effnetlib.data import photographs
from effnetlib.data.images import Unreadable, read
from effnetlib.data.photographs import FORMATS, KAGGLE, SPLIT_NAMES, TARS, MissingSplit, Photo, check_classes
from effnetlib.data.shards import MANIFEST, SCHEMA, UNFINISHED, encode_record, read_manifest, shard_order
from effnetlib.data.split import Split
from effnetlib.errors import EffnetlibError, FailedError, first_line, require
from effnetlib.runs.files import exclusive_lock, write_atomically
from effnetlib.runs.machine import usable_cores
from effnetlib.runs.progress import Progress

IMAGENET = {"train": 1_281_167, "eval": 50_000}
PHOTOGRAPHS_PER_SHARD = 1250
SHARD_FORMATS = ("JPEG", "PNG")  # formats whose bytes go into shards as they are


class Refused(Exception):
    """A photograph is not written to a shard. The message says why."""


class Odd(Refused):
    """The photograph is readable, but in the wrong format. It can be converted to JPEG."""


def accept(photo: Photo, convert: bool) -> tuple[bytes, bool]:
    """(bytes for a shard, whether they were converted). The photograph is decoded whole, to prove that it is readable.

    If shards cannot hold its format, `convert` makes an RGB JPEG of the best quality, as the reference's script does.
    Raises Refused: it is unreadable, CMYK, neither JPEG nor PNG, or its suffix names another format.
    """
    try:
        encoded = photo.read()
        kind, pixels = read(encoded)
    except EffnetlibError as error:
        raise Refused(str(error)) from None
    except Unreadable as error:
        raise Refused(f"unreadable, or cut off ({error})" if encoded else "an empty file") from None
    named = FORMATS[os.path.splitext(photo.name)[1].lower()]
    if (kind in SHARD_FORMATS and kind == named) or (kind == "JPEG" and convert):
        return encoded, False
    if not convert:
        posing = "a CMYK photograph" if kind.startswith("CMYK") else f"a {kind} posing as a {named}"
        raise Odd(f"a {kind}" if kind == named else posing)
    try:
        Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG", quality=100, subsampling=0)
    except Exception as error:  # too wide for a JPEG, or for the memory
        raise Refused(f"no JPEG can be made of it ({first_line(error)})") from None
    return out.getvalue(), True


class _Shard(NamedTuple):
    file: str
    places: list[int]  # positions of its photographs in canonical order
    photos: list[Photo]
    members: str  # hash of their labels, names and sizes


def prepare(
    source: Path, dest: Path, *, convert: bool = False, partial: bool = False, skip_unreadable: bool = False
) -> dict:
    """Writes the photographs of every split of `source` into ArrayRecord shards in `dest`; returns the manifest.

    Running it again continues after a stop, writes missing shards, and adds splits that are new in the source.

    Args:
      source: a folder in any layout of `effnetlib.data.photographs`.
      dest: the folder to write; created if needed.
      convert: make RGB JPEGs of photographs in the wrong format (see `accept`). Else they are refused.
      partial: accept an incomplete ImageNet.
      skip_unreadable: leave out unreadable photographs. The manifest names them; the fingerprint covers the rest.

    Raises:
      EffnetlibError: the source has no known layout, or lacks something. Or `dest` holds another data set, lies among
        the source's photographs, or is being written by another process.
      FailedError: photographs are refused (`refused.txt` names all), or the disk is too small or fails.
    """
    listings = _list(source, partial)
    taken = {name for names in SPLIT_NAMES.values() for name in names}
    taken |= {listing.origin.partition("/")[0] for listing in listings.values()}
    inside = any(dest.resolve().is_relative_to((source / name).resolve()) for name in taken)
    require(not inside, f"{dest} lies among the photographs of {source}: name a folder beside them")
    try:
        with exclusive_lock(dest, "preparing"):
            return _write(dest, listings, os.path.relpath(dest, source) + "/", convert, skip_unreadable)
    except OSError as error:
        failed = f"{error.filename or dest} could not be written ({error.strerror})"
        raise FailedError(f"{failed}: fix this, and run the same command again to continue") from None


def _list(source: Path, partial: bool) -> dict[str, Split]:
    require(source.is_dir(), f"there is no folder {source}")
    listings, missing = {}, {}
    for split in SPLIT_NAMES:
        try:
            listings[split] = photographs.list_photographs(source, split)
        except MissingSplit as error:
            missing[split] = error
    wanted = "wanted are ILSVRC2012_img_train.tar, ILSVRC/Data/CLS-LOC, or train/CLASS/*.jpg in it"
    unknown = f"{source} is no layout of photographs (seen: {photographs.seen(source)}): {wanted}"
    require(None not in listings.values(), unknown)
    if "train" in missing and not (partial and listings):
        raise missing["train"]
    if not partial and _is_imagenet(listings["train"]):
        for split, wanted in IMAGENET.items():
            count = len(listings.get(split, ()))
            short = f"{source} should hold the {wanted:,} photographs of ImageNet's {split} split, and holds {count:,}"
            hint = "complete it, or take what is there with --partial"
            require(count == wanted, f"{missing.get(split, short)}: {hint}")
    check_classes(source, {split: listing.class_names for split, listing in listings.items()})
    return listings


def _is_imagenet(train: Split) -> bool:
    by_name = len(train.class_names) == photographs.WHOLE and all(map(photographs.WNID.fullmatch, train.class_names))
    return by_name or train.origin.startswith((*TARS.values(), *KAGGLE))


def _divide(split: str, photos: list[Photo]) -> Iterator[_Shard]:
    order, of = shard_order(len(photos)).tolist(), -(-len(photos) // PHOTOGRAPHS_PER_SHARD)
    for number in range(of):
        places = order[len(order) * number // of : len(order) * (number + 1) // of]
        members = [photos[place] for place in places]
        text = "\n".join(f"{photo.label}/{photo.file_name} {photo.size}" for photo in members)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        yield _Shard(f"{split}-{number:05}-of-{of:05}.array_record", places, members, digest)


def _write(dest: Path, listings: dict[str, Split], name: str, convert: bool, skip_unreadable: bool) -> dict:
    """Writes the missing shards, and the manifest after each. `name` is the path of `dest` in the source, if inside."""
    shards = {split: list(_divide(split, listing.photos)) for split, listing in listings.items()}
    before = read_manifest(dest)["splits"] if (dest / MANIFEST).is_file() else {}
    for split, about in before.items():
        same = split in listings and listings[split].fingerprint == about["listing"]
        require(same or not about["whole"], f"{dest} holds another data set: name another folder, or delete that one")
    known = {about["file"]: about for split in before.values() for about in split["shards"]}
    done, todo = {}, []
    for shard in itertools.chain(*shards.values()):
        path, about = dest / shard.file, known.pop(shard.file, {})
        if about.get("members") == shard.members and path.is_file() and path.stat().st_size == about["bytes"]:
            done[shard.file] = about
        else:
            todo.append(shard)
    needed, free = sum(photo.size for shard in todo for photo in shard.photos), shutil.disk_usage(dest).free
    if needed > free:
        raise FailedError(f"the shards need {needed / 2**30:.1f} GiB, and {dest} has {free / 2**30:.1f} GiB free")
    manifest = {
        "schema": SCHEMA,
        "unused": {kind: n for listing in listings.values() for kind, n in listing.unused.items() if kind != name},
        "classes": list(next(iter(listings.values())).class_names),
    }

    def save():
        manifest["splits"] = {split: _describe(listings[split], shards[split], done) for split in listings}
        write_atomically(dest / MANIFEST, json.dumps(manifest) + "\n")

    save()
    # Old shards of an unfinished preparation with another number of photographs. Other files are not ours, and stay.
    for stale in (*(dest / file for file in known), *dest.glob(".*-?????-of-?????.array_record*")):
        stale.unlink(missing_ok=True)
    refused = []
    write = functools.partial(_write_shard, dest, convert=convert, skip_unreadable=skip_unreadable)
    for about, wrong in _map_shards(write, todo, [len(shard.photos) for shard in todo]):
        refused += wrong
        if about:
            done[about["file"]] = about
            save()
    (dest / "refused.txt").unlink(missing_ok=True)
    if refused:
        listed = "".join(f"{name}\t{reason}\n" for name, reason in refused)
        write_atomically(dest / "refused.txt", listed.encode(errors="surrogateescape"))  # names may not be UTF-8
        convertible = all(isinstance(reason, Odd) for _, reason in refused)
        hint = "replace them, or leave out unreadable ones with --skip-unreadable"
        hint = "--convert makes JPEGs of them" if convertible else hint
        named = "; ".join(f"{name}: {reason}" for name, reason in refused[:10]) + "; …" * (len(refused) > 10)
        where = f"all listed in {dest / 'refused.txt'} ({hint})"
        raise FailedError(f"{len(refused)} photographs are refused, {where}: {named}")
    return manifest


def _describe(listing: Split, shards: list[_Shard], done: dict[str, dict]) -> dict:
    """The manifest entry of a split: its shards that are done."""
    abouts = [done[shard.file] for shard in shards if shard.file in done]
    return {
        "whole": len(abouts) == len(shards),
        "examples": sum(about["examples"] for about in abouts),
        "fingerprint": hashlib.sha256("".join(about["records"] for about in abouts).encode()).hexdigest()[:16],
        "listing": listing.fingerprint,
        "origin": listing.origin,
        "shards": abouts,
    }


def _map_shards(work, shards: list, sizes: list[int]) -> Iterator:
    """Yields `work(shard)` per shard, from threads. Shows the progress; `sizes` are photographs per shard."""
    progress, done, pool = Progress(sum(sizes), 0, 1, unit="photograph"), 0, ThreadPoolExecutor(usable_cores())
    try:
        for size, result in zip(sizes, pool.map(work, shards), strict=True):
            yield result
            done += size
            progress.update(done)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shard(dest: Path, shard: _Shard, *, convert: bool, skip_unreadable: bool) -> tuple[dict | None, list]:
    """Writes one shard and returns (its manifest entry, []). If photographs are refused, writes none and returns
    (None, [(name, reason), ...])."""
    temporary, path = dest / f".{shard.file}", dest / shard.file
    refused, skipped, converted, records = [], [], [], hashlib.sha256()
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for place, photo in zip(shard.places, shard.photos, strict=True):
            try:
                encoded, is_converted = accept(photo, convert)
            except Refused as reason:
                if skip_unreadable and not isinstance(reason, Odd):
                    skipped.append((place, photo.name, str(reason)))
                else:
                    refused.append((photo.name, reason))
                continue
            converted += [photo.name] * is_converted
            record = encode_record(encoded, photo.label, photo.file_name)
            records.update(hashlib.sha256(record).digest())
            writer.write(record)
        writer.close()
        if refused:
            temporary.unlink()
            return None, refused
        examples = len(shard.photos) - len(skipped)
        reader = ArrayRecordReader(str(temporary))
        if reader.num_records() != examples:
            raise OSError(f"{reader.num_records()} of {examples} records arrived")
        reader.close()
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(0, getattr(error, "strerror", None) or first_line(error), str(path)) from None
    about = {
        "file": shard.file,
        "examples": examples,
        "bytes": temporary.stat().st_size,
        "sha256": _sha256(temporary),
        "records": records.hexdigest()[:32],
        "members": shard.members,
        "converted": converted,
        "skipped": skipped,
    }
    os.replace(temporary, path)
    return about, []


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(dest: Path) -> list[str]:
    """Compares every shard of a prepared folder with its manifest. Returns one sentence per problem.

    Raises:
      EffnetlibError: there is no readable manifest.
    """
    require((dest / MANIFEST).is_file(), f"{dest} has no {MANIFEST}: prepare it first")
    splits = read_manifest(dest)["splits"]
    require(all(split["whole"] for split in splits.values()), UNFINISHED.format(dest))

    def problem(about):
        path = dest / about["file"]
        if not path.is_file():
            return f"{path} is missing"
        is_right = path.stat().st_size == about["bytes"] and _sha256(path) == about["sha256"]
        return None if is_right else f"{path} is damaged: its bytes are not those that were written"

    shards = [about for split in splits.values() for about in split["shards"]]
    return list(filter(None, _map_shards(problem, shards, [about["examples"] for about in shards])))
