"""Recipe: every setting that can change a result, validated at construction."""

import dataclasses
import functools
import hashlib
import json
import math
import typing
from collections.abc import Iterable

from effnetlib.data.images import AUGMENTATIONS
from effnetlib.data.sources import KNOWN, SUBSETS, DataInfo, describe
from effnetlib.errors import EffnetlibError, did_you_mean, require
from effnetlib.mesh import groups_fit, nearest_group_size
from effnetlib.model import VARIANTS
from effnetlib.optim import OPTIMIZERS
from effnetlib.presets import preset_fields
from effnetlib.runs.paths import name_or_path
from effnetlib.schedules import Schedule, scaled_lr, warmup_exponential_decay, warmup_polynomial_decay


def setting(default, help: str, **accepted):
    """A field of a recipe: its default, its meaning with the unit, and what is accepted.

    That is `choices`, or numbers `above`, at `least`, `below` or at `most` a bound. A new setting changes no
    recipe's hash. A changed default would.
    """
    return dataclasses.field(default=default, metadata={"help": help, **accepted})


def check_parameters(names: Iterable[str], known: Iterable[str], sentence: str = "there is no parameter") -> None:
    """Raises EffnetlibError with the nearest known name if a name is unknown."""
    known = list(known)
    if unknown := [name for name in names if name not in known]:
        raise EffnetlibError(f"{sentence} {unknown[0]!r}: {did_you_mean(unknown[0], known)}")


