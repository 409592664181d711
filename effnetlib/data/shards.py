"""ArrayRecord shards of photographs: encoded images with their labels, read by index.

A record is a `tf.train.Example` with the features "image" (bytes), "label" (int64) and "file_name" (bytes). TFDS's
`imagenet2012` has the same form, so the same code reads its shards and ours. Our folders hold `manifest.json` (see
`effnetlib.data.prepare`); TFDS's hold `dataset_info.json`.
"""

import functools
import hashlib
import json
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from effnetlib.data.photographs import beside, split_of
from effnetlib.data.split import Split
from effnetlib.errors import EffnetlibError, FailedError

MANIFEST = "manifest.json"
UNFINISHED = "the preparation of {} did not end: the same `effnetlib data prepare` goes on with it"
SCHEMA = 1
INFO = "dataset_info.json"  # of TFDS

# `tf.train.Example` without TensorFlow: the fields that we use, with the numbers of example.proto.
_PROTO = """
name: "effnetlib_example.proto" package: "effnetlib" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature"
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".effnetlib.BytesList" }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".effnetlib.Int64List" } }
message_type { name: "Entry"
  field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".effnetlib.Feature" } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".effnetlib.Entry" } }
message_type { name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".effnetlib.Features" } }
"""
_pool = descriptor_pool.DescriptorPool()
_pool.Add(text_format.Parse(_PROTO, descriptor_pb2.FileDescriptorProto()))
_Example = message_factory.GetMessageClass(_pool.FindMessageTypeByName("effnetlib.Example"))


def encode_record(image: bytes, label: int, file_name: str) -> bytes:
    """A record as bytes."""
    example = _Example()
    for key, value in {"image": image, "label": label, "file_name": file_name.encode()}.items():
        feature = example.features.feature.add(key=key).value
        (feature.int64_list if key == "label" else feature.bytes_list).value.append(value)
    return example.SerializeToString(deterministic=True)


def decode_record(record: bytes) -> tuple[bytes, int, str]:
    """(image, label, file name) of a record. Raises ValueError if it is not one."""
    try:
        features = {entry.key: entry.value for entry in _Example.FromString(record).features.feature}
        (image,), (label,) = features["image"].bytes_list.value, features["label"].int64_list.value
    except Exception as error:  # protobuf raises its own kinds, and they differ between its implementations
        raise ValueError(f"not a record of an image and a label: {error!r}") from None
    return image, label, b"".join(features["file_name"].bytes_list.value).decode() if "file_name" in features else ""


class ShardedRecords:
    """Records of several shards by index. Example i is the record `order[i]`, or record i if `order` is None.

    Threads may share it. A damaged shard, or a label not below `classes`, raises a FailedError that names the shard.
    """

    def __init__(self, shards: list[tuple[Path, int]], classes: int, order: np.ndarray | None = None):
        self.shards, self.classes, self.order = shards, classes, order
        self.starts = np.cumsum([0, *(count for _, count in shards)])

    @functools.cached_property
    def _source(self):
        _allow_open_files(2 * len(self.shards) + 100)
        whole = functools.partial(SimpleNamespace, skip=0)  # known counts: no shard is opened to count its records
        return ArrayRecordDataSource(
            [whole(filename=str(path), take=count, examples_in_shard=count) for path, count in self.shards]
        )

    def __getstate__(self):  # open files belong to one process
        return {name: value for name, value in vars(self).items() if name != "_source"}

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
            raise FailedError(f"the shard {path} is damaged ({reason[:100]}): delete it, and write it anew") from None

    def split(self, class_names, fingerprint: str, origin: str, unused: dict[str, int]) -> Split:
        return Split.of_photographs(len(self), class_names, fingerprint, self.__getitem__, origin=origin, unused=unused)


