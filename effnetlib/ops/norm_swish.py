"""Batch norm's scale and shift, then swish, as one function."""

import jax
import jax.numpy as jnp

from effnetlib.ops.platforms import barrier_on, spatial


def plain_norm_swish(x: jax.Array, mean: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """``swish((x - mean) * scale + shift)``, in x's dtype.

    Args:
      x: ``[batch, height, width, C]``.
      mean, scale, shift: float32 ``[batch, 1, 1, C]``, see `GroupedBatchNorm.coefficients`.
    """
    return jax.nn.swish(((x.astype(jnp.float32) - mean) * scale + shift).astype(x.dtype))


# Why another form: on CPU, XLA stores the intermediates that autodiff shares between the passes. So the
# backward pass computes them again from x. On TPUs and GPUs autodiff of the formula moves the least memory.


@jax.custom_vjp
def norm_swish(x: jax.Array, mean: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """`plain_norm_swish`, in the form that suits the platform."""

    def on_cpu(x, *coefficients):
        return swish_and_slope(x, *coefficients)[0].astype(x.dtype)

    return jax.lax.platform_dependent(x, mean, scale, shift, cpu=on_cpu, default=plain_norm_swish)


def _forward(*inputs):
    return norm_swish(*inputs), inputs


def _backward(inputs, dy):
    def on_cpu(x, mean, scale, shift, dy):
        _, slope = swish_and_slope(barrier_on(("cpu",), x), mean, scale, shift)
        return norm_gradients(dy * slope, x, mean, scale)

    def autodiff(*arguments):
        *inputs, dy = arguments
        return jax.vjp(plain_norm_swish, *inputs)[1](dy)

    return jax.lax.platform_dependent(*inputs, dy, cpu=on_cpu, default=autodiff)


norm_swish.defvjp(_forward, _backward)


def swish_and_slope(x, mean, scale, shift):
    """Swish of ``z = (x - mean) * scale + shift`` and its derivative at z, both float32."""
    z = (x.astype(jnp.float32) - mean) * scale + shift
    # sigmoid(z) as a tanh: XLA recomputes a tanh in each fusion, but stores jax.nn.sigmoid.
    sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * z)
    return z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))


def norm_gradients(dz, x, mean, scale):
    """``(dx, dmean, dscale, dshift)`` of ``z = (x - mean) * scale + shift``."""
    # These sums are later summed over the batch. Without the barrier XLA would do that from dz again.
    dshift = jax.lax.optimization_barrier(spatial(jnp.sum, dz))
    # sum(dz * (x - mean)) = sum(dz * x) - mean * dshift. So the array x - mean is never written or read.
    dscale = spatial(jnp.sum, dz * x) - mean * dshift
    return (dz * scale).astype(x.dtype), -scale * dshift, dscale, dshift
