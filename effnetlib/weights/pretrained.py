"""Weights to use: imported from timm or Keras, or out of a run; evaluated on a data set, or exported for others."""

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
from effnetlib.errors import EffnetlibError
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
    """Weights, and what they belong to.

    Attributes:
      weights: ``(params, batch_stats)`` of a variant with so many logits.
      image_size: pixels per side that they were trained at, or the variant's own where that is unknown.
      class_names: of the logits, in their order; empty where that is unknown.
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
        """Reads a file (see `effnetlib.weights.files.read`), a folder with a `model.safetensors` (from `import_weights`, or
        Hugging Face), or a run's folder: the moving average in its latest checkpoint, or (`best`) in that of the highest top-1.

        Raises:
          EffnetlibError: there is nothing like that at the path, or it is damaged.
        """
        path = user_path(path, "the weights")
        if (path / "run.json").is_file():
            record = Record.load(path)
            recipe, names = record.recipe, tuple(record.data.get("class_names", ()))
            step, weights = checkpoints.latest_weights(path, best)
            origin = {"run": record.name, "step": step, "recipe_hash": recipe.hash}
            return cls(weights, recipe.variant, record.data["num_classes"], recipe.resolution, names, origin)
        if best:
            raise EffnetlibError(f"{path} is no run's folder, and only a run keeps its best checkpoint")
        file = next((each for each in (path, path / MODEL) if each.is_file()), None)
        if file is None:
            raise EffnetlibError(f"{path} is neither a file of weights nor the folder of an import or of a run")
        return cls(**files.read(file))

    def export(self, file: Path | str) -> None:
        """Writes `.safetensors` under timm's names; an EffnetlibError says where the suffix is another, or nothing can be written."""
        file = user_path(file, "the file")
        if file.suffix.lower() != ".safetensors":
            raise EffnetlibError(f"{file} does not end in .safetensors")
        try:
            files.write(file, **vars(self))
        except OSError as error:
            raise EffnetlibError(f"{file} cannot be written: {error.strerror}") from None

    def model(self, precision: str = "float32") -> EfficientNet:
        """A model with these weights, whose convolutions compute in `precision`. Nothing is initialised first."""
        graphdef, _ = skeleton(self.variant, self.num_classes, precision)
        return nnx.merge(graphdef, *jax.tree.map(jnp.asarray, self.weights))

    def check_classes(self, class_names: Sequence[str], dataset: str) -> None:
        """Compares the classes of a data set with those of the logits, and prints a line where nothing says what those are.

        Raises:
          EffnetlibError: they are others, or in another order.
        """
        theirs, ours = ([unicodedata.normalize("NFC", n) for n in names] for names in (class_names, self.class_names))
        count, numbers = len(theirs), [int(name) if name.isdecimal() else -1 for name in theirs]
        different = [i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]]
        synsets = count == WHOLE and all(map(WNID.fullmatch, theirs)) and theirs == sorted(theirs)
        wrong = None
        if count != self.num_classes:
            wrong = f"has {count:,} classes, and the weights {self.num_classes:,}: take what they were trained for"
        elif numbers != list(range(count)) and sorted(numbers) == list(range(count)):
            wrong = f"has numbers out of order for classes ({', '.join(theirs[:4])}): prepare it anew"
        elif different and numbers != list(range(count)):
            at, order = different[0], "; the order is another one" if sorted(theirs) == sorted(ours) else ""
            wrong = (
                f"has {shown(theirs[at])} for class {at}, and the weights {shown(ours[at])}{order}: "
                "name the class folders as the weights do, or by their numbers, 0 and so on"
            )
        elif ours or synsets or numbers == list(range(count)):
            pass
        elif count == WHOLE and self.origin.get("tag", "").endswith("in1k"):
            wrong = (
                f"begins with {', '.join(map(shown, theirs[:3]))}, and the weights have ImageNet's classes by their WordNet "
                "IDs: name its class folders by WordNet ID, or by the numbers 0 to 999"
            )
        else:
            say(
                f"nothing says what each of the {count} logits means: they are taken in the order of {dataset}'s classes"
            )
        if wrong:
            raise EffnetlibError(f"{dataset} {wrong}")


def import_weights(file: Path | str, directory: Path | str) -> Pretrained:
    """Reads a file of weights and writes it into a folder, as a `model.safetensors` of ours.

    Raises:
      EffnetlibError: the file does not hold a variant, or the folder holds something already.
    """
    directory, pretrained = user_path(directory, "the folder", folder=True), Pretrained.load(file)
    make_writable(directory)
    if any(directory.iterdir()):
        raise EffnetlibError(f"{directory} is not empty: name another folder, or delete that one")
    pretrained.export(directory / MODEL)
    return pretrained


@pinned()
def predict(
    pretrained: Pretrained, split: data.Split, *, batch: int = 64, augmentation: str = "inception"
) -> tuple[np.ndarray, np.ndarray]:
    """Labels, int32 ``[examples]``, and probabilities, float32 ``[examples, classes]``, of a split with the weights' classes, by
    one device of this process in float32. `augmentation` decides the crop, as in a recipe."""
    pretrained.check_classes(split.class_names, "the data set")
    graphdef, state = nnx.split(pretrained.model())
    probabilities = jax.jit(lambda state, images: jax.nn.softmax(nnx.merge(graphdef, state)(normalize(images))))
    here = batch_sharding(make_mesh(1, jax.local_devices()[:1]))
    size, labels, found = pretrained.image_size, [], []
    batches = data.eval_batches(split, batch=batch, size=size, augmentation=augmentation, sharding=here)
    with contextlib.closing(batches):
        for each in batches:
            mask = np.asarray(each["mask"])
            labels.append(np.asarray(each["labels"])[mask])
            found.append(np.asarray(probabilities(state, each["images"]))[mask])
    return np.concatenate(labels), np.concatenate(found)


def evaluate_pretrained(
    pretrained: Pretrained, dataset: str, file: Path | str, *, batch: int = 256, image_size: int | None = None,
    augmentation: str = "inception", precision: str = "float32",
) -> EvalResult:  # fmt: skip
    """Evaluates weights on the "eval" split of a data set, and writes what was counted, and on what, to a JSON file.

    Args:
      dataset: a data set's name, or a folder with ``val/CLASS/*.jpg``; its classes are the logits in sorted order.
      batch: images per step over all devices.
      image_size: pixels per side; None is that of the weights.
      augmentation: decides the crop, as in a recipe. precision: of the convolutions.

    Raises:
      EffnetlibError: the data is missing, or has other classes than the weights.
    """
    file, split = user_path(file, "the file"), data.load(dataset, "eval")
    pretrained.check_classes(split.class_names, dataset)
    if batch < 1 or batch % jax.device_count():
        raise EffnetlibError(f"a batch of {batch} does not divide over {jax.device_count()} devices")
    size = image_size or pretrained.image_size
    with pinned() as settings:
        result = evaluate(pretrained.model(precision), split, batch=batch, size=size, augmentation=augmentation)
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
