"""Files of weights: timm's `.safetensors` in and out, Keras' files in."""

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
from effnetlib.errors import EffnetlibError, first_line
from effnetlib.model import VARIANTS, head_filters, stage_repeats
from effnetlib.runs.checkpoints import Weights
from effnetlib.runs.files import write_atomically
from effnetlib.weights.names import KERAS, TIMM, is_outside, to_ours, to_timm

MEAN, STD = (np.divide(values, 255).tolist() for values in (MEAN_RGB, STDDEV_RGB))  # of pixels from 0 to 1
KERNELS = (  # of the stem, of each block's depthwise convolution, of the head and of the classifier
    ("conv_stem.weight", "conv_dw.weight", "conv_head.weight", "classifier.weight"),
    ("stem_conv/kernel", "dwconv/kernel", "top_conv/kernel", "predictions/kernel"),
)


def read(path: Path) -> dict:
    """What timm's `.safetensors`, or Keras' `.weights.h5`, `.h5` or `.keras`, holds, as the fields of `Pretrained`.

    The variant is what timm's config says, or the one with the file's number of blocks and width. The network may be part
    of a larger one, if it has its own classifier.

    Raises:
      EffnetlibError: the file is neither, cannot be read, holds no variant as a whole, or its config says that the network
        is another one, or takes images of another normalisation.
    """
    if path.suffix.lower() not in (".safetensors", ".h5", ".hdf5", ".keras"):
        raise EffnetlibError(f"{path} is neither a .safetensors file (timm) nor a .h5 or .keras file (Keras)")
    library = TIMM if path.suffix.lower() == ".safetensors" else KERAS
    try:
        found = load_file(path) if library == TIMM else _read_keras(path)
    except ImportError:
        raise EffnetlibError(f"{path} takes h5py to read: pip install 'effnetlib[keras]'") from None
    except Exception as error:  # h5py and safetensors each raise several kinds for a damaged file
        raise EffnetlibError(f"{path} cannot be read: {first_line(error)}") from None
    known = _stated(path) if library == TIMM else {}

    def layers(names: Iterable[str]) -> str:
        names = sorted({name.rpartition("./"[library])[0] for name in names if not is_outside(name)})
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    stem, depthwise, head, classifier = KERNELS[library]
    around = [name.removesuffix(stem) for name in found if name.endswith(stem)]
    if len(around) != 1:
        count = f"{len(around)} networks" if around else "nothing"
        raise EffnetlibError(f"{path} holds {count} with EfficientNet's names ({stem}): its layers are {layers(found)}")
    (around,) = around
    inside = [name for name in found if name.startswith(around) and name.count("/") <= around.count("/") + 1]
    outside = [name for name in found.keys() - inside if "normalization" not in name]
    inner = {name.removeprefix(around): found[name] for name in inside}
    # A kernel's outputs are its first axis in timm, and its last in Keras; without a kernel there are none.
    shapes = ((0, *np.shape(inner.get(name, ())), 0) for name in (head, classifier))
    width, num_classes = (shape[1 if library == TIMM else -2] for shape in shapes)
    blocks = sum(name.endswith(depthwise) for name in inner)
    nearest = min(VARIANTS, key=lambda v: (abs(blocks - sum(stage_repeats(v))), abs(width - head_filters(v))))
    variant = known.get("variant", nearest)
    names = known.get("class_names", ())
    for what, count in (("classes", known.get("num_classes")), ("names of classes", len(names))):
        if count and num_classes and count != num_classes:
            raise EffnetlibError(f"{path} has {num_classes} logits, and {count} {what} are stated")
    notes = [known["note"]] if "note" in known else []
    if outside:
        notes.append(f"of the model around {variant} in {path.name}, {layers(outside)} is left out")
    mean = next((np.ravel(inner[name]) for name in inner if re.fullmatch(r"normalization\w*/mean", name)), MEAN)
    if not np.allclose(mean, MEAN, atol=1e-3):
        theirs = mean.round(3).tolist()
        notes.append(f"{path.name} normalises images with the mean {theirs}, and here it is ImageNet's")
    itself = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    of_file = {"tag": known.get("tag"), "note": "; ".join(notes)}
    if not num_classes:  # what follows names the head that is there instead
        inner, num_classes = inner | {name: found[name] for name in outside}, 1000
    return {
        "weights": to_ours(inner, library, variant, num_classes, source=path),
        "variant": variant,
        "num_classes": num_classes,
        "image_size": known.get("image_size", VARIANTS[variant].resolution),
        "class_names": names,
        "origin": known.get("from", itself) | {name: text for name, text in of_file.items() if text},
    }


def write(path: Path, weights: Weights, variant: str, num_classes=1000, image_size=None, class_names=(), origin=None):
    """Writes what `read` reads as `.safetensors` under timm's names, with a config of timm's form in its metadata."""
    size, origin = image_size or VARIANTS[variant].resolution, dict(origin or {})
    config = {"architecture": f"tf_efficientnet_{variant}", "num_classes": num_classes, "label_names": class_names}
    config |= {"input_size": [3, size, size], "mean": MEAN, "std": STD}
    config |= {"tag": origin.pop("tag", None), "note": origin.pop("note", None), "from": origin}
    config = {name: value for name, value in config.items() if value}
    write_atomically(path, to_bytes(to_timm(weights, variant, num_classes), {"config": json.dumps(config)}))


