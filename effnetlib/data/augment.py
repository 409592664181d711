"""AutoAugment v0 and RandAugment on the host: uint8 images ``[height, width, 3]`` in and out.

Source: tensorflow/tpu, models/official/efficientnet/autoaugment.py, with the same constants. Empty places are filled
with 128. Geometric operations take the nearest pixel. Two things differ from the released code:

* Solarize at level 10 (and at RandAugment's 17) has a threshold above 255. It leaves the image unchanged, as in Pillow.
  The released code writes the threshold into an 8-bit constant, which may overflow in TensorFlow 1.
* Sharpness divides the sum of nine pixels once, exactly. The released code multiplies each pixel by a rounded weight, so
  a pixel whose exact value is a whole number may be one lower there.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

FILL = (128, 128, 128)

# A sub-policy is two operations (name, probability, level), applied in turn. One sub-policy is drawn per image.
POLICY_V0 = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)), (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)), (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)), (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)), (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)), (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)), (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)), (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)), (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)), (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)), (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)), (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)), (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)  # fmt: skip


def _lookup(image, table):
    """Maps each value through `table`: 256 values, or ``[256, 3]`` for one table per channel."""
    table = np.asarray(table, np.uint8)
    return cv2.LUT(image, table if table.ndim == 1 else table[None])


def _blend(degenerate, image, factor):
    """``degenerate + factor * (image - degenerate)``, clipped and truncated (as TensorFlow casts)."""
    if factor == 1.0:
        return image
    degenerate = degenerate.astype(np.float32)
    mixed = degenerate + np.float32(factor) * (image.astype(np.float32) - degenerate)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel linearly to 0 … 255. A constant channel is unchanged."""
    rows = (cv2.reduce(image, 0, kind).reshape(-1, 3) for kind in (cv2.REDUCE_MIN, cv2.REDUCE_MAX))
    low, high = (bound.astype(np.float32) for bound in (next(rows).min(0), next(rows).max(0)))
    scale = np.float32(255) / np.where(high > low, high - low, np.float32(255))
    offset = np.where(high > low, -low * scale, np.float32(0))
    return _lookup(image, np.clip(np.arange(256, dtype=np.float32)[:, None] * scale + offset, 0, 255))


