"""LARS, TensorFlow's RMSProp and Nesterov momentum as optax transformations, the loss's weight decay, and the moving average.

Source: section 3.1 of the paper; tensorflow/tpu, models/official/efficientnet/lars_optimizer.py and utils.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class LarsState(NamedTuple):
    """`count`: int32, updates so far. `momentum`: the buffer, shaped as the parameters."""

    count: jax.Array
    momentum: optax.Params


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 1e-5,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
) -> optax.GradientTransformation:
    """Layer-wise adaptive rate scaling, by the reference's rule.

    For a kernel w (rank above one) with gradient g::

        ratio = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)      (1 if |w| or |g| is 0)
        u = lr * ratio * (g + weight_decay * w)

    and for everything of rank one or zero (biases, batch norm's gamma and beta) ``u = lr * g``: the full learning rate
    and no weight decay. The learning rate is inside the momentum buffer: ``m = momentum * m + u``, ``w = w - m``.

    `optax.lars` differs: its ratio takes the norm of the sum ``|g + weight_decay * w|``, and its masks default to every
    parameter. The skip list of the reference (names) is stated here by rank, which survives renaming.

    >>> import jax.numpy as jnp
    >>> optimizer = lars(1.0, weight_decay=0.0, trust_coefficient=0.5)
    >>> w, g = jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0]])          # |w| = 5, |g| = 2, ratio = 1.25
    >>> optimizer.update(g, optimizer.init(w), w)[0].tolist()
    [[-0.0, -2.5]]

    References: You et al., arXiv 1708.03888.
    """

    def init(params):
        return LarsState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("lars needs the parameters: optimizer.update(grads, state, params)")
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def scaled(g, w):
            if w.ndim <= 1:
                return lr * g
            w_norm, g_norm = jnp.linalg.norm(w.ravel()), jnp.linalg.norm(g.ravel())
            divisor = g_norm + weight_decay * w_norm + eps
            usable = (w_norm > 0) & (g_norm > 0)
            ratio = jnp.where(usable, trust_coefficient * w_norm / jnp.where(usable, divisor, 1.0), 1.0)
            return lr * ratio * (g + weight_decay * w)

        buffer = jax.tree.map(lambda m, g, w: momentum * m + scaled(g, w), state.momentum, grads, params)
        return jax.tree.map(jnp.negative, buffer), LarsState(state.count + 1, buffer)

    return optax.GradientTransformation(init, update)


def rmsprop(
    learning_rate: optax.ScalarOrSchedule, *, decay: float = 0.9, momentum: float = 0.9, eps: float = 1e-3
) -> optax.GradientTransformation:
    """RMSProp as TensorFlow 1 has it: the accumulator starts at **one** and epsilon stands **inside** the root::

        ms = decay * ms + (1 - decay) * g^2
        m = momentum * m + lr * g / sqrt(ms + eps)
        w = w - m

    `optax.rmsprop` has the same rule under other defaults; this names the reference's.
    """
    return optax.rmsprop(learning_rate, decay, eps, initial_scale=1.0, eps_in_sqrt=True, momentum=momentum)


def nesterov(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 1e-5, momentum: float = 0.9
) -> optax.GradientTransformation:
    """Nesterov momentum with weight decay on kernels (rank above one) only. It is the plain optimizer beside LARS::

        g = g + weight_decay * w      (kernels)
        m = momentum * m + g
        w = w - lr * (g + momentum * m)

    >>> import jax.numpy as jnp
    >>> optimizer = nesterov(1.0, weight_decay=0.5, momentum=0.5)
    >>> params, grads = [jnp.array([[2.0]]), jnp.array([2.0])], [jnp.array([[1.0]]), jnp.array([1.0])]
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
    >>> [float(update.sum()) for update in updates]                      # of the kernel: 2 + 0.5 * 2; of the bias: 1 + 0.5 * 1
    [-3.0, -1.5]

    References: Nado et al., arXiv 2102.06356, who tune it as hard as LARS.
    """
    kernels = optax.add_decayed_weights(
        weight_decay, mask=lambda params: jax.tree.map(lambda w: jnp.ndim(w) > 1, params)
    )
    return optax.chain(kernels, optax.sgd(learning_rate, momentum, nesterov=True))


# What a recipe's `optimizer` may be, at one learning rate. A new one is a function like those above, and a line here.
OPTIMIZERS = {
    "lars": lambda recipe, lr: lars(
        lr, weight_decay=recipe.lars_weight_decay, momentum=recipe.momentum,
        trust_coefficient=recipe.lars_trust_coefficient, eps=recipe.lars_eps,
    ),
    "rmsprop": lambda recipe, lr: rmsprop(
        lr, decay=recipe.rmsprop_decay, momentum=recipe.momentum, eps=recipe.rmsprop_eps
    ),
    "momentum": lambda recipe, lr: nesterov(
        lr, weight_decay=recipe.momentum_weight_decay, momentum=recipe.momentum
    ),
}  # fmt: skip


def l2_penalty(params) -> jax.Array:
    """``sum(|v|^2 / 2)`` over every parameter but batch norm's gamma and beta (so biases count), a float32 scalar."""

    def term(path, value):
        is_norm = any(getattr(key, "key", None) in ("gamma", "beta") for key in path)
        return 0.0 if is_norm else 0.5 * jnp.sum(jnp.square(value))

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(term, params)))


def ema_decay(step: jax.typing.ArrayLike, decay: float = 0.9999) -> jax.Array:
    """``min(decay, (1 + t) / (10 + t))``, with t the optimizer steps done, this one included (TensorFlow's num_updates).

    >>> float(ema_decay(8))
    0.5
    """
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def ema_update(average, current, step: jax.typing.ArrayLike, decay: float = 0.9999):
    """Moves each leaf of `average` (parameters and batch statistics alike) towards `current` after step `step`."""
    keep = ema_decay(step, decay)
    return jax.tree.map(lambda a, c: a - (1.0 - keep) * (a - c), average, current)
