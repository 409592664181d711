"""From photographs in any layout to ArrayRecord shards with a manifest, and the check of such a folder.

A shard is written beside its final name and renamed when it is whole, with a note of what is in it; so a run that was
killed goes on where it stood, and nothing that is there is ever damaged. The manifest comes last.
"""

import contextlib
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

from effnetlib.data.images import Unreadable, read
from effnetlib.data.photographs import SPLIT_NAMES, Listing, MissingSplit, Photo, check_classes, list_photographs, seen
from effnetlib.data.shards import MANIFEST, NOTES, SCHEMA, decode_record, encode_record, read_manifest, shard_order
from effnetlib.errors import EffnetlibError, FailedError, first_line
from effnetlib.runs.files import exclusive_lock, write_atomically
from effnetlib.runs.machine import usable_cores
from effnetlib.runs.progress import Progress

IMAGENET = {"train": 1_281_167, "eval": 50_000}
IMAGENET_SHARDS = {"train": 1024, "eval": 128}  # the reference's
PHOTOGRAPHS_A_SHARD = 1250
KEPT = ("JPEG", "PNG")  # formats whose bytes go into shards as they are


class Odd(Exception):
    """A photograph that is not what it should be; `convertible` if a JPEG can be made of it."""

    def __init__(self, reason: str, convertible: bool = False):
        super().__init__(reason)
        self.convertible = convertible


def inspect(encoded: bytes, name: str) -> None:
    """Decodes a photograph as a whole; raises `Odd` if it is unreadable, CMYK, or not of the kind that its name says."""
    if not encoded:
        raise Odd("an empty file")
    try:
        kind, _ = read(encoded)
    except Unreadable as error:
        raise Odd(f"unreadable, or cut off ({error})") from None
    named = "PNG" if name.lower().endswith(".png") else "JPEG"
    if kind != named:
        reason = "a CMYK photograph" if kind.startswith("CMYK") else f"a {kind} posing as a {named}"
        raise Odd(reason, convertible=True)


def convert(encoded: bytes) -> bytes:
    """An RGB JPEG of the best quality, as the reference's conversion script makes of PNG and CMYK; a JPEG stays as it is."""
    try:
        kind, pixels = read(encoded)
        if kind == "JPEG":
            return encoded
        Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG", quality=100, subsampling=0)
    except Exception as error:  # too wide for a JPEG, or for the memory
        raise Odd(f"no JPEG can be made of it ({first_line(error)})") from None
    return out.getvalue()


@dataclass(frozen=True)
class _Shard:
    split: str
    number: int
    of: int
    photos: list[Photo]
    members: str  # a hash of the names and sizes of its photographs

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05}-of-{self.of:05}.array_record"


def prepare(source: Path, dest: Path, *, convert_odd: bool = False, partial: bool = False) -> dict:
    """Writes the photographs of every split of `source` into ArrayRecord shards in `dest`; returns the manifest.

    Running it again goes on where it stopped, writes what is missing, and adds splits that are new in the source.

    Args:
      source: a folder in any layout of `effnetlib.data.photographs`.
      dest: the folder to write; made if need be.
      convert_odd: make RGB JPEGs of CMYK photographs and of those in a format that their name does not say; otherwise
        they are refused.
      partial: take an ImageNet that is not whole.

    Raises:
      EffnetlibError: the source is none, or lacks something; `dest` holds something else, or lies where the source's
        photographs are, or another process is writing to it.
      FailedError: photographs are refused (all are named), or there is no room.
    """
    listings = _list(source, partial)
    taken = {"ILSVRC", "Data", *(name for names in SPLIT_NAMES.values() for name in names)}
    for listing in listings.values():
        listing.unused.pop(os.path.relpath(dest, source) + "/", None)
    taken |= {listing.origin.partition("/")[0] for listing in listings.values()}
    if any(dest.resolve().is_relative_to((source / name).resolve()) for name in taken):
        raise EffnetlibError(f"{dest} lies among the photographs of {source}: name a folder beside them")
    shards = [shard for split, listing in listings.items() for shard in _divide(split, listing)]
    try:
        dest.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(dest, "preparing"):
            return _prepare(dest, listings, shards, convert_odd)
    except OSError as error:
        raise FailedError(
            f"{error.filename or dest} could not be written ({error.strerror}): once that is mended, the same command goes on"
        ) from None