def _allow_open_files(count: int) -> None:
    """Raises the limit, usually 1,024 files: the data source keeps every shard open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def shard_order(num_examples: int) -> np.ndarray:
    """The example (in canonical order) at each place over all shards. This permutation never changes. It makes every
    shard a random part of the whole."""
    return np.random.default_rng(0).permutation(num_examples)


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder that `effnetlib.data.prepare` wrote.

    Raises:
      EffnetlibError: it is damaged, or of another version.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for split, about in manifest["splits"].items():
            about.setdefault("whole", True)  # old manifests were written only at the end
            if manifest["schema"] != SCHEMA or about["examples"] != sum(shard["examples"] for shard in about["shards"]):
                raise ValueError(f"the counts of {split} contradict each other")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EffnetlibError(f"{folder / MANIFEST} is damaged, or of another version: {error}") from None
    return manifest


def open_shards(root: Path, split: str) -> Split | None:
    """Opens a split of a folder of shards, ours or TFDS's. Returns None if it is neither.

    Raises:
      EffnetlibError: something in the folder is missing or wrong.
    """
    if (root / MANIFEST).is_file():
        return _open_ours(root, split)
    # TFDS's folders are NAME/CONFIG/VERSION, or a part of that. A deep search among photographs would take minutes.
    photographs = any(split_of(path.name) for path in root.glob("*"))
    infos = sorted(info for depth in range(2 if photographs else 4) for info in root.glob("*/" * depth + INFO))
    if len(infos) > 1:
        named = " or ".join(str(info.parent) for info in infos)
        raise EffnetlibError(
            f"{root} holds {len(infos)} data sets or versions of TFDS: name the folder of one, {named}"
        )
    return _open_tfds(root, infos[0], split) if infos else None


def _open_ours(root: Path, split: str) -> Split:
    manifest = read_manifest(root)
    if split not in manifest["splits"]:
        hint = ", or set subset=minival, which holds out a part of train" if split == "eval" else ""
        raise EffnetlibError(
            f"{root} was prepared without the {split} split, only with {', '.join(manifest['splits'])}: add it to the "
            f"source and prepare again{hint}"
        )
    about = manifest["splits"][split]
    if not about["whole"]:
        raise EffnetlibError(UNFINISHED.format(root))
    shards = [(root / shard["file"], shard["examples"]) for shard in about["shards"]]
    if missing := [path for path, _ in shards if not path.is_file()]:
        raise FailedError(f"the shard {missing[0]} is missing: prepare the folder again")
    skipped = [place for shard in about["shards"] for place, *_ in shard.get("skipped", ())]
    order = shard_order(about["examples"] + len(skipped))
    order = np.argsort(order[~np.isin(order, skipped)])  # skipped photographs leave no gaps
    used = {shard["file"] for each in manifest["splits"].values() for shard in each["shards"]} | {MANIFEST}
    unused = beside(root, root, used.__contains__)
    if skipped:
        unused["unreadable photographs that were left out"] = len(skipped)
    records, origin = ShardedRecords(shards, len(manifest["classes"]), order), about.get("origin", split)
    return records.split(manifest["classes"], about["fingerprint"], origin, unused)


def _open_tfds(root: Path, info: Path, split: str) -> Split:
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
    lengths = named[name]
    pattern = re.compile(rf".+-{re.escape(name)}\.array_record-(\d+)-of-0*{len(lengths)}")
    files = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if len(files) != len(lengths):
        raise EffnetlibError(
            f"{folder} should hold {len(lengths)} ArrayRecord shards of {name}, and holds {len(files)} (TFDS writes them "
            "with file_format='array_record')"
        )
    labels = folder / "label.labels.txt"
    try:
        classes = tuple(labels.read_text("utf-8").removesuffix("\n").split("\n"))
    except UnicodeError as error:
        raise EffnetlibError(f"{labels} is not UTF-8: {error}") from None
    except OSError as error:
        raise EffnetlibError(f"{labels}, which names the classes, cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(info.read_bytes())
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    written = re.compile(r".+\.array_record-\d+-of-\d+|.+\.(json|labels\.txt)")
    unused = beside(root, folder, written.fullmatch) | {
        f"the split {each}": sum(counts) for each, counts in named.items() if each not in known.values()
    }
    records = ShardedRecords(list(zip(files, lengths, strict=True)), len(classes))
    return records.split(classes, digest.hexdigest()[:16], name, unused)
