"""What `tests.bench.input --tensorflow PYTHON` runs in a Python that has TensorFlow: tf.data doing what our pipeline does.

    python tf_baseline.py FOLDER SIZE CORES POLICY

prints images/s over the JPEG files of FOLDER, read into memory before. The operations are those of the reference's
preprocessing.py and autoaugment.py; only the crop is decoded, as there. POLICY is AutoAugment's, as JSON: sub-policies of
(operation, probability, level); [] is none. Nothing of ours is imported.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def operations(tf, size):
    """Of an image, uint8 ``[size, size, 3]``, at a level."""

    def moved(image, matrix):
        filled = tf.concat([image, tf.fill([size, size, 1], tf.constant(255, tf.uint8))], 2)[None]
        out = tf.raw_ops.ImageProjectiveTransformV3(
            images=filled, transforms=[[*matrix, 0.0, 0.0]], output_shape=[size, size], fill_value=0.0,
            interpolation="NEAREST", fill_mode="CONSTANT",
        )[0]  # fmt: skip
        return tf.where(out[..., 3:] == 0, tf.constant(128, tf.uint8), out[..., :3])

    def signed(value):
        return tf.where(tf.random.uniform([]) < 0.5, -value, value)

    def rotate(image, level):
        angle, middle = signed(tf.constant(level * 3 * math.pi / 180)), (size - 1) / 2
        cos, sin = tf.cos(angle), tf.sin(angle)
        return moved(image, [cos, -sin, middle * (1 - cos + sin), sin, cos, middle * (1 - sin - cos)])

    def color(image, level):
        grey = tf.cast(tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image)), tf.float32)
        mixed = grey + (level * 0.18 + 0.1) * (tf.cast(image, tf.float32) - grey)
        return tf.cast(tf.clip_by_value(mixed, 0, 255), tf.uint8)

    def autocontrast(image, level):
        def channel(values):
            low, high = (tf.cast(bound(values), tf.float32) for bound in (tf.reduce_min, tf.reduce_max))
            stretched = (tf.cast(values, tf.float32) - low) * 255 / tf.maximum(high - low, 1)
            return tf.where(high > low, tf.cast(tf.clip_by_value(stretched, 0, 255), tf.uint8), values)

        return tf.stack([channel(image[..., i]) for i in range(3)], 2)

    def equalize(image, level):
        def channel(values):
            counts = tf.histogram_fixed_width(values, [0, 255], nbins=256)
            used = tf.boolean_mask(counts, counts != 0)
            step = (tf.reduce_sum(used) - used[-1]) // 255
            table = (tf.cumsum(counts, exclusive=True) + step // 2) // tf.maximum(step, 1)
            table = tf.where(step == 0, tf.range(256), tf.clip_by_value(table, 0, 255))
            return tf.cast(tf.gather(table, values), tf.uint8)

        wide = tf.cast(image, tf.int32)
        return tf.stack([channel(wide[..., i]) for i in range(3)], 2)

    def solarize(image, level):
        return tf.where(tf.cast(image, tf.int32) < int(level * 25.6), image, 255 - image)

    def solarize_add(image, level):
        added = tf.clip_by_value(tf.cast(image, tf.int32) + int(level * 11), 0, 255)
        return tf.where(image < 128, tf.cast(added, tf.uint8), image)

    def posterize(image, level):
        shift = tf.constant(min(8 - int(level * 0.4), 7), tf.uint8)
        return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift)

    return {
        "AutoContrast": autocontrast, "Color": color, "Equalize": equalize, "Invert": lambda image, level: 255 - image,
        "Posterize": posterize, "Rotate": rotate, "Solarize": solarize, "SolarizeAdd": solarize_add,
        "ShearX": lambda image, level: moved(image, [1.0, signed(level * 0.03), 0.0, 0.0, 1.0, 0.0]),
        "ShearY": lambda image, level: moved(image, [1.0, 0.0, 0.0, signed(level * 0.03), 1.0, 0.0]),
        "TranslateY": lambda image, level: moved(image, [1.0, 0.0, 0.0, 0.0, 1.0, signed(level * 25.0)]),
    }  # fmt: skip


def main(folder, size, cores, policy):
    if hasattr(os, "sched_setaffinity"):  # TensorFlow has threads beside those that it is allowed
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(cores)
    tf.config.threading.set_inter_op_parallelism_threads(cores)
    encoded = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
    known = operations(tf, size)

    def augment(image, sub_policy):
        for name, probability, level in sub_policy:
            image = tf.cond(
                tf.random.uniform([]) < probability,
                lambda image=image, name=name, level=level: known[name](image, level),
                lambda image=image: image,
            )
        return image

    def prepared(jpeg):
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(jpeg),
            bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], extent[:2]], 0)
        cropped = tf.image.decode_and_crop_jpeg(jpeg, window, channels=3)
        image = tf.image.random_flip_left_right(tf.compat.v1.image.resize_bicubic(cropped[None], (size, size))[0])
        if not policy:
            return image
        image = tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)
        drawn = tf.random.uniform([], maxval=len(policy), dtype=tf.int32)
        return tf.switch_case(drawn, [lambda each=each: augment(image, each) for each in policy])

    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1
    data = tf.data.Dataset.from_tensor_slices(encoded).repeat(3).map(prepared, cores).with_options(options)
    images = iter(data)
    for _ in encoded:
        next(images)  # warm-up
    start = time.perf_counter()
    count = sum(1 for _ in images)
    print(count / (time.perf_counter() - start))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
