"""Batches on the devices, in an order that is a pure function of (seed, step): the position to resume from is the step.

The training set is read as one endless stream, epoch after epoch, each a fresh permutation; step s takes the examples
from ``s * batch`` on, so no example is ever dropped and a batch may span two epochs. Which process loads what follows
from the sharding, and never changes what the global batch is.
"""

import functools
import logging
from collections.abc import Iterator

import jax
import numpy as np

from effnetlib.data.images import CROPPING, eval_image, train_images
from effnetlib.data.sources import Split
from effnetlib.runs.machine import usable_cores

# With a jaxlib before 0.11 grain warns, when imported, that it cannot profile its worker processes. None are used here, and the
# line would stand at the top of every notebook on Colab and Kaggle.
_disabled = logging.root.manager.disable
logging.disable(logging.WARNING)
import grain  # noqa: E402

logging.disable(_disabled)

Batch = dict[str, jax.Array]


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
    """Batches of the steps from `start` up to `stop`: uint8 images ``[batch, size, size, 3]``, int32 labels."""
    rows = _local_rows(sharding, batch)

    def make(step):
        epochs, indices = (each[rows] for each in positions(len(split), seed, step, batch))
        if augmentation not in CROPPING and _can_keep(split, size):
            originals, labels = (kept[indices] for kept in _kept(split, size, augmentation))
        else:
            originals, labels = zip(*(split.example(int(index)) for index in indices), strict=True)
        images = train_images(originals, size, augmentation, seed, epochs, indices)
        return {"images": images, "labels": np.asarray(labels, np.int32)}

    return _on_devices(make, start, stop, batch, sharding)


def eval_batches(split: Split, *, batch: int, size: int, augmentation: str, sharding) -> Iterator[Batch]:
    """Each example once, in order; the last batch is padded with black images whose ``mask`` is False."""
    rows = _local_rows(sharding, batch)

    def make(step):
        mask = step * batch + rows < len(split)
        indices = (step * batch + rows)[mask]
        images, labels = np.zeros((len(rows), size, size, 3), np.uint8), np.zeros(len(rows), np.int32)
        if _can_keep(split, size):
            images[mask], labels[mask] = (kept[indices] for kept in _kept(split, size, augmentation))
        else:
            for place, index in zip(np.flatnonzero(mask), indices, strict=True):
                image, labels[place] = split.example(int(index))
                images[place] = eval_image(image, size, augmentation)
        return {"images": images, "labels": labels, "mask": mask}

    return _on_devices(make, 0, -(-len(split) // batch), batch, sharding)


KEPT_BYTES = 2**30


def _can_keep(split: Split, size: int) -> bool:
    """Whether all images of a set in memory are kept at their final size: CIFAR-10 at 224 px is 7.5 GB, and is not."""
    return split.encoded is None and 3 * size * size * len(split) <= KEPT_BYTES


@functools.lru_cache(maxsize=2)  # the training and the evaluation split
def _kept(split: Split, size: int, augmentation: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a set as they are evaluated, and their labels, made once."""
    images, labels = np.empty((len(split), size, size, 3), np.uint8), np.empty(len(split), np.int32)
    for index in range(len(split)):
        image, labels[index] = split.example(index)
        images[index] = eval_image(image, size, augmentation)
    return images, labels


def _local_rows(sharding, batch: int) -> np.ndarray:
    """The rows of the global batch that this process's devices hold, sorted."""
    shards = sharding.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[shard] for shard in shards]))


def _on_devices(make, start: int, stop: int, batch: int, sharding) -> Iterator[Batch]:
    """Makes the batches in threads ahead of their use, and puts the rows of each device on it."""
    if start >= stop:
        return
    threads = min(usable_cores(), 16)
    ahead = grain.MapDataset.range(start, stop).map(make)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    rows = _local_rows(sharding, batch)

    def place(array):
        def shard(index):
            wanted = np.arange(batch)[index[0]]
            return array[np.searchsorted(rows, wanted)]

        return jax.make_array_from_callback((batch, *array.shape[1:]), sharding, shard)

    # The copy to the devices is asynchronous: while they work on one batch the next one is on its way.
    for arrays in ahead.to_iter_dataset(options):
        yield {name: place(array) for name, array in arrays.items()}
