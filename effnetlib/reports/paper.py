"""The figures of the paper and of others, as tables.

Source: arXiv 2011.00071. `checked` is "confirmed" if the abstract or the press article of 4 November 2020 states the
figure. It is "to check" if the figure was written from memory and was not yet compared with the PDF.
"""

import pandas as pd


def table1() -> pd.DataFrame:
    """Table 1: throughput in images/ms and all-reduce in percent of the step, at 32 images per core. All "to check"."""
    rows = [
        ("b2", 128, 4096, 57.57, 2.1),
        ("b2", 256, 8192, 113.73, 2.6),
        ("b2", 512, 16384, 227.13, 2.5),
        ("b2", 1024, 32768, 451.35, 2.81),
        ("b5", 128, 4096, 9.76, 0.89),
        ("b5", 256, 8192, 19.48, 1.24),
        ("b5", 512, 16384, 38.55, 1.24),
        ("b5", 1024, 32768, 77.44, 1.03),
    ]
    table = pd.DataFrame(rows, columns=["variant", "cores", "global_batch_size", "images_per_ms", "all_reduce_percent"])
    return table.assign(checked="to check")


def table2() -> pd.DataFrame:
    """Table 2: peak top-1 of the eleven recipes, by preset."""
    rows = [
        ("b2-4096-rmsprop", 128, 0.801, "to check"),
        ("b2-8192-rmsprop", 256, 0.800, "to check"),
        ("b2-16384-rmsprop", 512, 0.799, "to check"),
        ("b2-16384-lars", 512, 0.795, "to check"),
        ("b2-32768-lars", 1024, 0.797, "confirmed"),
        ("b5-4096-rmsprop", 128, 0.835, "to check"),
        ("b5-8192-rmsprop", 256, 0.834, "to check"),
        ("b5-16384-rmsprop", 512, 0.834, "to check"),
        ("b5-16384-lars", 512, 0.833, "to check"),
        ("b5-32768-lars", 1024, 0.832, "to check"),
        ("b5-65536-lars", 1024, 0.830, "confirmed"),
    ]
    return pd.DataFrame(rows, columns=["preset", "cores", "top1", "checked"])


def figure1() -> pd.DataFrame:
    """Figure 1: minutes to peak accuracy. Only its two rightmost points are known, both confirmed."""
    rows = [("b2", 1024, 32768, 18, 0.797), ("b5", 1024, 65536, 64, 0.830)]
    return pd.DataFrame(rows, columns=["variant", "cores", "global_batch_size", "minutes", "top1"])


def history() -> pd.DataFrame:
    """Fast ImageNet training up to the paper: minutes, accuracy, and dollars on a public cloud if known.

    Sources: the abstracts of arXiv 1706.02677, 1807.11205 and 1811.05233 (version 1), and DAWNBench's entries
    (github.com/stanford-futuredata/dawn-bench-entries, ImageNet/train). DAWNBench's accuracies are from the first
    evaluation with 93 % top-5. Its dollars are hours times the stated price. "accuracy to check": the abstract states
    only the time, and the accuracy was written from memory (for 1811.05233 also the number of cards).
    """
    rows = [
        (2017, "ResNet-50, Goyal et al.", "256 GPUs", 60, 0.763, None, None, "accuracy to check"),
        (2018, "AmoebaNet-D, Google", "a quarter of a TPUv2 pod", 66.5, 0.7634, 0.9303, None, "confirmed"),
        (2018, "ResNet-50, Jia et al.", "2,048 P40", 6.6, 0.758, None, None, "confirmed"),
        (2018, "ResNet-50, fast.ai and DIUx", "128 V100", 18.1, 0.7567, 0.9311, 118.07, "confirmed"),
        (2018, "ResNet-50, Mikami et al.", "2,176 V100", 224 / 60, 0.7503, None, None, "accuracy to check"),
        (2020, "ResNet-50, Alibaba Cloud, the fastest", "128 V100", 158 / 60, 0.7575, 0.9304, 14.42, "confirmed"),
        (2020, "ResNet-50, Alibaba Cloud, the cheapest", "8 V100", 21.6, 0.7558, 0.9305, 7.43, "confirmed"),
        (2020, "EfficientNet-B2, the paper", "1,024 TPU-v3 cores", 18, 0.797, None, None, "confirmed"),
        (2020, "EfficientNet-B5, the paper", "1,024 TPU-v3 cores", 64, 0.830, None, None, "confirmed"),
    ]
    columns = ["year", "what", "hardware", "minutes", "top1", "top5", "dollars", "checked"]
    return pd.DataFrame(rows, columns=columns)


def trainable_parameters() -> dict[str, int]:
    """Trainable parameters by variant, at 1,000 classes, from two public lists."""
    counts = [5_288_548, 7_794_184, 9_109_994, 12_233_232, 19_341_616, 30_389_784, 43_040_704, 66_347_960]
    return {f"b{i}": count for i, count in enumerate(counts)}


def published_top1() -> dict[str, float]:
    """ImageNet top-1 of the released weights with AutoAugment (`aa_in1k` in timm, the default in Keras), by variant.
    Source: README of tensorflow/tpu, models/official/efficientnet."""
    return {f"b{i}": top1 for i, top1 in enumerate([0.771, 0.791, 0.801, 0.816, 0.829, 0.836, 0.840, 0.843])}
