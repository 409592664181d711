"""How fast images come in: each step of the input side by side in one run, on one core and on all of them.

    python -m tests.bench.input SOURCE [--images N] [--size PIXELS] [--tensorflow PYTHON] [--record FILE]

SOURCE is a set of photographs. With a Python that has TensorFlow (ours has not), tf.data is measured beside.
"""

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import cv2
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from effnetlib import make_mesh
from effnetlib.data import loader
from effnetlib.data.augment import POLICY_V0
from effnetlib.data.images import Examples, decode, example_rng, random_crop, train_images
from effnetlib.data.photographs import Photo
from effnetlib.data.shards import ShardedRecords, encode_record
from effnetlib.data.sources import load
from effnetlib.data.workers import Workers
from effnetlib.errors import EffnetlibError
from effnetlib.mesh import batch_sharding
from effnetlib.runs.files import write_atomically
from effnetlib.runs.machine import usable_cores
from effnetlib.runs.record import environment

ROUNDS = 5
SMALL = 32  # pixels per side of images in memory
IMAGES_PER_SECOND = 2_000  # at which the main process's share of the interpreter lock is stated
STEPS = {
    "inception": "decode, crop, resize, flip",
    "autoaugment": "the same, AutoAugment",
    "randaugment": "the same, RandAugment",
}
PILLOW = "plain Pillow: decode, crop, same resize"
PILLOW_ANTIALIASED = "plain Pillow: decode, crop, its own resize"
IN_MEMORY, PER_IMAGE = (
    "in memory, shift and flip: a batch at a time",
    "in memory, shift and flip: one image after another",
)
TENSORFLOW = {"inception": "tf.data: decode, crop, resize, flip", "autoaugment": "tf.data: the same, AutoAugment"}
LOCK = "share of the main process's interpreter lock"
WITHOUT = "tf.data is left out: TensorFlow is not there (--tensorflow PYTHON names an environment that has it)"


@dataclass(frozen=True)
class Rate:
    """Images/s of one step on so many cores: the median of several rounds, the least and the greatest."""

    step: str
    cores: int
    median: float
    least: float
    greatest: float
    rounds: int


def bench(source: str, *, images: int = 300, size: int = 224, tensorflow: Path | None = None) -> list[Rate]:
    """Measures on a sample of a training split of photographs, in rounds that go through all steps in turn.

    Files are read once before, so reading is from the system's cache. One core is this process or one worker process.

    Args:
      source: a data set of photographs.
      images: photographs in the sample, spread over the split.
      size: pixels per side after resizing.
      tensorflow: a Python that has TensorFlow (ours does not), to measure tf.data on the same sample beside.

    Raises:
      EffnetlibError: the set holds no photographs, or that Python has no TensorFlow.
    """
    split = load(source, "train")
    if split.encoded is None:
        raise EffnetlibError(f"{source} is in memory already: name a set of photographs")
    chosen = np.linspace(0, len(split) - 1, min(images, len(split))).astype(int)
    sample = [split.encoded(int(index)) for index in chosen]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        everything = {
            (name, 1): functools.partial(_rate, step, len(sample))
            for name, step in _steps(sample, Path(scratch), size).items()
        }
        everything |= _in_memory()
        for augmentation in ("inception", "autoaugment"):
            for count in _counts():
                make = Examples(sample.__getitem__, size, augmentation, 0)
                made = stack.enter_context(contextlib.closing(Workers(make, size, 64, count)))
                everything[f"{STEPS[augmentation]}, in worker processes", count] = functools.partial(
                    _rate_of_workers, made, len(sample)
                )
            if tensorflow is not None:
                for cores in sorted({1, usable_cores()}):
                    everything[TENSORFLOW[augmentation], cores] = functools.partial(
                        _rate_of_tensorflow, tensorflow, Path(scratch), size, cores, augmentation
                    )
        everything[LOCK, 1] = functools.partial(_lock_share, made, len(sample))
        rates = {key: [] for key in everything}
        for _ in range(ROUNDS):
            for key, measure in everything.items():
                rates[key].append(measure())
    return [
        Rate(step, cores, statistics.median(values), min(values), max(values), len(values))
        for (step, cores), values in rates.items()
    ]


def _counts() -> list[int]:
    """1, 2, 4, … workers, and one per core."""
    cores = usable_cores()
    return sorted({2**i for i in range(8) if 2**i < cores} | {1, 2, cores})


