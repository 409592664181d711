"""ImageNet in each of its usual forms, made up and small; shards, their manifest, and all that can be wrong."""

import csv
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy.io import savemat

from effnetlib import EffnetlibError, Recipe, make_mesh
from effnetlib.__main__ import main
from effnetlib.data import describe, load, remark, shards, train_batches
from effnetlib.data import prepare as module
from effnetlib.data.photographs import DEVKIT
from effnetlib.data.prepare import check, prepare
from effnetlib.data.shards import decode_record, encode_record
from effnetlib.errors import FailedError
from effnetlib.mesh import batch_sharding

WNIDS = ["n01440764", "n01443537", "n02099601"]
TRAIN, VAL = 4, 2  # photographs a class


def jpeg(seed, size=(20, 16), mode="RGB", **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, options.pop("format", "JPEG"), **options)
    return out.getvalue()


def train_files():
    return [(w, f"{w}_{i}.JPEG", jpeg(100 * k + i)) for k, w in enumerate(WNIDS) for i in range(TRAIN)]


def val_files():
    """Flat names in an order that is not that of the classes."""
    wnids = [WNIDS[i % len(WNIDS)] for i in range(VAL * len(WNIDS))]
    return [(w, f"ILSVRC2012_val_{i + 1:08}.JPEG", jpeg(1000 + i)) for i, w in enumerate(wnids)]


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def devkit(root, damage=lambda name, content: content):
    """IDs run against the order of the synsets, as the official ones do."""
    ids = {wnid: len(WNIDS) - k for k, wnid in enumerate(WNIDS)}
    kinds = np.dtype([("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    table = np.array([(i, wnid, "a fish") for wnid, i in ids.items()], kinds)
    meta = io.BytesIO()
    savemat(meta, {"synsets": table})
    truth = "".join(f"{ids[wnid]}\n" for wnid, *_ in val_files()).encode()
    files = {"ILSVRC2012_validation_ground_truth.txt": truth, "meta.mat": meta.getvalue()}
    with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            add(archive, f"{DEVKIT}/data/{name}", damage(name, content))


def official(root):
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in reversed(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for w, name, content in train_files():
                    if w == wnid:
                        add(archive, name, content)
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for _, name, content in reversed(val_files()):
            add(archive, name, content)
    devkit(root)


def kaggle(root):
    for wnid, name, content in train_files():
        put(root / f"ILSVRC/Data/CLS-LOC/train/{wnid}/{name}", content)
    for _, name, content in val_files():
        put(root / f"ILSVRC/Data/CLS-LOC/val/{name}", content)
    put(root / "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG", jpeg(5))
    with open(root / "LOC_val_solution.csv", "w", newline="") as file:
        rows = [[name.removesuffix(".JPEG"), f"{wnid} 1 2 3 4 {wnid} 5 6 7 8"] for wnid, name, _ in val_files()]
        csv.writer(file).writerows([["ImageId", "PredictionString"], *reversed(rows)])


def by_class(root):
    for split, files in (("train", train_files()), ("val", val_files())):
        for wnid, name, content in files:
            put(root / split / wnid / name, content)


def flat_with_kit(root):
    for wnid, name, content in train_files():
        put(root / "train" / wnid / name, content)
    for _, name, content in val_files():
        put(root / "val" / name, content)
    put(root / "test/ILSVRC2012_test_00000001.JPEG", jpeg(5))
    devkit(root)


LAYOUTS = [official, kaggle, by_class, flat_with_kit]


def contents(split):
    return [(split.encoded(i)[0], split.encoded(i)[1]) for i in range(len(split))]


def wanted(files):
    return [(content, WNIDS.index(wnid)) for wnid, _, content in sorted(files, key=lambda file: file[:2])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_photographs_labels_and_fingerprint(layout, tmp_path):
    layout(tmp_path / "in")
    by_class(tmp_path / "plain")
    for split, files in (("train", train_files()), ("eval", val_files())):
        found = load(str(tmp_path / "in"), split)
        assert found.class_names == tuple(WNIDS)
        assert contents(found) == wanted(files)
        assert found.fingerprint == load(str(tmp_path / "plain"), split).fingerprint


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepared_shards_hold_the_same_bytes_in_the_same_order(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PHOTOGRAPHS_PER_SHARD", 5)
    layout(tmp_path / "in")
    manifest = prepare(tmp_path / "in", tmp_path / "out", partial=True)
    assert [len(manifest["splits"][s]["shards"]) for s in ("train", "eval")] == [3, 2]
    assert {split: about["examples"] for split, about in manifest["splits"].items()} == {"train": 12, "eval": 6}
    for split, files in (("train", train_files()), ("eval", val_files())):
        assert contents(load(str(tmp_path / "out"), split)) == wanted(files)
    assert check(tmp_path / "out") == []
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == ["", *[".array_record"] * 5, ".json"]
    assert prepare(tmp_path / "in", tmp_path / "out", partial=True) == manifest


def test_loose_and_prepared_photographs_train_on_the_same_batches(tmp_path):
    by_class(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out")

    def batches(place, devices, start=0):
        sharding = batch_sharding(make_mesh(devices, jax.devices()[:devices]))
        read = train_batches(load(str(tmp_path / place), "train"), seed=3, batch=8, size=12, augmentation="autoaugment",
                             sharding=sharding, start=start, stop=4)  # fmt: skip
        return [(np.asarray(b["images"]), np.asarray(b["labels"])) for b in read]

    whole = batches("in", 1)
    for other in (batches("out", 1), batches("out", 8), batches("out", 2, start=2)):
        for (a, b), (c, d) in zip(other, whole[-len(other) :], strict=True):
            np.testing.assert_array_equal(a, c)
            np.testing.assert_array_equal(b, d)


def tfds(root):
    """As TFDS's imagenet2012 lies: shards in any order, counts in its dataset_info.json."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = root / "imagenet2012/5.1.0"
    folder.mkdir(parents=True)
    splits = []
    for name, files in (("train", train_files()), ("validation", val_files())):
        parts = [files[:3], files[3:]]
        for number, part in enumerate(parts):
            path = folder / f"imagenet2012-{name}.array_record-{number:05}-of-00002"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for wnid, file_name, content in part:
                writer.write(encode_record(content, WNIDS.index(wnid), file_name))
            writer.close()
        splits.append({"name": name, "shardLengths": [str(len(part)) for part in parts]})
    (folder / "dataset_info.json").write_text(json.dumps({"name": "imagenet2012", "splits": splits}))
    (folder / "label.labels.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))


def test_tfds_shards(tmp_path):
    tfds(tmp_path / "in")
    train, evaluation = load(str(tmp_path / "in"), "train"), load(str(tmp_path / "in"), "eval")
    assert train.class_names == tuple(WNIDS)
    assert contents(train) == [(content, WNIDS.index(wnid)) for wnid, _, content in train_files()]
    assert len(evaluation) == 6 and evaluation.example(0)[0].shape == (16, 20, 3)
    (tmp_path / "in/imagenet2012/5.1.0/imagenet2012-train.array_record-00001-of-00002").unlink()
    with pytest.raises(
        EffnetlibError, match="train.array_record-00001-of-00002 is missing: .* file_format=.array_record"
    ):
        load(str(tmp_path / "in"), "train")


def test_two_versions_of_tfds_are_refused_by_name(tmp_path):
    tfds(tmp_path / "in")
    shutil.copytree(tmp_path / "in/imagenet2012/5.1.0", tmp_path / "in/imagenet2012/5.0.0")
    for root in (tmp_path / "in", tmp_path / "in/imagenet2012"):
        with pytest.raises(
            EffnetlibError, match="name the folder of one, .*/imagenet2012/5.0.0 or .*/imagenet2012/5.1.0"
        ):
            load(str(root), "train")
    assert len(load(str(tmp_path / "in/imagenet2012/5.0.0"), "train")) == 12


def test_tfds_without_validation_is_evaluated_on_test_and_says_so(tmp_path):
    tfds(tmp_path / "in")
    folder = tmp_path / "in/imagenet2012/5.1.0"
    about = (folder / "dataset_info.json").read_text().replace('"validation"', '"test"')
    (folder / "dataset_info.json").write_text(about)
    for path in folder.glob("*-validation.*"):
        path.rename(path.with_name(path.name.replace("validation", "test")))
    (folder / "notes.txt").write_text("")
    found = load(str(tmp_path / "in"), "eval")
    assert len(found) == 6 and found.origin == "test"
    assert found.unused == {"imagenet2012/5.1.0/*.txt": 1}
    with pytest.raises(EffnetlibError, match="without the test split, only with train, eval"):
        load(str(tmp_path / "in"), "test")
    more = [{"name": "validation_v2", "shardLengths": ["7"]}]
    about = json.loads(about)
    (folder / "dataset_info.json").write_text(json.dumps(about | {"splits": about["splits"] + more}))
    assert load(str(tmp_path / "in"), "train").unused["the split validation_v2"] == 7


def test_names_of_classes_that_do_not_fit_the_shards_of_tfds(tmp_path):
    tfds(tmp_path / "in")
    names = tmp_path / "in/imagenet2012/5.1.0/label.labels.txt"
    names.write_text(f"{WNIDS[0]}\n")
    train = load(str(tmp_path / "in"), "train")
    assert train.example(0)[1] == 0
    with pytest.raises(FailedError, match="label 1, where 1 classes are named"):
        contents(train)
    names.write_bytes("Käfer\n".encode("latin-1"))
    with pytest.raises(EffnetlibError, match="label.labels.txt is damaged.*UnicodeDecodeError"):
        load(str(tmp_path / "in"), "train")


def tiny_imagenet(root):
    for wnid, name, content in train_files():
        put(root / "train" / wnid / "images" / name, content)
        put(root / "train" / wnid / f"{wnid}_boxes.txt", b"")
    for _, name, content in val_files():
        put(root / "val/images" / name, content)
    put(
        root / "val/val_annotations.txt",
        "".join(f"{name}\t{wnid}\t0\t0\t9\t9\n" for wnid, name, _ in val_files()).encode(),
    )
    put(root / "test/images/test_0.JPEG", jpeg(5))
    put(root / "wnids.txt", b"")


def test_tiny_imagenet(tmp_path):
    tiny_imagenet(tmp_path / "in")
    name = str(tmp_path / "in")
    assert contents(load(name, "train")) == wanted(train_files())
    assert contents(load(name, "eval")) == wanted(val_files())
    assert load(name, "eval").unused == {"*.txt": 1, "test/*.jpeg": 1}
    assert load(name, "train").unused == {"*.txt": 1, "test/*.jpeg": 1, "train/**/*.txt": 3}
    (tmp_path / "in/val/val_annotations.txt").write_text("")
    with pytest.raises(EffnetlibError, match="val_annotations.txt has no label for 6 of 6 photographs"):
        load(name, "eval")


def test_preparing_names_what_is_not_used_in_the_output_and_the_manifest(tmp_path):
    by_class(tmp_path / "in")
    (tmp_path / "in/val").rename(tmp_path / "in/valid")
    for path in (
        "valid/x/a.gif",
        f"valid/{WNIDS[0]}/a.gif",
        f"valid/{WNIDS[1]}/b.gif",
        "extras/c.jpg",
        "test/d.jpg",
    ):
        put(tmp_path / "in" / path, b"x")
    shutil.rmtree(tmp_path / "in/valid/x")
    unused = {"valid/**/*.gif": 2, "extras/": 1, "test/*.jpg": 1}
    for dest in ("out", "in/shards", "in/shards"):  # what is being written is not named
        run = CliRunner().invoke(main, ["data", "prepare", str(tmp_path / "in"), str(tmp_path / dest)])
        assert run.exit_code == 0 and "eval: 6 photographs of valid/ in 1 shards" in run.output
        assert "not used: extras/, test/*.jpg, valid/**/*.gif (2)\n" in run.output
        assert shards.read_manifest(tmp_path / dest)["unused"] == unused
    manifest = shards.read_manifest(tmp_path / "out")
    del (
        manifest["unused"],
        manifest["splits"]["train"]["origin"],
        manifest["splits"]["train"]["whole"],
    )  # as it was once
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    assert len(load(str(tmp_path / "out"), "train")) == 12 and check(tmp_path / "out") == []
    assert prepare(tmp_path / "in", tmp_path / "out")["unused"] == unused | {"shards/": 1}


def test_prepared_without_a_split_to_evaluate_on(tmp_path):
    by_class(tmp_path / "in")
    (tmp_path / "in/val").rename(tmp_path / "in/holdout")
    put(tmp_path / "in/test/d.jpg", b"x")
    manifest = prepare(tmp_path / "in", tmp_path / "out")
    assert list(manifest["splits"]) == ["train"] and manifest["unused"] == {"holdout/": 1, "test/*.jpg": 1}
    with pytest.raises(EffnetlibError, match="without the eval split, only with train: add it .* set subset=minival"):
        load(str(tmp_path / "out"), "eval")


def test_shards_and_photographs_in_one_folder(tmp_path):
    by_class(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out")
    by_class(tmp_path / "out")
    found = load(str(tmp_path / "out"), "train")
    assert found.unused == {"train/": 1, "val/": 1} and "not used: train/, val/" in remark({"train": found})
    tfds(tmp_path / "in")
    assert load(str(tmp_path / "in"), "train").unused == {"imagenet2012/": 1}  # the photographs are read


def test_a_record_is_a_tensorflow_example():
    # Typed by hand from example.proto: Features(1) { feature(1) { key(1) "label"  value(2) { int64_list(3) { 1: [7] } } } … }
    feature = b"\x0a\x05label\x12\x05\x1a\x03\x0a\x01\x07"
    image = b"\x0a\x05image\x12\x06\x0a\x04\x0a\x02ab"
    features = b"".join(b"\x0a" + bytes([len(f)]) + f for f in (feature, image))
    record = b"\x0a" + bytes([len(features)]) + features
    assert decode_record(record) == (b"ab", 7, "")
    assert decode_record(encode_record(b"ab", 7, "x.JPEG")) == (b"ab", 7, "x.JPEG")
    for broken in (b"", b"\xff\xff", record[:-1]):
        with pytest.raises(ValueError, match="not a record"):
            decode_record(broken)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda root: (root / "ILSVRC2012_img_train.tar").unlink(),
            "no train split .*: wanted is ILSVRC2012_img_train",
        ),
        (lambda root: (root / f"{DEVKIT}.tar.gz").unlink(), "put LOC_val_solution.csv .* or ILSVRC2012_devkit"),
        (lambda root: (root / f"{DEVKIT}.tar.gz").write_bytes(b"no"), "validation labels in .* cannot be read"),
        (lambda root: os.truncate(root / "ILSVRC2012_img_train.tar", 4096), "is damaged, or not whole"),
        (lambda root: None, "should hold the 1,281,167 photographs of ImageNet's train split, and holds 12"),
    ],
)
def test_official_archives_that_lack_something(spoil, sentence, tmp_path):
    official(tmp_path / "in")
    spoil(tmp_path / "in")
    with pytest.raises(EffnetlibError, match=sentence):
        prepare(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_label_files(tmp_path):
    kaggle(tmp_path / "in")
    solution = tmp_path / "in/LOC_val_solution.csv"
    text = solution.read_text()
    solution.write_text(text.replace(WNIDS[2], "n99999999"))
    with pytest.raises(EffnetlibError, match="names classes that the training split does not have: n99999999"):
        load(str(tmp_path / "in"), "eval")
    solution.write_text("\n".join(text.splitlines()[:3]))
    with pytest.raises(EffnetlibError, match="has no label for 4 of 6 photographs"):
        load(str(tmp_path / "in"), "eval")
    solution.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EffnetlibError, match="validation labels in .* cannot be read"):
        load(str(tmp_path / "in"), "eval")


@pytest.mark.parametrize("name", ["ILSVRC2012_validation_ground_truth.txt", "meta.mat"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"99\n99\n99\n99\n99\n99\n", None])
def test_a_damaged_development_kit(name, content, tmp_path):
    flat_with_kit(tmp_path / "in")
    devkit(tmp_path / "in", lambda n, right: right if n != name else right[:-40] if content is None else content)
    with pytest.raises(EffnetlibError) as caught:
        load(str(tmp_path / "in"), "eval")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_lies_between_the_photographs_does_not_matter(tmp_path):
    flat_with_kit(tmp_path / "in")
    (tmp_path / "in/val/@eaDir").mkdir()
    assert len(load(str(tmp_path / "in"), "eval")) == 6
    (tmp_path / "in/train" / WNIDS[0] / "gone.JPEG").symlink_to(tmp_path / "nothing")
    with pytest.raises(EffnetlibError, match="gone.JPEG cannot be read"):
        load(str(tmp_path / "in"), "train")


def test_an_imagenet_by_class_with_a_test_split(tmp_path, monkeypatch):
    by_class(tmp_path / "in")
    shutil.copytree(tmp_path / "in/val", tmp_path / "in/test")
    monkeypatch.setattr("effnetlib.data.photographs.WHOLE", 3)
    with pytest.raises(EffnetlibError, match="should hold the 1,281,167 photographs"):
        prepare(tmp_path / "in", tmp_path / "out")
    manifest = prepare(tmp_path / "in", tmp_path / "out", partial=True)
    assert {name: split["examples"] for name, split in manifest["splits"].items()} == {
        "train": 12,
        "eval": 6,
        "test": 6,
    }
    (tmp_path / "in/val").rename(tmp_path / "in/elsewhere")
    shutil.rmtree(tmp_path / "in/test")
    monkeypatch.setattr(module, "IMAGENET", {"train": 12, "eval": 6})
    with pytest.raises(
        EffnetlibError, match="has no eval split .seen: elsewhere/, train/.: wanted is val/CLASS/.*--partial"
    ):
        prepare(tmp_path / "in", tmp_path / "other")


def test_the_destination_is_not_among_the_photographs(tmp_path):
    by_class(tmp_path / "in")
    with pytest.raises(EffnetlibError, match="lies among the photographs"):
        prepare(tmp_path / "in", tmp_path / "in/train/out")
    assert not (tmp_path / "in/train/out").exists()
    prepare(tmp_path / "in", tmp_path / "in/shards")
    assert check(tmp_path / "in/shards") == []


def test_preparing_again_mends_adds_and_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PHOTOGRAPHS_PER_SHARD", 3)
    by_class(tmp_path / "in")
    (tmp_path / "in/val").rename(tmp_path / "later")
    prepare(tmp_path / "in", tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.array_record")}
    (tmp_path / "out/train-00001-of-00004.array_record").unlink()
    os.truncate(tmp_path / "out/train-00002-of-00004.array_record", 0)
    (tmp_path / "later").rename(tmp_path / "in/val")
    manifest = prepare(tmp_path / "in", tmp_path / "out")
    assert manifest["splits"].keys() == {"train", "eval"} and check(tmp_path / "out") == []
    kept = {name for name, time in times.items() if (tmp_path / "out" / name).stat().st_mtime_ns == time}
    assert kept == {"train-00000-of-00004.array_record", "train-00003-of-00004.array_record"}


def test_what_others_put_into_the_destination_stays(tmp_path, monkeypatch):
    by_class(tmp_path / "in")
    for name in ("mine.array_record", "train-00000-of-00009.array_record", ".mine.array_record"):
        put(tmp_path / "out" / name, b"precious")
    prepare(tmp_path / "in", tmp_path / "out")
    prepare(tmp_path / "in", tmp_path / "out")
    kept = [path for path in (tmp_path / "out").iterdir() if path.read_bytes() == b"precious"]
    assert len(kept) == 3
    monkeypatch.setattr(module, "PHOTOGRAPHS_PER_SHARD", 3)  # of our own, the former are taken away
    prepare(tmp_path / "in", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").glob("train-*")}
    assert names == {f"train-{i:05}-of-00004.array_record" for i in range(4)} | {"train-00000-of-00009.array_record"}


def test_counts_of_a_manifest_that_contradict_each_other(tmp_path):
    by_class(tmp_path / "in")
    path = tmp_path / "out/manifest.json"
    prepare(tmp_path / "in", tmp_path / "out")
    text = path.read_text()
    for wrong in (11, "12"):
        for place in ("split", "shard"):
            manifest = json.loads(text)
            about = manifest["splits"]["train"]
            (about if place == "split" else about["shards"][0])["examples"] = wrong
            path.write_text(json.dumps(manifest))
            with pytest.raises(EffnetlibError, match="manifest.json is damaged"):
                load(str(tmp_path / "out"), "train")


def test_a_refused_photograph_in_a_folder_whose_name_is_not_utf8(tmp_path):
    try:
        source = tmp_path / os.fsdecode(b"lat\xe4")
        source.mkdir()
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    by_class(source)
    put(source / "train" / WNIDS[0] / "bad.jpg", b"x")
    with pytest.raises(FailedError, match="1 photographs are refused"):
        prepare(source, tmp_path / "out")
    assert (tmp_path / "out/refused.txt").read_bytes().startswith(os.fsencode(source))


def test_replacing_a_refused_photograph_keeps_the_other_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PHOTOGRAPHS_PER_SHARD", 3)
    by_class(tmp_path / "in")
    bad = tmp_path / "in/train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    good = bad.read_bytes()
    bad.write_bytes(good[:100])
    with pytest.raises(FailedError, match="1 photographs are refused"):
        prepare(tmp_path / "in", tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.array_record")}
    assert len(times) == 5  # of four and two
    bad.write_bytes(good)
    prepare(tmp_path / "in", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times} == times
    assert check(tmp_path / "out") == []


def test_a_picture_of_absurd_size_is_refused_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("effnetlib.data.images.MAX_PIXELS", 1000)
    by_class(tmp_path / "in")
    put(tmp_path / "in/train" / WNIDS[0] / "bomb.png", jpeg(1, size=(100, 100), format="PNG"))
    with pytest.raises(FailedError, match="bomb.png: unreadable.* 100 x 100 pixels, and 1,000 are the limit"):
        prepare(tmp_path / "in", tmp_path / "out")
    with pytest.raises(FailedError, match="bomb.png is not a readable image"):
        split = load(str(tmp_path / "in"), "train")
        [split.example(i) for i in range(len(split))]


def test_more_shards_than_open_files_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PHOTOGRAPHS_PER_SHARD", 1)
    by_class(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out")
    code = (
        "import resource, sys; from effnetlib.data import load\n"
        "used = len(__import__('os').listdir('/proc/self/fd'))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (used + 6, 4096))\n"
        "split = load(sys.argv[1], 'train'); print(len({split.encoded(i)[0] for i in range(len(split))}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stdout == "12\n", done.stderr


def test_folders_that_lack_something(tmp_path):
    by_class(tmp_path / "in")
    (tmp_path / "in/train/n03000000").mkdir()
    with pytest.raises(EffnetlibError, match="class folder .*n03000000 holds no .jpg"):
        load(str(tmp_path / "in"), "train")
    (tmp_path / "in/train/n03000000").rmdir()
    with pytest.raises(EffnetlibError, match="has no test split .seen: train/, val/"):
        load(str(tmp_path / "in"), "test")
    with pytest.raises(EffnetlibError, match="is no layout of photographs"):
        prepare(tmp_path / "in/train", tmp_path / "out")
    with pytest.raises(EffnetlibError, match="there is no folder"):
        prepare(tmp_path / "nothing", tmp_path / "out")


ODD = {
    "cmyk.JPEG": (lambda: jpeg(1, mode="CMYK"), "a CMYK photograph"),
    "png.JPEG": (lambda: jpeg(2, format="PNG"), "a PNG posing as a JPEG"),
    "webp.jpg": (lambda: jpeg(4, format="WEBP"), "a WEBP posing as a JPEG"),
    "gif.jpg": (lambda: jpeg(5, format="GIF"), "a GIF posing as a JPEG"),
    "bmp.jpeg": (lambda: jpeg(6, format="BMP"), "a BMP posing as a JPEG"),
    "tiff.jpg": (lambda: jpeg(7, format="TIFF"), "a TIFF posing as a JPEG"),
    "webp.png": (lambda: jpeg(8, format="WEBP"), "a WEBP posing as a PNG"),
    "jpeg.png": (lambda: jpeg(9), "a JPEG posing as a PNG"),
}
BROKEN = {
    "cut.JPEG": (lambda: jpeg(3, size=(200, 160))[:2000], "unreadable, or cut off"),
    "empty.JPEG": (lambda: b"", "an empty file"),
    "text.JPEG": (lambda: b"no picture", "unreadable, or cut off"),
}


def test_odd_photographs_are_refused_by_name_or_converted_as_asked(tmp_path):
    by_class(tmp_path / "in")
    for name, (content, _) in ODD.items():
        put(tmp_path / "in/train" / WNIDS[0] / name, content())
    run = CliRunner().invoke(main, ["data", "prepare", str(tmp_path / "in"), str(tmp_path / "out")])
    assert run.exit_code == 1 and f"{len(ODD)} photographs are refused" in run.output and "--convert" in run.output
    listed = (tmp_path / "out/refused.txt").read_text()
    assert all(f"{name}\t{reason}" in listed and name in run.output for name, (_, reason) in ODD.items())
    again = ["data", "prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--convert"]
    assert CliRunner().invoke(main, again).exit_code == 0
    manifest = shards.read_manifest(tmp_path / "out")
    (shard,) = manifest["splits"]["train"]["shards"]  # which names what was encoded anew
    assert {name.rpartition("/")[2] for name in shard["converted"]} == ODD.keys() - {"jpeg.png"}
    assert not (tmp_path / "out/refused.txt").exists()
    train = load(str(tmp_path / "out"), "train")
    assert len(train) == 12 + len(ODD) and {train.encoded(i)[0][:2] for i in range(len(train))} == {b"\xff\xd8"}
    assert all(train.example(i)[0].shape == (16, 20, 3) for i in range(len(train)))
    assert jpeg(9) in {train.encoded(i)[0] for i in range(len(train))}  # what is a JPEG already is not encoded again
    assert CliRunner().invoke(main, ["data", "check", str(tmp_path / "out")]).exit_code == 0


def test_what_no_jpeg_can_be_made_of_is_refused_with_conversion_too(tmp_path):
    by_class(tmp_path / "in")
    put(tmp_path / "in/train" / WNIDS[0] / "long.jpg", jpeg(1, size=(65_536, 1), format="PNG"))
    with pytest.raises(FailedError, match="long.jpg: no JPEG can be made of it"):
        prepare(tmp_path / "in", tmp_path / "out", convert=True)


def test_broken_photographs_are_refused_even_with_conversion(tmp_path):
    by_class(tmp_path / "in")
    for name, (content, _) in BROKEN.items():
        put(tmp_path / "in/val" / WNIDS[1] / name, content())
    with pytest.raises(EffnetlibError, match="3 photographs are refused") as caught:
        prepare(tmp_path / "in", tmp_path / "out", convert=True)
    assert all(f"{name}: {reason}" in str(caught.value) for name, (_, reason) in BROKEN.items())
    assert len(list((tmp_path / "out").glob("train-*"))) == 1  # what was whole stays


FORMATS = {"a.webp": "WEBP", "b.jfif": "JPEG", "c.jpe": "JPEG", "d.bmp": "BMP", "e.tif": "TIFF", "f.TIFF": "TIFF"}


def test_other_formats_are_read_loose_and_encoded_anew_for_shards_if_asked(tmp_path):
    by_class(tmp_path / "in")
    for number, (name, form) in enumerate(FORMATS.items()):
        out = io.BytesIO()
        options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
        Image.new("RGB", (9, 7), (40 * number, 20, 200)).save(out, form, **options)
        put(tmp_path / "in/train/a" / name, out.getvalue())
        put(tmp_path / "in/val/a" / name, out.getvalue())
    loose = load(str(tmp_path / "in"), "train")
    assert (len(loose), loose.class_names[0], loose.unused) == (12 + len(FORMATS), "a", {})
    with pytest.raises(
        FailedError, match="8 photographs are refused, .*--convert makes JPEGs.*a.webp: a WEBP;"
    ) as caught:
        prepare(tmp_path / "in", tmp_path / "out")
    assert all(f"{name}: a {form}" in str(caught.value) for name, form in FORMATS.items() if form != "JPEG")
    prepare(tmp_path / "in", tmp_path / "out", convert=True)
    for split, most in ((loose, 2), (load(str(tmp_path / "out"), "train"), 4)):
        for number in range(len(FORMATS)):
            image, label = split.example(number)
            assert label == 0 and image.shape == (7, 9, 3)
            assert np.abs(image.astype(int) - (40 * number, 20, 200)).max() <= most
    kinds = [split.encoded(number)[0][:2] for number in range(len(FORMATS))]
    assert kinds == [b"\xff\xd8"] * len(FORMATS)


def test_what_cannot_be_read_is_left_out_of_shards_by_name_if_asked(tmp_path):
    by_class(tmp_path / "in")
    whole = prepare(tmp_path / "in", tmp_path / "whole")["splits"]["train"]["fingerprint"]
    bad = [tmp_path / "in/train" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG", tmp_path / "in/train" / WNIDS[2] / "cut.png"]
    bad[0].write_bytes(b"")
    put(bad[1], jpeg(1, size=(200, 160), format="PNG")[:900])
    put(tmp_path / "in/val" / WNIDS[0] / "cmyk.jpg", jpeg(1, mode="CMYK"))
    arguments = ["data", "prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--skip-unreadable"]
    run = CliRunner().invoke(main, arguments)
    assert (
        run.exit_code == 1 and "1 photographs are refused" in run.output and "--skip" not in run.output
    )  # it can be read
    run = CliRunner().invoke(main, [*arguments, "--convert"])
    assert (
        run.exit_code == 0
        and f"left out: {bad[0]}: an empty file\n" in run.output
        and f"left out: {bad[1]}: un" in run.output
    )
    manifest = shards.read_manifest(tmp_path / "out")
    (shard,) = manifest["splits"]["train"]["shards"]
    assert sorted(name for _, name, _ in shard["skipped"]) == sorted(map(str, bad)) and shard["examples"] == 11
    assert prepare(tmp_path / "in", tmp_path / "out") == manifest and check(tmp_path / "out") == []
    packed = load(str(tmp_path / "out"), "train")
    assert "unreadable photographs that were left out (2)" in remark({"train": packed})
    (tmp_path / "in/skip.txt").write_text("".join(f"{path}\tbroken\n" for path in bad))
    loose = load(str(tmp_path / "in"), "train")
    assert len(packed) == 11 and contents(packed) == contents(loose)
    again = prepare(tmp_path / "in", tmp_path / "again", convert=True)["splits"]["train"]["fingerprint"]
    assert len({whole, packed.fingerprint, again}) == 3  # skipped in other shards, in another order


def test_photographs_that_are_named_to_be_skipped(tmp_path):
    by_class(tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "without")
    (tmp_path / "without/train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").unlink()
    put(tmp_path / "in/train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG", b"no picture")
    (tmp_path / "in/val" / WNIDS[2] / "gone.jpg").symlink_to(tmp_path / "nowhere")
    before = load(str(tmp_path / "in"), "train")
    lines = [f"train/{WNIDS[0]}/{WNIDS[0]}_1.JPEG", f"{tmp_path}/in/val/{WNIDS[2]}/gone.jpg\tcannot be read: why", ""]
    (tmp_path / "in/skip.txt").write_text("\n".join(lines))
    for split, size in (("train", 11), ("eval", 6)):
        found, same = load(str(tmp_path / "in"), split), load(str(tmp_path / "without"), split)
        assert len(found) == size and found.fingerprint == same.fingerprint and contents(found) == contents(same)
        assert found.unused == {"photographs that skip.txt names": 1}
    assert load(str(tmp_path / "in"), "train").fingerprint != before.fingerprint
    assert len(prepare(tmp_path / "in", tmp_path / "out")["unused"]) == 1
    (tmp_path / "links").mkdir()  # as for a disk that cannot be written
    for split in ("train", "val"):
        (tmp_path / "links" / split).symlink_to(tmp_path / "in" / split)
    (tmp_path / "links/skip.txt").write_text(lines[0])
    assert load(str(tmp_path / "links"), "train").fingerprint == load(str(tmp_path / "in"), "train").fingerprint
    for stray in (f"train/{WNIDS[1]}/cat.jpg", f"{tmp_path}/other/train/{WNIDS[1]}/cat.jpg"):
        (tmp_path / "in/skip.txt").write_text("\n".join([*lines, stray]))
        with pytest.raises(EffnetlibError, match=f"skip.txt names .*{stray}, which is no photograph here"):
            load(str(tmp_path / "in"), "train")


def test_photographs_in_archives_can_be_skipped(tmp_path):
    official(tmp_path / "in")
    name = f"{WNIDS[0]}_1.JPEG"
    (tmp_path / "in/skip.txt").write_text(f"ILSVRC2012_img_train.tar/{WNIDS[0]}/{name}\n")
    assert contents(load(str(tmp_path / "in"), "train")) == wanted([f for f in train_files() if f[1] != name])


def test_grey_tiny_wide_and_turned_photographs_are_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: not applied, as in the reference
    for name, content in {
        "grey.jpg": jpeg(0, mode="L"), "one.jpg": jpeg(1, size=(1, 1)), "wide.jpg": jpeg(2, size=(10_000, 3)),
        "turned.jpg": jpeg(3, size=(20, 10), exif=exif), "real.png": jpeg(4, format="PNG"),
    }.items():  # fmt: skip
        put(tmp_path / "in/train/a" / name, content)
        put(tmp_path / "in/val/a" / name, content)
    prepare(tmp_path / "in", tmp_path / "out")
    split = load(str(tmp_path / "out"), "train")
    assert [split.example(i)[0].shape for i in range(5)] == [
        (16, 20, 3), (1, 1, 3), (16, 20, 3), (10, 20, 3), (3, 10_000, 3)]  # fmt: skip
    from effnetlib.data.images import eval_image, train_images

    for i in range(5):
        for augmentation in ("inception", "autoaugment", "none"):
            assert eval_image(split.example(i)[0], 24, augmentation).shape == (24, 24, 3)
            assert train_images([split.example(i)[0]], 24, augmentation, 0, [0], [i]).shape == (1, 24, 24, 3)


def test_a_damaged_or_missing_shard_is_named(tmp_path):
    by_class(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out")
    path = next((tmp_path / "out").glob("train-*"))
    content = bytearray(path.read_bytes())
    content[content.find(b"\xff\xd8\xff") + 50] ^= 0xFF  # within a photograph
    path.write_bytes(content)
    run = CliRunner().invoke(main, ["data", "check", str(tmp_path / "out")])
    assert run.exit_code == 1 and f"{path} is damaged" in run.output and "1 problems" in run.output
    with pytest.raises(EffnetlibError, match=f"{path.name} is damaged"):
        split = load(str(tmp_path / "out"), "train")
        for index in range(len(split)):
            split.encoded(index)
    path.unlink()
    assert check(tmp_path / "out") == [f"{path} is missing"]
    with pytest.raises(EffnetlibError, match=f"{path.name} is missing"):
        load(str(tmp_path / "out"), "train")


def test_other_photographs_are_not_mixed_into_a_folder(tmp_path):
    by_class(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out")
    put(tmp_path / "in/train" / WNIDS[0] / "more.JPEG", jpeg(9))
    with pytest.raises(EffnetlibError, match="holds another data set"):
        prepare(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out/manifest.json").write_text('{"schema": 1, "classes": [], "splits": {"train": {}}}')
    with pytest.raises(EffnetlibError, match="manifest.json is damaged"):
        check(tmp_path / "out")


def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PHOTOGRAPHS_PER_SHARD", 4)
    by_class(tmp_path / "in")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(EffnetlibError, match=r"the shards need .* GiB free"):
        prepare(tmp_path / "in", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(module, "PHOTOGRAPHS_PER_SHARD", 4)
    code = (
        "import resource, signal, sys; from pathlib import Path; from effnetlib.data import prepare as m\n"
        "m.PHOTOGRAPHS_PER_SHARD = 4; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: m.prepare(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "except m.EffnetlibError as error: sys.exit(str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "in", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*.array_record"))
    prepare(tmp_path / "in", tmp_path / "out")
    assert check(tmp_path / "out") == []


def hold(source, dest, started):
    def slow(*_, **__):
        started.set()
        time.sleep(60)

    module._write_shard = slow
    prepare(source, dest)


def test_two_at_once_and_a_kill_in_between(tmp_path, monkeypatch):
    by_class(tmp_path / "in")
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    first = context.Process(target=hold, args=(tmp_path / "in", tmp_path / "out", started))
    first.start()
    assert started.wait(60)
    with pytest.raises(EffnetlibError, match=f"process {first.pid} on .* is preparing"):
        prepare(tmp_path / "in", tmp_path / "out")
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with pytest.raises(EffnetlibError, match="the preparation of .* did not end: the same"):
        check(tmp_path / "out")
    with pytest.raises(EffnetlibError, match="the preparation of .* did not end"):
        load(str(tmp_path / "out"), "train")
    prepare(tmp_path / "in", tmp_path / "out")
    assert check(tmp_path / "out") == []


def test_what_was_written_before_a_stop_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PHOTOGRAPHS_PER_SHARD", 3)
    by_class(tmp_path / "in")
    original, written = module._write_shard, []

    def stopping(dest, shard, **choices):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.file)
        return original(dest, shard, **choices)

    monkeypatch.setattr(module, "_write_shard", stopping)
    monkeypatch.setattr(module, "usable_cores", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out/.train-00003-of-00004.array_record").write_bytes(b"half a shard")
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written}
    monkeypatch.setattr(module, "_write_shard", original)
    prepare(tmp_path / "in", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written} == before
    assert check(tmp_path / "out") == [] and not list((tmp_path / "out").glob(".*array_record"))


def test_minival(tmp_path, monkeypatch):
    by_class(tmp_path / "in")
    prepare(tmp_path / "in", tmp_path / "out")
    loose, packed = str(tmp_path / "in"), str(tmp_path / "out")
    with pytest.raises(EffnetlibError, match="has 12 training examples, too few to hold out"):
        describe(loose, "minival")
    monkeypatch.setattr("effnetlib.data.sources.MINIVAL_SHARDS", 256)
    train, held_out = (load(packed, split, "minival") for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (9, 3)
    assert sorted(contents(train) + contents(held_out)) == sorted(contents(load(loose, "train")))
    shutil.rmtree(tmp_path / "in/val")  # which minival does without
    assert describe(loose, "minival").eval_examples == 3
    info = describe(packed, "minival")
    assert (info.train_examples, info.eval_examples) == (9, 3)
    assert Recipe.preset("b0-3-rmsprop").replace(dataset=packed, subset="minival", epochs=10).total_steps == 30


def test_imagenets_minival_has_the_references_size():
    info = describe("imagenet", "minival")
    assert (info.train_examples, info.eval_examples) == (1_281_167 - 25_022, 25_022)
