"""Weights to use: imported from timm or Keras, or out of a run; evaluated on a data set, or exported for others."""

import contextlib
import hashlib
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
from effnetlib.data import Split
from effnetlib.data.images import normalize
from effnetlib.data.photographs import WHOLE, WNID
from effnetlib.errors import EffnetlibError, shown
from effnetlib.evaluation import EvalResult, evaluate
from effnetlib.mesh import batch_sharding, make_mesh
from effnetlib.model import VARIANTS
from effnetlib.runs import checkpoints
from effnetlib.runs.checkpoints import Weights
from effnetlib.runs.files import new_folder, write_atomically
from effnetlib.runs.machine import pinned
from effnetlib.runs.paths import user_path
from effnetlib.runs.progress import say
from effnetlib.runs.record import SCHEMA, Record, environment
from effnetlib.weights import names as weights


@dataclass(frozen=True)
class Pretrained:
    """Weights, and what they belong to.

    Attributes:
      variant: b0 to b7, or nano.
      num_classes: size of the logits.
      image_size: pixels a side that they were trained at, or the variant's own where that is unknown.
      weights: ``(params, batch_stats)``.
      origin: where they come from: "file" and "sha256", or "run", "step" and "recipe_hash"; timm's "tag"; a "note" on what could
        not be checked.
      class_names: of the logits, in their order; empty where that is unknown.
    """

    variant: str
    num_classes: int
    image_size: int
    weights: Weights
    origin: dict
    class_names: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path | str, *, best: bool = False) -> "Pretrained":
        """Reads a file (see `effnetlib.weights.names.read`), a folder that `import_weights` made, or a run's folder, of which it
        takes the moving average in the latest checkpoint, or (`best`) in that of the highest top-1.

        Raises:
          EffnetlibError: there is nothing like that at the path, or it is damaged.
        """
        path = user_path(path, "the weights")
        if best and not (path / "run.json").is_file():
            raise EffnetlibError(f"{path} is no run's folder, and only a run keeps its best checkpoint")
        if path.is_file():
            variant, num_classes, found, known = weights.read(path)
            size, names = known.pop("image_size", VARIANTS[variant].resolution), known.pop("class_names", ())
            origin = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **known}
            return cls(variant, num_classes, size, found, origin, names)
        if (path / "weights.json").is_file():
            try:
                about = json.loads((path / "weights.json").read_text())
                known = {name: about[name] for name in ("variant", "num_classes", "image_size", "origin")}
                known["class_names"] = tuple(about.get("class_names", ()))
            except (ValueError, KeyError, TypeError) as error:
                raise EffnetlibError(f"{path / 'weights.json'} is damaged, or of another version: {error}") from None
            return cls(weights=checkpoints.latest_weights(path)[1], **known)
        if (path / "run.json").is_file():
            record = Record.load(path)
            step, found = checkpoints.latest_weights(path, best)
            origin = {"run": record.name, "step": step, "recipe_hash": record.recipe.hash}
            recipe, names = record.recipe, tuple(record.data.get("class_names", ()))
            return cls(recipe.variant, record.data["num_classes"], recipe.resolution, found, origin, names)
        raise EffnetlibError(f"{path} is neither a file of weights nor the folder of an import or of a run")

    def export(self, file: Path | str) -> None:
        """Writes `.safetensors` under timm's names, with the names of the classes in its metadata.

        Raises:
          EffnetlibError: the suffix is another, or the file cannot be written.
        """
        file = user_path(file, "the file")
        if file.suffix.lower() != ".safetensors":
            raise EffnetlibError(f"{file} does not end in .safetensors")
        known = {"image_size": self.image_size, "class_names": self.class_names}
        known |= {name: self.origin.get(name) for name in ("tag", "note")}
        try:
            weights.write(file, self.weights, self.variant, self.num_classes, **known)
        except OSError as error:
            raise EffnetlibError(f"{file} cannot be written: {error.strerror}") from None

    def check_classes(self, class_names: Sequence[str], dataset: str) -> None:
        """Compares the classes of a data set with those of the logits, and prints a line where nothing says what those are.

        Raises:
          EffnetlibError: they are others, or in another order.
        """
        theirs, ours = ([unicodedata.normalize("NFC", n) for n in names] for names in (class_names, self.class_names))
        if len(theirs) != self.num_classes:
            raise EffnetlibError(
                f"{dataset} has {len(theirs):,} classes, and the weights {self.num_classes:,}: "
                "evaluate them on what they were trained for"
            )
        numbers = [int(name) if name.isdecimal() else -1 for name in theirs]
        numbered = numbers == list(range(len(theirs)))
        if sorted(numbers) == list(range(len(theirs))) and not numbered:
            raise EffnetlibError(
                f"the classes of {dataset} are numbers out of order ({', '.join(theirs[:4])}): prepare it anew"
            )
        if ours and not numbered and theirs != ours:
            at = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
            raise EffnetlibError(
                f"class {at} of {dataset} is {shown(theirs[at])}, and of the weights {shown(ours[at])}"
                + ("; the order is another one" if sorted(theirs) == sorted(ours) else "")
                + ": name the class folders as the weights do, or by their numbers, 0 and so on"
            )
        synsets = len(theirs) == WHOLE and all(map(WNID.fullmatch, theirs)) and theirs == sorted(theirs)
        if ours or numbered or synsets:
            return
        if self.origin.get("tag", "").endswith("in1k") and len(theirs) == WHOLE:
            raise EffnetlibError(
                f"the weights know ImageNet's classes in the order of their WordNet IDs, and {dataset} begins with "
                f"{', '.join(map(shown, theirs[:3]))}: name its class folders by WordNet ID, or by the numbers 0 to 999"
            )
        say(
            f"nothing says which class each of the {len(theirs)} logits means: they are taken in the order of {dataset}'s"
        )


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
        _write_import(pretrained, directory)
    except OSError as error:
        raise EffnetlibError(f"the folder {directory} cannot be written: {error.strerror}") from None
    return pretrained


def _write_import(pretrained: Pretrained, directory: Path) -> None:
    params, batch_stats = pretrained.weights
    about = {name: value for name, value in vars(pretrained).items() if name != "weights"}
    with new_folder(directory) as folder:
        with checkpoints.open_checkpoints(folder) as manager:
            checkpoints.save(manager, 0, {"ema_params": params, "ema_batch_stats": batch_stats})
        write_atomically(folder / "weights.json", json.dumps({"schema": SCHEMA, **about}, indent=2) + "\n")


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
    process. `augmentation` decides the crop, as in a recipe.

    Raises:
      EffnetlibError: the split has other classes than the weights.
    """
    pretrained.check_classes(split.class_names, "the data set")
    model = weights.build(pretrained.weights, pretrained.variant, pretrained.num_classes, dtype=jnp.dtype(precision))
    graphdef, state = nnx.split(model)
    probabilities = jax.jit(lambda state, images: jax.nn.softmax(nnx.merge(graphdef, state)(normalize(images))))
    sharding = batch_sharding(make_mesh(1, jax.local_devices()[:1]))
    batches = data.eval_batches(
        split, batch=batch, size=pretrained.image_size, augmentation=augmentation, sharding=sharding
    )
    labels, found = [], []
    with contextlib.closing(batches):
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
      EffnetlibError: the data is missing, or has other classes than the weights.
    """
    file, split = user_path(file, "the file"), data.load(dataset, "eval")
    pretrained.check_classes(split.class_names, dataset)
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
