"""Weights to use: imported from timm or Keras, or out of a run; evaluated on a data set, or exported for others."""

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export

from effnetlib import checkpoints, data, weights
from effnetlib.checkpoints import Weights
from effnetlib.data import Split
from effnetlib.data.images import normalize
from effnetlib.errors import EffnetlibError
from effnetlib.evaluation import EvalResult, evaluate
from effnetlib.host import pinned
from effnetlib.mesh import batch_sharding, make_mesh
from effnetlib.model import VARIANTS
from effnetlib.paths import user_path
from effnetlib.records import SCHEMA, Record, environment, write_atomically

EXPORTS = (".safetensors", ".stablehlo")
PLATFORMS = ("cpu", "tpu", "cuda")


@dataclass(frozen=True)
class Pretrained:
    """Weights, and what they belong to.

    Attributes:
      variant: b0 to b7, or nano.
      num_classes: size of the logits.
      image_size: pixels a side that they were trained at, or the variant's own where that is unknown.
      weights: ``(params, batch_stats)``.
      origin: where they come from: "file" and "sha256", or "run", "step" and "recipe_hash".
    """

    variant: str
    num_classes: int
    image_size: int
    weights: Weights
    origin: dict

    @classmethod
    def load(cls, path: Path | str) -> "Pretrained":
        """Reads a file (see `effnetlib.weights.read`), a folder that `import_weights` made, or a run's folder, of which it
        takes the moving average in the latest checkpoint.

        Raises:
          EffnetlibError: there is nothing like that at the path, or it is damaged.
        """
        path = user_path(path, "the weights")
        if path.is_file():
            variant, num_classes, found = weights.read(path)
            origin = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            return cls(variant, num_classes, VARIANTS[variant].resolution, found, origin)
        if (path / "weights.json").is_file():
            try:
                about = json.loads((path / "weights.json").read_text())
                known = {name: about[name] for name in ("variant", "num_classes", "image_size", "origin")}
            except (ValueError, KeyError, TypeError) as error:
                raise EffnetlibError(f"{path / 'weights.json'} is damaged, or of another version: {error}") from None
            return cls(weights=checkpoints.latest_weights(path)[1], **known)
        if (path / "run.json").is_file():
            record = Record.load(path)
            step, found = checkpoints.latest_weights(path)
            origin = {"run": record.name, "step": step, "recipe_hash": record.recipe.hash}
            return cls(record.recipe.variant, record.data["num_classes"], record.recipe.resolution, found, origin)
        raise EffnetlibError(f"{path} is neither a file of weights nor the folder of an import or of a run")

    def export(self, file: Path | str) -> None:
        """Writes `.safetensors` under timm's names, or `.stablehlo`: a `jax.export` of the float32 forward pass with the
        weights in it, for any batch size, on CPU, TPU or CUDA.

        The latter is read by a Python with jax and flatbuffers alone, ``jax.export.deserialize(bytes).call(images)``. It
        takes normalised float32 images ``[batch, image_size, image_size, 3]``, as the model does.

        Raises:
          EffnetlibError: the suffix is neither.
        """
        file = user_path(file, "the file")
        try:
            self._export(file)
        except OSError as error:
            raise EffnetlibError(f"{file} cannot be written: {error.strerror}") from None

    def _export(self, file: Path) -> None:
        if file.suffix == ".safetensors":
            weights.write(file, self.weights, self.variant, self.num_classes)
        elif file.suffix == ".stablehlo":
            model = weights.build(self.weights, self.variant, self.num_classes, dtype=jnp.float32)
            (batch,) = jax_export.symbolic_shape("batch")
            images = jax.ShapeDtypeStruct((batch, self.image_size, self.image_size, 3), jnp.float32)
            exported = jax_export.export(jax.jit(lambda images: model(images)), platforms=PLATFORMS)(images)
            write_atomically(file, bytes(exported.serialize()))
        else:
            raise EffnetlibError(f"{file} ends in neither of {' and '.join(EXPORTS)}")


