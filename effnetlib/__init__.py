"""EfficientNet at supercomputer scale (arXiv 2011.00071): the method as a small library; the results are notebooks.

Recipe -> run -> record -> report.
"""

import importlib

from effnetlib.errors import EffnetlibError

# Imported when first used: papermill loads our engine in every process that it runs, and must not wait for jax there.
_MODULES = {
    "EfficientNet": "model",
    "EvalResult": "evaluation",
    "GroupedBatchNorm": "norm",
    "Recipe": "recipe",
    "Record": "runs.record",
    "evaluate": "evaluation",
    "Plan": "planning.plan",
    "lars": "optim",
    "load_records": "runs.record",
    "make_mesh": "mesh",
    "plan": "planning.plan",
    "rmsprop": "optim",
    "simulate_devices": "runs.hosts",
    "train": "training",
    "warmup_exponential_decay": "schedules",
    "warmup_polynomial_decay": "schedules",
}

__all__ = ["EffnetlibError", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
