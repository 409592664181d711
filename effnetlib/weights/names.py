"""Published weights in and ours out: the tensors of EfficientNet under the names that timm and Keras give them.

Source of the names: timm's `tf_efficientnet_b*` (conv_stem, blocks.STAGE.REPEAT, …) and `keras.applications.EfficientNetB*` (stem_conv,
block1a_dwconv, …).
"""

import io
import json
import re
import string
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from effnetlib.data.images import MEAN_RGB, STDDEV_RGB
from effnetlib.errors import EffnetlibError, first_line
from effnetlib.model import VARIANTS, EfficientNet, block_specs, head_filters, stage_repeats
from effnetlib.runs.checkpoints import Weights
from effnetlib.runs.files import write_atomically


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
        if not jax.numpy.issubdtype(found[theirs].dtype, jax.numpy.floating):
            wrong.append(f"{theirs} is of {found[theirs].dtype}, no floating-point numbers")
        elif not np.isfinite(value).all() or (name == "var" and (value < 0).any()):
            wrong.append(f"{theirs} holds values that are not finite, or variances below 0")
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
    """Tensors by "LAYER/VARIABLE" of a file that Keras wrote, before it the names of the models around the layer.

    Reads `.keras`, `.weights.h5` and `.h5`, of weights alone or of a whole model, from Keras 2 and 3. Keras itself reads
    weights alone only into a model that is built already, and building B0 takes it 18 seconds (h5py: 0.05).

    Raises:
      EffnetlibError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise EffnetlibError(f"{path} takes h5py to read: pip install 'effnetlib[keras]'") from None
    source = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5")) if path.suffix.lower() == ".keras" else path
    tensors = {}

    def add(name, item):
        if not isinstance(item, h5py.Dataset) or name.startswith(("optimizer", "_")):
            return
        *around, layer, variable = name.partition(":")[0].split("/")
        if layer == "vars":  # Keras 3: …/layers/NUMBER/vars/INDEX, with the layer's name as an attribute
            if "name" not in item.parent.attrs:
                return
            variables = ("kernel", "bias") if len(item.parent) < 3 else KERAS_VARIABLES.get(len(item.parent), ())
            around, layer = around[:-1], item.parent.attrs["name"]
            variable = variables[int(variable)] if int(variable) < len(variables) else variable
        around = [each for each in around if each not in ("layers", "model_weights", layer)]
        tensors["/".join((*around, layer, variable.replace("depthwise_kernel", "kernel")))] = item[()]

    with h5py.File(source) as file:
        file.visititems(add)
    return tensors


def _stated(path: Path) -> dict:
    """What is known of a `.safetensors` file from a config of timm's form, in its metadata (as in ours) or in `config.json`
    beside it: variant, image size, class names and tag; or a note, where there is none.

    Raises:
      EffnetlibError: its network differs from ours, though its tensors may have the same names and shapes.
    """
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
    beside = path.with_name("config.json")
    where = path if "config" in metadata else beside
    try:
        config = json.loads(metadata.get("config") or (beside.read_text() if beside.exists() else "{}"))
        stated = config.get("num_classes")  # that of `pretrained_cfg` may be from before a fine-tuning
        config |= config.get("pretrained_cfg", {})
        architecture = config.get("architecture", "")
        if not architecture:
            return {"note": _unknown(path)}
        name = r"(?:.*[/:])?tf_efficientnet_(b[0-7]|nano)(?:_(aa|ap|ns))?(?:\.(\w+))?"
        ours = re.fullmatch(name, architecture.lower())
        tag = config.get("tag") or (ours and (ours[3] or ours[2])) or ""
        wrong = [] if ours else [f"is {architecture}, with other layers, padding or batch-norm epsilon"]
        other = {*config.get("model_args", {})} - {"num_classes", "drop_rate", "drop_path_rate"}
        other |= {"global_pool"} if (config.get("global_pool") or "avg") != "avg" else set()
        wrong += [f"was built with another {name}" for name in sorted(other)]
        for name, values in (("mean", MEAN_RGB), ("std", STDDEV_RGB)):
            values = np.round(np.divide(values, 255), 3).tolist()
            theirs = config.get(name, 0.5 if tag.startswith("ap") else values)  # AdvProp's
            if not np.allclose(theirs, values, atol=1e-3):
                wrong.append(f"takes images normalised with the {name} {theirs}, not {values}")
        labels = config.get("label_names") or list(config.get("label_descriptions", ()))
        labels = [labels[key] for key in sorted(labels, key=int)] if isinstance(labels, dict) else labels
        variant = ours[1] if ours else "b*"
        size = int(config["input_size"][-1]) if "input_size" in config else None
        known = {"variant": variant, "image_size": size, "class_names": tuple(map(str, labels)), "tag": tag}
        known |= {"num_classes": int(stated or 0), "note": str(config.get("note") or "")}
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise EffnetlibError(f"{where} is damaged, or no config of timm's: {first_line(error)}") from None
    if wrong:
        would = f"timm's tf_efficientnet_{variant}.aa_in1k, for one, would do"
        raise EffnetlibError(f"{path} is not ours: {where} says that it {' and '.join(wrong)}; {would}")
    return {name: value for name, value in known.items() if value}


def _unknown(path: Path) -> str:
    words, hint = {*re.split("[^a-z0-9]+", path.stem.lower())}, ""
    if words & {"ap", "advprop"} or ("efficientnet" in words and "tf" not in words):
        hint = " (its name speaks of " + (
            "AdvProp)" if "tf" in words else "timm's own efficientnet, not of tf_efficientnet)"
        )
    return (
        f"nothing beside {path.name} states which network of timm's it holds{hint}: without its config.json, efficientnet_b* "
        "(other padding and epsilon) and AdvProp's weights (other normalisation) look like ours, and would score badly"
    )


def read(path: Path | str) -> tuple[str, int, Weights, dict]:
    """Variant, number of classes and weights of a file, timm's `.safetensors` or Keras' `.weights.h5`, `.h5` or `.keras`; and
    what else is known of it: "image_size", "class_names", timm's "tag", and a "note" on what could not be checked.

    The variant is what timm's config says, or the one with the file's number of blocks and width. The network may be part of
    a larger one, if it has its own classifier.

    Raises:
      EffnetlibError: the file is neither, cannot be read, or holds no variant as a whole; or timm's config says that the
        network is another one, or takes images of another normalisation.
    """
    path = Path(path)
    try:
        suffix = path.suffix.lower()
        if suffix == ".safetensors":
            tensors, known, from_theirs, name_of, dot = load_file(path), _stated(path), from_timm, _timm_name, "."
            stem, ends, head = "conv_stem.weight", "conv_dw.weight", ("conv_head.weight", 0)
            classifier = "classifier.weight"
        elif suffix in (".h5", ".hdf5", ".keras"):
            tensors, known, from_theirs, name_of, dot = _read_keras(path), {}, from_keras, _keras_name, "/"
            stem, ends, head = "stem_conv/kernel", "dwconv/kernel", ("top_conv/kernel", -1)
            classifier = "predictions/kernel"
        else:
            raise EffnetlibError(f"{path} is neither a .safetensors file (timm) nor a .h5 or .keras file (Keras)")
    except EffnetlibError:
        raise
    except Exception as error:  # h5py and safetensors each raise several kinds for a damaged file
        raise EffnetlibError(f"{path} cannot be read: {first_line(error)}") from None

    def listed(names):
        names = sorted({name.rpartition(dot)[0] for name in names if "num_batches_tracked" not in name})
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    around = [name.removesuffix(stem) for name in tensors if name.endswith(stem)]
    if len(around) != 1:
        found = f"{len(around)} networks" if around else "nothing"
        raise EffnetlibError(
            f"{path} holds {found} with EfficientNet's names ({stem}): its layers are {listed(tensors)}"
        )
    deepest = around[0].count("/") + 1
    inside = {name for name in tensors if name.startswith(around[0]) and name.count("/") <= deepest}
    inner = {name.removeprefix(around[0]): tensors[name] for name in inside}
    outer = [name for name in tensors.keys() - inside if "normalization" not in name]

    def size(name, axis):
        return inner[name].shape[axis] if name in inner and inner[name].ndim else 0

    nearest = _nearest_variant(sum(name.endswith(ends) for name in inner), size(*head))
    variant, num_classes = known.pop("variant", nearest), size(classifier, head[1])
    if not num_classes:
        ours = {name_of(layer, name) for layer, _, name, _ in _tensors(variant, 1)}
        other = outer + [name for name in inner.keys() - ours if "normalization" not in name]
        raise EffnetlibError(
            f"{path} holds {variant} without its classifier {classifier.rpartition(dot)[0]}, "
            + (f"under another head ({listed(other)})" if other else "without any head")
            + ": what can be imported has the head it was published with"
        )
    counts = {"classes": known.pop("num_classes", 0), "names of classes": len(known.get("class_names", ()))}
    for what, count in counts.items():
        if count not in (0, num_classes):
            raise EffnetlibError(f"{path} has {num_classes} logits, and {count} {what} are stated")
    notes = [known["note"]] if "note" in known else []
    if outer:
        notes.append(f"of the model around {variant} in {path.name}, {listed(outer)} is left out")
    mean = [np.ravel(value) for name, value in inner.items() if re.fullmatch(r"normalization\w*/mean", name)]
    if mean and not np.allclose(mean, np.divide(MEAN_RGB, 255), atol=1e-3):
        notes.append(
            f"{path.name} normalises images with the mean {mean[0].round(3).tolist()}, and here it is ImageNet's"
        )
    known |= {"note": "; ".join(notes)} if notes else {}
    return variant, num_classes, from_theirs(inner, variant, num_classes, source=path), known


def _nearest_variant(blocks: int, head: int) -> str:
    return min(VARIANTS, key=lambda v: (abs(blocks - sum(stage_repeats(v))), abs(head - head_filters(v))))


def write(path: Path | str, weights: Weights, variant: str, num_classes: int = 1000, **known) -> None:
    """Writes weights as `.safetensors` under timm's names, and into its metadata a config of timm's form. `known` is as of `read`."""
    mean, std = (np.divide(values, 255).tolist() for values in (MEAN_RGB, STDDEV_RGB))
    size = known.get("image_size", VARIANTS[variant].resolution)
    config = {"architecture": f"tf_efficientnet_{variant}", "num_classes": num_classes, "tag": known.get("tag")}
    config |= {"input_size": [3, size, size], "mean": mean, "std": std, "label_names": known.get("class_names")}
    config["note"] = known.get("note")
    tensors = to_timm(weights, variant, num_classes)
    write_atomically(Path(path), to_bytes(tensors, {"config": json.dumps({k: v for k, v in config.items() if v})}))


def build(weights: Weights, variant: str, num_classes: int = 1000, **options) -> EfficientNet:
    """A model with these weights. `options` are those of `EfficientNet`; nothing is initialised first."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: EfficientNet(variant, num_classes, **options)))
    return nnx.merge(graphdef, *jax.tree.map(jax.numpy.asarray, weights))
