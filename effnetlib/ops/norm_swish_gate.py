"""Squeeze-and-excite with the batch norm and the swish before it: one function, for one pass over the activations."""

import jax
import jax.numpy as jnp
from flax import nnx

from effnetlib.ops.depthwise import conv_init, precision_of
from effnetlib.ops.norm_swish import barrier, spatial, swish_and_slope, through_norm


def gate(squeezed, weights):
    """Squeeze-and-excite's two 1x1 convolutions: of the spatial means, the factor of each channel."""
    for (kernel, bias), activation in zip(weights, (jax.nn.swish, jax.nn.sigmoid), strict=True):
        squeezed = activation(jnp.matmul(squeezed, kernel, precision=precision_of(squeezed)) + bias)
    return squeezed


@jax.custom_vjp
def gated_swish(x, mean, scale, shift, weights):
    """``y * gate(spatial mean of y)`` with ``y = swish((x - mean) * scale + shift)``, in x's dtype.

    The backward pass is the chain rule's, with its sums in another order. The gradient of a spatial mean is the same for all
    pixels, so what batch norm's gradients need of it are sums over pixels that the forward pass already knows; the others come
    with the sum that the gate needs. One pass over x and the cotangent makes all of them, where autodiff makes two that wait
    for one another: 8 % of a step's memory traffic on a TPU, by its compiler's count. On CPU, where a sum is a pass of its own
    whatever its order, it is the chain rule as it stands; on an NVIDIA GPU too, where each pass begins with x anew.
    """
    return _gated_swish_forward(x, mean, scale, shift, weights)[0]


def _gated_swish_forward(x, mean, scale, shift, weights):
    y, slope = swish_and_slope(barrier(x, "cuda"), mean, scale, shift)
    factor, gate_vjp = jax.vjp(gate, spatial(jnp.mean, y), weights)

    def sums(x, mean, slope):
        return spatial(jnp.mean, slope), spatial(jnp.mean, slope * (x - mean))

    def none(x, mean, slope):
        return jnp.zeros_like(mean), jnp.zeros_like(mean)

    kept = jax.lax.platform_dependent(x, mean, slope, cpu=none, cuda=none, default=sums)
    x_anew, factor = barrier((x, factor), "cuda")
    y, _ = swish_and_slope(x_anew, mean, scale, shift)
    return y.astype(x.dtype) * factor.astype(x.dtype), (x, mean, scale, shift, factor, gate_vjp, kept)


def _gated_swish_backward(residuals, cotangent):
    x, mean, scale, shift, factor, gate_vjp, kept = residuals
    x_first, cotangent_first = barrier((x, cotangent), "cuda")
    y, _ = swish_and_slope(x_first, mean, scale, shift)
    of_squeezed, of_weights = gate_vjp(spatial(jnp.sum, cotangent_first * y))
    x_anew, of_squeezed = barrier((barrier(x, "cpu"), of_squeezed), "cuda")
    _, slope = swish_and_slope(x_anew, mean, scale, shift)
    of_z = (cotangent * factor + of_squeezed / (x.shape[1] * x.shape[2])) * slope

    def with_sums(x, mean, scale, factor, cotangent, slope, of_z, of_squeezed, kept):
        slope_mean, slope_x_mean = kept
        of_shift = factor * spatial(jnp.sum, cotangent * slope) + of_squeezed * slope_mean
        of_scale = factor * spatial(jnp.sum, cotangent * slope * (x - mean)) + of_squeezed * slope_x_mean
        return (of_z * scale).astype(x.dtype), -scale * of_shift, of_scale, of_shift

    def with_none(x, mean, scale, factor, cotangent, slope, of_z, of_squeezed, kept):
        return through_norm(of_z, x, mean, scale)

    def with_none_written(x, mean, scale, factor, cotangent, slope, of_z, of_squeezed, kept):
        # Two sums and the cotangent of x need it: written once, as narrow as x, it costs less than three times its tanh.
        return through_norm(jax.lax.optimization_barrier(of_z.astype(x.dtype)).astype(of_z.dtype), x, mean, scale)

    arguments = x, mean, scale, factor, cotangent, slope, of_z, of_squeezed, kept
    of_input = jax.lax.platform_dependent(*arguments, cpu=with_none, cuda=with_none_written, default=with_sums)
    return *of_input, of_weights


gated_swish.defvjp(_gated_swish_forward, _gated_swish_backward)


class SqueezeExcite(nnx.Module):
    """Batch norm, swish, and a gate a channel: spatial mean, 1x1 to `reduced`, swish, 1x1 back, sigmoid. Both 1x1 have a bias."""

    def __init__(self, filters, reduced, *, rngs):
        self.reduce = nnx.Linear(filters, reduced, kernel_init=conv_init, rngs=rngs)
        self.expand = nnx.Linear(reduced, filters, kernel_init=conv_init, rngs=rngs)

    def __call__(self, x, mean, scale, shift):
        layers = (self.reduce, self.expand)
        return gated_swish(x, mean, scale, shift, [(layer.kernel[...], layer.bias[...]) for layer in layers])
