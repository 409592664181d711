"""Presets: the names of recipes, and the rules that make their fields."""

import re

from effnetlib.data.sources import KNOWN
from effnetlib.errors import EffnetlibError, did_you_mean
from effnetlib.mesh import nearest_group_size
from effnetlib.model import VARIANTS

# Table 2 of the paper as rules. RMSProp: 0.016 per 256, with exponential decay. LARS, with polynomial decay: a peak of 15.104
# for batches of 16,384 and 32,768, and of 20.736 beyond. The paper has no LARS below 16,384. There our peak falls with the
# square root of the batch: a constant one would be 32 times the paper's per 256 at a batch of 1,024.
_PAPER_VARIANTS = tuple(name for name in VARIANTS if name != "nano")
PAPER_PRESETS = tuple(
    f"{variant}-{rest}"
    for variant, largest in (("b2", ()), ("b5", ("65536-lars",)))
    for rest in ("4096-rmsprop", "8192-rmsprop", "16384-rmsprop", "16384-lars", "32768-lars", *largest)
)

# Small sets: variant, epochs, augmentation and size of each. A digit that is flipped is another sign.
_SMALL_SETS = {
    "digits": ("nano", 10.0, "shift", None),
    "cifar10": ("nano", 30.0, "shift_flip", None),
    "photos": ("nano", 16.0, "inception", 128),
    "imagenette": ("nano", 20.0, "inception", 128),
    "imagenette-b0": ("b0", 20.0, "inception", 128),
}

# One session on a hosted notebook: B0 by the paper's RMSProp rules, with the schedule shortened in proportion. The times are
# predictions (outputs/published/plans, and input.json for the host's images per second).
SESSIONS = {
    # One chip of v5e: about a minute for 2.0 million images. One core of the host augments more than the chip can take.
    "colab": dict(batch=512, epochs=40.0, dataset="cifar10", image_size=64, augmentation="shift_flip"),
    # Eight chips of v5e: 70 minutes for 128 million images, if the host can read 3.5 GB/s. Nobody has measured what Kaggle's
    # mount gives. At an eighth of that the session's nine hours are just enough.
    "kaggle": dict(batch=1024, epochs=100.0, augmentation="inception"),
}
# A session of Kaggle ends after 540 without a warning. Installing, listing photographs and keeping the output take some.
SESSION_MINUTES = {"kaggle": 500.0}


def preset_fields(name: str) -> dict:
    """The fields of the recipe that `Recipe.preset` has under a name.

    Raises:
      EffnetlibError: there is no such preset.
    """
    name = str(name)
    if name in SESSIONS:
        return _session_rules(**SESSIONS[name])
    text = f"{name}-64-rmsprop" if name in _SMALL_SETS else name
    match = re.fullmatch(r"([a-z0-9_-]+)-([1-9]\d*)-(rmsprop|lars|momentum)", text)
    if not match or match[1] not in (*_PAPER_VARIANTS, *_SMALL_SETS):
        small = [f"{base}-64-{optimizer}" for base in _SMALL_SETS for optimizer in ("lars", "rmsprop", "momentum")]
        raise EffnetlibError(f"there is no preset {name!r}: {did_you_mean(name, [*PAPER_PRESETS, *SESSIONS, *small])}")
    base, batch, optimizer = match[1], int(match[2]), match[3]
    return (_paper_rules if base in _PAPER_VARIANTS else _small_rules)(base, batch, optimizer)


def _paper_rules(variant: str, batch: int, optimizer: str) -> dict:
    shared = dict(dataset="imagenet", variant=variant, global_batch_size=batch, optimizer=optimizer)
    if optimizer == "lars":
        # batch_norm_batch_size 128 is the default of the released LARS path; the paper's own setting is unknown.
        largest = batch > 32768
        return shared | dict(
            batch_norm_batch_size=nearest_group_size(batch, 128),
            lr_per_256=(0.081 * 65536 if largest else 0.118 * 32768 * min(1.0, batch / 16384) ** 0.5) / batch,
            decay="polynomial",
            warmup_epochs=43.0 if largest else 50.0,
        )
    if optimizer == "momentum":
        # LARS' schedule and groups, and the linear rule of Goyal et al. (arXiv 1706.02677): 0.1 per 256, to 0.7 % of the peak.
        peak = 0.1 * batch / 256
        return _paper_rules(variant, batch, "lars") | dict(
            optimizer=optimizer, lr_per_256=0.1, end_lr=0.1 * peak / 15.104
        )
    # The released RMSProp path, at the paper's 32 examples per replica. Up to 8 replicas a group is one replica. Else it is an
    # eighth of them, but at least 8.
    replicas = max(1, batch // 32)
    group = batch // replicas * (1 if replicas <= 8 else max(8, replicas // 8))
    return shared | dict(
        batch_norm_batch_size=nearest_group_size(batch, group), lr_per_256=0.016, decay="exponential", warmup_epochs=5.0
    )


def _session_rules(batch: int, epochs: float, **changes) -> dict:
    return _paper_rules("b0", batch, "rmsprop") | dict(epochs=epochs, decay_epochs=2.4 * epochs / 350) | changes


def _small_rules(base: str, batch: int, optimizer: str) -> dict:
    dataset, (variant, epochs, augmentation, image_size) = base.removesuffix("-b0"), _SMALL_SETS[base]
    shared = dict(
        dataset=dataset, variant=variant, image_size=image_size, augmentation=augmentation, global_batch_size=batch,
        batch_norm_batch_size=nearest_group_size(batch, 32), epochs=epochs, warmup_epochs=epochs / 5, optimizer=optimizer,
        eval_every_epochs=max(epochs / 8, batch / KNOWN[dataset].train_examples if dataset in KNOWN else 0.0),
        # Hundreds of steps, not the paper's thousands: 0.99 would leave the running statistics at their start.
        batch_norm_momentum=0.9, drop_path=0.0, precision="float32",
    )  # fmt: skip
    if optimizer == "lars":
        # LARS gives biases, gamma and beta the full learning rate. A run of a few hundred steps does not recover from that. So
        # it is a tenth here, with ten times the trust coefficient: the kernels move as far. As in the paper, the peak is the
        # same for every batch.
        return shared | dict(lr_per_256=0.5 * 256 / batch, lars_trust_coefficient=0.01, decay="polynomial", end_lr=0.0)
    if optimizer == "momentum":
        return shared | dict(lr_per_256=0.2, decay="polynomial", end_lr=0.0)
    # The paper's stairs (2.4 of 350 epochs) end at 1 % of the peak: so short a run would stop moving early. These end at 8 %.
    return shared | dict(lr_per_256=0.032, decay="exponential", decay_epochs=0.012 * epochs)
