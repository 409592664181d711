"""Published weights in and ours out: the tensors of EfficientNet under the names that timm and Keras give them.

Source of the names: timm's `tf_efficientnet_b*` (conv_stem, blocks.STAGE.REPEAT, …) and `keras.applications.EfficientNetB*` (stem_conv,
block1a_dwconv, …).
"""

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from effnetlib.checkpoints import Weights
from effnetlib.errors import EffnetlibError
from effnetlib.model import VARIANTS, EfficientNet, block_specs, head_filters, stage_repeats
from effnetlib.records import write_atomically


@dataclass(frozen=True)
class Layer:
    """One layer with weights: our path to it, and its names elsewhere.

    `kind` says how the layouts differ: "conv" (ours ``[k, k, in, out]``), "depthwise" (``[k, k, 1, C]``), "pointwise"
    (a 1x1 convolution, ours ``[in, out]``), "dense" (``[in, out]``) or "norm".
    """

    path: tuple
    kind: str
    timm: str
    keras: str


def layers(variant: str) -> Iterator[Layer]:
    """Every layer of a variant that has weights, in the order of the forward pass."""
    yield Layer(("stem",), "conv", "conv_stem", "stem_conv")
    yield Layer(("stem_norm",), "norm", "bn1", "stem_bn")
    places = [(stage, repeat) for stage, repeats in enumerate(stage_repeats(variant)) for repeat in range(repeats)]
    for i, (spec, (stage, repeat)) in enumerate(zip(block_specs(variant), places, strict=True)):
        ours, timm = ("blocks", i), f"blocks.{stage}.{repeat}"
        keras = f"block{stage + 1}{string.ascii_lowercase[repeat]}_"
        # timm numbers the batch norms of a block, and names the projection after what comes before it.
        expands = spec.expansion != 1
        if expands:
            yield Layer((*ours, "expand"), "pointwise", f"{timm}.conv_pw", keras + "expand_conv")
            yield Layer((*ours, "expand_norm"), "norm", f"{timm}.bn1", keras + "expand_bn")
        yield Layer((*ours, "depthwise"), "depthwise", f"{timm}.conv_dw", keras + "dwconv")
        yield Layer((*ours, "depthwise_norm"), "norm", f"{timm}.bn{1 + expands}", keras + "bn")
        yield Layer((*ours, "se", "reduce"), "pointwise", f"{timm}.se.conv_reduce", keras + "se_reduce")
        yield Layer((*ours, "se", "expand"), "pointwise", f"{timm}.se.conv_expand", keras + "se_expand")
        yield Layer((*ours, "project"), "pointwise", f"{timm}.conv_pw{'l' * expands}", keras + "project_conv")
        yield Layer((*ours, "project_norm"), "norm", f"{timm}.bn{2 + expands}", keras + "project_bn")
    yield Layer(("head",), "pointwise", "conv_head", "top_conv")
    yield Layer(("head_norm",), "norm", "bn2", "top_bn")
    yield Layer(("classifier",), "dense", "classifier", "predictions")


NORM_NAMES = {  # ours: timm's, Keras'
    "gamma": ("weight", "gamma"),
    "beta": ("bias", "beta"),
    "mean": ("running_mean", "moving_mean"),
    "var": ("running_var", "moving_variance"),
}


def _kernel_to_timm(kind: str, kernel: np.ndarray) -> np.ndarray:
    if kind == "dense":
        return kernel.T
    if kind == "pointwise":
        return kernel.T[:, :, None, None]
    return kernel.transpose(3, 2, 0, 1)


def _kernel_from_timm(kind: str, weight: np.ndarray) -> np.ndarray:
    if kind == "dense":
        return weight.T
    if kind == "pointwise":
        return weight[:, :, 0, 0].T
    return weight.transpose(2, 3, 1, 0)


def _kernel_from_keras(kind: str, kernel: np.ndarray) -> np.ndarray:
    if kind == "pointwise":
        return kernel[0, 0]
    return kernel.swapaxes(2, 3) if kind == "depthwise" else kernel


