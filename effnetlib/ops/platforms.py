"""What the ops share: the precision of products, and barriers that hold on some platforms only."""

import jax
import jax.numpy as jnp


def precision_of(x: jax.Array) -> jax.lax.Precision:
    """The precision of every product of x: the highest for float32, the default for bfloat16.

    By default a TPU multiplies float32 in bfloat16, and an NVIDIA GPU in TF32. Stating it also means
    that ``JAX_DEFAULT_MATMUL_PRECISION`` changes no result.
    """
    return jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else jax.lax.Precision.DEFAULT


def barrier_on(platforms: tuple[str, ...], x):
    """x, an array or a tuple of arrays, behind an optimization barrier on these platforms only.

    XLA then does not store an intermediate of float32 for several consumers: each computes it again
    from x. The arrays of one tuple also wait for each other.
    """
    return jax.lax.platform_dependent(x, **dict.fromkeys(platforms, jax.lax.optimization_barrier), default=lambda x: x)


def spatial(reduction, x: jax.Array) -> jax.Array:
    """``jnp.sum`` or ``jnp.mean`` over height and width, in float32, as ``[batch, 1, 1, C]``."""
    return reduction(x, (1, 2), keepdims=True, dtype=jnp.float32)
