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

from effnetlib.data.images import eval_image, train_image
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


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator that augments one example in one epoch."""
    return np.random.Generator(np.random.Philox(key=(seed, (epoch << 32) + index)))


def train_batches(
    split: Split, *, seed: int, batch: int, size: int, augmentation: str, sharding, start: int, stop: int
) -> Iterator[Batch]:
    """Batches of the steps from `start` up to `stop`: uint8 images ``[batch, size, size, 3]``, int32 labels."""

    def make(step):
        epochs, indices = positions(len(split), seed, step, batch)

        rows = _local_rows(sharding, batch)
        images, labels = np.empty((len(rows), size, size, 3), np.uint8), np.empty(len(rows), np.int32)
        for place, row in enumerate(rows):
            epoch, index = int(epochs[row]), int(indices[row])
            image, labels[place] = split.example(index)
            images[place] = train_image(image, size, augmentation, example_rng(seed, epoch, index))
        return {"images": images, "labels": labels}

    return _on_devices(make, start, stop, batch, sharding)


def eval_batches(split: Split, *, batch: int, size: int, augmentation: str, sharding) -> Iterator[Batch]:
    """Each example once, in order; the last batch is padded with black images whose ``mask`` is False."""

    def make(step):
        rows = _local_rows(sharding, batch)
        indices = step * batch + rows
        mask = indices < len(split)
        images, labels = np.zeros((len(rows), size, size, 3), np.uint8), np.zeros(len(rows), np.int32)
        for place in np.flatnonzero(mask):
            image, labels[place] = split.example(int(indices[place]))
            images[place] = eval_image(image, size, augmentation)
        return {"images": images, "labels": labels, "mask": mask}

    return _on_devices(make, 0, -(-len(split) // batch), batch, sharding)


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
