"""Grouped batch norm: statistics over groups of examples, stated by the recipe and not by the hardware."""

import jax
import jax.numpy as jnp
from flax import nnx

from effnetlib.errors import EffnetlibError


class GroupedBatchNorm(nnx.Module):
    """Batch norm whose statistics are taken inside each of `num_groups` contiguous slices of the global batch.

    For group g of the input viewed as ``[num_groups, batch // num_groups, ..., num_features]``, in float32::

        mean_g = E[x]        var_g = max(E[x^2] - mean_g^2, 0)        (over all axes but the last, biased)
        y = gamma * (x - mean_g) / sqrt(var_g + epsilon) + beta

    The running statistics move by the mean over groups of the group means and of the group variances. The spread
    between group means is *not* added to the variance. This is the reference's DistributedBatchNormalization::

        running = momentum * running + (1 - momentum) * mean_over_groups(statistic)

    The module knows nothing of devices. Under `jax.jit` with the batch sharded over the mesh of
    `effnetlib.mesh.make_mesh`, the compiler emits one reduction over the members of each group, and none where a
    group lies within one device.

    Args:
      num_features: size C of the last axis.
      num_groups: number of groups; divides the batch. Used in training only.
      momentum: share of the old running statistics that is kept per step (0.99 in the reference).
      epsilon: added to the variance (1e-3 in the reference).
      rngs: unused (gamma starts at one, beta at zero); every layer of flax.nnx takes it.

    Calling it with ``x: [batch, ..., C]`` of any float dtype returns float32 of the same shape. With ``train=True``
    the group statistics normalise and the running ones are updated in place. Otherwise the running ones normalise.

    Raises:
      EffnetlibError: the batch does not divide into the groups.

    Source: section 3.4 of the paper; tensorflow/tpu, models/official/efficientnet/utils.py.
    """

    def __init__(self, num_features: int, *, num_groups: int, momentum=0.99, epsilon=1e-3, rngs: nnx.Rngs):
        del rngs
        self.num_groups = num_groups
        self.momentum = momentum
        self.epsilon = epsilon
        self.gamma = nnx.Param(jnp.ones(num_features))
        self.beta = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        grouped = self._grouped(x) if train else x.astype(jnp.float32)
        mean, var = self._statistics(grouped, train)
        return ((grouped - mean) * self._scale(var) + self.beta[...]).reshape(x.shape)

    def coefficients(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The layer as ``(x - mean) * scale + shift``: the three, each ``[batch, 1, ..., C]``, for an op that does more."""
        mean, var = self._statistics(self._grouped(x) if train else x, train)

        def of_example(value):
            groups = value.reshape(-1, 1, value.shape[-1])
            shape = (len(groups), x.shape[0] // len(groups), groups.shape[-1])
            return jnp.broadcast_to(groups, shape).reshape(x.shape[0], *(1,) * (x.ndim - 2), -1)

        return of_example(mean), of_example(self._scale(var)), of_example(self.beta[...])

    def _grouped(self, x):
        batch, *rest = x.shape
        if batch % self.num_groups:
            raise EffnetlibError(f"a batch of {batch} does not divide into {self.num_groups} batch-norm groups")
        return x.astype(jnp.float32).reshape(self.num_groups, batch // self.num_groups, *rest)

    def _scale(self, var):
        return self.gamma[...] * jax.lax.rsqrt(var + self.epsilon)

    def _statistics(self, grouped, train):
        """In training, mean and variance of each group, and the running ones are updated. Else the running ones."""
        if not train:
            return self.mean[...], self.var[...]
        axes = tuple(range(1, grouped.ndim - 1))
        mean = grouped.mean(axes, keepdims=True)
        # One pass over x. Cancellation in float32 can leave a tiny negative number, hence the maximum.
        var = jnp.maximum(jnp.square(grouped).mean(axes, keepdims=True) - jnp.square(mean), 0.0)
        for running, statistic in ((self.mean, mean), (self.var, var)):
            new = jax.lax.stop_gradient(statistic.reshape(self.num_groups, -1).mean(0))
            running[...] = self.momentum * running[...] + (1.0 - self.momentum) * new
        return mean, var
