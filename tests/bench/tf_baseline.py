"""What `data bench --tensorflow PYTHON` runs in a Python that has TensorFlow: tf.data doing what our pipeline does.

    python tf_baseline.py FOLDER SIZE THREADS

prints images/s over the JPEG files of FOLDER, read into memory before. The operations are those of the reference's
preprocessing.py; only the crop is decoded, as there. Nothing of ours is imported.
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def main(folder, size, threads):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    encoded = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]

    def image(jpeg):
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
        resized = tf.compat.v1.image.resize_bicubic(cropped[None], (size, size))[0]
        return tf.image.random_flip_left_right(resized)

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    data = tf.data.Dataset.from_tensor_slices(encoded).repeat(3).map(image, threads).with_options(options)
    images = iter(data)
    for _ in encoded:
        next(images)  # warm-up
    start = time.perf_counter()
    count = sum(1 for _ in images)
    print(count / (time.perf_counter() - start))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
