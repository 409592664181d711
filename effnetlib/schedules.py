"""Learning-rate schedules of the reference, as `step -> learning rate` functions that run under jit.

Both warm up linearly from **zero**: ``peak_lr * t / warmup_steps`` while ``t < warmup_steps``.
Source: section 3.2 of the paper; tensorflow/tpu, models/official/efficientnet/utils.py, build_learning_rate.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def scaled_lr(lr_per_256: float, global_batch_size: int) -> float:
    """The linear scaling rule: ``lr_per_256 * global_batch_size / 256``."""
    return lr_per_256 * global_batch_size / 256


def _after_warmup(peak_lr: float, warmup_steps: int, decayed: Schedule) -> Schedule:
    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        # The divisor of a schedule without warm-up is never used; 1 only keeps 0 / 0 out of the unselected branch.
        return jnp.where(step < warmup_steps, peak_lr * step / max(warmup_steps, 1), decayed(step))

    return schedule


def warmup_polynomial_decay(
    peak_lr: float, warmup_steps: int, total_steps: int, power: float = 2.0, end_lr: float = 0.1
) -> Schedule:
    """Polynomial decay from the end of warm-up.

    With ``D = total_steps - warmup_steps + 1`` and ``s = clip(t - warmup_steps, 1, D)``::

        lr = (peak_lr - end_lr) * (1 - s / D) ** power + end_lr

    As in the reference, s is 1 both at ``t = warmup_steps`` and one step later, so `peak_lr` itself is never used, and
    the last step (``total_steps - 1``) stays above `end_lr`. That is absolute, and not scaled with the batch.

    >>> schedule = warmup_polynomial_decay(peak_lr=2.0, warmup_steps=2, total_steps=5, power=1.0, end_lr=0.0)
    >>> [float(schedule(t)) for t in range(5)]
    [0.0, 1.0, 1.5, 1.5, 1.0]
    """
    decay_steps = total_steps - warmup_steps + 1

    def decayed(step):
        since = jnp.clip(step - warmup_steps, 1, decay_steps)
        return (peak_lr - end_lr) * (1 - since / decay_steps) ** power + end_lr

    return _after_warmup(peak_lr, warmup_steps, decayed)


def warmup_exponential_decay(peak_lr: float, warmup_steps: int, decay_rate: float, decay_steps: float) -> Schedule:
    """Staircase decay ``peak_lr * decay_rate ** floor(t / decay_steps)``, counted from step 0, not from warm-up's end.

    `decay_steps` is a float, as the reference's 2.4 epochs are.

    >>> schedule = warmup_exponential_decay(peak_lr=8.0, warmup_steps=2, decay_rate=0.5, decay_steps=1.5)
    >>> [float(schedule(t)) for t in range(5)]
    [0.0, 4.0, 4.0, 2.0, 2.0]
    """
    return _after_warmup(peak_lr, warmup_steps, lambda step: peak_lr * decay_rate ** jnp.floor(step / decay_steps))
