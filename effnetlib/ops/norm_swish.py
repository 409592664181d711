"""Batch norm's last step and swish as one function, with a backward pass for CPU: few passes over the activations."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def normalized_swish(x: jax.Array, mean: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """``swish((x - mean) * scale + shift)`` of ``[batch, height, width, C]`` and three of ``[batch, 1, 1, C]`` (see
    `GroupedBatchNorm.coefficients`), in x's dtype.

    On TPUs and GPUs autodiff's form has the least memory traffic, by their compilers' count. XLA's for CPU fuses less, and writes
    and keeps what autodiff shares between the passes; there the backward pass begins with x anew, and a step is a tenth faster.
    """

    def cpu_form(x, *coefficients):
        return swish_and_slope(x, *coefficients)[0].astype(x.dtype)

    return jax.lax.platform_dependent(x, mean, scale, shift, cpu=cpu_form, default=_autodiff_form)


def _autodiff_form(x, mean, scale, shift):
    return jax.nn.swish(((x.astype(jnp.float32) - mean) * scale + shift).astype(x.dtype))


def _forward(*inputs):
    return normalized_swish(*inputs), inputs


def _backward(inputs, cotangent):
    def cpu_form(x, mean, scale, shift, cotangent):
        _, slope = swish_and_slope(barrier(x, "cpu"), mean, scale, shift)
        return through_norm(cotangent * slope, x, mean, scale)

    def autodiff(*arguments):
        *inputs, cotangent = arguments
        return jax.vjp(_autodiff_form, *inputs)[1](cotangent)

    return jax.lax.platform_dependent(*inputs, cotangent, cpu=cpu_form, default=autodiff)


normalized_swish.defvjp(_forward, _backward)


def swish_and_slope(x, mean, scale, shift):
    """Swish of ``z = (x - mean) * scale + shift`` and its derivative at z, both float32."""
    z = (x.astype(jnp.float32) - mean) * scale + shift
    # The sigmoid. XLA takes a tanh as cheap enough to be computed in each of the fusions that want it, and jax.nn.sigmoid not.
    sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * z)
    return z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))


def barrier(x, *platforms):
    """x, or a tuple of arrays, beyond which XLA does not look on these platforms. Where several passes over the activations want
    what they are computed from, above all a tanh, each then computes it, and none writes it, in float32, for the others to read.
    What stands in a tuple with another pass's sum comes after that pass."""
    return jax.lax.platform_dependent(x, **dict.fromkeys(platforms, jax.lax.optimization_barrier), default=lambda x: x)


def through_norm(of_z, x, mean, scale):
    """The cotangents of x, mean, scale and shift, from that of ``z = (x - mean) * scale + shift``."""
    # The barrier: XLA would sum over the batch anew, where it sums these over it.
    of_shift = jax.lax.optimization_barrier(spatial(jnp.sum, of_z))
    # Of x and not of x - mean, which would be one more array to write and to read.
    of_scale = spatial(jnp.sum, of_z * x) - mean * of_shift
    return (of_z * scale).astype(x.dtype), -scale * of_shift, of_scale, of_shift


def spatial(reduction, x):
    """``jnp.sum`` or ``jnp.mean`` over height and width, in float32, as ``[batch, 1, 1, C]``."""
    return reduction(x, (1, 2), keepdims=True, dtype=jnp.float32)
