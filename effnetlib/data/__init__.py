"""Data: sources, decoding, augmentation, and batches on the devices. The order is a pure function of (seed, step)."""

from effnetlib.data.fetch import fetch
from effnetlib.data.sources import DataInfo, Split, cache_folder, data_folder, describe, load, remark

__all__ = [
    "DataInfo",
    "Split",
    "cache_folder",
    "data_folder",
    "describe",
    "eval_batches",
    "fetch",
    "load",
    "remark",
    "train_batches",
]


def __getattr__(name: str):
    if name not in ("eval_batches", "train_batches"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from effnetlib.data import loader  # imports jax, which worker processes do not need

    return getattr(loader, name)
