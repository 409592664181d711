"""AutoAugment v0 and RandAugment against Pillow where the two agree, and else against the formulas, a pixel at a time."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from effnetlib.data import augment
from effnetlib.data.augment import OPERATIONS, POLICY_V0, autoaugment, magnitude, randaugment

LEVELS = (*range(11), 17)
# A photograph's range of values, an odd size, and as many pixels as an image of 32 pixels has and more.
PHOTO = np.clip(np.random.default_rng(0).normal(120, 60, (37, 53, 3)) + np.arange(53)[:, None], 5, 250).astype(np.uint8)
FLAT = np.full((8, 9, 3), 77, np.uint8)


def operate(name, image, *value):
    return OPERATIONS[name][0](image, *value)


def pillow(function, *arguments):
    return lambda image: np.asarray(function(Image.fromarray(image), *arguments))


@pytest.mark.parametrize("image", [PHOTO, FLAT, PHOTO[:1, :1], PHOTO[:, ::-1]])
def test_equalize_invert_and_autocontrast_are_pillows(image):
    np.testing.assert_array_equal(operate("Equalize", image), pillow(ImageOps.equalize)(image))
    np.testing.assert_array_equal(operate("Invert", image), pillow(ImageOps.invert)(image))
    # Pillow computes in double precision, the reference in single: a whole number may come out one lower.
    difference = operate("AutoContrast", image).astype(int) - pillow(ImageOps.autocontrast)(image)
    assert np.abs(difference).max() <= 1


def test_autocontrast_is_the_formula_in_single_precision():
    for channel in range(3):
        values = PHOTO[..., channel].astype(np.float32)
        low, high = values.min(), values.max()
        scale = np.float32(255) / (high - low)
        wanted = np.clip(values * scale + -low * scale, 0, 255).astype(np.uint8)
        np.testing.assert_array_equal(operate("AutoContrast", PHOTO)[..., channel], wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_solarize_posterize_and_brightness_are_pillows(level):
    def ours(name):
        return operate(name, PHOTO, magnitude(name, level))

    threshold = int(level / 10 * 256)
    np.testing.assert_array_equal(ours("Solarize"), pillow(ImageOps.solarize, threshold)(PHOTO))
    bits = max(int(level / 10 * 4), 1)  # the reference's shift stops at seven
    np.testing.assert_array_equal(ours("Posterize"), pillow(ImageOps.posterize, bits)(PHOTO))
    factor = level / 10 * 1.8 + 0.1
    brighter = np.asarray(ImageEnhance.Brightness(Image.fromarray(PHOTO)).enhance(factor))
    np.testing.assert_array_equal(ours("Brightness"), brighter)
    added = np.where(PHOTO < 128, np.minimum(PHOTO.astype(int) + int(level / 10 * 110), 255), PHOTO)
    np.testing.assert_array_equal(ours("SolarizeAdd"), added)


def blended(degenerate, factor):
    return np.clip(degenerate + factor * (PHOTO - degenerate), 0, 255)


@pytest.mark.parametrize("level", LEVELS)
def test_color_contrast_and_sharpness_are_the_formulas(level):
    factor = level / 10 * 1.8 + 0.1

    def check(name, degenerate):
        ours = operate(name, PHOTO, magnitude(name, level))
        wanted = blended(degenerate, factor)
        # Without its fraction, but for a value within rounding of a whole number.
        assert np.all((ours <= wanted + 1e-3) & (ours > wanted - 1 - 1e-3)), name

    exact = PHOTO.astype(float)
    luma = np.floor(exact @ [0.2989, 0.587, 0.114] * 255.5 / 255 + 1e-6)
    check("Color", luma[..., None])
    check("Contrast", np.floor(37 * 53 / 256))
    smooth = exact.copy()
    for row in range(1, 36):
        for column in range(1, 52):
            around = exact[row - 1 : row + 2, column - 1 : column + 2].sum((0, 1))
            smooth[row, column] = (around + 4 * exact[row, column]) // 13
    check("Sharpness", smooth)
    if level == 5:
        for name in ("Color", "Contrast", "Sharpness", "Brightness"):
            np.testing.assert_array_equal(operate(name, PHOTO, magnitude(name, 5)), PHOTO)


def moved(matrix):
    """Pixel by pixel: the nearest of the source, halves away from zero, or the fill."""
    out = np.full_like(PHOTO, 128)
    (a, b, c), (d, e, f) = np.float32(matrix)
    for y in range(PHOTO.shape[0]):
        for x in range(PHOTO.shape[1]):
            source = [
                float(a * np.float32(x) + b * np.float32(y) + c),
                float(d * np.float32(x) + e * np.float32(y) + f),
            ]
            column, row = (int(math.copysign(math.floor(abs(value) + 0.5), value)) for value in source)
            if 0 <= row < PHOTO.shape[0] and 0 <= column < PHOTO.shape[1]:
                out[y, x] = PHOTO[row, column]
    return out


@pytest.mark.parametrize("level", [0, 2, 5, 7, 10, 17])
@pytest.mark.parametrize("sign", [1, -1])
def test_geometric_operations_are_the_formulas(level, sign):
    shear, angle = sign * level / 10 * 0.3, math.radians(sign * level / 10 * 30)
    pixels = sign * level / 10 * 10  # of this small image; 250 in AutoAugment
    right, bottom = PHOTO.shape[1] - 1, PHOTO.shape[0] - 1
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = [
        [cos, -sin, (right - (cos * right - sin * bottom)) / 2],
        [sin, cos, (bottom - (sin * right + cos * bottom)) / 2],
    ]
    matrices = {
        "ShearX": [[1, shear, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [shear, 1, 0]],
        "TranslateX": [[1, 0, pixels], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, pixels]],
        "Rotate": rotation,
    }
    for name, matrix in matrices.items():
        value = sign * magnitude(name, level, translate=10.0)
        # cos and sin in single and in double precision may part where a source lies half-way between two pixels.
        odd = (operate(name, PHOTO, value) != moved(matrix)).any(-1).mean()
        assert odd <= (0.002 if name == "Rotate" else 0), name


def test_directions():
    image = np.zeros((5, 5, 3), np.uint8)
    image[2, 4] = 255  # right of the centre
    assert operate("Rotate", image, 90)[0, 2, 0] == 255  # counter-clockwise: above it
    assert operate("TranslateX", image, 3)[2, 1, 0] == 255  # to the left
    assert operate("TranslateX", image, 3)[2, 2].tolist() == [128, 128, 128]
    assert operate("ShearX", image, 1.0)[2, 2, 0] == 255
    assert operate("ShearY", image, 0.25)[1, 4, 0] == 255


def test_magnitudes():
    assert [magnitude("Posterize", level) for level in LEVELS] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 6]
    assert [magnitude("Solarize", level) for level in (0, 3, 10)] == [0, 76, 256]
    assert [magnitude("SolarizeAdd", level) for level in (3, 7, 10)] == [33, 77, 110]
    assert magnitude("Rotate", 9) == 27 and magnitude("ShearX", 4) == pytest.approx(0.12)
    assert magnitude("TranslateY", 9) == 225 and magnitude("TranslateY", 17, 100.0) == pytest.approx(170)
    assert magnitude("Cutout", 17) == 68 and magnitude("Equalize", 3) is None


def test_cutout_is_a_square_within_the_image():
    image = augment.cutout(np.zeros((10, 10, 3), np.uint8), 2, 1, 5)
    wanted = np.zeros((10, 10))
    wanted[0:3, 3:7] = 128
    np.testing.assert_array_equal(image[..., 0], wanted)


# The published policy (arXiv 1805.09501, table of ImageNet), typed a second time in a form of its own.
PUBLISHED = """
Equalize 0.8 1 ShearY 0.8 4 | Color 0.4 9 Equalize 0.6 3 | Color 0.4 1 Rotate 0.6 8 | Solarize 0.8 3 Equalize 0.4 7 |
Solarize 0.4 2 Solarize 0.6 2 | Color 0.2 0 Equalize 0.8 8 | Equalize 0.4 8 SolarizeAdd 0.8 3 | ShearX 0.2 9 Rotate 0.6 8 |
Color 0.6 1 Equalize 1.0 2 | Invert 0.4 9 Rotate 0.6 0 | Equalize 1.0 9 ShearY 0.6 3 | Color 0.4 7 Equalize 0.6 0 |
Posterize 0.4 6 AutoContrast 0.4 7 | Solarize 0.6 8 Color 0.6 9 | Solarize 0.2 4 Rotate 0.8 9 |
Rotate 1.0 7 TranslateY 0.8 9 | ShearX 0.0 0 Solarize 0.8 4 | ShearY 0.8 0 Color 0.6 4 | Color 1.0 0 Rotate 0.6 2 |
Equalize 0.8 4 Equalize 0.0 8 | Equalize 1.0 4 AutoContrast 0.6 2 | ShearY 0.4 7 SolarizeAdd 0.6 7 |
Posterize 0.8 2 Solarize 0.6 10 | Solarize 0.6 8 Equalize 0.6 1 | Color 0.8 6 Rotate 0.4 5
"""


def test_the_twenty_five_sub_policies():
    published = [part.split() for part in PUBLISHED.split("|")]
    ours = [[str(word) for operation in sub_policy for word in operation] for sub_policy in POLICY_V0]
    assert ours == published and len(ours) == 25


def draws(monkeypatch, policy, count):
    """The (name, level) of the operations that `count` draws apply."""
    applied = []
    monkeypatch.setattr(augment, "apply", lambda image, name, level, rng, translate: applied.append((name, level)))
    rng = np.random.default_rng(0)
    for _ in range(count):
        policy(FLAT, rng)
    return applied


def test_probabilities_over_many_draws(monkeypatch):
    count = 100_000
    applied = draws(monkeypatch, autoaugment, count)
    wanted = {}
    for sub_policy in POLICY_V0:
        for name, probability, level in sub_policy:
            wanted[name, level] = wanted.get((name, level), 0) + probability / 25
    for operation, share in wanted.items():
        spread = math.sqrt(max(share, 1e-9) / count)
        assert abs(applied.count(operation) / count - share) < 5 * spread, operation


def test_the_operations_of_a_sub_policy_are_drawn_independently(monkeypatch):
    seen = []
    monkeypatch.setattr(augment, "apply", lambda image, name, level, rng, translate: seen[-1].append((name, level)))
    rng, count = np.random.default_rng(1), 50_000
    for _ in range(count):
        seen.append([])
        autoaugment(FLAT, rng)
    both = sum(each == [("Equalize", 1), ("ShearY", 4)] for each in seen) / count
    assert both == pytest.approx(0.8 * 0.8 / 25, abs=0.004)
    assert not any(("ShearX", 0) in each for each in seen)  # of probability 0


def test_signs_are_even_and_randaugment_is_uniform(monkeypatch):
    ramp = np.zeros((1, 9, 3), np.uint8)
    ramp[0, 4] = 255
    rng = np.random.default_rng(2)
    left = [augment.apply(ramp, "TranslateX", 1, rng, 20.0)[0, 2, 0] == 255 for _ in range(4000)]
    assert np.mean(left) == pytest.approx(0.5, abs=0.04)
    applied = draws(monkeypatch, randaugment, 16_000)
    assert len(applied) == 32_000 and {level for _, level in applied} == {17.0}
    for name in OPERATIONS:
        assert applied.count((name, 17.0)) == pytest.approx(2000, abs=5 * math.sqrt(2000))


def test_every_operation_of_both_policies_runs_and_changes_no_input():
    before = PHOTO.copy()
    rng = np.random.default_rng(3)
    for policy in (autoaugment, randaugment):
        for _ in range(300):
            out = policy(PHOTO, rng)
            assert out.shape == PHOTO.shape and out.dtype == np.uint8
    np.testing.assert_array_equal(PHOTO, before)
