"""Batches on the devices, in an order that is a pure function of (seed, step): the position to resume from is the step.

The training set is read as one endless stream, epoch after epoch, each a fresh permutation. Step s takes the examples
from ``s * batch`` on, so no example is ever dropped, and a batch may span two epochs. Which process loads what follows
from the sharding, and never changes what the global batch is.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from effnetlib.data.images import CROPPING, Examples, eval_image, train_images
from effnetlib.data.sources import Split
from effnetlib.data.workers import Workers
from effnetlib.runs.machine import usable_cores

Batch = dict[str, jax.Array]
KEPT_BYTES = 2**30  # of a resized set; CIFAR-10 at 224 px would be 7.5 GB, and is resized anew for each batch
WORTH_A_WORKER = 64  # images; to start one takes as long as to make about so many


@functools.lru_cache(maxsize=4)
def permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def positions(num_examples: int, seed: int, step: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, indices) of the examples of a step, each int64 ``[batch]``."""
    stream = np.arange(step * batch, (step + 1) * batch)
    epochs = stream // num_examples
    indices = np.empty_like(stream)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permutation(num_examples, seed, int(epoch))[stream[here] % num_examples]
    return epochs, indices


def train_batches(
    split: Split, *, seed: int, batch: int, size: int, augmentation: str, sharding, start: int, stop: int
) -> Iterator[Batch]:
    """Batches of the steps from `start` up to `stop`: uint8 images ``[batch, size, size, 3]``, int32 labels.

    Close it (`contextlib.closing`) when an error may end its use: it has worker processes.
    """
    rows = _local_rows(sharding, batch)
    with contextlib.closing(Reader(split, size, augmentation, seed)) as reader:
        wanted = (np.stack(positions(len(split), seed, step, batch), 1)[rows] for step in range(start, stop))
        for images, labels in reader(wanted, len(rows), (stop - start) * len(rows)):
            yield _on_devices({"images": images, "labels": labels}, rows, batch, sharding)


def eval_batches(
    split: Split, *, batch: int, size: int, augmentation: str, sharding, reader: "Reader | None" = None
) -> Iterator[Batch]:
    """Each example once, in order; the last batch is padded with black images whose ``mask`` is False.

    Close it as `train_batches`. A `reader` of this split is used, and stays open for the next evaluation.
    """
    rows, steps = _local_rows(sharding, batch), range(-(-len(split) // batch))
    masks = [step * batch + rows < len(split) for step in steps]
    wanted = [(step * batch + rows)[mask] for step, mask in zip(steps, masks, strict=True)]
    wanted = [np.stack([np.zeros_like(indices), indices], 1) for indices in wanted]
    with contextlib.ExitStack() as stack:
        reader = reader or stack.enter_context(contextlib.closing(Reader(split, size, augmentation)))
        made = reader(wanted, len(rows), sum(map(len, wanted)))
        for mask, (images, labels) in zip(masks, made, strict=True):
            if padding := len(rows) - len(images):
                images, labels = np.pad(images, [(0, padding)] + [(0, 0)] * 3), np.pad(labels, (0, padding))
            yield _on_devices({"images": images, "labels": labels, "mask": mask}, rows, batch, sharding)


class Reader:
    """Makes the examples of a split, as they are evaluated, or with a seed as they are trained on.

    A set in memory is resized once and augmented a batch at a time, in a thread. Photographs are made by a worker process
    per core, which stay until `close`; on one core, or for a few, in a thread.
    """

    def __init__(self, split: Split, size: int, augmentation: str, seed: int | None = None):
        self.split, self.size, self.augmentation, self.seed = split, size, augmentation, seed
        self.examples, self.workers = Examples(split.encoded or split.example, size, augmentation, seed), None
        as_evaluated = split.encoded is None and (seed is None or augmentation not in CROPPING)
        self.kept = as_evaluated and 3 * size * size * len(split) <= KEPT_BYTES

    def __call__(self, wanted: Iterable[np.ndarray], batch: int, total: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images and labels of each batch of (epoch, index), int64 ``[n, 2]``: n is at most `batch`, and `total` in all."""
        count = min(usable_cores(), total // WORTH_A_WORKER)
        if self.split.encoded is None or count < 2:
            return _one_thread_ahead(self._make, wanted)
        self.workers = self.workers or Workers(self.examples, self.size, batch, count)
        return self.workers(wanted)

    def close(self) -> None:
        """Ends the worker processes; the next call starts others."""
        if self.workers:
            self.workers.close()
        self.workers = None

    def _make(self, wanted):
        epochs, indices = wanted.T
        if not self.kept:
            made = [self.examples(*each) for each in wanted.tolist()]
            images = np.array([image for image, _ in made], np.uint8).reshape(-1, self.size, self.size, 3)
            return images, np.array([label for _, label in made], np.int32)
        images, labels = _kept(self.split, self.size, self.augmentation)
        if self.seed is None:
            return images[indices], labels[indices]
        return train_images(images, self.size, self.augmentation, self.seed, epochs, indices), labels[indices]


@functools.lru_cache(maxsize=2)  # the training and the evaluation split
def _kept(split: Split, size: int, augmentation: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a set in memory as they are evaluated, and their labels."""
    images, labels = np.empty((len(split), size, size, 3), np.uint8), np.empty(len(split), np.int32)
    for index in range(len(split)):
        image, labels[index] = split.example(index)
        images[index] = eval_image(image, size, augmentation)
    return images, labels


def _one_thread_ahead(make, items: Iterable) -> Iterator:
    thread, ahead = ThreadPoolExecutor(1), deque()
    try:
        for item in items:
            ahead.append(thread.submit(make, item))
            if len(ahead) > 2:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _local_rows(sharding, batch: int) -> np.ndarray:
    """The rows of the global batch that this process's devices hold, sorted."""
    shards = sharding.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[shard] for shard in shards]))


def _on_devices(arrays: dict[str, np.ndarray], rows: np.ndarray, batch: int, sharding) -> Batch:
    """Puts the rows of each device on it. The copy is asynchronous: while the devices work on one batch the next is on its way."""

    def place(array):
        def shard(index):
            first, end, _ = index[0].indices(batch)
            return array[np.searchsorted(rows, first) :][: end - first]

        return jax.make_array_from_callback((batch, *array.shape[1:]), sharding, shard)

    return {name: place(array) for name, array in arrays.items()}
