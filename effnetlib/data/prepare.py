"""From photographs in any layout to ArrayRecord shards with a manifest, and the check of such a folder.

A shard is written beside its final name and renamed when it is whole, with a note of what is in it; so a run that was
killed goes on where it stood, and nothing that is there is ever damaged. The manifest comes last.
"""

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
import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from effnetlib.data.photographs import Listing, MissingSplit, Photo, list_photographs
from effnetlib.data.shards import MANIFEST, NOTES, SCHEMA, decode_record, encode_record, read_manifest, shard_order
from effnetlib.errors import EffnetlibError
from effnetlib.lock import held
from effnetlib.progress import Progress

SPLITS = ("train", "eval", "test")
IMAGENET = {"train": 1_281_167, "eval": 50_000}
IMAGENET_SHARDS = {"train": 1024, "eval": 128}  # the reference's
PHOTOGRAPHS_A_SHARD = 1250


class Odd(Exception):
    """A photograph that is not what it should be; `convertible` if Pillow can make a JPEG of it."""

    def __init__(self, reason: str, convertible: bool = False):
        super().__init__(reason)
        self.convertible = convertible


def inspect(encoded: bytes, name: str) -> None:
    """Decodes a photograph as a whole; raises `Odd` if it is unreadable, CMYK, or not of the kind that its name says."""
    if not encoded:
        raise Odd("an empty file")
    png = encoded.startswith(b"\x89PNG")
    if png and not name.lower().endswith(".png"):
        raise Odd("a PNG posing as a JPEG", convertible=_opens(encoded))
    if not png:
        try:
            *_, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
            if colorspace in ("CMYK", "YCCK"):
                raise Odd("a CMYK photograph", convertible=_opens(encoded))
            simplejpeg.decode_jpeg(encoded, "RGB")
            return
        except ValueError:
            pass  # strict: Pillow has the last word
    if not _opens(encoded):
        raise Odd("unreadable, or cut off")


def _opens(encoded: bytes) -> bool:
    try:
        Image.open(io.BytesIO(encoded)).convert("RGB")
        return True
    except (OSError, ValueError, SyntaxError):  # Pillow raises each of them for damaged files
        return False


def convert(encoded: bytes) -> bytes:
    """An RGB JPEG of the best quality, as the reference's conversion script makes of PNG and CMYK."""
    out = io.BytesIO()
    Image.open(io.BytesIO(encoded)).convert("RGB").save(out, "JPEG", quality=100, subsampling=0)
    return out.getvalue()


@dataclass(frozen=True)
class _Shard:
    split: str
    number: int
    of: int
    photos: list[Photo]

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05}-of-{self.of:05}.array_record"


def prepare(source: Path, dest: Path, *, convert_odd: bool = False, partial: bool = False) -> dict:
    """Writes the photographs of every split of `source` into ArrayRecord shards in `dest`; returns the manifest.

    Running it again goes on where it stopped; where the manifest is there already it does nothing.

    Args:
      source: a folder in any layout of `effnetlib.data.photographs`.
      dest: the folder to write; made if need be.
      convert_odd: make RGB JPEGs of CMYK photographs and of PNGs with a JPEG's name; otherwise they are refused.
      partial: take an ImageNet that is not whole.

    Raises:
      EffnetlibError: the source is none, lacks something, holds photographs that are refused (all are named), or does not
        fit the disk; `dest` holds something else, or another process is writing to it.
    """
    listings = _list(source, partial)
    if (dest / MANIFEST).is_file():
        manifest = read_manifest(dest)
        if {name: split["listing"] for name, split in manifest["splits"].items()} != _fingerprints(listings):
            raise EffnetlibError(f"{dest} holds another data set: name another folder, or delete that one")
        return manifest
    shards = [shard for split, listing in listings.items() for shard in _divide(split, listing)]
    notes = dest / NOTES
    try:
        notes.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EffnetlibError(f"the folder {dest} cannot be written: {error.strerror}") from None
    with held(notes, "preparing"):
        plan = json.dumps(_fingerprints(listings))
        if (notes / "plan.json").is_file() and (notes / "plan.json").read_text() != plan:
            raise EffnetlibError(f"{dest} was begun with other photographs: name another folder, or delete that one")
        _write(notes / "plan.json", plan)
        for leftover in dest.glob(".*.array_record*"):
            leftover.unlink()
        todo = [shard for shard in shards if not _done(dest, notes, shard)]
        _require_space(dest, todo)
        _write_shards(dest, notes, todo, listings, convert_odd)
        manifest = _manifest(dest, notes, shards, listings)
        _write(dest / MANIFEST, json.dumps(manifest) + "\n")
        shutil.rmtree(notes)
    return manifest


