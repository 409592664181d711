"""ArrayRecord shards of photographs: the original JPEG bytes with their labels, read at random.

A record is a `tf.train.Example` with the features "image" (bytes), "label" (int64) and "file_name" (bytes): the form of
TFDS's `imagenet2012`, so its shards and ours are read by the same code. A folder of ours holds `manifest.json` (see
`effnetlib.data.prepare`), TFDS's holds `dataset_info.json`.
"""

import functools
import hashlib
import json
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from effnetlib.data.photographs import beside, split_of
from effnetlib.errors import EffnetlibError, FailedError

MANIFEST = "manifest.json"
NOTES = ".prepare"  # a folder that is there while shards are being written
SCHEMA = 1
INFO = "dataset_info.json"  # of TFDS


def _example_class():
    """`tf.train.Example` without TensorFlow: the fields that we use, by their numbers in its example.proto."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="effnetlib_example.proto", package="effnetlib", syntax="proto3")

    def message(name, *fields):
        kinds = {"string": kind.TYPE_STRING, "bytes": kind.TYPE_BYTES, "int64": kind.TYPE_INT64}
        added = file.message_type.add(name=name)
        for field, number, repeated, of in fields:
            label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
            added.field.add(name=field, number=number, label=label, type=kinds.get(of, kind.TYPE_MESSAGE),
                            type_name=None if of in kinds else f".effnetlib.{of}")  # fmt: skip

    message("BytesList", ("value", 1, True, "bytes"))
    message("Int64List", ("value", 1, True, "int64"))
    message("Feature", ("bytes_list", 1, False, "BytesList"), ("int64_list", 3, False, "Int64List"))
    message("Entry", ("key", 1, False, "string"), ("value", 2, False, "Feature"))  # a map, as it is on the wire
    message("Features", ("feature", 1, True, "Entry"))
    message("Example", ("features", 1, False, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("effnetlib.Example"))


_Example = _example_class()


def encode_record(image: bytes, label: int, file_name: str) -> bytes:
    """A record as bytes."""
    example = _Example()
    for key, value in (("image", image), ("label", label), ("file_name", file_name.encode())):
        entry = example.features.feature.add(key=key)
        if isinstance(value, bytes):
            entry.value.bytes_list.value.append(value)
        else:
            entry.value.int64_list.value.append(value)
    return example.SerializeToString(deterministic=True)


def decode_record(record: bytes) -> tuple[bytes, int, str]:
    """(image, label, file name) of a record. A ValueError says that it is none."""
    try:
        features = {entry.key: entry.value for entry in _Example.FromString(record).features.feature}
        (image,), (label,) = features["image"].bytes_list.value, features["label"].int64_list.value
    except Exception as error:  # protobuf raises its own kinds, and they differ between its implementations
        raise ValueError(f"not a record of an image and a label: {error!r}") from None
    return image, label, b"".join(features["file_name"].bytes_list.value).decode() if "file_name" in features else ""


@dataclass(frozen=True)
class Instruction:
    """One shard as a whole, in the words of the ArrayRecord data source; knowing the count spares opening it."""

    filename: str
    examples_in_shard: int
    skip: int = 0

    @property
    def take(self) -> int:
        return self.examples_in_shard


class ShardedRecords:
    """Records by index over several shards. `order[i]` is where example i lies; None means where it is counted.

    Threads may share it. Reading a damaged shard, or a label of `classes` or more, is a FailedError that names the shard and
    says `remedy`.
    """

    def __init__(
        self, shards: list[tuple[Path, int]], classes: int, order: np.ndarray | None = None, remedy="write it anew"
    ):
        self.shards, self.classes, self.order, self.remedy = shards, classes, order, remedy
        self.starts = np.cumsum([0, *(count for _, count in shards)])

    @functools.cached_property
    def _source(self):
        _allow_open_files(2 * len(self.shards) + 100)
        return ArrayRecordDataSource([Instruction(str(path), count) for path, count in self.shards])

    def __getstate__(self):
        return {
            name: value for name, value in vars(self).items() if name != "_source"
        }  # its files are open in one process

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        place = index if self.order is None else int(self.order[index])
        try:
            image, label, name = decode_record(self._source[place])
            if not 0 <= label < self.classes:
                raise ValueError(f"label {label}, where {self.classes} classes are named")
            return image, label, name
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            path = self.shards[int(np.searchsorted(self.starts, place, side="right")) - 1][0]
            reason = str(error).splitlines()[0]
            if "Too many open files" in reason:
                raise FailedError(
                    f"{len(self.shards)} shards need as many open files: raise the limit (ulimit -n)"
                ) from None
            raise FailedError(f"the shard {path} is damaged ({reason[:100]}): {self.remedy}") from None


def _allow_open_files(count: int) -> None:
    """The data source keeps every shard open, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def shard_order(num_examples: int) -> np.ndarray:
    """Which example (in canonical order) lies at each place over all shards: a permutation fixed for ever, so that every
    shard is a random part of the whole."""
    return np.random.default_rng(0).permutation(num_examples)


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder of ours.

    Raises:
      EffnetlibError: it is damaged, or of another version.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"schema {manifest['schema']}")
        parts = [(manifest, ("classes", "converted"))]
        for about in manifest["splits"].values():
            parts.append((about, ("examples", "examples_a_class", "fingerprint", "listing")))
            parts += [
                (shard, ("file", "examples", "bytes", "sha256", "records", "members")) for shard in about["shards"]
            ]
        for part, keys in parts:
            _ = [part[key] for key in keys]
        for split, about in manifest["splits"].items():
            counts = (sum(shard["examples"] for shard in about["shards"]), sum(about["examples_a_class"]))
            if counts != (about["examples"],) * 2 or len(about["examples_a_class"]) != len(manifest["classes"]):
                raise ValueError(f"the counts of {split} contradict each other")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EffnetlibError(f"{folder / MANIFEST} is damaged, or of another version: {error}") from None
    return manifest


