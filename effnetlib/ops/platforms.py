"""Helpers of the ops: the precision of products, barriers on some platforms only, spatial sums."""

import jax
import jax.numpy as jnp


def precision_of(x: jax.Array) -> jax.lax.Precision:
    """The precision of products with x: the highest for float32, the default for bfloat16.

    The default for float32 would be bfloat16 on a TPU and TF32 on an NVIDIA GPU. With a stated precision
    ``JAX_DEFAULT_MATMUL_PRECISION`` changes no result.
    """
    return jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else jax.lax.Precision.DEFAULT


def barrier_on(platforms: tuple[str, ...], x):
    """Puts x, an array or a tuple of arrays, behind an optimization barrier on these platforms only.

    Without it XLA stores a float32 intermediate for several consumers. With it each consumer computes the
    intermediate again from x. The arrays of one tuple also wait for each other.
    """
    return jax.lax.platform_dependent(x, **dict.fromkeys(platforms, jax.lax.optimization_barrier), default=lambda x: x)


def spatial(reduction, x: jax.Array) -> jax.Array:
    """``jnp.sum`` or ``jnp.mean`` over height and width, in float32, as ``[batch, 1, 1, C]``."""
    return reduction(x, (1, 2), keepdims=True, dtype=jnp.float32)
