"""Worker processes: the same batches for any number of them, an end for whatever happens, and nothing left behind."""

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from effnetlib.data import load, workers
from effnetlib.data.workers import UNIT, Packed, Workers
from effnetlib.errors import FailedError


class Make:
    """Images that show their epoch and index; `at` is what happens at index 5."""

    def __init__(self, at=None, seconds=0.0):
        self.at, self.seconds, self.table = at, seconds, np.arange(1000, dtype=np.int32)

    def __call__(self, epoch, index):
        time.sleep(self.seconds)
        if index == 5 and self.at == "error":
            raise FailedError("5.jpg is not a readable image (why)")
        if index == 5 and self.at == "bug":
            raise ZeroDivisionError("nothing")
        if index == 5 and self.at:
            os.kill(os.getpid(), self.at)
        jax = "jax" in sys.modules
        return np.full((2, 2, 3), [epoch % 256, index % 256, jax], np.uint8), self.table[index]

    def name(self, index):
        return f"{index}.jpg"


def wanted(*lengths):
    ends = np.cumsum([0, *lengths])
    return [np.stack([np.arange(a, b) // 100, np.arange(a, b)], 1) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def own_workers():
    return [each for each in psutil.Process().children() if any("workers.work" in word for word in each.cmdline())]


def alive(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def soon(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("count", [1, 3])
def test_batches_of_any_length_come_in_order_twice_from_processes_without_jax(count):
    parts = wanted(5, 0, 64, 1, 40, 64, 64, 17, 0, 64)
    with contextlib.closing(Workers(Make(), 2, 64, count)) as made:
        for _ in range(2):
            batches = list(made(parts))
            assert [len(labels) for _, labels in batches] == list(map(len, parts))
            for part, (images, labels) in zip(parts, batches, strict=True):
                np.testing.assert_array_equal(images[:, 1, 1], np.c_[part % 256, np.zeros(len(part))])
                np.testing.assert_array_equal(labels, part[:, 1])
        assert len(made.ring) == 64 + 2 * UNIT * count  # what is in memory, however many are wanted
    assert not own_workers()


@pytest.mark.parametrize(
    ("at", "sentence"),
    [
        ("error", r"^5.jpg is not a readable image \(why\)$"),
        ("bug", "a worker process of the input ended at 5.jpg with ZeroDivisionError: nothing$"),
        (signal.SIGKILL, "ended at 5.jpg with SIGKILL, as the system does when memory is used up"),
        (signal.SIGSEGV, "ended at 5.jpg with SIGSEGV$"),
    ],
)
def test_a_worker_that_fails_or_dies_ends_the_run_with_a_sentence(at, sentence):
    made = Workers(Make(at), 2, 8, 2)
    with pytest.raises(FailedError, match=sentence), contextlib.closing(made):
        list(made(wanted(*[8] * 20)))
    assert not own_workers()


def test_workers_that_cannot_begin_are_told_of(monkeypatch):
    monkeypatch.setattr(workers, "START", "raise SystemExit(3)")
    made = Workers(Make(), 2, 8, 2)
    with pytest.raises(FailedError, match="a worker process of the input ended with code 3$"), contextlib.closing(made):
        list(made(wanted(8)))


def test_signals_that_stop_a_run_do_not_end_its_workers():
    with contextlib.closing(Workers(Make(seconds=0.01), 2, 8, 2)) as made:
        batches = made(wanted(*[8] * 5))
        next(batches)
        for child in own_workers():
            for number in workers.SIGNALS:
                child.send_signal(number)
        assert len(list(batches)) == 4
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


PARENT = """
import psutil, sys, time
print("once")
from effnetlib.data.workers import Workers
from test_workers import Make, wanted
batches = Workers(Make(seconds=0.05), 2, 64, 2)(wanted(*[64] * 10))
next(batches)
print(*(child.pid for child in psutil.Process().children()), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(number, tmp_path):
    (tmp_path / "script.py").write_text(PARENT)  # without the guard of __name__
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "script.py")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "once\n"
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(alive(pids)) == 2
        parent.send_signal(number)
        assert soon(lambda: not alive(pids))
        parent.communicate()


def test_without_memfd_a_file_does(monkeypatch):
    def forbidden(name):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    with contextlib.closing(Workers(Make(), 2, 8, 1)) as made:
        ((_, labels),) = made(wanted(8))
    np.testing.assert_array_equal(labels, range(8))


def test_a_packed_list_is_shared_and_not_copied():
    items, buffers = [("a.jpg", 1), ("ä" * 300, 2), ("", 3)], []
    pickled = pickle.dumps(Packed(items), protocol=5, buffer_callback=buffers.append)
    assert len(pickled) < 500 and len(buffers) == 2
    again = pickle.loads(pickled, buffers=buffers)
    assert (
        list(again) == items
        and len(again) == 3
        and np.shares_memory(again.content, np.frombuffer(buffers[0].raw()[:1], np.uint8))
    )


@pytest.fixture
def photographs(tmp_path):
    for split, each in (("train", 20), ("val", 5)):
        for number, name in enumerate(("ant", "bee")):
            folder = tmp_path / "in" / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                noise = np.random.default_rng([i, number]).integers(0, 255, (9, 12, 3), np.uint8)
                Image.fromarray(noise).resize((120, 90)).save(folder / f"{i:02}.jpg")
    return str(tmp_path / "in")


@pytest.mark.parametrize("augmentation", ["autoaugment", "shift_flip"])
def test_the_stream_is_the_same_for_any_number_of_workers_and_any_start(photographs, augmentation, monkeypatch):
    import jax

    from effnetlib import make_mesh
    from effnetlib.data import loader
    from effnetlib.mesh import batch_sharding

    monkeypatch.setattr(loader, "WORTH_A_WORKER", 1)
    sharding = batch_sharding(make_mesh(1, jax.devices()[:1]))

    def stream(cores, start=0, workers=None):
        monkeypatch.setattr(loader, "usable_cores", lambda: cores)
        if workers:
            monkeypatch.setattr(loader, "Workers", lambda *arguments: Workers(*arguments[:3], workers))
        split = load(photographs, "train")
        with contextlib.closing(
            loader.train_batches(
                split, seed=1, batch=16, size=32, augmentation=augmentation, sharding=sharding, start=start, stop=6
            )
        ) as batches:
            first = next(batches)
            assert len(own_workers()) == (workers or (cores if cores > 1 else 0))
            all_of_them = [first, *batches]
        assert not own_workers()
        return [(np.asarray(batch["images"]), np.asarray(batch["labels"])) for batch in all_of_them]

    alone = stream(1)
    for other in (stream(2), stream(4, start=4), stream(2, workers=1)):
        for (images, labels), (same, as_well) in zip(alone[-len(other) :], other, strict=True):
            np.testing.assert_array_equal(images, same)
            np.testing.assert_array_equal(labels, as_well)


def test_evaluations_share_their_workers_and_an_unreadable_file_is_named(photographs, monkeypatch):
    import jax

    from effnetlib import make_mesh
    from effnetlib.data import loader
    from effnetlib.mesh import batch_sharding

    monkeypatch.setattr(loader, "WORTH_A_WORKER", 1)
    monkeypatch.setattr(loader, "usable_cores", lambda: 2)
    split, options = load(photographs, "eval"), dict(size=32, augmentation="inception")
    sharding = batch_sharding(make_mesh(1, jax.devices()[:1]))

    def evaluate(reader):
        batches = loader.eval_batches(split, batch=4, sharding=sharding, reader=reader, **options)
        return np.concatenate([np.asarray(batch["labels"])[np.asarray(batch["mask"])] for batch in batches])

    with contextlib.closing(loader.Reader(split, **options)) as reader:
        pids = []
        for _ in range(2):
            assert evaluate(reader).tolist() == [0] * 5 + [1] * 5
            pids.append({child.pid for child in own_workers()})
        assert pids[0] == pids[1] and len(pids[0]) == 2
        Path(photographs, "val/bee/03.jpg").write_bytes(b"\xff\xd8\xff no more")
        with pytest.raises(FailedError, match="val/bee/03.jpg is not a readable image"):
            evaluate(reader)
    assert not own_workers()


def jpeg(**options):
    mode = options.pop("mode", "RGB")
    noise = np.random.default_rng(0).integers(0, 255, (25, 20, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((163, 201)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


exif = Image.Exif()
exif[0x0112] = 6
THUMBNAIL = b"\xff\xe1" + (2 + len(jpeg())).to_bytes(2) + jpeg()  # a whole JPEG in a segment before the frame's header


@pytest.mark.parametrize(
    ("encoded", "is_cut"),
    [
        (jpeg(subsampling="4:2:0"), True), (jpeg(subsampling="4:2:2"), True), (jpeg(subsampling="4:4:4"), True),
        (jpeg(mode="L"), True), (jpeg(exif=exif), True), (jpeg(restart_marker_rows=1), True),
        (jpeg()[:2] + THUMBNAIL + jpeg()[2:], True), (jpeg(progressive=True), False), (jpeg() + b"after it", False),
    ],
)  # fmt: skip
def test_the_rows_that_a_crop_needs_are_those_of_the_whole(encoded, is_cut):
    from effnetlib.data.images import _upper_rows, read

    whole = read(encoded)[1]
    for rows in (1, 16, 47, 100, 192, 201):
        upper = _upper_rows(encoded, rows, (201, 163))
        np.testing.assert_array_equal(upper[:rows, :, :3], whole[:rows])
        assert len(upper) == (min(rows + 8, 201) if is_cut else 201)


def test_a_photograph_is_cropped_from_its_bytes_as_from_its_pixels_and_a_truncated_one_is_refused():
    from effnetlib.data.images import Unreadable, eval_image, read, train_images

    def check(from_bytes, from_pixels):  # the fourth channel may round otherwise
        assert np.abs(from_bytes.astype(int) - from_pixels).max() <= 1

    for encoded in (jpeg(), jpeg(progressive=True), jpeg(mode="CMYK")):
        pixels = read(encoded)[1]
        check(eval_image(encoded, 48, "inception"), eval_image(pixels, 48, "inception"))
        for augmentation in ("inception", "shift_flip", "none"):
            check(
                *(
                    train_images([original] * 6, 48, augmentation, 0, range(6), range(6))
                    for original in (encoded, pixels)
                )
            )
    for end in (100, len(jpeg()) // 2, len(jpeg()) - 40):
        with pytest.raises(Unreadable):
            train_images([jpeg()[:end]], 48, "inception", 0, [0], [0])
