"""EfficientNet at supercomputer scale (arXiv 2011.00071): the method as a small library; the results are notebooks.

Recipe -> train -> Record -> report.
"""

from effnetlib.errors import EffnetlibError
from effnetlib.evaluate import EvalResult, evaluate
from effnetlib.mesh import make_mesh, simulate_devices
from effnetlib.model import EfficientNet
from effnetlib.norm import GroupedBatchNorm
from effnetlib.optim import lars, rmsprop
from effnetlib.recipe import Recipe
from effnetlib.records import Record, load_records
from effnetlib.schedules import warmup_exponential_decay, warmup_polynomial_decay
from effnetlib.train import train

__all__ = [
    "EfficientNet",
    "EffnetlibError",
    "EvalResult",
    "GroupedBatchNorm",
    "Recipe",
    "Record",
    "evaluate",
    "lars",
    "load_records",
    "make_mesh",
    "rmsprop",
    "simulate_devices",
    "train",
    "warmup_exponential_decay",
    "warmup_polynomial_decay",
]