def _tensors(variant: str, num_classes: int):
    """(layer, our path to the tensor, its name in the layer, shape) of every tensor."""
    model = nnx.eval_shape(lambda: EfficientNet(variant, num_classes))
    params, stats = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))
    shapes = {path: leaf.shape for path, leaf in (flatten_dict(params) | flatten_dict(stats)).items()}
    for layer in layers(variant):
        if layer.kind == "depthwise":
            yield layer, layer.path, "kernel", shapes[layer.path]
            continue
        names = NORM_NAMES if layer.kind == "norm" else ("kernel", "bias")
        for name in names:
            if (*layer.path, name) in shapes:
                yield layer, (*layer.path, name), name, shapes[(*layer.path, name)]


def _timm_name(layer: Layer, name: str) -> str:
    leaf = NORM_NAMES[name][0] if layer.kind == "norm" else {"kernel": "weight", "bias": "bias"}[name]
    return f"{layer.timm}.{leaf}"


def _keras_name(layer: Layer, name: str) -> str:
    return f"{layer.keras}/{NORM_NAMES[name][1] if layer.kind == 'norm' else name}"


def _collect(found: Mapping[str, np.ndarray], variant: str, num_classes: int, name_of, from_theirs, source) -> Weights:
    """The weights out of named tensors, or one EffnetlibError that names all that is missing, extra or mis-shaped."""
    params, stats, known, wrong = {}, {}, set(), []
    for layer, path, name, shape in _tensors(variant, num_classes):
        theirs = name_of(layer, name)
        known.add(theirs)
        if theirs not in found:
            wrong.append(f"{theirs} is missing")
            continue
        value = np.asarray(found[theirs], np.float32)
        try:
            value = from_theirs(layer.kind, value) if name == "kernel" else value
        except (ValueError, IndexError):
            pass  # of another rank: the shape below says so
        if value.shape != shape:
            wrong.append(f"{theirs} has shape {list(found[theirs].shape)}, which is not {variant}'s")
            continue
        (stats if name in ("mean", "var") else params)[path] = np.ascontiguousarray(value)
    wrong += [f"{name} is not {variant}'s" for name in sorted(set(found) - known)]
    if wrong:
        listed = "; ".join(wrong[:20]) + (f"; and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise EffnetlibError(f"{source} does not hold {variant} with {num_classes} classes: {listed}")
    return unflatten_dict(params), unflatten_dict(stats)


def from_timm(tensors: Mapping[str, np.ndarray], variant: str, num_classes: int = 1000, source="the file") -> Weights:
    """The weights of timm's `tf_efficientnet_b*`, whose network is the same: with timm 1.0.31 on PyTorch the float32 logits
    of all eight variants were equal to 3e-5 of their range. (Not a test: PyTorch is no dependency, not even of the tests.)

    Args:
      tensors: timm's state dict; its ``num_batches_tracked`` counters are left out.

    Raises:
      EffnetlibError: a tensor is missing, extra or mis-shaped; all of them are named.
    """
    tensors = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    return _collect(tensors, variant, num_classes, _timm_name, _kernel_from_timm, source)


def to_timm(weights: Weights, variant: str, num_classes: int = 1000) -> dict[str, np.ndarray]:
    """The inverse of `from_timm`."""
    out = {}
    params, stats = weights
    flat = flatten_dict(params) | flatten_dict(stats)
    for layer, path, name, _ in _tensors(variant, num_classes):
        value = np.asarray(flat[path])
        out[_timm_name(layer, name)] = np.ascontiguousarray(
            _kernel_to_timm(layer.kind, value) if name == "kernel" else value
        )
    return out


def from_keras(tensors: Mapping[str, np.ndarray], variant: str, num_classes: int = 1000, source="the file") -> Weights:
    """The weights of `keras.applications.EfficientNetB*`, whose network is the same but for what surrounds it:

    * Keras normalises inside the model (layers `rescaling` and `normalization`: ``x / 255``, then mean and variance). Ours
      takes images that `effnetlib.data.images.normalize` has normalised; the layer's tensors are left out. With its
      ImageNet weights Keras divides by the square root of the standard deviation once more, to mend its own layer.
    * Keras pads the strided convolutions by a layer of its own (`correct_pad`); the result is TensorFlow's SAME, as ours.
    * Keras' `drop_connect_rate * i / N` counts the blocks as the reference does; its masks come from another generator.
    * Keras' initialisers are truncated normals ("VarianceScaling"), the reference's and ours are not; its dense layer
      draws from the same uniform range.
    * Batch norm's running variance is the biased one in both.

    Args:
      tensors: arrays by "LAYER/VARIABLE", such as "stem_conv/kernel".

    Raises:
      EffnetlibError: a tensor is missing, extra or mis-shaped; all of them are named.
    """
    outside = ("normalization", "seed_generator")
    tensors = {name: value for name, value in tensors.items() if not name.startswith(outside)}
    return _collect(tensors, variant, num_classes, _keras_name, _kernel_from_keras, source)


KERAS_VARIABLES = {4: ("gamma", "beta", "moving_mean", "moving_variance"), 3: ("mean", "variance", "count")}


def _read_keras(path: Path) -> dict[str, np.ndarray]:
    """Tensors by "LAYER/VARIABLE" of a Keras 3 `.weights.h5` or an older `.h5` (weights alone or in a whole model)."""
    with h5py.File(path) as file:
        if "layers" in file:
            groups = [group["vars"] for group in file["layers"].values() if len(group.get("vars", ()))]
            named = {group.attrs["name"]: [group[key][()] for key in sorted(group, key=int)] for group in groups}
        else:
            root = file.get("model_weights", file)
            text = [name.decode() if isinstance(name, bytes) else name for name in root.attrs.get("layer_names", ())]
            named = {name: [root[name][key][()] for key in root[name].attrs["weight_names"]] for name in text}
    tensors = {}
    for layer, values in named.items():
        variables = ("kernel", "bias") if len(values) < 3 else KERAS_VARIABLES.get(len(values), ())
        if layer.endswith("dwconv"):
            variables = ("kernel",)
        tensors |= {f"{layer}/{name}": value for name, value in zip(variables, values, strict=False)}
    return tensors


def read(path: Path | str) -> tuple[str, int, Weights]:
    """Variant, number of classes and weights of a file: timm's `.safetensors`, or Keras' `.weights.h5` or `.h5`.

    The variant is the one with the file's number of blocks and width.

    Raises:
      EffnetlibError: the file is neither, cannot be read, or holds no variant as a whole.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            tensors, from_theirs = load_file(path), from_timm
            ends, head, classifier = "conv_dw.weight", ("conv_head.weight", 0), ("classifier.weight", 0)
        elif path.suffix == ".h5":
            tensors, from_theirs = _read_keras(path), from_keras
            ends, head, classifier = "dwconv/kernel", ("top_conv/kernel", -1), ("predictions/kernel", -1)
        else:
            raise EffnetlibError(f"{path} is neither a .safetensors file (timm) nor a .h5 file (Keras)")
    except EffnetlibError:
        raise
    except Exception as error:  # h5py and safetensors each raise several kinds for a damaged file
        raise EffnetlibError(f"{path} cannot be read: {error}") from None

    def size(name, axis):
        return tensors[name].shape[axis] if name in tensors and tensors[name].ndim else 0

    variant = _nearest_variant(sum(name.endswith(ends) for name in tensors), size(*head))
    num_classes = size(*classifier) or 1000
    return variant, num_classes, from_theirs(tensors, variant, num_classes, source=path)


def _nearest_variant(blocks: int, head: int) -> str:
    return min(VARIANTS, key=lambda v: (abs(blocks - sum(stage_repeats(v))), abs(head - head_filters(v))))


def write(path: Path | str, weights: Weights, variant: str, num_classes: int = 1000) -> None:
    """Writes weights as `.safetensors` under timm's names."""
    write_atomically(Path(path), to_bytes(to_timm(weights, variant, num_classes)))


def build(weights: Weights, variant: str, num_classes: int = 1000, **options) -> EfficientNet:
    """A model with these weights. `options` are those of `EfficientNet`; nothing is initialised first."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: EfficientNet(variant, num_classes, **options)))
    return nnx.merge(graphdef, *jax.tree.map(jax.numpy.asarray, weights))