@dataclass(frozen=True)
class Shards:
    """An opened split: its records, the names of its classes, a fingerprint, what it was called, and what lies beside the
    shards and is not used (see `effnetlib.data.photographs.Listing`)."""

    records: ShardedRecords
    class_names: tuple[str, ...]
    fingerprint: str
    origin: str
    unused: dict[str, int]
    names: str = ""  # of loose photographs alone


def open_shards(root: Path, split: str) -> Shards | None:
    """Opens a split of a folder of shards, ours or TFDS's; None where it is neither.

    Raises:
      EffnetlibError: it is one, and what is missing or wrong in it.
    """
    if (root / MANIFEST).is_file():
        manifest = read_manifest(root)
        if split not in manifest["splits"]:
            hint = ", or set subset=minival, which holds out a part of train" if split == "eval" else ""
            raise EffnetlibError(
                f"{root} was prepared without the {split} split, only with {', '.join(manifest['splits'])}: add it to the "
                f"source and prepare again{hint}"
            )
        about = manifest["splits"][split]
        shards = [(root / shard["file"], shard["examples"]) for shard in about["shards"]]
        for path, _ in shards:
            if not path.is_file():
                raise FailedError(f"the shard {path} is missing: preparing again mends it")
        order = np.argsort(shard_order(about["examples"]))
        remedy = "`effnetlib data check` lists what is; delete those, and preparing again mends it"
        records = ShardedRecords(shards, len(manifest["classes"]), order, remedy)
        used = {shard["file"] for each in manifest["splits"].values() for shard in each["shards"]} | {MANIFEST}
        unused = beside(root, root, used.__contains__)
        return Shards(records, tuple(manifest["classes"]), about["fingerprint"], about.get("origin", split), unused)
    # NAME/CONFIG/VERSION, or a part of that. Where there are photographs, such a search would take minutes.
    photographs = any(split_of(path.name) for path in root.glob("*"))
    infos = sorted(info for depth in range(2 if photographs else 4) for info in root.glob("*/" * depth + INFO))
    if len(infos) > 1:
        named = " or ".join(str(info.parent) for info in infos)
        raise EffnetlibError(
            f"{root} holds {len(infos)} data sets or versions of TFDS: name the folder of one, {named}"
        )
    return _open_tfds(root, infos[0], split) if infos else None


def _open_tfds(root: Path, info: Path, split: str) -> Shards:
    folder = info.parent
    try:
        about = json.loads(info.read_text())
        named = {each["name"]: [int(n) for n in each["shardLengths"]] for each in about["splits"]}
    except (ValueError, KeyError, TypeError) as error:
        raise EffnetlibError(f"{info} is damaged, or of another version: {error!r}") from None
    known = {kind: name for name in reversed(named) if (kind := split_of(name))}
    name = known.get(split) or (known.get("test") if split == "eval" else None)
    if name is None or (split == "test" and "eval" not in known):
        raise EffnetlibError(f"{folder} has no {split} split, only {', '.join(named)}")
    unread = [each for each in named if each not in known.values()]
    if split == "eval" and "eval" not in known and unread:
        raise EffnetlibError(
            f"{folder} has no validation split, and {', '.join(unread)} could be evaluated on just as {name} could: set "
            f"subset=minival, which holds out a part of train, or take what is not meant out of {INFO}"
        )
    lengths = named[name]
    pattern = re.compile(rf".+-{re.escape(name)}\.array_record-(\d+)-of-0*{len(lengths)}")
    files = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if len(files) != len(lengths):
        raise EffnetlibError(
            f"{folder} should hold {len(lengths)} ArrayRecord shards of {name}, and holds {len(files)} (TFDS writes them "
            "with file_format='array_record')"
        )
    labels = folder / "label.labels.txt"
    if not labels.is_file():
        raise EffnetlibError(f"{labels} is missing, which names the classes")
    try:
        names = tuple(labels.read_text("utf-8").removesuffix("\n").split("\n"))
    except UnicodeError as error:
        raise EffnetlibError(f"{labels} is not UTF-8: {error}") from None
    digest = hashlib.sha256(info.read_bytes())
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    written = re.compile(r".+\.array_record-\d+-of-\d+|.+\.(json|labels\.txt)")
    unused = beside(root, folder, written.fullmatch) | {f"the split {each}": sum(named[each]) for each in unread}
    records = ShardedRecords(list(zip(files, lengths, strict=True)), len(names))
    return Shards(records, names, digest.hexdigest()[:16], name, unused)
