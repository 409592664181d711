"""Batches on the devices. Their order is a pure function of (seed, step), so a run resumes from its step alone.

The training set is one endless stream of epochs, and each epoch is a new permutation. Step s takes the examples from
``s * batch`` on. No example is dropped, and a batch may span two epochs. The sharding decides which process loads which
rows; it never changes the global batch.
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
CACHED_BYTES = 2**30  # limit of a resized set in memory; CIFAR-10 at 224 px (7.5 GB) is resized anew per batch
WORTH_A_WORKER = 64  # images; starting a worker takes about as long as making these


@functools.lru_cache(maxsize=4)
def permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch."""
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

    Use it in `contextlib.closing`, so that its worker processes end after an error, too.
    """
    rows = _local_rows(sharding, batch)
    with contextlib.closing(Reader(split, size, augmentation, seed)) as reader:
        wanted = (np.stack(positions(len(split), seed, step, batch), 1)[rows] for step in range(start, stop))
        for images, labels in reader(wanted, len(rows), (stop - start) * len(rows)):
            yield _on_devices({"images": images, "labels": labels}, rows, batch, sharding)


def eval_batches(
    split: Split, *, batch: int, size: int, augmentation: str, sharding, reader: "Reader | None" = None
) -> Iterator[Batch]:
    """Batches of each example once, in order. Black images with a ``mask`` of False fill the last batch.

    Close it like `train_batches`. A given `reader` of this split stays open for the next evaluation.
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
    """Makes the examples of a split: for training with a seed, for evaluation without.

    A set in memory is resized once and augmented batch by batch, in a thread. Photographs are made by one worker process
    per core, until `close`. On one core, or for a few images, a thread makes them.
    """

    def __init__(self, split: Split, size: int, augmentation: str, seed: int | None = None):
        self.split, self.size, self.augmentation, self.seed = split, size, augmentation, seed
        self.examples, self.workers = Examples(split.encoded or split.example, size, augmentation, seed), None
        is_resized_once = split.encoded is None and (seed is None or augmentation not in CROPPING)
        self.is_cached = is_resized_once and 3 * size * size * len(split) <= CACHED_BYTES

    def __call__(self, wanted: Iterable[np.ndarray], batch: int, total: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images and labels per array of (epoch, index), int64 ``[n, 2]``, n <= `batch`. `total` is the sum of all n."""
        count = min(usable_cores(), total // WORTH_A_WORKER)
        if self.split.encoded is None or count < 2:
            return _one_thread_ahead(self._make, wanted)
        self.workers = self.workers or Workers(self.examples, self.size, batch, count)
        return self.workers(wanted)

    def close(self) -> None:
        """Ends the worker processes; the next call starts new ones."""
        if self.workers:
            self.workers.close()
        self.workers = None

    def _make(self, wanted):
        epochs, indices = wanted.T
        if not self.is_cached:
            made = [self.examples(epoch, index) for epoch, index in wanted.tolist()]
            images = np.array([image for image, _ in made], np.uint8).reshape(-1, self.size, self.size, 3)
            return images, np.array([label for _, label in made], np.int32)
        images, labels = _resized(self.split, self.size, self.augmentation)
        if self.seed is None:
            return images[indices], labels[indices]
        return train_images(images, self.size, self.augmentation, self.seed, epochs, indices), labels[indices]


@functools.lru_cache(maxsize=2)  # for the training and the evaluation split
def _resized(split: Split, size: int, augmentation: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a set in memory, resized for evaluation, and their labels."""
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
    """Puts the rows on their devices. The copy is asynchronous: the next batch is copied while the devices compute."""

    def place(array):
        def shard(index):
            first, end, _ = index[0].indices(batch)
            return array[np.searchsorted(rows, first) :][: end - first]

        return jax.make_array_from_callback((batch, *array.shape[1:]), sharding, shard)

    return {name: place(array) for name, array in arrays.items()}
