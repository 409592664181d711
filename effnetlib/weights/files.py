"""Reads and writes timm's `.safetensors`, and reads Keras' files."""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from effnetlib.data.images import MEAN_RGB, STDDEV_RGB
from effnetlib.errors import EffnetlibError, first_line, require
from effnetlib.model import VARIANTS, head_filters, stage_repeats
from effnetlib.runs.checkpoints import Weights
from effnetlib.runs.files import write_atomically
from effnetlib.weights.names import KERAS, TIMM, is_outside, to_ours, to_timm

MEAN, STD = (np.divide(values, 255).tolist() for values in (MEAN_RGB, STDDEV_RGB))  # for pixels from 0 to 1
KERNELS = (  # of the stem, the depthwise convolutions, the head and the classifier, by library
    ("conv_stem.weight", "conv_dw.weight", "conv_head.weight", "classifier.weight"),
    ("stem_conv/kernel", "dwconv/kernel", "top_conv/kernel", "predictions/kernel"),
)
OURS = re.compile(
    r"(?:.*[/:])?tf_efficientnet_(b[0-7]|nano)(?:_(aa|ap|ns))?(?:\.(\w+))?"
)  # timm's names of our networks
UNKNOWN = (
    "no config states which of timm's networks {} holds: efficientnet_b* (other padding and epsilon) and AdvProp's "
    "weights (other normalisation) look like ours, but would score badly"
)


def read(path: Path) -> dict:
    """Reads timm's `.safetensors`, or Keras' `.weights.h5`, `.h5` or `.keras`, as the fields of `Pretrained`.

    timm's config states the variant. Without it, the number of blocks and the width decide. The network may be a part
    of a larger model, if it has its own classifier.

    Raises:
      EffnetlibError: the format is another one, the file is damaged, a part of the variant is missing, or timm's config
        states another network or another normalisation of images.
    """
    known_suffix = path.suffix.lower() in (".safetensors", ".h5", ".hdf5", ".keras")
    require(known_suffix, f"{path} is neither a .safetensors file (timm) nor a .h5 or .keras file (Keras)")
    library = TIMM if path.suffix.lower() == ".safetensors" else KERAS
    try:
        found = load_file(path) if library == TIMM else _read_keras(path)
    except ImportError:
        raise EffnetlibError(f"{path} needs h5py: pip install 'effnetlib[keras]'") from None
    except Exception as error:  # h5py and safetensors raise many types for a damaged file
        raise EffnetlibError(f"{path} cannot be read: {first_line(error)}") from None
    known = _stated(path) if library == TIMM else {}

    def layers(names: Iterable[str]) -> str:
        names = sorted({name.rpartition("./"[library])[0] for name in names if not is_outside(name)})
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    stem, depthwise, head, classifier = KERNELS[library]
    prefixes = [name.removesuffix(stem) for name in found if name.endswith(stem)]
    wrong = f"{path} holds {len(prefixes)} networks with EfficientNet's names ({stem}): its layers are {layers(found)}"
    require(len(prefixes) == 1, wrong)
    (prefix,) = prefixes
    inside = [name for name in found if name.startswith(prefix) and name.count("/") <= prefix.count("/") + 1]
    outside = [name for name in found.keys() - inside if "normalization" not in name]
    inner = {name.removeprefix(prefix): found[name] for name in inside}
    # The output axis of a kernel is the first in timm and the last in Keras. Without a kernel there are 0 outputs.
    kernels = (inner.get(name, np.zeros(0)) for name in (head, classifier))
    width, num_classes = (kernel.shape[0 if library == TIMM else -1] for kernel in kernels)
    blocks = sum(name.endswith(depthwise) for name in inner)
    nearest = min(VARIANTS, key=lambda v: (abs(blocks - sum(stage_repeats(v))), abs(width - head_filters(v))))
    variant = known.get("variant", nearest)
    names = known.get("class_names", ())
    for what, count in (("classes", known.get("num_classes")), ("class names", len(names))):
        agrees = not count or not num_classes or count == num_classes
        require(agrees, f"{path} has {num_classes} logits, but its config states {count} {what}")
    notes = [known["note"]] if "note" in known else []
    if outside:
        notes.append(f"{path.name} holds more than {variant}, and {layers(outside)} is left out")
    mean = next((np.ravel(inner[name]) for name in inner if re.fullmatch(r"normalization\w*/mean", name)), MEAN)
    if not np.allclose(mean, MEAN, atol=1e-3):
        notes.append(f"{path.name} normalises images with the mean {mean.round(3).tolist()}, and here it is ImageNet's")
    this_file = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    stated = {"tag": known.get("tag"), "note": "; ".join(notes)}
    if not num_classes:  # then the error of to_ours also names the layers of the other head
        inner, num_classes = inner | {name: found[name] for name in outside}, 1000
    return {
        "weights": to_ours(inner, library, variant, num_classes, source=path),
        "variant": variant,
        "num_classes": num_classes,
        "image_size": known.get("image_size", VARIANTS[variant].resolution),
        "class_names": names,
        "origin": known.get("from", this_file) | {name: text for name, text in stated.items() if text},
    }