def typed(name: str, value, hint):
    """`value` as the type `hint`, which may be Optional. An integer may stand for a float. Else an EffnetlibError."""
    kinds = typing.get_args(hint) or (hint,)
    if float in kinds and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    require(type(value) in kinds, f"{name} must be {wanted}, and is {value!r} ({type(value).__name__})")
    require(type(value) is not float or math.isfinite(value), f"{name} must be a finite number, and is {value}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, completely. The defaults are the paper's B2 run at batch 32,768 (`b2-32768-lars`).

    Raises EffnetlibError for a value of the wrong type or out of range, or an impossible combination.
    """

    dataset: str = setting("imagenet", "digits, cifar10, imagenet; or photographs or shards: a path, or a cached name")
    subset: str = setting("all", "minival holds 20/1,024 of the training set out, to evaluate on", choices=SUBSETS)
    variant: str = setting("b2", "the network", choices=VARIANTS)
    image_size: int | None = setting(None, "pixels per side; None is the variant's own resolution", above=0)
    # Whether the paper's runs had AutoAugment is not stated; its accuracies are those of the released weights that had.
    augmentation: str = setting(
        "autoaugment",
        "inception: random-resized crop and flip; autoaugment, randaugment: the same, then that; shift_flip, shift: shifts by "
        "up to an eighth. The first three evaluate on the centre crop, the others on the whole image",
        choices=AUGMENTATIONS,
    )
    global_batch_size: int = setting(32768, "training examples per step, over all devices", above=0, below=2**31)
    batch_norm_batch_size: int = setting(128, "examples that share statistics; divides the global batch", above=0)
    # Hundreds of steps: short runs want less than the reference's 0.99.
    batch_norm_momentum: float = setting(0.99, "share of the running statistics kept per step", least=0, below=1)
    epochs: float = setting(350.0, "passes over the training set", above=0)
    eval_every_epochs: float = setting(4.0, "epochs between evaluations; the last step always has one", above=0)
    optimizer: str = setting(
        "lars", "lars, rmsprop with TensorFlow's semantics, or Nesterov momentum", choices=OPTIMIZERS
    )
    lr_per_256: float = setting(0.118, "learning rate for 256 examples; scaled linearly with the global batch", above=0)
    decay: str = setting("polynomial", "how the learning rate falls", choices=("polynomial", "exponential"))
    warmup_epochs: float = setting(50.0, "epochs of linear warm-up from zero", least=0)
    end_lr: float = setting(0.1, "last learning rate of polynomial decay, absolute", least=0)
    decay_power: float = setting(2.0, "power of polynomial decay", above=0)
    decay_rate: float = setting(0.97, "factor per stair of exponential decay", above=0, most=1)
    decay_epochs: float = setting(2.4, "epochs per stair of exponential decay", above=0)
    momentum: float = setting(0.9, "of the optimizer", least=0, below=1)
    rmsprop_decay: float = setting(0.9, "decay of RMSProp's accumulator", least=0, below=1)
    rmsprop_eps: float = setting(1e-3, "epsilon inside RMSProp's root", above=0)
    lars_trust_coefficient: float = setting(1e-3, "LARS' eta", above=0)
    lars_weight_decay: float = setting(1e-5, "weight decay inside LARS, on kernels only", least=0)
    lars_eps: float = setting(0.0, "epsilon in the divisor of LARS' trust ratio", least=0)
    momentum_weight_decay: float = setting(1e-5, "weight decay inside momentum, on kernels only", least=0)
    # The released code has it on under LARS too, where kernels are then decayed twice.
    loss_weight_decay: float = setting(1e-5, "of sum(|v|^2 / 2), all but batch norm's gamma and beta", least=0)
    label_smoothing: float = setting(0.1, "share of the target spread over all classes", least=0, below=1)
    dropout: float | None = setting(None, "rate before the classifier; None is the variant's own", least=0, below=1)
    drop_path: float = setting(0.2, "stochastic depth: block i of N is dropped at drop_path * i / N", least=0, below=1)
    ema_decay: float = setting(0.9999, "upper bound of the moving average's decay", least=0, below=1)
    precision: str = setting("bfloat16", "of convolutions; all else is float32", choices=("bfloat16", "float32"))
    seed: int = setting(0, "of initialisation, order, augmentation, dropout and stochastic depth", least=0, below=2**32)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, typed(field.name, getattr(self, field.name), HINTS[field.name]))
        object.__setattr__(self, "dataset", name_or_path(self.dataset, "dataset"))
        self.validate()

    @classmethod
    def preset(cls, name: str) -> "Recipe":
        """A recipe by name, `BASE-BATCH-OPTIMIZER`, or `colab` or `kaggle`: what fits one session of theirs.

        The base `b0` to `b7` is the paper's Table 2 where that has the row, and follows the same rules elsewhere.
        `digits`, `cifar10`, `imagenette`, `imagenette-b0` and `photos` (photographs cached under that name) are small. Their
        names alone mean `-64-rmsprop`. The optimizer is `rmsprop`, `lars`, or `momentum`, which the paper does not have.
        """
        return cls(**preset_fields(name))

    def replace(self, **changes) -> "Recipe":
        """A copy with some fields changed, validated anew."""
        check_parameters(changes, HINTS, "a recipe has no field")
        return dataclasses.replace(self, **changes)

    @functools.cached_property
    def hash(self) -> str:
        """Twelve hex digits of the SHA-256 of the fields that differ from their defaults, in sorted order.

        It is the same in any process, and whatever settings are added to `Recipe`.
        """
        differ = {field.name: value for field in dataclasses.fields(self)
                  if (value := getattr(self, field.name)) != field.default}  # fmt: skip
        return hashlib.sha256(json.dumps(differ, sort_keys=True).encode()).hexdigest()[:12]

    # Derived values. Those that count examples need the size of the data set. For a folder that is a listing.

    @functools.cached_property
    def data(self) -> DataInfo:
        """Sizes of the data set: training and evaluation examples, classes."""
        return describe(self.dataset, self.subset)

    @property
    def resolution(self) -> int:
        """Pixels per side that the model sees."""
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
        """Training examples / global batch. A fraction, as in the reference: no example is ever dropped."""
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

        Construction calls it without `num_devices`: a recipe belongs to no hardware. `train` calls it with the
        number of devices before it compiles or writes anything.
        """

        for field in dataclasses.fields(self):
            value, of = getattr(self, field.name), field.metadata
            if choices := of.get("choices"):
                require(value in choices, f"{field.name} {value!r} is unknown: {did_you_mean(value, choices)}")
            elif not isinstance(value, str | None):
                inside = of.get("least", value) <= value <= of.get("most", value)
                inside &= of.get("above", -math.inf) < value < of.get("below", math.inf)
                require(inside, f"{field.name} must be {accepted(field)}, and is {value}")
        batch, group = self.global_batch_size, self.batch_norm_batch_size
        wrong = f"global_batch_size {batch} does not divide into batch-norm groups of {group}: the nearest "
        require(batch % group == 0, f"{wrong}batch_norm_batch_size that fits is {nearest_group_size(batch, group)}")
        wrong = f"warmup_epochs {self.warmup_epochs:g} must be shorter than the run of {self.epochs:g} epochs"
        require(self.warmup_epochs < self.epochs, wrong)
        wrong = f"end_lr {self.end_lr:g} is above the peak learning rate {self.peak_lr:g} "
        wrong += f"(lr_per_256 {self.lr_per_256:g} x {batch} / 256)"
        require(self.decay != "polynomial" or self.end_lr <= self.peak_lr, wrong)
        if num_devices is not None:
            wrong = f"global_batch_size {batch} does not divide over {num_devices} devices"
            require(batch % num_devices == 0, f"{wrong}: use a multiple of {num_devices}")
            wrong = f"{self.num_groups} batch-norm groups do not fit {num_devices} devices (one number must divide the "
            nearest = nearest_group_size(batch, group, num_devices)
            require(groups_fit(self.num_groups, num_devices), f"{wrong}other): try batch_norm_batch_size {nearest}")
        if num_devices is not None or self.dataset in KNOWN:  # a folder is not listed before it is used
            wrong = f"eval_every_epochs {self.eval_every_epochs:g} is less than a step: the least is "
            least = 1 / self.steps_per_epoch
            require(self.eval_every_epochs > 0.9999 * least, f"{wrong}{least:.6g}")


def accepted(field: dataclasses.Field) -> str:
    """What is accepted for a setting, in words."""
    words = {"above": "above", "least": "at least", "below": "below", "most": "at most"}
    bounds = [f"{word} {field.metadata[name]:,}" for name, word in words.items() if name in field.metadata]
    return ", ".join(field.metadata.get("choices", ())) or " and ".join(bounds)


HINTS = typing.get_type_hints(Recipe)  # setting -> type
