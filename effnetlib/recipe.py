"""Recipe: every setting that can change a result, validated at construction."""

import dataclasses
import functools
import hashlib
import json
import math
import typing
from collections.abc import Iterable, Mapping

from effnetlib.data.images import AUGMENTATIONS
from effnetlib.data.sources import KNOWN, SUBSETS, DataInfo, describe
from effnetlib.errors import EffnetlibError, did_you_mean
from effnetlib.mesh import groups_fit, nearest_group_size
from effnetlib.model import VARIANTS
from effnetlib.optim import OPTIMIZERS
from effnetlib.presets import preset_fields
from effnetlib.runs.paths import name_or_path
from effnetlib.schedules import Schedule, scaled_lr, warmup_exponential_decay, warmup_polynomial_decay

CHOICES = {
    "subset": SUBSETS,
    "variant": tuple(VARIANTS),
    "augmentation": AUGMENTATIONS,
    "optimizer": OPTIMIZERS,
    "decay": ("polynomial", "exponential"),
    "precision": ("bfloat16", "float32"),
}


def check_parameters(parameters: Iterable[str], known: Iterable[str]) -> None:
    """Raises EffnetlibError, naming the nearest, if a parameter is not a known one."""
    known = list(known)
    for name in parameters:
        if name not in known:
            raise EffnetlibError(f"there is no parameter {name!r}: {did_you_mean(name, known)}")


