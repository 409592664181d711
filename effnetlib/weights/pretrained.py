"""Loads weights from timm, Keras or a run; evaluates and exports them."""

import contextlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effnetlib import data
from effnetlib.data.images import normalize
from effnetlib.data.photographs import WHOLE, WNID
from effnetlib.data.split import shown
from effnetlib.errors import EffnetlibError, require
from effnetlib.evaluation import EvalResult, evaluate
from effnetlib.mesh import batch_sharding, make_mesh
from effnetlib.model import EfficientNet
from effnetlib.runs import checkpoints
from effnetlib.runs.checkpoints import Weights
from effnetlib.runs.files import make_writable, write_atomically
from effnetlib.runs.machine import pinned
from effnetlib.runs.paths import user_path
from effnetlib.runs.progress import say
from effnetlib.runs.record import SCHEMA, Record, environment
from effnetlib.weights import files
from effnetlib.weights.names import skeleton

MODEL = "model.safetensors"


@dataclass(frozen=True)
class Pretrained:
    """Weights, and the network, image size and classes that they belong to.

    Attributes:
      weights: ``(params, batch_stats)`` of `variant` with `num_classes` logits.
      image_size: pixels per side in training; the variant's own if unknown.
      class_names: the class of each logit, in order; empty if unknown.
      origin: "file" and "sha256", or "run", "step" and "recipe_hash"; timm's "tag"; a "note" on what was not checked.
    """

    weights: Weights
    variant: str
    num_classes: int
    image_size: int
    class_names: tuple[str, ...]
    origin: dict

    @classmethod
    def load(cls, path: Path | str, *, best: bool = False) -> "Pretrained":
        """Loads a file (see `effnetlib.weights.files.read`), a folder with a `model.safetensors` (our import's, or Hugging
        Face's), or a run: the moving average of its latest checkpoint, or with `best` that of the highest top-1.

        Raises:
          EffnetlibError: the path holds none of these, or it is damaged.
        """
        path = user_path(path, "the weights")
        if (path / "run.json").is_file():
            record = Record.load(path)
            recipe, names = record.recipe, tuple(record.data.get("class_names", ()))
            step, weights = checkpoints.latest_weights(path, best)
            origin = {"run": record.name, "step": step, "recipe_hash": recipe.hash}
            return cls(weights, recipe.variant, record.data["num_classes"], recipe.resolution, names, origin)
        require(not best, f"{path} is not the folder of a run, and only a run keeps its best checkpoint")
        file = path / MODEL if path.is_dir() else path
        require(file.is_file(), f"{path} is neither a file of weights nor the folder of an import or of a run")
        return cls(**files.read(file))

    def export(self, file: Path | str) -> None:
        """Writes a `.safetensors` file with timm's names. EffnetlibError: the suffix is another, or writing fails."""
        file = user_path(file, "the file")
        require(file.suffix.lower() == ".safetensors", f"{file} does not end in .safetensors")
        try:
            files.write(file, **vars(self))
        except OSError as error:
            raise EffnetlibError(f"{file} cannot be written: {error.strerror}") from None

    def model(self, precision: str = "float32") -> EfficientNet:
        """A model with these weights. Its convolutions compute in `precision`."""
        graphdef, _ = skeleton(self.variant, self.num_classes, precision)
        return nnx.merge(graphdef, *jax.tree.map(jnp.asarray, self.weights))

    def check_classes(self, class_names: Sequence[str], dataset: str) -> None:
        """Compares the classes of a data set with the classes of the logits. Prints a line if the latter are unknown.

        Raises:
          EffnetlibError: the classes or their order differ.
        """
        given, ours = ([unicodedata.normalize("NFC", n) for n in names] for names in (class_names, self.class_names))
        count, numbers = len(given), list(map(str, range(len(class_names))))
        wrong = (
            f"{dataset} has {count:,} classes, and the weights {self.num_classes:,}: take the data of their training"
        )
        require(count == self.num_classes, wrong)
        values = [str(int(name)) if name.isdecimal() else name for name in given]
        if values == numbers:
            return
        wrong = f"{dataset} has numbers out of order for classes ({', '.join(given[:4])}): prepare it again"
        require(sorted(values) != sorted(numbers), wrong)
        hint = "name the class folders as the weights do, or by the numbers from 0"
        for at, (here, there) in enumerate(zip(given, ours, strict=False)):
            order = "; the order differs" if sorted(given) == sorted(ours) else ""
            wrong = f"{dataset} has {shown(here)} for class {at}, and the weights {shown(there)}{order}: {hint}"
            require(here == there, wrong)
        if ours or (count == WHOLE and all(map(WNID.fullmatch, given)) and given == sorted(given)):
            return
        wrong = f"{dataset} begins with {', '.join(map(shown, given[:3]))}, and the weights have ImageNet's classes: "
        hint = "name the class folders by WordNet ID, or by the numbers 0 to 999"
        require(count != WHOLE or not self.origin.get("tag", "").endswith("in1k"), wrong + hint)
        say(f"The weights do not name the classes of {count} logits: the order of {dataset}'s classes is assumed")


