"""Data: where examples come from, what is done to them, and how they reach the devices in an order that is a pure
function of (seed, step)."""

from effnetlib.data.fetch import fetch
from effnetlib.data.loader import eval_batches, train_batches
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
