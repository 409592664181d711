"""Batch norm's scale and shift, swish, then the gate of squeeze-and-excite, as one function."""

import jax
import jax.numpy as jnp

from effnetlib.ops.norm_swish import norm_gradients, plain_norm_swish, swish_and_slope
from effnetlib.ops.platforms import barrier_on, precision_of, spatial


def gate(squeezed: jax.Array, weights) -> jax.Array:
    """A factor per channel, from the spatial means ``[batch, 1, 1, C]``: two dense layers, with swish and sigmoid.

    Args:
      weights: ``[(kernel [C, R], bias [R]), (kernel [R, C], bias [C])]``, float32.
    """
    for (kernel, bias), activation in zip(weights, (jax.nn.swish, jax.nn.sigmoid), strict=True):
        squeezed = activation(jnp.matmul(squeezed, kernel, precision=precision_of(squeezed)) + bias)
    return squeezed


def plain_norm_swish_gate(x, mean, scale, shift, weights):
    """``y * gate(spatial mean of y)`` with ``y = swish((x - mean) * scale + shift)``, in x's dtype.

    For the arguments see `plain_norm_swish` and `gate`.
    """
    y = plain_norm_swish(x, mean, scale, shift)
    return y * gate(spatial(jnp.mean, y), weights).astype(y.dtype)


# Why other forms: autodiff makes two backward passes over x and dy, and the second waits for the first.
# The gradient of a spatial mean, dsqueezed, is the same for all pixels. So its part in dscale and dshift is
# dsqueezed times a sum that the forward pass can save. On a TPU one pass then makes all sums: 8 % less
# memory traffic per step, by its compiler's count. A CPU makes one pass per sum in any case, and an NVIDIA
# GPU reads x again in each pass. Both use the plain chain rule.


@jax.custom_vjp
def norm_swish_gate(x, mean, scale, shift, weights):
    """`plain_norm_swish_gate`, with the backward pass that suits the platform."""
    return _forward(x, mean, scale, shift, weights)[0]


def _forward(x, mean, scale, shift, weights):
    y, slope = swish_and_slope(barrier_on(("cuda",), x), mean, scale, shift)
    factor, gate_vjp = jax.vjp(gate, spatial(jnp.mean, y), weights)

    def sums(x, mean, slope):
        return spatial(jnp.mean, slope), spatial(jnp.mean, slope * (x - mean))

    def no_sums(x, mean, slope):
        return jnp.zeros_like(mean), jnp.zeros_like(mean)

    saved_sums = jax.lax.platform_dependent(x, mean, slope, cpu=no_sums, cuda=no_sums, default=sums)
    x_again, factor = barrier_on(("cuda",), (x, factor))
    y, _ = swish_and_slope(x_again, mean, scale, shift)
    return y.astype(x.dtype) * factor.astype(x.dtype), (x, mean, scale, shift, factor, gate_vjp, saved_sums)


def _backward(residuals, dy):
    x, mean, scale, shift, factor, gate_vjp, saved_sums = residuals
    x_first, dy_first = barrier_on(("cuda",), (x, dy))
    y, _ = swish_and_slope(x_first, mean, scale, shift)
    dsqueezed, dweights = gate_vjp(spatial(jnp.sum, dy_first * y))
    x_again, dsqueezed = barrier_on(("cuda",), (barrier_on(("cpu",), x), dsqueezed))
    _, slope = swish_and_slope(x_again, mean, scale, shift)
    dz = (dy * factor + dsqueezed / (x.shape[1] * x.shape[2])) * slope

    def with_saved_sums(dz, x, mean, scale):
        slope_mean, slope_x_mean = saved_sums
        dshift = factor * spatial(jnp.sum, dy * slope) + dsqueezed * slope_mean
        dscale = factor * spatial(jnp.sum, dy * slope * (x - mean)) + dsqueezed * slope_x_mean
        return (dz * scale).astype(x.dtype), -scale * dshift, dscale, dshift

    def from_written(dz, x, mean, scale):
        # Two sums and dx need dz. Writing it once in x's dtype costs less than computing its tanh three times.
        return norm_gradients(jax.lax.optimization_barrier(dz.astype(x.dtype)).astype(dz.dtype), x, mean, scale)

    forms = dict(cpu=norm_gradients, cuda=from_written, default=with_saved_sums)
    return *jax.lax.platform_dependent(dz, x, mean, scale, **forms), dweights


norm_swish_gate.defvjp(_forward, _backward)