def _list(source: Path, partial: bool) -> dict[str, Listing]:
    if not source.is_dir():
        raise EffnetlibError(f"there is no folder {source}")
    listings = {}
    for split in SPLITS:
        try:
            listing = list_photographs(source, split)
        except MissingSplit:
            if split == "train" and not partial:
                raise
            continue
        if listing is None:
            raise EffnetlibError(
                f"{source} is no layout of photographs: wanted are ILSVRC2012_img_train.tar, ILSVRC/Data/CLS-LOC, or "
                "train/CLASS/*.jpg in it"
            )
        listings[split] = listing
    if not listings:
        raise EffnetlibError(f"{source} holds no split of photographs")
    first = next(iter(listings.values()))
    for split, listing in listings.items():
        wanted = IMAGENET.get(split)
        if listing.is_imagenet and len(listing.photos) != wanted and not partial:
            raise EffnetlibError(
                f"{source} ({listing.layout}) should hold the {wanted:,} photographs of ImageNet's {split} split, and "
                f"holds {len(listing.photos):,}: complete it, or take what is there with --partial"
            )
        if listing.class_names != first.class_names:
            odd = ", ".join(sorted(set(listing.class_names) ^ set(first.class_names))[:5])
            raise EffnetlibError(f"in {source} the {split} split has other classes than the first one: {odd}")
    return listings


def _fingerprints(listings: dict[str, Listing]) -> dict[str, str]:
    return {split: listing.fingerprint for split, listing in listings.items()}