def _prepare(dest: Path, listings: dict[str, Listing], shards: list[_Shard], convert_odd: bool) -> dict:
    before = _manifest_before(dest, listings)
    known = {shard["file"]: shard for about in before["splits"].values() for shard in about["shards"]}
    notes = dest / NOTES
    notes.mkdir(exist_ok=True)
    for leftover in dest.glob(".*-?????-of-?????.array_record*"):
        leftover.unlink()
    for note in notes.glob("*.json"):
        known[note.stem] = {}  # where a crash cut the note off: its shard is made again
        with contextlib.suppress(ValueError, KeyError, TypeError):
            about = json.loads(note.read_text())
            known[about["file"]] = about
    done = {shard.file for shard in shards if _is_whole(dest, shard, known.get(shard.file))}
    todo = [shard for shard in shards if shard.file not in done]
    _require_space(dest, todo)
    _write_shards(dest, todo, convert_odd)
    for shard in todo:
        known[shard.file] = json.loads((notes / f"{shard.file}.json").read_text())
    manifest = _manifest(before, listings, shards, known)
    write_atomically(dest / MANIFEST, json.dumps(manifest) + "\n")
    # Of an earlier, unfinished preparation of fewer or more photographs. What else lies there is not ours.
    for stale in known.keys() - {shard.file for shard in shards}:
        (dest / stale).unlink(missing_ok=True)
    shutil.rmtree(notes)
    return manifest


def _list(source: Path, partial: bool) -> dict[str, Listing]:
    if not source.is_dir():
        raise EffnetlibError(f"there is no folder {source}")
    listings, missing = {}, {}
    for split in SPLIT_NAMES:
        try:
            listing = list_photographs(source, split)
        except MissingSplit as error:
            missing[split] = error
            continue
        if listing is None:
            raise EffnetlibError(
                f"{source} is no layout of photographs (seen: {seen(source)}): wanted are "
                "ILSVRC2012_img_train.tar, ILSVRC/Data/CLS-LOC, or train/CLASS/*.jpg in it"
            )
        listings[split] = listing
    if "train" in missing and not (partial and listings):
        raise missing["train"]
    first = next(iter(listings.values()))
    if first.is_imagenet and not partial:
        if "eval" in missing:
            raise EffnetlibError(f"{missing['eval']}: complete it, or take what is there with --partial")
        for split, wanted in IMAGENET.items():
            if len(listings[split].photos) != wanted:
                raise EffnetlibError(
                    f"{source} ({first.layout}) should hold the {wanted:,} photographs of ImageNet's {split} split, and "
                    f"holds {len(listings[split].photos):,}: complete it, or take what is there with --partial"
                )
    check_classes(source, {split: listing.class_names for split, listing in listings.items()})
    return listings