def _steps(sample, scratch: Path, size: int) -> dict[str, Callable[[int], object]]:
    writer = ArrayRecordWriter(str(scratch / "all.array_record"), "group_size:1,uncompressed")
    loose = []
    for index, (encoded, label, _) in enumerate(sample):
        path = scratch / f"{index:06}.jpg"
        path.write_bytes(encoded)
        loose.append(Photo(path.name, label, str(path), len(encoded)))
        writer.write(encode_record(encoded, label, path.name))
    writer.close()
    records = ShardedRecords([(scratch / "all.array_record", len(sample))], 1000)

    def pipeline(augmentation, read):
        return lambda index: train_images([read(index)], size, augmentation, 0, [0], [index])

    def pillow(index, antialias):
        image = Image.open(BytesIO(sample[index][0])).convert("RGB")
        crop = random_crop(image.height, image.width, example_rng(0, 0, index)) or (0, 0, image.height, image.width)
        top, left, height, width = crop
        box, cubic = (left, top, left + width, top + height), Image.Resampling.BICUBIC
        if antialias:
            return np.asarray(image.crop(box).resize((size, size), cubic))
        return np.asarray(image.transform((size, size), Image.Transform.EXTENT, box, cubic))

    return {
        "read a loose file": lambda index: loose[index].read(),
        "read from ArrayRecord": lambda index: records[index],
        "decode the whole": lambda index: decode(sample[index][0], ""),
        **{STEPS[augmentation]: pipeline(augmentation, lambda index: sample[index][0]) for augmentation in STEPS},
        "AutoAugment from loose files": pipeline("autoaugment", lambda index: loose[index].read()),
        "AutoAugment from ArrayRecord": pipeline("autoaugment", lambda index: records[index][0]),
        PILLOW: lambda index: pillow(index, antialias=False),
        PILLOW_ANTIALIASED: lambda index: pillow(index, antialias=True),
    }


def _rate(step: Callable[[int], object], count: int) -> float:
    start = time.perf_counter()
    for index in range(count):
        step(index)
    return count / (time.perf_counter() - start)


def _in_memory(batch: int = 512) -> dict[tuple[str, int], Callable[[], float]]:
    """A set of the size of CIFAR-10, as it is augmented, and as it was before: one image after another."""
    images = np.random.default_rng(0).integers(0, 256, (50_000, SMALL, SMALL, 3), np.uint8)

    def batched(indices):
        return train_images(images, SMALL, "shift_flip", 0, np.zeros_like(indices), indices)

    def per_image(indices):
        out, pad = np.empty((len(indices), SMALL, SMALL, 3), np.uint8), SMALL // 8
        for place, index in enumerate(indices):
            rng = example_rng(0, 0, index)
            top, left = rng.integers(0, 2 * pad + 1, 2)
            framed = cv2.copyMakeBorder(images[index], pad, pad, pad, pad, cv2.BORDER_CONSTANT)
            image = framed[top : top + SMALL, left : left + SMALL]
            out[place] = np.ascontiguousarray(image[:, ::-1]) if rng.random() < 0.5 else image
        return out

    def rate(make, batches, threads):
        order = np.random.default_rng(1).permutation(len(images))[: batches * batch].reshape(batches, batch)
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            list(pool.map(lambda part: len(make(part)), order))  # frees each batch, as training does
            return order.size / (time.perf_counter() - start)

    return {
        (IN_MEMORY, 1): functools.partial(rate, batched, 90, 1),
        (IN_MEMORY, 2): functools.partial(rate, batched, 90, 2),
        (PER_IMAGE, 1): functools.partial(rate, per_image, 9, 1),
    }