def write(path: Path, weights: Weights, variant: str, num_classes=1000, image_size=None, class_names=(), origin=None):
    """Writes a `.safetensors` file with timm's names, and a config in timm's format in its metadata."""
    size, origin = image_size or VARIANTS[variant].resolution, dict(origin or {})
    config = {"architecture": f"tf_efficientnet_{variant}", "num_classes": num_classes, "label_names": class_names}
    config |= {"input_size": [3, size, size], "mean": MEAN, "std": STD}
    config |= {"tag": origin.pop("tag", None), "note": origin.pop("note", None), "from": origin}
    config = {name: value for name, value in config.items() if value}
    write_atomically(path, to_bytes(to_timm(weights, variant, num_classes), {"config": json.dumps(config)}))


def _read_keras(path: Path) -> dict[str, np.ndarray]:
    """Tensors by "MODEL/LAYER/VARIABLE" (without "MODEL/" outside nested models), from Keras 2 and 3.

    The file may hold weights alone or a whole model. Keras itself loads weights only into a built model. Building B0
    takes 18 seconds, and reading with h5py 0.05 seconds.
    """
    import h5py

    source = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5")) if path.suffix.lower() == ".keras" else path
    batch_norm = ("gamma", "beta", "moving_mean", "moving_variance")
    variables = {2: ("kernel", "bias"), 3: ("mean", "variance", "count"), 4: batch_norm}  # by their number
    found = {}

    def add(name, item):
        if not isinstance(item, h5py.Dataset) or name.startswith(("optimizer", "_")):
            return
        *models, layer, variable = name.partition(":")[0].split("/")
        if layer == "vars":  # Keras 3: …/layers/NUMBER/vars/INDEX, with the layer's name as an attribute
            layer = item.parent.attrs.get("name", models.pop())
            variable = (*variables.get(len(item.parent), ("kernel",)), *"?" * 9)[int(variable)]
        models = [part for part in models if part not in ("layers", "model_weights", layer)]
        found["/".join((*models, layer, variable.replace("depthwise_kernel", "kernel")))] = item[()]

    with h5py.File(source) as file:
        file.visititems(add)
    return found


def _stated(path: Path) -> dict:
    """What timm's config states, in the file's metadata (as in ours) or in `config.json` beside it, or else a note.

    Refuses other networks: their tensors may have the same names and shapes as ours."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
    beside = path.with_name("config.json")
    where = path if "config" in metadata else beside
    try:
        config = json.loads(metadata.get("config") or (beside.read_text() if beside.exists() else "{}"))
        num_classes = int(config.get("num_classes") or 0)  # `pretrained_cfg` may state the number before fine-tuning
        config |= config.get("pretrained_cfg", {})
        architecture = config.get("architecture", "")
        if not architecture:
            return {"note": UNKNOWN.format(path.name)}
        ours = OURS.fullmatch(architecture.lower())
        variant, *tags = ours.groups() if ours else ("b*",)
        tag = config.get("tag") or next(filter(None, tags), "")
        wrong = [] if ours else [f"is {architecture}, with other layers, padding or batch-norm epsilon"]
        other = {*config.get("model_args", {})} - {"num_classes", "drop_rate", "drop_path_rate"}
        other |= {"global_pool"} if (config.get("global_pool") or "avg") != "avg" else set()
        wrong += [f"was built with another {name}" for name in sorted(other)]
        for name, values in (("mean", MEAN), ("std", STD)):
            stated = config.get(name, 0.5 if tag.startswith("ap") else values)  # AdvProp's mean and std are 0.5
            if not np.allclose(stated, values, atol=1e-3):
                wrong.append(f"takes images normalised with the {name} {stated}, not {np.round(values, 3).tolist()}")
        labels = config.get("label_names") or list(config.get("label_descriptions", ()))
        labels = [labels[key] for key in sorted(labels, key=int)] if isinstance(labels, dict) else labels
        size = int(config["input_size"][-1]) if "input_size" in config else 0
        known = {"variant": variant, "num_classes": num_classes, "image_size": size, "tag": tag}
        known |= {"class_names": tuple(map(str, labels)), "note": str(config.get("note") or "")}
        known |= {"from": dict(config.get("from") or {})}
    except (AttributeError, TypeError, ValueError, KeyError, IndexError, OSError) as error:
        raise EffnetlibError(f"{where} is damaged, or is not timm's config: {first_line(error)}") from None
    example = f"take timm's tf_efficientnet_{variant}.aa_in1k, for example"
    require(not wrong, f"{path} is not ours: {where} says that it {' and '.join(wrong)}; {example}")
    return {name: value for name, value in known.items() if value}
