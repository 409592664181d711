"""A split of a data set: its examples by index."""

import functools
import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from effnetlib.data.images import decode


@dataclass(frozen=True, eq=False)  # compared by identity, so that a split can be a cache key
class Split:
    """One split of a data set, read by index. Its order is fixed; loose photographs are ordered by class, then name.

    Attributes:
      size: number of examples.
      class_names: the class of each label.
      fingerprint: 16 hex digits of a SHA-256. It covers pixels and labels (in memory), records (our shards), or file names
        and sizes (loose photographs, TFDS).
      example: ``example(index)`` returns an image, uint8 ``[height, width, 3]``, and its label.
      encoded: ``encoded(index)`` returns a photograph's bytes, label and name; None for sets in memory.
      origin: the folder or archive of the photographs.
      unused: counts of the files and folders that are not used, by kind.
      names: a hash like `fingerprint`, but over file names without sizes; only for loose files.
    """

    size: int
    class_names: tuple[str, ...]
    fingerprint: str
    example: Callable[[int], tuple[np.ndarray, int]] = field(repr=False)
    encoded: Callable[[int], tuple[bytes, int, str]] | None = field(default=None, repr=False)
    origin: str = ""
    unused: dict[str, int] = field(default_factory=dict, repr=False)
    names: str = ""

    def __len__(self) -> int:
        return self.size

    def sample(self) -> str:
        """A hash of the fingerprint and of the bytes of 16 to 31 photographs. Hosts compare it."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for index in range(0, len(self), max(1, len(self) // 16)) if self.encoded else ():
            digest.update(self.encoded(index)[0])
        return digest.hexdigest()

    @property
    def photos(self) -> Sequence:
        """The loose files (see `effnetlib.data.photographs.Photo`); empty for other sets."""
        return getattr(self.encoded, "photos", ())

    @classmethod
    def of_photographs(
        cls, size: int, class_names: Sequence[str], fingerprint: str, encoded: Callable, **about
    ) -> "Split":
        """A split of photographs. `about` sets the fields after `encoded`."""
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
        """The examples at `indices`, in the order of this split."""
        indices = np.sort(indices).astype(np.int64)
        return replace(
            self,
            size=len(indices),
            fingerprint=hashlib.sha256(self.fingerprint.encode() + indices.tobytes()).hexdigest()[:16],
            example=functools.partial(_read_at, self.example, indices),
            encoded=self.encoded and functools.partial(_read_at, self.encoded, indices),
        )


def _pixels(images: np.ndarray, labels: np.ndarray, index: int) -> tuple[np.ndarray, int]:
    return images[index], int(labels[index])


def _decoded(encoded: Callable, index: int) -> tuple[np.ndarray, int]:
    photograph, label, name = encoded(index)
    return decode(photograph, name), label


def _read_at(read: Callable, indices: np.ndarray, index: int):
    return read(int(indices[index]))


def shown(name: str) -> str:
    r"""A file or class name for a sentence. It is escaped if it could be mistaken for another name.

    Reasons are outer or double spaces, decomposed letters, and invisible characters.

    >>> print(shown("ant"), shown("ant "), shown("A\u0308pfel"))
    ant 'ant ' 'A\u0308pfel'
    """
    plain = name.isprintable() and name == " ".join(name.split()) != "" and unicodedata.is_normalized("NFKC", name)
    return name if plain else ascii(name)