def _divide(split: str, listing: Listing) -> Iterator[_Shard]:
    photos, count = listing.photos, len(listing.photos)
    of = IMAGENET_SHARDS[split] if listing.is_imagenet else max(1, -(-count // PHOTOGRAPHS_A_SHARD))
    order = shard_order(count)
    for number in range(of):
        places = order[count * number // of : count * (number + 1) // of]
        yield _Shard(split, number, of, [photos[place] for place in places])


def _require_space(dest: Path, shards: list[_Shard]) -> None:
    needed = sum(_size(photo) for shard in shards for photo in shard.photos)
    free = shutil.disk_usage(dest).free
    if needed > free:
        raise EffnetlibError(f"the shards need {needed / 2**30:.1f} GiB, and {dest} has {free / 2**30:.1f} GiB free")


def _size(photo: Photo) -> int:
    return os.stat(photo.path).st_size if photo.length is None else photo.length


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    os.replace(temporary, path)


def _done(dest: Path, notes: Path, shard: _Shard) -> bool:
    return (dest / shard.file).is_file() and (notes / f"{shard.file}.json").is_file()


def _write_shards(dest: Path, notes: Path, shards: list[_Shard], listings, convert_odd: bool) -> None:
    progress = Progress(sum(len(shard.photos) for shard in shards), 0, 1, unit="photograph")
    seen, refused = 0, []

    def one(shard):
        return _write_shard(dest, notes, shard, convert_odd)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for shard, odd in zip(shards, pool.map(one, shards), strict=True):
                refused += odd
                seen += len(shard.photos)
                progress.update(seen)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if refused:
        _write(dest / "refused.txt", "".join(f"{name}\t{reason}\n" for name, reason, _ in refused))
        named = "; ".join(f"{name}: {reason}" for name, reason, _ in refused[:10])
        more = f"; and {len(refused) - 10} more" if len(refused) > 10 else ""
        hint = "--convert makes JPEGs of them" if all(able for *_, able in refused) else "replace or remove them"
        raise EffnetlibError(
            f"{len(refused)} photographs are refused, all listed in {dest / 'refused.txt'} ({hint}): {named}{more}"
        )
    (dest / "refused.txt").unlink(missing_ok=True)


def _write_shard(dest: Path, notes: Path, shard: _Shard, convert_odd: bool) -> list[tuple[str, str, bool]]:
    """Writes one shard; if any photograph in it is refused it leaves none, and returns them all."""
    temporary, path = dest / f".{shard.file}", dest / shard.file
    refused, converted, digests = [], [], []
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for photo in shard.photos:
            encoded, file_name = photo.read(), photo.name.rpartition("/")[2]
            try:
                inspect(encoded, file_name)
            except Odd as odd:
                if not (convert_odd and odd.convertible):
                    refused.append((photo.name, str(odd), odd.convertible))
                    continue
                encoded = convert(encoded)
                converted.append(photo.name)
            record = encode_record(encoded, photo.label, file_name)
            digests.append(hashlib.sha256(record).hexdigest()[:32])
            writer.write(record)
        writer.close()
        if refused:
            temporary.unlink()
            return refused
        written = ArrayRecordReader(str(temporary))
        if written.num_records() != len(shard.photos):
            raise OSError(f"{written.num_records()} of {len(shard.photos)} records arrived")
        written.close()
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise EffnetlibError(
            f"the shard {path} could not be written ({reason}): make room, and the same command goes on"
        ) from None
    about = {
        "file": shard.file,
        "examples": len(digests),
        "bytes": temporary.stat().st_size,
        "sha256": _sha256(temporary),
    }
    os.replace(temporary, path)
    _write(notes / f"{shard.file}.json", json.dumps({"shard": about, "records": digests, "converted": converted}))
    return []


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(dest: Path, notes: Path, shards: list[_Shard], listings: dict[str, Listing]) -> dict:
    splits, converted = {}, []
    for split, listing in listings.items():
        written = [json.loads((notes / f"{s.file}.json").read_text()) for s in shards if s.split == split]
        labels = np.array([photo.label for photo in listing.photos])
        splits[split] = {
            "examples": len(labels),
            "examples_a_class": np.bincount(labels, minlength=len(listing.class_names)).tolist(),
            "fingerprint": _fingerprint(each["records"] for each in written),
            "listing": listing.fingerprint,
            "shards": [each["shard"] for each in written],
        }
        converted += [name for each in written for name in each["converted"]]
    first = next(iter(listings.values()))
    whole = {split: len(listing.photos) for split, listing in listings.items()} == IMAGENET
    return {
        "schema": SCHEMA,
        "layout": first.layout,
        "imagenet": "whole" if whole else "partial" if first.is_imagenet else "no",
        "converted": converted,
        "splits": splits,
        "classes": list(first.class_names),
    }


def _fingerprint(records) -> str:
    digest = hashlib.sha256()
    for of_a_shard in records:
        digest.update("".join(of_a_shard).encode())
    return digest.hexdigest()[:16]


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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (split, shard), (wrong, labels, digests) in zip(
            shards, pool.map(lambda item: _check_shard(dest / item[1]["file"], item[1]), shards), strict=True
        ):
            problems += wrong
            records[split].append(digests)
            counts[split] += np.bincount(labels, minlength=len(manifest["classes"]))[: len(manifest["classes"])]
            seen += shard["examples"]
            progress.update(seen)
    for split, about in manifest["splits"].items():
        if not problems and counts[split].tolist() != about["examples_a_class"]:
            problems.append(f"the classes of {split} have other counts than the manifest says")
        if not problems and _fingerprint(records[split]) != about["fingerprint"]:
            problems.append(f"the fingerprint of {split} is not the manifest's")
    return problems


def _check_shard(path: Path, about: dict) -> tuple[list[str], list[int], list[str]]:
    if not path.is_file():
        return [f"{path} is missing"], [], []
    if path.stat().st_size != about["bytes"] or _sha256(path) != about["sha256"]:
        return [f"{path} is damaged: its bytes are not those that were written"], [], []
    labels, digests = [], []
    reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0,max_parallelism:0")
    for index in range(reader.num_records()):
        record = reader.read([index])[0]
        try:
            encoded, label, name = decode_record(record)
            inspect(encoded, name)
        except (ValueError, Odd) as error:
            return [f"record {index} of {path} is not readable: {error}"], labels, digests
        labels.append(label)
        digests.append(hashlib.sha256(record).hexdigest()[:32])
    if len(labels) != about["examples"]:
        return [f"{path} holds {len(labels)} records, and should hold {about['examples']}"], labels, digests
    return [], labels, digests
