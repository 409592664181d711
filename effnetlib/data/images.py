"""One image: decoding, cropping, resizing, augmentation (numpy, on the host), and normalisation.

Source: tensorflow/tpu, models/official/efficientnet/preprocessing.py.
"""

import contextlib
import io
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from effnetlib.data.augment import autoaugment, randaugment
from effnetlib.errors import FailedError, first_line, require

# Augmentations with a random crop, as for ImageNet, and the policy that follows the crop.
CROPPING = {"inception": None, "autoaugment": autoaugment, "randaugment": randaugment}
AUGMENTATIONS = (*CROPPING, "shift_flip", "shift", "none")

MEAN_RGB = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STDDEV_RGB = (0.229 * 255, 0.224 * 255, 0.225 * 255)
CROP_PADDING = 32

# Images are already made in parallel. OpenCV's own threads would only compete for the same cores.
cv2.setNumThreads(1)

# 512 MiB of RGB. Pillow refuses larger images, too.
MAX_PIXELS = 2**29 // 3
BACKGROUND = (255, 255, 255)  # behind transparent pixels


class Unreadable(Exception):
    """An encoded image cannot be read. The message is the decoder's or ours."""


def normalize(images):
    """uint8 ``[..., 3]`` to float32 with ImageNet's mean and standard deviation; a jax array stays on its device."""
    return (images.astype(np.float32) - np.float32(MEAN_RGB)) / np.float32(STDDEV_RGB)


def decode(encoded: bytes, name: str) -> np.ndarray:
    """The pixels of an encoded image (see `read`). Raises a FailedError with its name."""
    with _named(name):
        return read(encoded)[1]


@contextlib.contextmanager
def _named(name: str):
    """Turns an Unreadable of the block into a FailedError with the image's name."""
    try:
        yield
    except Unreadable as error:
        raise FailedError(f"{name} is not a readable image ({error})") from None


def read(encoded: bytes) -> tuple[str, np.ndarray]:
    """The format and the pixels of an encoded image.

    The content decides the format. It is Pillow's name, such as "JPEG", "PNG" or "CMYK JPEG". The pixels are RGB, uint8
    ``[height, width, 3]``: the first frame of an animation, the upper 8 of 16 bits, transparency over `BACKGROUND`. EXIF
    orientation is not applied.

    Raises:
      Unreadable: no decoder can read it, its header claims more than `MAX_PIXELS` (no memory is allocated), or its
        pixels are 32-bit numbers with no defined white.
    """
    with contextlib.suppress(Exception):  # Pillow reads more forms of JPEG
        if _jpeg_size(encoded):
            return "JPEG", simplejpeg.decode_jpeg(encoded, "RGB")
    try:
        return _read_by_pillow(encoded)
    except Exception as error:  # decoders raise many kinds, even MemoryError and KeyError
        raise Unreadable(first_line(error).partition(" <")[0]) from None


def _read_by_pillow(encoded: bytes) -> tuple[str, np.ndarray]:
    image = Image.open(io.BytesIO(encoded))
    claims = f"its header claims {image.width:,} x {image.height:,} pixels, and {MAX_PIXELS:,} are the limit"
    require(image.width * image.height <= MAX_PIXELS, claims)
    kind = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG with previews, from cameras
    kind = f"CMYK {kind}" if image.mode == "CMYK" else kind
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        levels = np.asarray(image).astype(np.int32)
        grey = (levels >> 8).astype(np.uint8)
        grey[levels == image.info.get("transparency", -1)] = BACKGROUND[0]
        image = Image.fromarray(grey)
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, and nothing says which of them is white")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image.convert("RGBA"))
    return kind, np.asarray(image.convert("RGB"))


def _jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """(height, width) from the header, if it is a JPEG that simplejpeg can decode."""
    with contextlib.suppress(Exception):
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
        return (height, width) if height * width <= MAX_PIXELS and colorspace not in ("CMYK", "YCCK") else None


