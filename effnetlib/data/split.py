"""A split of a data set: its examples by index."""

import functools
import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from effnetlib.data.images import decode


@dataclass(frozen=True, eq=False)  # two are equal where they are the same object, which makes them keys
class Split:
    """One split of a data set, by random access, in an order that is the set's own (class by class for photographs).

    Attributes:
      size: examples.
      class_names: the names of the labels.
      fingerprint: sixteen hex digits of a SHA-256. Over every pixel and label where the set is in memory or in shards of
        ours; over names and sizes of the files where they are loose.
      example: ``example(index)`` is an image, uint8 ``[height, width, 3]``, and its label.
      encoded: ``encoded(index)`` is a photograph's file as bytes, its label and its name; None for sets in memory.
      origin: the folder or archive that photographs come from.
      unused: counts of what lies among or beside photographs and is not used.
      names: a SHA-256 over the names of loose files alone; empty for other sets.
      photos: the loose files (see `effnetlib.data.photographs.Photo`); empty for other sets.
    """

    size: int
    class_names: tuple[str, ...]
    fingerprint: str
    example: Callable[[int], tuple[np.ndarray, int]] = field(repr=False)
    encoded: Callable[[int], tuple[bytes, int, str]] | None = field(default=None, repr=False)
    origin: str = ""
    unused: dict[str, int] = field(default_factory=dict, repr=False)
    names: str = ""
    photos: Sequence = field(default=(), repr=False)

    def __len__(self) -> int:
        return self.size

    @classmethod
    def of_photographs(
        cls, size: int, class_names: Sequence[str], fingerprint: str, encoded: Callable, **about
    ) -> "Split":
        """A split of which `encoded` is known; `about` has the fields after that."""
        return cls(size, tuple(class_names), fingerprint, functools.partial(_decoded, encoded), encoded, **about)

    @classmethod
    def in_memory(cls, images: np.ndarray, labels: np.ndarray, class_names) -> "Split":
        """A split over ``images``: uint8 ``[examples, height, width]`` (grey) or ``[..., 3]``."""
        labels = labels.astype(np.int32)
        digest = hashlib.sha256(np.ascontiguousarray(images).tobytes() + labels.tobytes()).hexdigest()[:16]
        if images.ndim == 3:
            images = np.repeat(images[..., None], 3, axis=-1)
        return cls(len(labels), tuple(class_names), digest, functools.partial(_pixels, images, labels))

    def select(self, indices: np.ndarray) -> "Split":
        """Part of the split, in its order."""
        indices = np.sort(indices).astype(np.int64)
        return replace(
            self,
            size=len(indices),
            fingerprint=hashlib.sha256(self.fingerprint.encode() + indices.tobytes()).hexdigest()[:16],
            example=functools.partial(_at, self.example, indices),
            encoded=self.encoded and functools.partial(_at, self.encoded, indices),
            photos=(),
        )


def _pixels(images: np.ndarray, labels: np.ndarray, index: int) -> tuple[np.ndarray, int]:
    return images[index], int(labels[index])


def _decoded(encoded: Callable, index: int) -> tuple[np.ndarray, int]:
    photograph, label, name = encoded(index)
    return decode(photograph, name), label


def _at(read: Callable, indices: np.ndarray, index: int):
    return read(int(indices[index]))


def shown(name: str) -> str:
    r"""The name of a file or a class for a sentence. It is escaped where it looks like another name.

    That is so for blanks at its ends, letters made of parts, and invisible characters.

    >>> print(shown("ant"), shown("ant "), shown("A\u0308pfel"))
    ant 'ant ' 'A\u0308pfel'
    """
    plain = name.isprintable() and name == " ".join(name.split()) != "" and unicodedata.is_normalized("NFKC", name)
    return name if plain else ascii(name)
