"""How fast images come in: each step of the input side by side in one run, on one core and on all of them.

    python -m tests.bench.input SOURCE [--images N] [--size PIXELS] [--tensorflow PYTHON] [--record FILE]

SOURCE is a set of photographs. With a Python that has TensorFlow (ours has not), tf.data is measured beside.
"""

import argparse
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

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from effnetlib.data.images import decode, example_rng, random_crop, train_images
from effnetlib.data.photographs import Photo
from effnetlib.data.shards import ShardedRecords, encode_record
from effnetlib.data.sources import load
from effnetlib.errors import EffnetlibError
from effnetlib.runs.files import write_atomically
from effnetlib.runs.machine import usable_cores
from effnetlib.runs.record import environment

ROUNDS = 5
PILLOW = "plain Pillow: decode, crop, same resize"
PILLOW_ANTIALIASED = "plain Pillow: decode, crop, its own resize"
CROP = "decode, crop, resize, flip"
TENSORFLOW = "tf.data: decode, crop, resize, flip"


@dataclass(frozen=True)
class Rate:
    """Images/s of one step with so many threads: the median of several rounds, the least and the greatest."""

    step: str
    threads: int
    median: float
    least: float
    greatest: float
    rounds: int


def bench(source: str, *, images: int = 300, size: int = 224, tensorflow: Path | None = None) -> list[Rate]:
    """Measures on a sample of a training split of photographs, in rounds that go through all steps in turn.

    Files are read once before, so reading is from the system's cache.

    Args:
      source: a data set of photographs.
      images: photographs in the sample, spread over the split.
      size: pixels a side after resizing.
      tensorflow: a Python that has TensorFlow (ours does not), to measure tf.data on the same sample beside.

    Raises:
      EffnetlibError: the set holds no photographs, or that Python has no TensorFlow.
    """
    split = load(source, "train")
    if split.encoded is None:
        raise EffnetlibError(f"{source} is in memory already: name a set of photographs")
    chosen = np.linspace(0, len(split) - 1, min(images, len(split))).astype(int)
    sample = [split.encoded(int(index)) for index in chosen]
    with tempfile.TemporaryDirectory() as scratch:
        steps = _steps(sample, Path(scratch), size)
        everything = {
            (name, threads): lambda step=step, threads=threads: _rate(step, len(sample), threads)
            for name, step in steps.items()
            for threads in sorted({1, usable_cores()})
        }
        if tensorflow is not None:
            for threads in sorted({1, usable_cores()}):
                everything[TENSORFLOW, threads] = _tf_data(tensorflow, Path(scratch), size, threads)
        rates = {key: [] for key in everything}
        for _ in range(ROUNDS):
            for key, measure in everything.items():
                rates[key].append(measure())
    return [
        Rate(step, threads, statistics.median(values), min(values), max(values), len(values))
        for (step, threads), values in rates.items()
    ]


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
        return lambda index: train_images([decode(read(index), "")], size, augmentation, 0, [0], [index])

    def encoded(index):
        return sample[index][0]

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
        "decode": lambda index: decode(encoded(index), ""),
        CROP: pipeline("inception", encoded),
        "the same, AutoAugment": pipeline("autoaugment", encoded),
        "the same, RandAugment": pipeline("randaugment", encoded),
        "AutoAugment from loose files": pipeline("autoaugment", lambda index: loose[index].read()),
        "AutoAugment from ArrayRecord": pipeline("autoaugment", lambda index: records[index][0]),
        PILLOW: lambda index: pillow(index, antialias=False),
        PILLOW_ANTIALIASED: lambda index: pillow(index, antialias=True),
    }


def _rate(step: Callable[[int], object], count: int, threads: int) -> float:
    def share(first):
        for index in range(first, count, threads):
            step(index)

    start = time.perf_counter()
    if threads == 1:
        share(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(share, range(threads)))
    return count / (time.perf_counter() - start)


def _tf_data(python: Path, folder: Path, size: int, threads: int) -> Callable[[], float]:
    script = Path(__file__).parent / "tf_baseline.py"

    def measure():
        command = [str(python), str(script), str(folder), str(size), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise EffnetlibError(f"{python} cannot measure tf.data: {last}")
        return float(done.stdout.split()[-1])

    return measure


def table(rates: list[Rate]) -> str:
    """The rates as a table, with the ratios that matter below."""
    steps = list(dict.fromkeys(rate.step for rate in rates))
    threads = sorted({rate.threads for rate in rates})
    found = {(rate.step, rate.threads): rate for rate in rates}
    width = max(map(len, steps))
    lines = [f"{'images/s, median (range)':<{width}}  " + "".join(f"{f'{n} threads':>28}" for n in threads)]
    for step in steps:
        cells = [found[step, n] for n in threads]
        texts = [f"{cell.median:,.0f} ({cell.least:,.0f} to {cell.greatest:,.0f})" for cell in cells]
        lines.append(f"{step:<{width}}  " + "".join(f"{text:>28}" for text in texts))
    lines.append("")
    lines += [f"{name}: {value:.2f}" for name, value in ratios(rates).items()]
    return "\n".join(lines)


def ratios(rates: list[Rate]) -> dict[str, float]:
    """Medians over medians."""
    found = {(rate.step, rate.threads): rate.median for rate in rates}
    most = max(rate.threads for rate in rates)
    out = {
        "ours over plain Pillow doing the same, one core": found[CROP, 1] / found[PILLOW, 1],
        "ours over plain Pillow with its antialiased resize, one core": found[CROP, 1] / found[PILLOW_ANTIALIASED, 1],
    }
    if most > 1:
        out[f"{most} threads over one, with AutoAugment"] = (
            found["the same, AutoAugment", most] / found["the same, AutoAugment", 1]
        )
        out[f"{most} threads over one, without"] = found[CROP, most] / found[CROP, 1]
    for threads in sorted({1, most}):
        if (TENSORFLOW, threads) in found:
            out[f"ours over tf.data, {threads} threads"] = found[CROP, threads] / found[TENSORFLOW, threads]
    return out


def to_json(rates: list[Rate], source: str, environment: dict) -> str:
    """A record of a bench, for reports."""
    rows = [asdict(rate) for rate in rates]
    return json.dumps(
        {"source": Path(source).name, "environment": environment, "rates": rows, "ratios": ratios(rates)}, indent=2
    )


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
    print(table(rates))
    if given.record:
        write_atomically(given.record, to_json(rates, source, environment()) + "\n")


if __name__ == "__main__":
    main()
