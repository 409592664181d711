"""Learning-rate schedules of the reference, as `step -> learning rate` functions. Numpy computes in float64, so that the
rates are the same on every platform. A jax array gives a jax array, also under jit.

Both warm up linearly from **zero**: ``peak_lr * t / warmup_steps`` while ``t < warmup_steps``.
Source: section 3.2 of the paper; tensorflow/tpu, models/official/efficientnet/utils.py, build_learning_rate.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[jax.typing.ArrayLike], np.ndarray | jax.Array]


def scaled_lr(lr_per_256: float, global_batch_size: int) -> float:
    """The linear scaling rule: ``lr_per_256 * global_batch_size / 256``."""
    return lr_per_256 * global_batch_size / 256


def _after_warmup(peak_lr: float, warmup_steps: int, decayed: Callable) -> Schedule:
    def schedule(step):
        xp = jnp if isinstance(step, jax.Array) else np
        step = xp.asarray(step, jnp.float32 if xp is jnp else np.float64)
        # The divisor of a schedule without warm-up is never used; 1 only keeps 0 / 0 out of the unselected branch.
        return xp.where(step < warmup_steps, peak_lr * step / max(warmup_steps, 1), decayed(xp, step))

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

    def decayed(xp, step):
        since = xp.clip(step - warmup_steps, 1, decay_steps)
        return (peak_lr - end_lr) * (1 - since / decay_steps) ** power + end_lr

    return _after_warmup(peak_lr, warmup_steps, decayed)


def warmup_exponential_decay(peak_lr: float, warmup_steps: int, decay_rate: float, decay_steps: float) -> Schedule:
    """Staircase decay ``peak_lr * decay_rate ** floor(t / decay_steps)``, counted from step 0, not from warm-up's end.

    `decay_steps` is a float, as the reference's 2.4 epochs are.

    >>> schedule = warmup_exponential_decay(peak_lr=8.0, warmup_steps=2, decay_rate=0.5, decay_steps=1.5)
    >>> [float(schedule(t)) for t in range(5)]
    [0.0, 4.0, 4.0, 2.0, 2.0]
    """
    return _after_warmup(peak_lr, warmup_steps, lambda xp, step: peak_lr * decay_rate ** xp.floor(step / decay_steps))