def typed(name: str, value, hint):
    """`value` as `hint` says, which is a type or an Optional one; an integer is allowed for a float. Anything else is an
    EffnetlibError that calls it `name`."""
    kinds = typing.get_args(hint) or (hint,)
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds:
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise EffnetlibError(f"{name} must be {wanted}, and is {value!r} ({type(value).__name__})")
    if type(value) is float and not math.isfinite(value):
        raise EffnetlibError(f"{name} must be a finite number, and is {value}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, completely. The defaults are the paper's B2 run at batch 32,768 (`b2-32768-lars`).

    Attributes:
      dataset: digits, cifar10, imagenet, or a folder of photographs or of shards (a path, which is made absolute, or a name
        under the cache folder; see `effnetlib.data`).
      subset: "all", or "minival" (the reference's hold-out: evaluate on 20/1,024 of the training set, train on the rest).
      variant: b0 to b7, or nano.
      image_size: pixels a side; None is the variant's own resolution.
      augmentation: "inception" (random-resized crop and flip; evaluation on the centre crop), "autoaugment" and
        "randaugment" (the same, then AutoAugment v0 or RandAugment 2, 17), "shift_flip" and "shift" (random shift by up to
        an eighth, with or without flip; evaluation on the whole image) or "none". Whether the paper's runs had AutoAugment
        on is not stated; its accuracies (B2 80.1 %, B5 83.5 %) are those of the released weights that had.
      global_batch_size: training examples a step, over all devices.
      batch_norm_batch_size: examples that share batch-norm statistics; divides the global batch.
      batch_norm_momentum: share of the running statistics kept a step. 0.99 is the reference's and needs hundreds of
        steps; runs of few steps want less.
      epochs: passes over the training set (350 in the paper).
      eval_every_epochs: epochs between evaluations; the last step is always evaluated.
      optimizer: "lars" or "rmsprop" (TensorFlow's semantics); the names in `effnetlib.optim.OPTIMIZERS`.
      lr_per_256: learning rate for 256 examples; scaled linearly with the global batch.
      decay: "polynomial" or "exponential".
      warmup_epochs: epochs of linear warm-up from zero.
      end_lr: polynomial decay's last learning rate, absolute (0.1 in the reference).
      decay_power: polynomial decay's power (2 in the reference).
      decay_rate: exponential decay's factor a stair (0.97).
      decay_epochs: exponential decay's epochs a stair (2.4).
      momentum: of either optimizer.
      rmsprop_decay: decay of RMSProp's accumulator.
      rmsprop_eps: epsilon inside RMSProp's root.
      lars_trust_coefficient: LARS's eta.
      lars_weight_decay: weight decay inside LARS, on kernels only.
      lars_eps: epsilon in the divisor of the trust ratio.
      loss_weight_decay: coefficient of ``sum(|v|^2 / 2)`` in the loss, over all but batch norm's gamma and beta. The
        released code has it on under LARS too (kernels are then decayed twice); 0 turns it off.
      label_smoothing: share of the target spread over all classes.
      dropout: rate before the classifier; None is the variant's own.
      drop_path: rate of stochastic depth at the last block.
      ema_decay: upper bound of the moving average's decay, over parameters and batch statistics.
      precision: dtype of the convolutions and of the activations between them, "bfloat16" or "float32"; parameters,
        batch norm, the classifier, the loss and the optimizer are float32.
      seed: of initialisation, order, augmentation, dropout and stochastic depth.

    Raises:
      EffnetlibError: a value of the wrong type or out of range, or an impossible combination.
    """

    dataset: str = "imagenet"
    subset: str = "all"
    variant: str = "b2"
    image_size: int | None = None
    augmentation: str = "autoaugment"
    global_batch_size: int = 32768
    batch_norm_batch_size: int = 128
    batch_norm_momentum: float = 0.99
    epochs: float = 350.0
    eval_every_epochs: float = 4.0
    optimizer: str = "lars"
    lr_per_256: float = 0.118
    decay: str = "polynomial"
    warmup_epochs: float = 50.0
    end_lr: float = 0.1
    decay_power: float = 2.0
    decay_rate: float = 0.97
    decay_epochs: float = 2.4
    momentum: float = 0.9
    rmsprop_decay: float = 0.9
    rmsprop_eps: float = 1e-3
    lars_trust_coefficient: float = 1e-3
    lars_weight_decay: float = 1e-5
    lars_eps: float = 0.0
    loss_weight_decay: float = 1e-5
    label_smoothing: float = 0.1
    dropout: float | None = None
    drop_path: float = 0.2
    ema_decay: float = 0.9999
    precision: str = "bfloat16"
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, typed(field.name, getattr(self, field.name), _HINTS[field.name]))
        object.__setattr__(self, "dataset", name_or_path(self.dataset, "dataset"))
        self.validate()

    @classmethod
    def preset(cls, name: str) -> "Recipe":
        """A recipe by name.

        `b0…b7-BATCH-rmsprop|lars` is the paper's Table 2 where it has that row, and else follows the same rules;
        `digits-`, `cifar10-` and `photos-BATCH-rmsprop|lars` are small ones, and their names alone mean
        `-64-rmsprop`. `photos` is any set of photographs under that name, at 128 pixels.
        `colab` is B0 on CIFAR-10 in ten minutes of one v5e chip, and `kaggle` B0 on ImageNet in a session of eight.
        """
        return cls(**preset_fields(name))

    @classmethod
    def from_parameters(cls, parameters: Mapping) -> "Recipe":
        """The recipe that train.ipynb's parameters state: `preset`, changed by every field that is not None.

        A name that train.ipynb does not have is an EffnetlibError.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        check_parameters(parameters, TRAIN_PARAMETERS)
        if not parameters.get("preset"):
            raise EffnetlibError("the parameter 'preset' is missing")
        changes = {name: parameters[name] for name in names if parameters.get(name) is not None}
        return cls.preset(parameters["preset"]).replace(**changes)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The inverse of `to_json`; unknown fields are an EffnetlibError."""
        return cls().replace(**json.loads(text))

    @classmethod
    def recorded(cls, fields: Mapping, hash: str | None) -> "Recipe":
        """A record's recipe as it stands there, whatever program wrote it: nothing is checked, unknown fields are left out,
        those that are missing have their defaults, and the hash is the one given, if any."""
        recipe = object.__new__(cls)
        vars(recipe).update({field.name: fields.get(field.name, field.default) for field in dataclasses.fields(cls)})
        vars(recipe).update({"hash": hash} if hash else {})
        return recipe

    def to_json(self) -> str:
        """All fields, in order, as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def replace(self, **changes) -> "Recipe":
        """A copy with some fields changed, validated anew."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise EffnetlibError(f"a recipe has no field {name!r}: {did_you_mean(name, names)}")
        return dataclasses.replace(self, **changes)

    @functools.cached_property
    def hash(self) -> str:
        """Twelve hex digits of the SHA-256 of the fields in sorted order: the same in any process. A field that is
        added to `Recipe` changes it."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    # Derived values. Those that count examples read the data set's size: constants for the known sets, a listing for a
    # folder.

    @functools.cached_property
    def data(self) -> DataInfo:
        """Sizes of the data set: training and evaluation examples, classes."""
        return describe(self.dataset, self.subset)

    @property
    def resolution(self) -> int:
        """Pixels a side that the model sees."""
        return self.image_size or VARIANTS[self.variant].resolution

    @property
    def num_groups(self) -> int:
        """Batch-norm groups: `global_batch_size / batch_norm_batch_size`."""
        return self.global_batch_size // self.batch_norm_batch_size

    @property
    def peak_lr(self) -> float:
        """`lr_per_256 * global_batch_size / 256`, the linear scaling rule."""
        return scaled_lr(self.lr_per_256, self.global_batch_size)

    @property
    def steps_per_epoch(self) -> float:
        """Training examples / global batch: a fraction, as in the reference (no example is ever dropped)."""
        return self.data.train_examples / self.global_batch_size

    @property
    def total_steps(self) -> int:
        """`int(epochs * steps_per_epoch)`, at least 1."""
        return max(1, int(self.epochs * self.steps_per_epoch))

    @property
    def warmup_steps(self) -> int:
        """`int(warmup_epochs * steps_per_epoch)`."""
        return int(self.warmup_epochs * self.steps_per_epoch)

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """The steps after which to evaluate: the last one, and every `eval_every_epochs` before it."""
        interval = self.eval_every_epochs * self.steps_per_epoch
        steps = {max(1, int(interval * k)) for k in range(1, int(self.total_steps / interval) + 1)}
        return tuple(sorted(steps | {self.total_steps}))

    @property
    def schedule(self) -> Schedule:
        """The learning rate as a function of the step."""
        if self.decay == "polynomial":
            return warmup_polynomial_decay(
                self.peak_lr, self.warmup_steps, self.total_steps, self.decay_power, self.end_lr
            )
        decay_steps = self.decay_epochs * self.steps_per_epoch
        return warmup_exponential_decay(self.peak_lr, self.warmup_steps, self.decay_rate, decay_steps)

    def validate(self, num_devices: int | None = None) -> None:
        """Raises EffnetlibError, in one sentence, on the first thing that is wrong.

        Construction calls it without `num_devices`, for a recipe belongs to no hardware; `train` calls it with the
        devices that there are, before anything is compiled or written.
        """

        def require(condition, sentence):
            if not condition:
                raise EffnetlibError(sentence)

        for name, choices in CHOICES.items():
            value = getattr(self, name)
            require(value in choices, f"{name} {value!r} is unknown: {did_you_mean(value, choices)}")
        for name in ("global_batch_size", "batch_norm_batch_size", "epochs", "eval_every_epochs", "lr_per_256",
                     "decay_epochs", "decay_power", "rmsprop_eps", "lars_trust_coefficient", "image_size"):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be above 0, and is {value}")
        for name in ("warmup_epochs", "end_lr", "lars_weight_decay", "loss_weight_decay", "lars_eps", "seed"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, and is {getattr(self, name)}")
        for name in ("batch_norm_momentum", "momentum", "rmsprop_decay", "label_smoothing", "dropout", "drop_path",
                     "ema_decay"):  # fmt: skip
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"{name} must be at least 0 and below 1, and is {value}")
        require(0 < self.decay_rate <= 1, f"decay_rate must be above 0 and at most 1, and is {self.decay_rate}")
        require(self.seed < 2**32, f"seed must be below 2**32, and is {self.seed}")
        batch, group = self.global_batch_size, self.batch_norm_batch_size
        require(
            batch % group == 0,
            f"global_batch_size {batch} does not divide into batch-norm groups of {group}: the nearest "
            f"batch_norm_batch_size that fits is {nearest_group_size(batch, group)}",
        )
        require(
            self.warmup_epochs < self.epochs,
            f"warmup_epochs {self.warmup_epochs:g} must be shorter than the run of {self.epochs:g} epochs",
        )
        require(
            self.decay != "polynomial" or self.end_lr <= self.peak_lr,
            f"end_lr {self.end_lr:g} is above the peak learning rate {self.peak_lr:g} "
            f"(lr_per_256 {self.lr_per_256:g} x {batch} / 256)",
        )
        if num_devices is not None:
            require(
                batch % num_devices == 0,
                f"global_batch_size {batch} does not divide over {num_devices} devices: use a multiple of {num_devices}",
            )
            require(
                groups_fit(self.num_groups, num_devices),
                f"{self.num_groups} batch-norm groups do not fit {num_devices} devices (one number must divide the "
                f"other): try batch_norm_batch_size {nearest_group_size(batch, group, num_devices)}",
            )
        if num_devices is not None or self.dataset in KNOWN:  # a folder is not listed before it is used
            least = 1 / self.steps_per_epoch
            require(
                self.eval_every_epochs > 0.9999 * least,
                f"eval_every_epochs {self.eval_every_epochs:g} is less than a step: the least is {least:.6g}",
            )


# What train.ipynb takes: a preset, what is not part of a recipe, and every field of it.
TRAIN_OPTIONS = ("directory", "simulated_devices", "eval_devices", "max_minutes", "coordinator", "processes", "process")
TRAIN_PARAMETERS = ("preset", *TRAIN_OPTIONS, *(field.name for field in dataclasses.fields(Recipe)))

_HINTS = typing.get_type_hints(Recipe)