def import_weights(file: Path | str, directory: Path | str) -> Pretrained:
    """Reads weights, and writes them to `model.safetensors` in an empty folder.

    Raises:
      EffnetlibError: the file does not hold a variant, or the folder is not empty.
    """
    directory, pretrained = user_path(directory, "the folder", folder=True), Pretrained.load(file)
    make_writable(directory)
    require(not any(directory.iterdir()), f"{directory} is not empty: name another folder, or delete that one")
    pretrained.export(directory / MODEL)
    return pretrained


@pinned()
def predict(
    pretrained: Pretrained, split: data.Split, *, batch: int = 64, augmentation: str = "inception"
) -> tuple[np.ndarray, np.ndarray]:
    """Labels, int32 ``[examples]``, and probabilities, float32 ``[examples, classes]``, of a split.

    Computes in float32 on one device of this process. `augmentation` decides the crop, as in a recipe."""
    pretrained.check_classes(split.class_names, "the data set")
    graphdef, state = nnx.split(pretrained.model())
    probabilities = jax.jit(lambda state, images: jax.nn.softmax(nnx.merge(graphdef, state)(normalize(images))))
    sharding, size = batch_sharding(make_mesh(1, jax.local_devices()[:1])), pretrained.image_size
    batches = data.eval_batches(split, batch=batch, size=size, augmentation=augmentation, sharding=sharding)
    labels, rows = [], []
    with contextlib.closing(batches):
        for arrays in batches:
            mask = np.asarray(arrays["mask"])
            labels.append(np.asarray(arrays["labels"])[mask])
            rows.append(np.asarray(probabilities(state, arrays["images"]))[mask])
    return np.concatenate(labels), np.concatenate(rows)


def evaluate_pretrained(
    pretrained: Pretrained, dataset: str, file: Path | str, *, batch: int = 256, image_size: int | None = None,
    augmentation: str = "inception", precision: str = "float32",
) -> EvalResult:  # fmt: skip
    """Evaluates weights on the "eval" split of a data set. Writes the result, the settings and the data to a JSON file.

    Args:
      dataset: the name of a data set, or a folder with ``val/CLASS/*.jpg``. Its sorted classes are the logits.
      batch: images per step over all devices.
      image_size: pixels per side; the weights' own by default.
      augmentation: decides the crop, as in a recipe. precision: of the convolutions.

    Raises:
      EffnetlibError: the data is missing or has other classes, or the batch does not divide over the devices.
    """
    file, split = user_path(file, "the file"), data.load(dataset, "eval")
    pretrained.check_classes(split.class_names, dataset)
    divides = batch > 0 and batch % jax.device_count() == 0
    require(divides, f"a batch of {batch} does not divide over {jax.device_count()} devices")
    size = image_size or pretrained.image_size
    with pinned() as settings:
        result = evaluate(pretrained.model(precision), split, batch=batch, size=size, augmentation=augmentation)
    fields = {
        "schema": SCHEMA,
        "weights": {"variant": pretrained.variant, "num_classes": pretrained.num_classes, **pretrained.origin},
        "settings": {"image_size": size, "augmentation": augmentation, "precision": precision},
        "data": {"source": dataset, "eval_examples": len(split), "fingerprint": split.fingerprint},
        "environment": environment() | {"settings": settings},
        "result": asdict(result) | {"top1": result.top1, "top5": result.top5, "loss": result.loss},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(fields, indent=2) + "\n")
    return result