def _upper_rows(encoded: bytes, rows: int, shape: tuple[int, int]) -> np.ndarray:
    """At least the first `rows` rows of an image of `shape` (height, width). A fourth channel speeds up resizing.

    A copy of the header claims `rows` + 8 rows, so the decoder stops early. The 8 extra rows keep the interpolation of
    chroma between rows exact. Only a baseline JPEG with a proper end is cut. Other kinds are decoded whole, and in a
    truncated file an early stop would hide the missing end.
    """
    at, marker, length = 2, 0, 0
    while at + 9 < len(encoded) and not 0xFFC0 <= marker <= 0xFFDA:  # find the frame header
        at += length
        marker, length = int.from_bytes(encoded[at : at + 2]), 2 + int.from_bytes(encoded[at + 2 : at + 4])
    size, fewer = struct.pack(">HH", *shape), struct.pack(">H", min(rows + 8, shape[0]))
    cut = marker in (0xFFC0, 0xFFC1) and encoded[at + 5 : at + 9] == size and encoded.endswith(b"\xff\xd9")
    try:
        # Not strict if cut: the decoder warns about the data after its last row.
        part = encoded[: at + 5] + fewer + encoded[at + 7 :] if cut else encoded
        return simplejpeg.decode_jpeg(part, "RGBX", strict=not cut or fewer == size[:2])
    except Exception:
        return read(encoded)[1]


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes to uint8 ``[size, size, 3]``: bicubic (Keys, a = -0.75), without antialiasing.

    A fourth channel makes it faster; values may then differ by one. Two things differ from the released code. TensorFlow
    1 samples at ``i * scale``, this at ``(i + 0.5) * scale - 0.5`` (pixel centres), a shift below one output pixel. Values
    are always rounded to 0 … 255; the released code keeps fractions and overshoots if it does not augment.
    """
    if image.shape[:2] != (size, size):
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    return image if image.shape[2] == 3 else cv2.cvtColor(image, cv2.COLOR_RGBA2RGB)


def eval_image(original: bytes | np.ndarray, size: int, augmentation: str, rng=None) -> np.ndarray:
    """The image resized for evaluation. For `CROPPING`, the centre ``size / (size + 32)`` of the shorter side.

    With an `rng` the crop is random, as for training. Of a JPEG only the rows that the crop needs are decoded.
    """
    shape = _jpeg_size(original) if isinstance(original, bytes) else original.shape[:2]
    if shape is None:
        original = read(original)[1]
        shape = original.shape[:2]
    crop = random_crop(*shape, rng) if rng else None
    if crop is None and augmentation in CROPPING:
        side = max(1, int(size / (size + CROP_PADDING) * min(shape)))
        crop = (shape[0] - side + 1) // 2, (shape[1] - side + 1) // 2, side, side
    top, left, height, width = crop or (0, 0, *shape)
    if isinstance(original, bytes):
        original = _upper_rows(original, top + height, shape)
    return resize(original[top : top + height, left : left + width], size)


def train_images(
    originals: Sequence, size: int, augmentation: str, seed: int, epochs: Sequence[int], indices: Sequence[int]
) -> np.ndarray:
    """Augmented training images, uint8 ``[batch, size, size, 3]``.

    Each image is a pure function of its original and (seed, epoch, index), not of the rest of the batch.

    Args:
      originals: per example uint8 ``[height, width, 3]``, or the bytes of a photograph. Or one array of a whole resized
        set, ``[examples, size, size, 3]``, which is read at `indices`.
      epochs, indices: epoch and index per example.

    Raises:
      Unreadable: see `read`.
    """
    if augmentation in CROPPING:
        made, policy = [], CROPPING[augmentation]
        for original, epoch, index in zip(originals, epochs, indices, strict=True):
            rng = example_rng(seed, epoch, index)
            image = eval_image(original, size, augmentation, rng)
            image = cv2.flip(image, 1) if rng.random() < 0.5 else image
            made.append(policy(image, rng) if policy else image)
        return np.stack(made)
    images, rows = originals, np.asarray(indices)
    if not isinstance(images, np.ndarray):
        images, rows = np.stack([eval_image(x, size, augmentation) for x in originals]), np.arange(len(originals))
    if not augmentation.startswith("shift"):
        return images[rows]
    top, left, flip, _ = philox((indices, epochs, 0, 0), seed)
    places = np.uint64(2 * (size // 8) + 1)
    top, left = ((bits * places >> np.uint64(32)).astype(np.intp) for bits in (top, left))
    flip = (flip >> np.uint64(31)).astype(bool) & (augmentation == "shift_flip")
    return _shift(images, rows, top, left, flip)


def _shift(images, rows, top, left, flip):
    """Pads ``images[rows]`` with black by an eighth, cuts the window at (top, left), and mirrors where `flip`."""
    size, pad = images.shape[1], images.shape[1] // 8
    out, chunk = np.empty((len(rows), size, size, 3), np.uint8), max(1, 2**16 // size**2)  # fits the cache
    framed = np.zeros((chunk, size + 2 * pad, 3 * (size + 2 * pad)), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(framed, (size, 3 * size), axis=(1, 2))
    images = images.reshape(len(images), size, 3 * size)
    for at in range(0, len(rows), chunk):
        part = slice(at, at + chunk)
        count, mirrored = len(rows[part]), flip[part]
        framed[:count, pad : pad + size, 3 * pad : 3 * (pad + size)] = images[rows[part]]
        cut = windows[np.arange(count), top[part], 3 * left[part]].reshape(count, size, size, 3)
        if mirrored.any():  # as one tall image
            cut[mirrored] = cv2.flip(cut[mirrored].reshape(-1, size, 3), 1).reshape(-1, size, size, 3)
        out[part] = cut
    return out


def philox(counter: Sequence, key: int) -> tuple[np.ndarray, ...]:
    """Four random numbers below 2**32 per counter, as uint64 arrays: Philox 4x32 with ten rounds.

    Args:
      counter: four arrays or numbers below 2**32.
      key: below 2**64.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), with its constants.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    keys, step = np.array([key & 0xFFFFFFFF, key >> 32], np.uint64), np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, c = second >> half ^ b ^ keys[0], first >> half ^ d ^ keys[1]
        b, d = second & low, first & low
        keys = keys + step & low
    return a, b, c, d


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator of one photograph in one epoch."""
    return np.random.Generator(np.random.Philox(key=(seed, (int(epoch) << 32) + int(index))))


@dataclass(frozen=True)
class Examples:
    """Makes examples one by one. ``read(index)`` returns an image and its label, or a photograph's bytes, label and name.

    Without a seed, examples are made for evaluation. Raises FailedError if a photograph cannot be read.
    """

    read: Callable[[int], tuple]
    size: int
    augmentation: str
    seed: int | None = None

    def __call__(self, epoch: int, index: int) -> tuple[np.ndarray, int]:
        original, label, *name = self.read(index)
        with _named("".join(name)):  # what lies in memory is not encoded, and has no name
            if self.seed is None:
                return eval_image(original, self.size, self.augmentation), label
            return train_images([original], self.size, self.augmentation, self.seed, [epoch], [index])[0], label

    def name(self, index: int) -> str:
        return self.read(index)[2]


def random_crop(
    height: int, width: int, rng: np.random.Generator, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), min_covered=0.1
) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) of a random crop, by the rule of tf.image.sample_distorted_bounding_box.

    An attempt draws an aspect ratio, then a height within the limits of `area`, then a place, each uniformly. It fails if
    the crop does not fit or covers less than `min_covered` of the image. Returns None if every attempt fails or the crop
    is the whole image. The caller then takes the centre crop, as the released code does.
    """
    smallest, largest = area[0] * height * width, area[1] * height * width
    for _ in range(10):
        ratio = rng.uniform(*aspect)
        low, high = round(math.sqrt(smallest / ratio)), round(math.sqrt(largest / ratio))
        if round(high * ratio) > width:
            high = int((width + 0.5 - 1e-7) / ratio)
        high = min(high, height)
        low = min(low, high)
        crop_height = int(rng.integers(low, high + 1))
        crop_width = round(crop_height * ratio)
        if crop_width * crop_height < smallest:
            crop_height += 1
        elif crop_width * crop_height > largest:
            crop_height -= 1
        crop_width = round(crop_height * ratio)
        pixels = crop_height * crop_width
        fits = 0 < crop_height <= height and 0 < crop_width <= width and smallest <= pixels <= largest
        if fits and pixels >= min_covered * height * width:
            if (crop_height, crop_width) == (height, width):
                return None
            top = int(rng.integers(0, max(height - crop_height, 1)))
            left = int(rng.integers(0, max(width - crop_width, 1)))
            return top, left, crop_height, crop_width
    return None
