"""Depthwise convolution: the platform's own convolution, or on CPU a sum of shifted products."""

import functools

import jax
import jax.numpy as jnp


def _convolution(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _same_padding(size, kernel, stride):
    """(before, after, output size) of TensorFlow's SAME padding in one direction."""
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2, out


def _shifted(x, i, j, stride, out_h, out_w):
    return x[:, i : i + (out_h - 1) * stride + 1 : stride, j : j + (out_w - 1) * stride + 1 : stride]


def _shifted_products(x, kernel, stride):
    """``sum_ij shift_ij(x) * kernel[i, j]``."""
    size = kernel.shape[0]
    top, bottom, out_h = _same_padding(x.shape[1], size, stride)
    left, right, out_w = _same_padding(x.shape[2], size, stride)
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    taps = [(i, j) for i in range(size) for j in range(size)]
    return sum(_shifted(x, i, j, stride, out_h, out_w) * kernel[i, j, 0] for i, j in taps)


def _shifted_products_backward(x, kernel, cotangent, stride):
    """Of x: the products of the dilated cotangent with the kernel turned round. Of the kernel: a sum over the image a tap."""
    size = kernel.shape[0]
    _, height, width, _ = x.shape
    top, bottom, out_h = _same_padding(height, size, stride)
    left, right, out_w = _same_padding(width, size, stride)

    def around(before, extent, out):
        low = size - 1 - before
        return low, extent + size - 1 - low - ((out - 1) * stride + 1), stride - 1

    dilated = jax.lax.pad(
        cotangent,
        jnp.zeros([], cotangent.dtype),
        ((0, 0, 0), around(top, height, out_h), around(left, width, out_w), (0, 0, 0)),
    )
    taps = [(i, j) for i in range(size) for j in range(size)]
    of_x = sum(_shifted(dilated, i, j, 1, height, width) * kernel[size - 1 - i, size - 1 - j, 0] for i, j in taps)
    padded = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    span_h, span_w = (out_h - 1) * stride + 1, (out_w - 1) * stride + 1

    # A loop over the taps, not an unrolled sum: fewer reductions to compile, and a nano step 1.8 times as fast. The batch is
    # summed after it, so that devices that share the batch meet once and not at every tap.
    def of_tap(tap):
        window = jax.lax.dynamic_slice(
            padded, (0, tap // size, tap % size, 0), (x.shape[0], span_h, span_w, x.shape[3])
        )
        return (window[:, ::stride, ::stride] * cotangent).sum((1, 2))

    of_kernel = jax.lax.map(of_tap, jnp.arange(size * size)).sum(1)
    return of_x, of_kernel.reshape(kernel.shape).astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves each channel with its own k x k kernel, padding SAME as TensorFlow does.

    On CPU it is written as ``sum_ij shift_ij(x) * kernel[i, j]``: XLA's grouped convolution there is the bottleneck of
    training (about four times slower on a whole B0 step at 32 px). Which form is lowered follows the platform that is
    compiled *for*, so a TPU program compiled on a laptop has the convolution.

    Args:
      x: ``[batch, height, width, C]``.
      kernel: ``[k, k, 1, C]``, same dtype as x.
      stride: 1 or 2, both directions.

    Returns:
      ``[batch, ceil(height / stride), ceil(width / stride), C]``, x's dtype.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_shifted_products, stride=stride),
        default=functools.partial(_convolution, stride=stride),
    )


def _forward(x, kernel, stride):
    return depthwise_conv(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, cotangent):
    # Differentiating through the choice would keep the residuals of both forms, so each platform has its own backward pass.
    def of_convolution(x, kernel, cotangent):
        return jax.vjp(functools.partial(_convolution, stride=stride), x, kernel)[1](cotangent)

    of_products = functools.partial(_shifted_products_backward, stride=stride)
    return jax.lax.platform_dependent(*residuals, cotangent, cpu=of_products, default=of_convolution)


depthwise_conv.defvjp(_forward, _backward)