def _divide(split: str, listing: Listing) -> Iterator[_Shard]:
    photos, count = listing.photos, len(listing.photos)
    of = IMAGENET_SHARDS.get(split) if listing.is_imagenet else None
    of = of or max(1, -(-count // PHOTOGRAPHS_A_SHARD))
    order = shard_order(count)
    for number in range(of):
        members = [photos[place] for place in order[count * number // of : count * (number + 1) // of]]
        text = "\n".join(f"{photo.label}/{photo.file_name} {photo.size}" for photo in members)
        yield _Shard(split, number, of, members, hashlib.sha256(text.encode()).hexdigest()[:32])


def _manifest_before(dest: Path, listings: dict[str, Listing]) -> dict:
    """The manifest that is there already, or an empty one."""
    if not (dest / MANIFEST).is_file():
        return {"splits": {}, "converted": []}
    before = read_manifest(dest)
    for split, about in before["splits"].items():
        if split not in listings or listings[split].fingerprint != about["listing"]:
            raise EffnetlibError(f"{dest} holds another data set: name another folder, or delete that one")
    return before


def _is_whole(dest: Path, shard: _Shard, about: dict | None) -> bool:
    path = dest / shard.file
    return (
        bool(about) and about["members"] == shard.members and path.is_file() and path.stat().st_size == about["bytes"]
    )


def _require_space(dest: Path, shards: list[_Shard]) -> None:
    needed = sum(photo.size for shard in shards for photo in shard.photos)
    free = shutil.disk_usage(dest).free
    if needed > free:
        raise FailedError(f"the shards need {needed / 2**30:.1f} GiB, and {dest} has {free / 2**30:.1f} GiB free")


def _write_shards(dest: Path, shards: list[_Shard], convert_odd: bool) -> None:
    progress = Progress(sum(len(shard.photos) for shard in shards), 0, 1, unit="photograph")
    seen, refused = 0, []
    with ThreadPoolExecutor(usable_cores()) as pool:
        try:
            for shard, odd in zip(shards, pool.map(lambda s: _write_shard(dest, s, convert_odd), shards), strict=True):
                refused += odd
                seen += len(shard.photos)
                progress.update(seen)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if refused:
        text = "".join(f"{name}\t{reason}\n" for name, reason, _ in refused)
        write_atomically(dest / "refused.txt", text.encode(errors="surrogateescape"))  # names as the disk has them
        named = "; ".join(f"{name}: {reason}" for name, reason, _ in refused[:10])
        more = f"; and {len(refused) - 10} more" if len(refused) > 10 else ""
        hint = "--convert makes JPEGs of them" if all(able for *_, able in refused) else "replace them and run it again"
        raise FailedError(
            f"{len(refused)} photographs are refused, all listed in {dest / 'refused.txt'} ({hint}; taking some away instead "
            f"changes every shard): {named}{more}"
        )
    (dest / "refused.txt").unlink(missing_ok=True)


def _write_shard(dest: Path, shard: _Shard, convert_odd: bool) -> list[tuple[str, str, bool]]:
    """Writes one shard and a note on it; if any photograph in it is refused it leaves none, and returns them all."""
    temporary, path = dest / f".{shard.file}", dest / shard.file
    refused, converted, records = [], [], hashlib.sha256()
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for photo in shard.photos:
            encoded = photo.read()
            try:
                try:
                    inspect(encoded, photo.file_name)
                except Odd as odd:
                    if not (convert_odd and odd.convertible):
                        raise
                    encoded = convert(encoded)
                    converted.append(photo.name)
            except Odd as odd:
                refused.append((photo.name, str(odd), odd.convertible))
                continue
            record = encode_record(encoded, photo.label, photo.file_name)
            records.update(hashlib.sha256(record).digest())
            writer.write(record)
        writer.close()
        if refused:
            temporary.unlink()
            return refused
        written = ArrayRecordReader(str(temporary))
        if written.num_records() != len(shard.photos):
            raise OSError(f"{written.num_records()} of {len(shard.photos)} records arrived")
        written.close()
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise FailedError(
            f"the shard {path} could not be written ({reason}): once that is mended, the same command goes on"
        ) from None
    about = {
        "file": shard.file,
        "examples": len(shard.photos),
        "bytes": temporary.stat().st_size,
        "sha256": _sha256(temporary),
        "records": records.hexdigest()[:32],
        "members": shard.members,
        "converted": converted,
    }
    os.replace(temporary, path)
    write_atomically(dest / NOTES / f"{shard.file}.json", json.dumps(about))
    return []


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(before: dict, listings: dict[str, Listing], shards: list[_Shard], known: dict[str, dict]) -> dict:
    splits = {}
    for split, listing in listings.items():
        labels = np.array([photo.label for photo in listing.photos])
        abouts = [known[shard.file] for shard in shards if shard.split == split]
        splits[split] = {
            "examples": len(labels),
            "examples_a_class": np.bincount(labels, minlength=len(listing.class_names)).tolist(),
            "fingerprint": _fingerprint(about["records"] for about in abouts),
            "listing": listing.fingerprint,
            "origin": listing.origin,
            "shards": [{name: value for name, value in about.items() if name != "converted"} for about in abouts],
        }
    converted = {name for about in known.values() for name in about.get("converted", ())}
    first = next(iter(listings.values()))
    whole = all(len(listings[split].photos) == wanted for split, wanted in IMAGENET.items() if split in listings)
    return {
        "schema": SCHEMA,
        "layout": first.layout,
        "imagenet": "no" if not first.is_imagenet else "whole" if whole and len(listings) > 1 else "partial",
        "converted": sorted(converted | set(before["converted"])),
        "unused": {kind: count for listing in listings.values() for kind, count in listing.unused.items()},
        "splits": splits,
        "classes": list(first.class_names),
    }


def _fingerprint(records) -> str:
    return hashlib.sha256("".join(records).encode()).hexdigest()[:16]


def check(dest: Path) -> list[str]:
    """Reads every record of a prepared folder and compares all with the manifest; returns what is wrong, a sentence each.

    Raises:
      EffnetlibError: there is no readable manifest.
    """
    if not (dest / MANIFEST).is_file():
        hint = "its preparation did not end: run it again" if (dest / NOTES).is_dir() else "prepare it first"
        raise EffnetlibError(f"{dest} has no {MANIFEST}: {hint}")
    manifest = read_manifest(dest)
    shards = [(split, shard) for split, about in manifest["splits"].items() for shard in about["shards"]]
    progress = Progress(sum(shard["examples"] for _, shard in shards), 0, 1, unit="photograph")
    seen, problems = 0, []
    records = {split: [] for split in manifest["splits"]}
    counts = {split: np.zeros(len(manifest["classes"]), np.int64) for split in manifest["splits"]}
    with ThreadPoolExecutor(usable_cores()) as pool:
        for (split, shard), (wrong, labels, digest) in zip(
            shards, pool.map(lambda item: _check_shard(dest / item[1]["file"], item[1]), shards), strict=True
        ):
            problems += wrong
            records[split].append(digest)
            counts[split] += np.bincount(labels, minlength=len(manifest["classes"]))[: len(manifest["classes"])]
            seen += shard["examples"]
            progress.update(seen)
    for split, about in manifest["splits"].items():
        if not problems and counts[split].tolist() != about["examples_a_class"]:
            problems.append(f"the classes of {split} have other counts than the manifest says")
        if not problems and _fingerprint(records[split]) != about["fingerprint"]:
            problems.append(f"the fingerprint of {split} is not the manifest's")
    return problems


def _check_shard(path: Path, about: dict) -> tuple[list[str], list[int], str]:
    if not path.is_file():
        return [f"{path} is missing"], [], ""
    if path.stat().st_size != about["bytes"] or _sha256(path) != about["sha256"]:
        return [f"{path} is damaged: its bytes are not those that were written"], [], ""
    labels, records = [], hashlib.sha256()
    reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0,max_parallelism:0")
    for index in range(reader.num_records()):
        record = reader.read([index])[0]
        try:
            encoded, label, _ = decode_record(record)
            kind, _ = read(encoded)
            if kind not in KEPT:
                raise ValueError(f"a {kind}, which is neither {' nor '.join(KEPT)}")
        except (ValueError, Unreadable) as error:
            return [f"record {index} of {path} is not readable: {error}"], labels, ""
        labels.append(label)
        records.update(hashlib.sha256(record).digest())
    if len(labels) != about["examples"]:
        return [f"{path} holds {len(labels)} records, and should hold {about['examples']}"], labels, ""
    return [], labels, records.hexdigest()[:32]