def import_weights(file: Path | str, directory: Path | str) -> Pretrained:
    """Reads a file of weights and writes it into a folder, as a checkpoint of ours and a `weights.json`.

    Raises:
      EffnetlibError: the file does not hold a variant, or the folder holds something already.
    """
    directory = user_path(directory, "the folder", folder=True)
    pretrained = Pretrained.load(file)
    try:
        if directory.exists() and any(directory.iterdir()):
            raise EffnetlibError(f"{directory} is not empty: name another folder, or delete that one")
        directory.parent.mkdir(parents=True, exist_ok=True)
        _write_import(pretrained, directory)
    except OSError as error:
        raise EffnetlibError(f"the folder {directory} cannot be written: {error.strerror}") from None
    return pretrained


def _write_import(pretrained: Pretrained, directory: Path) -> None:
    params, batch_stats = pretrained.weights
    about = {name: value for name, value in vars(pretrained).items() if name != "weights"}
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".import-") as temporary:
        whole = Path(temporary) / directory.name
        whole.mkdir()
        with checkpoints.open_checkpoints(whole) as manager:
            checkpoints.save(manager, 0, {"ema_params": params, "ema_batch_stats": batch_stats})
        write_atomically(whole / "weights.json", json.dumps({"schema": SCHEMA, **about}, indent=2) + "\n")
        whole.rename(directory)


@pinned()
def predict(
    pretrained: Pretrained,
    split: Split,
    *,
    batch: int = 64,
    augmentation: str = "inception",
    precision: str = "float32",
) -> tuple[np.ndarray, np.ndarray]:
    """Labels, int32 ``[examples]``, and probabilities, float32 ``[examples, classes]``, of a split, on the devices of this
    process. `augmentation` decides the crop, as in a recipe."""
    model = weights.build(pretrained.weights, pretrained.variant, pretrained.num_classes, dtype=jnp.dtype(precision))
    graphdef, state = nnx.split(model)
    probabilities = jax.jit(lambda state, images: jax.nn.softmax(nnx.merge(graphdef, state)(normalize(images))))
    sharding = batch_sharding(make_mesh(1, jax.local_devices()[:1]))
    batches = data.eval_batches(
        split, batch=batch, size=pretrained.image_size, augmentation=augmentation, sharding=sharding
    )
    labels, found = [], []
    for each in batches:
        mask = np.asarray(each["mask"])
        labels.append(np.asarray(each["labels"])[mask])
        found.append(np.asarray(probabilities(state, each["images"]))[mask])
    return np.concatenate(labels), np.concatenate(found)


def evaluate_pretrained(
    pretrained: Pretrained,
    dataset: str,
    file: Path | str,
    *,
    batch: int = 256,
    image_size: int | None = None,
    augmentation: str = "inception",
    precision: str = "float32",
) -> EvalResult:
    """Evaluates weights on the "eval" split of a data set and writes what was counted, and on what, to a JSON file.

    Args:
      dataset: a data set's name, or a folder with ``val/CLASS/*.jpg``; its classes are the logits in sorted order.
      file: where the result goes; replaced whole.
      batch: images a step over all devices.
      image_size: pixels a side; None is that of the weights.
      augmentation: decides the crop, as in a recipe.
      precision: of the convolutions.

    Raises:
      EffnetlibError: the data is missing, or has another number of classes than the weights.
    """
    file, split = user_path(file, "the file"), data.load(dataset, "eval")
    if len(split.class_names) != pretrained.num_classes:
        raise EffnetlibError(
            f"{dataset} has {len(split.class_names):,} classes, and the weights {pretrained.num_classes:,}: "
            "evaluate them on what they were trained for"
        )
    if batch < 1 or batch % jax.device_count():
        raise EffnetlibError(f"a batch of {batch} does not divide over {jax.device_count()} devices")
    size = image_size or pretrained.image_size
    with pinned() as settings:
        model = weights.build(
            pretrained.weights, pretrained.variant, pretrained.num_classes, dtype=jnp.dtype(precision)
        )
        result = evaluate(model, split, batch=batch, size=size, augmentation=augmentation)
    text = {
        "schema": SCHEMA,
        "weights": {"variant": pretrained.variant, "num_classes": pretrained.num_classes, **pretrained.origin},
        "settings": {"image_size": size, "augmentation": augmentation, "precision": precision},
        "data": {"source": dataset, "eval_examples": len(split), "fingerprint": split.fingerprint},
        "environment": environment() | {"settings": settings},
        "result": asdict(result) | {"top1": result.top1, "top5": result.top5, "loss": result.loss},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(text, indent=2) + "\n")
    return result
