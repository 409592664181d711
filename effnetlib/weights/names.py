"""The names and layouts of EfficientNet's tensors in timm and in Keras.

Sources: timm's `tf_efficientnet_b*` and `keras.applications.EfficientNetB*`. Both are the same network as ours. The
float32 logits of timm 1.0.31 equalled ours to 3e-5 of their range for all eight variants (not tested here, as it needs
PyTorch). Keras has separate layers for normalising images and for padding, equal to TensorFlow's SAME.
"""

import functools
import string
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from effnetlib.errors import EffnetlibError
from effnetlib.model import EfficientNet, block_specs, stage_repeats
from effnetlib.runs.checkpoints import Weights

TIMM, KERAS = 0, 1  # the index of each library in the pairs below
LAYERS = {
    "stem": ("conv_stem", "stem_conv"),
    "stem_norm": ("bn1", "stem_bn"),
    "expand": ("conv_pw", "expand_conv"),
    "expand_norm": ("bn1", "expand_bn"),
    "depthwise": ("conv_dw", "dwconv"),
    "depthwise_norm": ("bn2", "bn"),
    "se.reduce": ("se.conv_reduce", "se_reduce"),
    "se.expand": ("se.conv_expand", "se_expand"),
    "project": ("conv_pwl", "project_conv"),
    "project_norm": ("bn3", "project_bn"),
    "head": ("conv_head", "top_conv"),
    "head_norm": ("bn2", "top_bn"),
    "classifier": ("classifier", "predictions"),
}
WITHOUT_EXPANSION = {"bn2": "bn1", "conv_pwl": "conv_pw", "bn3": "bn2"}  # timm's names in blocks without expansion
VARIABLES = {
    "kernel": ("weight", "kernel"),
    "bias": ("bias", "bias"),
    "gamma": ("weight", "gamma"),
    "beta": ("bias", "beta"),
    "mean": ("running_mean", "moving_mean"),
    "var": ("running_var", "moving_variance"),
}


class Tensor(NamedTuple):
    """One tensor: our path and shape, and (timm, Keras) pairs of names and shapes.

    Our kernels are ``[k, k, in, out]`` (depthwise ``[k, k, 1, C]``, 1x1 ``[in, out]``). timm's are ``[out, in, k, k]``.
    Keras' are ``[k, k, in, out]`` (depthwise ``[k, k, C, 1]``).
    """

    path: tuple
    shape: tuple[int, ...]
    names: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@functools.cache
def skeleton(variant: str, num_classes: int, precision: str) -> tuple[nnx.GraphDef, nnx.State]:
    """`nnx.split` of a model, with shapes in place of arrays."""
    return nnx.split(nnx.eval_shape(lambda: EfficientNet(variant, num_classes, dtype=jax.numpy.dtype(precision))))


@functools.cache
def tensors(variant: str, num_classes: int) -> list[Tensor]:
    specs, found = block_specs(variant), []
    places = [(stage, repeat) for stage, repeats in enumerate(stage_repeats(variant)) for repeat in range(repeats)]
    for path, leaf in flatten_dict(nnx.to_pure_dict(skeleton(variant, num_classes, "float32")[1])).items():
        in_block = path[0] == "blocks"
        layer = ".".join(part for part in path[2 * in_block :] if part not in VARIABLES)
        timm, keras = LAYERS[layer]
        if in_block:
            stage, repeat = places[path[1]]
            timm = WITHOUT_EXPANSION.get(timm, timm) if specs[path[1]].expansion == 1 else timm
            timm, keras = f"blocks.{stage}.{repeat}.{timm}", f"block{stage + 1}{string.ascii_lowercase[repeat]}_{keras}"
        in_timm, in_keras = VARIABLES.get(path[-1], VARIABLES["kernel"])  # depthwise: no variable
        shape = (1, 1, *leaf.shape) if leaf.ndim == 2 and layer != "classifier" else leaf.shape
        shapes = shape, shape
        if leaf.ndim > 1:
            *sides, inputs, outputs = shape
            shapes = (outputs, inputs, *sides), (*sides, outputs, inputs) if layer == "depthwise" else shape
        found.append(Tensor(path, leaf.shape, (f"{timm}.{in_timm}", f"{keras}/{in_keras}"), shapes))
    return found


def is_outside(name: str) -> bool:
    """Whether a tensor is outside the network: timm's counters of batches, Keras' normalisation and random seeds."""
    return name.endswith("num_batches_tracked") or name.startswith(("normalization", "seed_generator"))


def to_ours(
    arrays: Mapping[str, np.ndarray], library: int, variant: str, num_classes=1000, source="the file"
) -> Weights:
    """Our weights of a variant, from the tensors of a library (TIMM or KERAS).

    Raises:
      EffnetlibError: tensors are missing, extra, of another shape, or not finite floats. The sentence names up to 20.
    """
    remaining = {name: array for name, array in arrays.items() if not is_outside(name)}
    params, stats, wrong = {}, {}, []
    for path, shape, names, shapes in tensors(variant, num_classes):
        name, array = names[library], remaining.pop(names[library], None)
        if array is None:
            wrong.append(f"{name} is missing")
        elif array.shape != shapes[library]:
            wrong.append(f"{name} has shape {list(array.shape)}, which is not {variant}'s")
        elif not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            wrong.append(f"{name} is {array.dtype}, not floating-point")
        elif not np.isfinite(array).all() or (path[-1] == "var" and (array < 0).any()):
            wrong.append(f"{name} holds values that are not finite, or variances below 0")
        else:
            array = np.moveaxis(array, (0, 1), (-1, -2)) if library == TIMM and array.ndim > 1 else array
            collection = stats if path[-1] in ("mean", "var") else params
            collection[path] = np.ascontiguousarray(array.reshape(shape), np.float32)
    wrong += [f"{name} is not {variant}'s" for name in sorted(remaining)]
    if wrong:
        listed = "; ".join(wrong[:20]) + (f"; and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise EffnetlibError(f"{source} does not hold {variant} with {num_classes} classes: {listed}")
    return unflatten_dict(params), unflatten_dict(stats)


def to_timm(weights: Weights, variant: str, num_classes: int = 1000) -> dict[str, np.ndarray]:
    """The inverse of `to_ours` for timm."""
    ours, renamed = flatten_dict(weights[0]) | flatten_dict(weights[1]), {}
    for path, _, (name, _), (shape, _) in tensors(variant, num_classes):
        array = np.asarray(ours[path])
        if array.ndim > 1:
            array = np.moveaxis(array.reshape(*shape[2:], shape[1], shape[0]), (-1, -2), (0, 1))
        renamed[name] = np.ascontiguousarray(array)
    return renamed