def _read_keras(path: Path) -> dict[str, np.ndarray]:
    """Tensors by "LAYER/VARIABLE" of a file that Keras wrote, with the names of the models around a layer before it.

    Reads weights alone or a whole model, from Keras 2 and 3. Keras itself reads weights alone only into a model that is
    built already, and building B0 takes it 18 seconds (h5py: 0.05).
    """
    import h5py

    source = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5")) if path.suffix.lower() == ".keras" else path
    of_norm = ("gamma", "beta", "moving_mean", "moving_variance")
    variables = {2: ("kernel", "bias"), 3: ("mean", "variance", "count"), 4: of_norm}
    found = {}

    def add(name, item):
        if not isinstance(item, h5py.Dataset) or name.startswith(("optimizer", "_")):
            return
        *around, layer, variable = name.partition(":")[0].split("/")
        if layer == "vars":  # Keras 3: …/layers/NUMBER/vars/INDEX, with the layer's name as an attribute
            layer = item.parent.attrs.get("name", around.pop())
            variable = (*variables.get(len(item.parent), ("kernel",)), *"?" * 9)[int(variable)]
        around = [each for each in around if each not in ("layers", "model_weights", layer)]
        found["/".join((*around, layer, variable.replace("depthwise_kernel", "kernel")))] = item[()]

    with h5py.File(source) as file:
        file.visititems(add)
    return found


def _stated(path: Path) -> dict:
    """What a config of timm's form says, in the file's metadata (as in ours) or in `config.json` beside it; or a note, where
    there is none. Refuses a network that differs from ours, though its tensors may have the same names and shapes."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
    beside = path.with_name("config.json")
    where = path if "config" in metadata else beside
    try:
        config = json.loads(metadata.get("config") or (beside.read_text() if beside.exists() else "{}"))
        num_classes = int(config.get("num_classes") or 0)  # that of `pretrained_cfg` may be from before a fine-tuning
        config |= config.get("pretrained_cfg", {})
        architecture = config.get("architecture", "")
        if not architecture:
            return {"note": _unknown(path)}
        ours = re.fullmatch(
            r"(?:.*[/:])?tf_efficientnet_(b[0-7]|nano)(?:_(aa|ap|ns))?(?:\.(\w+))?", architecture.lower()
        )
        variant, tag_of_name = (ours[1], ours[3] or ours[2]) if ours else ("b*", None)
        tag = config.get("tag") or tag_of_name or ""
        wrong = [] if ours else [f"is {architecture}, with other layers, padding or batch-norm epsilon"]
        other = {*config.get("model_args", {})} - {"num_classes", "drop_rate", "drop_path_rate"}
        other |= {"global_pool"} if (config.get("global_pool") or "avg") != "avg" else set()
        wrong += [f"was built with another {name}" for name in sorted(other)]
        for name, values in (("mean", MEAN), ("std", STD)):
            theirs = config.get(name, 0.5 if tag.startswith("ap") else values)  # AdvProp's
            if not np.allclose(theirs, values, atol=1e-3):
                wrong.append(f"takes images normalised with the {name} {theirs}, not {np.round(values, 3).tolist()}")
        labels = config.get("label_names") or list(config.get("label_descriptions", ()))
        labels = [labels[key] for key in sorted(labels, key=int)] if isinstance(labels, dict) else labels
        size = int(config["input_size"][-1]) if "input_size" in config else 0
        known = {"variant": variant, "image_size": size, "class_names": tuple(map(str, labels)), "tag": tag}
        known |= {"num_classes": num_classes, "note": str(config.get("note") or "")}
        known |= {"from": dict(config.get("from") or {})}
    except (AttributeError, TypeError, ValueError, KeyError, IndexError, OSError) as error:
        raise EffnetlibError(f"{where} is damaged, or no config of timm's: {first_line(error)}") from None
    if wrong:
        would = f"timm's tf_efficientnet_{variant}.aa_in1k, for one, would do"
        raise EffnetlibError(f"{path} is not ours: {where} says that it {' and '.join(wrong)}; {would}")
    return {name: value for name, value in known.items() if value}


def _unknown(path: Path) -> str:
    words = {*re.split("[^a-z0-9]+", path.stem.lower())}
    hints = ["AdvProp"] * bool(words & {"ap", "advprop"})
    hints += ["timm's own efficientnet"] * ("efficientnet" in words and "tf" not in words)
    hint = f" (its name speaks of {' and '.join(hints)})" if hints else ""
    return (
        f"nothing beside {path.name} states which network of timm's it holds{hint}: without its config.json, efficientnet_b* "
        "(other padding and epsilon) and AdvProp's weights (other normalisation) look like ours, and would score badly"
    )