def equalize(image: np.ndarray) -> np.ndarray:
    """Equalizes the histogram of each channel: value v becomes ``(pixels below v + step // 2) // step``, where
    ``step = (pixels - pixels of the greatest value) // 255``. A channel with step 0 is unchanged."""
    tables = []
    for channel in range(3):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        below = np.cumsum(counts) - counts
        tables.append(np.clip((below + step // 2) // step, 0, 255) if step else np.arange(256))
    return _lookup(image, np.stack(tables, 1))


def affine(image: np.ndarray, matrix) -> np.ndarray:
    """Output (x, y) is the input pixel nearest to ``(a x + b y + c, d x + e y + f)``, or `FILL` outside the image.

    Computed in float32. Halves round away from zero, as in TensorFlow.
    """
    height, width = image.shape[:2]
    x, y = np.arange(width, dtype=np.float32)[None], np.arange(height, dtype=np.float32)[:, None]

    def nearest(by_x, by_y, offset):
        parts = [np.float32(scale) * axis for scale, axis in ((by_x, x), (by_y, y)) if scale]
        coordinates = sum(parts[1:], parts[0]) + np.float32(offset)
        rounded = np.rint(coordinates)
        half = np.abs(coordinates - rounded) == 0.5
        if half.any():
            rounded[half] = coordinates[half] + np.copysign(np.float32(0.5), coordinates[half])
        return np.ascontiguousarray(np.broadcast_to(rounded, (height, width)))

    places = [nearest(*row) for row in matrix]
    return cv2.remap(image, *places, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=FILL)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates about the image centre, ``(size - 1) / 2``. Positive is counter-clockwise on the screen."""
    right, bottom = np.float32(image.shape[1] - 1), np.float32(image.shape[0] - 1)
    radians = np.float32(degrees * (math.pi / 180))
    cos, sin = np.cos(radians), np.sin(radians)
    x_offset = (right - (cos * right - sin * bottom)) / np.float32(2)
    y_offset = (bottom - (sin * right + cos * bottom)) / np.float32(2)
    return affine(image, ((cos, -sin, x_offset), (sin, cos, y_offset)))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends from grey (0) past the image itself (1) to stronger colours. Grey is TensorFlow's rgb_to_grayscale: a float
    luma, scaled back by ``255.5``."""
    luma = (image * np.float32(1 / 255)) @ np.array([0.2989, 0.587, 0.114], np.float32)
    return _blend((luma * np.float32(255.5)).astype(np.uint8)[..., None], image, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends from an even grey (0) past the image (1). As in the released code, the grey is not the mean of the image but
    ``min(pixels / 256, 255)``. AutoAugment v0 does not use this operation, RandAugment does."""
    grey = np.uint8(min(image.shape[0] * image.shape[1] / 256, 255))
    return _lookup(image, _blend(np.full(256, grey), np.arange(256), factor))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends from a smooth image (0) past the image (1). Smoothing weights: 5/13 in the centre, 1/13 around it."""
    smooth = image.copy()
    sums = cv2.filter2D(image, cv2.CV_32F, np.float32([[1, 1, 1], [1, 5, 1], [1, 1, 1]]))[1:-1, 1:-1]
    # A sum of 13 n must give n in spite of rounding, hence + 0.5. Other sums stay below: 13 n + 12.5 < 13 (n + 1).
    smooth[1:-1, 1:-1] = (sums + np.float32(0.5)) * np.float32(1 / 13)
    return _blend(smooth, image, factor)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the upper `bits` bits. 0 keeps one bit, because TensorFlow shifts 8-bit numbers by at most 7."""
    shift = min(8 - bits, 7)
    return image >> shift << shift


def cutout(image: np.ndarray, half: int, row: int, column: int) -> np.ndarray:
    """Fills the square of side ``2 * half`` around (row, column), clipped to the image."""
    image = image.copy()
    image[max(row - half, 0) : row + half, max(column - half, 0) : column + half] = FILL
    return image


VALUES = np.arange(256)
# Each operation, and its value at level 10: degrees, shear, pixels, bits, threshold, addition, or half a side. Values are
# proportional to the level. None takes no value. A "factor" is ``level / 10 * 1.8 + 0.1``. "translate": see `magnitude`.
OPERATIONS: dict[str, tuple[Callable[..., np.ndarray], float | int | str | None]] = {
    "AutoContrast": (autocontrast, None),
    "Equalize": (equalize, None),
    "Invert": (lambda image: 255 - image, None),
    "Rotate": (rotate, 30.0),  # counter-clockwise
    "Posterize": (posterize, 4),
    "Solarize": (lambda image, threshold: _lookup(image, np.where(VALUES < threshold, VALUES, 255 - VALUES)), 256),
    "Color": (color, "factor"),
    "Contrast": (contrast, "factor"),
    "Brightness": (lambda image, factor: _lookup(image, _blend(np.zeros(256), VALUES, factor)), "factor"),
    "Sharpness": (sharpness, "factor"),
    "ShearX": (lambda image, shear: affine(image, ((1, shear, 0), (0, 1, 0))), 0.3),  # row y moves left by shear * y
    "ShearY": (lambda image, shear: affine(image, ((1, 0, 0), (shear, 1, 0))), 0.3),  # column x moves up by shear * x
    "TranslateX": (lambda image, pixels: affine(image, ((1, 0, pixels), (0, 1, 0))), "translate"),  # to the left
    "TranslateY": (lambda image, pixels: affine(image, ((1, 0, 0), (0, 1, pixels))), "translate"),  # up
    "Cutout": (cutout, 40),
    "SolarizeAdd": (
        lambda image, more: _lookup(image, np.where(VALUES < 128, np.minimum(VALUES + more, 255), VALUES)),
        110,
    ),
}
AUTOAUGMENT_TRANSLATE, RANDAUGMENT_TRANSLATE = 250.0, 100.0


def magnitude(name: str, level: float, translate: float = AUTOAUGMENT_TRANSLATE) -> float | None:
    """The value of an operation at a level, without its random sign. None if the operation takes no value.

    Integer values are truncated. `translate` is the shift in pixels at level 10.
    """
    share, unit = level / 10.0, OPERATIONS[name][1]
    if unit == "factor":
        return share * 1.8 + 0.1
    unit = translate if unit == "translate" else unit
    return None if unit is None else type(unit)(share * unit)


def apply(image: np.ndarray, name: str, level: float, rng: np.random.Generator, translate: float) -> np.ndarray:
    """Applies one operation at a level. Rotations, shears and translations get a random sign. The centre of a cutout is
    uniform over the image."""
    operation, value = OPERATIONS[name][0], magnitude(name, level, translate)
    if value is None:
        return operation(image)
    if name.startswith(("Rotate", "Shear", "Translate")) and rng.random() < 0.5:
        value = -value
    if name == "Cutout":
        return cutout(image, value, int(rng.integers(image.shape[0])), int(rng.integers(image.shape[1])))
    return operation(image, value)


def autoaugment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """AutoAugment's policy v0: draws a sub-policy uniformly and applies each operation with its probability.

    Source: arXiv 1805.09501; `policy_v0` of the released code.
    """
    for name, probability, level in POLICY_V0[rng.integers(len(POLICY_V0))]:
        if rng.random() < probability:
            image = apply(image, name, level, rng, AUTOAUGMENT_TRANSLATE)
    return image


def randaugment(image: np.ndarray, rng: np.random.Generator, layers: int = 2, level: float = 17.0) -> np.ndarray:
    """RandAugment: `layers` operations, each drawn uniformly from all sixteen and always applied, at one level.

    Source: arXiv 1909.13719; B5 and B7 of the released code use 2 layers at level 17.
    """
    names = list(OPERATIONS)
    for _ in range(layers):
        image = apply(image, names[rng.integers(len(names))], level, rng, RANDAUGMENT_TRANSLATE)
    return image
