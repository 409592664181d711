"""ArrayRecord shards of photographs: encoded images with their labels, read by index.

A record is a `tf.train.Example` with the features "image" (bytes), "label" (int64) and "file_name" (bytes). TFDS's
`imagenet2012` has the same form, so the same code reads its shards and ours. Our folders hold `manifest.json` (see
`effnetlib.data.prepare`); TFDS's hold `dataset_info.json`.
"""

import functools
import hashlib
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from effnetlib.data.photographs import SPLIT_NAMES, beside, split_of
from effnetlib.data.split import Split
from effnetlib.errors import EffnetlibError, FailedError, first_line, require

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
            hint = "delete it, and write it anew (or raise the limit of open files, ulimit -n, if that is the reason)"
            raise FailedError(f"the shard {path} is damaged ({first_line(error)[:100]}): {hint}") from None


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
    is_ours = (root / MANIFEST).is_file()
    info = None if is_ours else _find_tfds(root)
    if not is_ours and not info:
        return None
    folder, manifest = (root, read_manifest(root)) if is_ours else (info.parent, _read_tfds(info))
    splits = manifest["splits"]
    hint = "add it to the source and prepare again" + ", or set subset=minival" * (split == "eval")
    require(split in splits, f"{folder} was prepared without the {split} split, only with {', '.join(splits)}: {hint}")
    about = splits[split]
    require(about["whole"], UNFINISHED.format(root))
    shards = [(folder / shard["file"], shard["examples"]) for shard in about["shards"]]
    if missing := [path for path, _ in shards if not path.is_file()]:
        hint = "prepare the folder again" + ", with file_format='array_record'" * (not is_ours)
        raise FailedError(f"the shard {missing[0]} is missing: {hint}")
    used = {shard["file"] for each in splits.values() for shard in each["shards"]}
    unused = beside(root, folder, lambda name: name in used or name.endswith((".json", ".labels.txt")))
    unused |= {f"the split {name}": each["examples"] for name, each in splits.items() if name not in SPLIT_NAMES}
    if is_ours:
        skipped = [place for shard in about["shards"] for place, *_ in shard.get("skipped", ())]
        order, fingerprint = shard_order(about["examples"] + len(skipped)), about["fingerprint"]
        order = np.argsort(order[~np.isin(order, skipped)])  # skipped photographs leave no gaps
        unused |= {"unreadable photographs that were left out": len(skipped)} if skipped else {}
    else:
        sizes = "".join(f"{path.name} {path.stat().st_size}\n" for path, _ in shards).encode()
        order, fingerprint = None, hashlib.sha256(info.read_bytes() + sizes).hexdigest()[:16]
    records, classes = ShardedRecords(shards, len(manifest["classes"]), order), manifest["classes"]
    about = {"origin": about.get("origin", split), "unused": unused}
    return Split.of_photographs(len(records), classes, fingerprint, records.__getitem__, **about)


def _find_tfds(root: Path) -> Path | None:
    # TFDS's folders are NAME/CONFIG/VERSION, or a part of that. A deep search among photographs would take minutes.
    photographs = any(split_of(path.name) for path in root.glob("*"))
    infos = sorted(info for depth in range(2 if photographs else 4) for info in root.glob("*/" * depth + INFO))
    named = " or ".join(str(info.parent) for info in infos)
    require(len(infos) < 2, f"{root} holds {len(infos)} data sets or versions of TFDS: name the folder of one, {named}")
    return infos[0] if infos else None


def _read_tfds(info: Path) -> dict:
    """What TFDS says of a data set, in the form of our manifest. A split of another kind keeps its name."""
    labels, splits = info.with_name("label.labels.txt"), {}
    try:
        classes, about = labels.read_text("utf-8").removesuffix("\n").split("\n"), json.loads(info.read_text())
        for each in about["splits"]:
            name, lengths = each["name"], [int(length) for length in each["shardLengths"]]
            stem, of = f"{about['name']}-{name}.array_record", len(lengths)
            shards = [{"file": f"{stem}-{i:05}-of-{of:05}", "examples": n} for i, n in enumerate(lengths)]
            found = {"whole": True, "examples": sum(lengths), "origin": name, "shards": shards}
            splits.setdefault(split_of(name) or name, found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EffnetlibError(f"{info} or {labels.name} is damaged, or of another version: {error!r}") from None
    if "eval" not in splits and "test" in splits:
        splits["eval"] = splits.pop("test")
    return {"classes": classes, "splits": splits}