def _batches(count: int) -> list[np.ndarray]:
    """The (epoch, index) of batches of 64, several times through a sample."""
    indices = np.resize(np.arange(count), max(64, 3 * count) // 64 * 64).reshape(-1, 64)
    return [np.stack([np.zeros_like(part), part], 1) for part in indices]


def _rate_of_workers(made: Workers, count: int) -> float:
    """Several times through the sample, after the workers have started."""
    batches = _batches(count)
    list(made(batches[:2]))
    start = time.perf_counter()
    done = sum(len(labels) for _, labels in made(batches))
    return done / (time.perf_counter() - start)


class _TimedCopies:
    """Stands for the images of a ring, and adds up the processor time of copying out of them."""

    def __init__(self, ring: np.ndarray):
        self.ring, self.seconds = ring, 0.0

    def __getitem__(self, rows):
        if isinstance(rows, str):
            return self if rows == "image" else self.ring[rows]
        start = time.thread_time()
        copy = self.ring["image"][rows]
        self.seconds += time.thread_time() - start
        return copy


def _lock_share(made: Workers, count: int) -> float:
    """The main thread's processor time per image, in what a training loop does for its input, times the rate.

    Copies out of the shared memory are left out, for they hold no lock. The rest may hold it, and counts as if it did.
    """
    sharding, rows, ring = batch_sharding(make_mesh(1, jax.devices()[:1])), np.arange(64), made.ring
    steps = len(_batches(count))
    wanted = (np.stack(loader.positions(count, 0, step, 64), 1) for step in range(steps))
    made.ring, start = _TimedCopies(ring), time.thread_time()
    for pixels, labels in made(wanted):
        loader._on_devices({"images": pixels, "labels": labels}, rows, 64, sharding)
    spent = time.thread_time() - start - made.ring.seconds
    made.ring = ring
    return spent / (64 * steps) * IMAGES_PER_SECOND


def _rate_of_tensorflow(python: Path, folder: Path, size: int, cores: int, augmentation: str) -> float:
    script, policy = Path(__file__).parent / "tf_baseline.py", POLICY_V0 if augmentation == "autoaugment" else ()
    command = [str(python), str(script), str(folder), str(size), str(cores), json.dumps(policy)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise EffnetlibError(f"{python} cannot measure tf.data: {last}")
    return float(done.stdout.split()[-1])


def table(rates: list[Rate]) -> str:
    """The rates as a table, with the ratios that matter below."""
    width = max(len(rate.step) for rate in rates)
    lines = [f"{'images/s':<{width}}  {'cores':>5}  {'median':>9}  range"]
    for rate in rates:
        if rate.step != LOCK:
            spread = f"{rate.least:,.0f} to {rate.greatest:,.0f}"
            lines.append(f"{rate.step:<{width}}  {rate.cores:>5}  {rate.median:>9,.0f}  {spread}")
    return "\n".join([*lines, "", *(f"{name}: {value:.3g}" for name, value in ratios(rates).items())])


def ratios(rates: list[Rate]) -> dict[str, float]:
    """Medians over medians; the last is a share."""
    found = {(rate.step, rate.cores): rate.median for rate in rates}
    crop, autoaugment = STEPS["inception"], STEPS["autoaugment"]
    workers = f"{autoaugment}, in worker processes"
    most = max(cores for step, cores in found if step == workers)
    out = {
        "in_memory_over_per_image": found[IN_MEMORY, 1] / found[PER_IMAGE, 1],
        "in_memory_two_threads_over_one": found[IN_MEMORY, 2] / found[IN_MEMORY, 1],
        "over_pillow_per_core": found[crop, 1] / found[PILLOW, 1],
        "over_antialiased_pillow_per_core": found[crop, 1] / found[PILLOW_ANTIALIASED, 1],
        "two_workers_over_one": found[workers, 2] / found[workers, 1],
        f"{most}_workers_over_linear": found[workers, most] / found[workers, 1] / most,
    }
    if (TENSORFLOW["inception"], 1) in found:
        out["over_tf_data_per_core"] = found[crop, 1] / found[TENSORFLOW["inception"], 1]
        out["over_tf_data_per_core_autoaugment"] = found[autoaugment, 1] / found[TENSORFLOW["autoaugment"], 1]
    return out | {"main_process_lock_share": found[LOCK, 1]}


def to_json(rates: list[Rate], source: str, size: int, environment: dict) -> str:
    """A record of a bench, for reports and for plans, which need the images/s of a core by augmentation."""
    per_core = {
        augmentation: rate.median for augmentation in STEPS for rate in rates if rate.step == STEPS[augmentation]
    }
    about = {"source": Path(source).name, "size": size, "environment": environment, "images_per_core": per_core}
    return json.dumps(about | {"rates": [asdict(rate) for rate in rates], "ratios": ratios(rates)}, indent=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--images", type=int, default=300, help="photographs in the sample")
    parser.add_argument("--size", type=int, default=224, help="pixels per side")
    parser.add_argument("--tensorflow", type=Path, help="a Python with TensorFlow")
    parser.add_argument("--record", type=Path, help="where to write the record, as JSON")
    given = parser.parse_args()
    if given.images < 1 or given.size < 1:
        parser.error("--images and --size must be above 0")
    if given.tensorflow and not given.tensorflow.exists():
        parser.error(f"there is no {given.tensorflow}")
    if given.record and not given.record.absolute().parent.is_dir():
        parser.error(f"there is no folder {given.record.absolute().parent}")
    source = str(Path(given.source).absolute()) if Path(given.source).is_dir() else given.source
    try:
        rates = bench(source, images=given.images, size=given.size, tensorflow=given.tensorflow)
    except EffnetlibError as error:
        sys.exit(f"bench: {error}")
    print(table(rates) if given.tensorflow else f"{table(rates)}\n{WITHOUT}")
    if given.record:
        write_atomically(given.record, to_json(rates, source, given.size, environment()) + "\n")


if __name__ == "__main__":
    main()
